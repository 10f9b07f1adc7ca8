"""The command line. `tempflow` alone imports next to nothing; a verb imports what it needs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from tempflow.train.display import let_go

USAGE = """usage: tempflow VERB …

Reinforcement learning for flow-matching image generators.

  train [RECIPE | config.yaml] [--field value …]   train, by default the recipe `demo`
  train --resume RUN [--allow-changes]             go on with a run from its newest whole checkpoint
  cost [RECIPE | config.yaml] [--field value …]    what that would take: forwards, decodes, reward calls, memory
  cost … --measure                                 and how long, from ten seconds of measurement on this machine
  cost … --find-rows FILE.yaml                     the largest rows that fit here, written into a configuration
  sample [PATH] --prompt TEXT …                    draw pictures
  eval [WHAT] [--base MODEL] [--gold NAME …]       score a model, a run or a LoRA on fixed prompts and noise
  suite NAME [WHAT] --prompts FILE …               GenEval, UniGenBench and others, of a model or a folder of pictures
  serve-reward NAME | --function FILE.py:NAME      a reward over HTTP, for runs elsewhere (docs/reward_server.md)
  report RUN [RUN …] [--output page.html]          one page about a run, or several side by side
  export RUN --output FOLDER [--form merged]       a run's weights as a folder for diffusers
  doctor [RECIPE | config.yaml] [--field value …]  what stands between this machine and a run
  check-reward NAME [--pictures FILE]              what a reward does, before a run leans on it
  algorithms | models | rewards | recipes          what there is

A configuration may have stages, runs one after the other (docs/stages.md).
`tempflow VERB --help` lists a verb's options, `tempflow train RECIPE --help` that recipe's. `tempflow --version` says
which version this is. --traceback, or TEMPFLOW_TRACEBACK=1, shows where an error came from."""

TRACEBACK = "TEMPFLOW_TRACEBACK"

VERBS = {
    "train": "train",
    "cost": "train",
    "sample": "draw",
    "eval": "judge",
    "algorithms": "lists",
    "models": "lists",
    "rewards": "lists",
    "recipes": "lists",
    "suite": "suite",
    "serve-reward": "serve",
    "report": "report",
    "export": "export",
    "doctor": "doctor",
    "check-reward": "check_reward",
}
"""Verb → the file here whose function VERB_verb runs it ("_" for "-")."""

EXHAUSTED = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENOMEM", "EMFILE", "ENFILE")
"""What the machine is short of, or broken, whatever the input."""

LINE = 600
"""Characters of a line on the error stream."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status: 0, 1 where a run or the machine failed, 2 for bad input, 128 + the number
    of the signal that ended it (130 after Ctrl-C, 143 after SIGTERM, 129 where the terminal went).

    Whatever happens is told in a line, but where a traceback is asked for: then it is raised.
    """
    try:
        return _main(args)
    finally:
        for stream in (sys.stdout, sys.stderr):
            let_go(stream)


def _main(args: Sequence[str] | None) -> int:
    _open_streams()
    words = list(sys.argv[1:] if args is None else args)
    asked = "--traceback" in words or bool(os.environ.get(TRACEBACK))
    try:
        status = _run([word for word in words if word != "--traceback"])
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # help was printed
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; nothing is left to tell it
        return 0
    except BaseException as error:
        if asked:
            raise
        return _told(error)


def fail(message: str, status: int = 2) -> int:
    """Tells what is wrong, a line a fault, none longer than a few lines of a screen; returns the status."""
    import re

    from tempflow.names import PATH, cut

    for line in message.splitlines() or [""]:
        short = re.sub(rf"\S{{{PATH},}}", lambda word: cut(word[0], PATH), line)
        print(f"tempflow: {cut(short, LINE - 11)}", file=sys.stderr)
    return status


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"tempflow {version('tempflow')}")
        return 0
    if words[0] not in VERBS:
        from tempflow.names import cut, nearest

        close = nearest(words[0].strip("-"), VERBS)
        what = "is no verb, and the verb comes first" if words[0].startswith("-") else "is no verb"
        return fail(f"{cut(words[0])!r} {what}; nearest valid: {close}. `tempflow --help` lists them")
    return _verb(words[0])(words[1:])


def _verb(name: str) -> Callable[[Sequence[str]], int]:
    import importlib

    return vars(importlib.import_module(f"tempflow.cli.{VERBS[name]}"))[f"{name.replace('-', '_')}_verb"]


def _told(error: BaseException) -> int:
    """The line about an exception. Bad input is a ValueError or ImportError; other kinds come from the machine or from
    a mistake of ours, whose traceback goes into a file."""
    if isinstance(error, OSError):
        let_go(sys.stdout)  # it may be what cannot be written
        file = f"{error.filename}: " if error.filename else ""
        text = f"{file}{error.strerror or error}".replace("\n", " ")
        return fail(text, 1 if errno.errorcode.get(error.errno or 0) in EXHAUSTED else 2)
    text = str(error) or type(error).__name__
    if isinstance(error, ValueError | ImportError):
        from tempflow.strict import ConfigError

        return fail(text if isinstance(error, ConfigError) else " ".join(text.split()))
    if type(error).__module__.startswith("tempflow."):  # an exception of ours says it all
        return fail(" ".join(text.split()), 1)
    where = _kept_traceback(error)
    return fail(f"{type(error).__name__}: {' '.join(text.split())[: LINE // 2]} ({where})", 1)


def _kept_traceback(error: BaseException) -> str:
    """Where an exception's traceback can be read."""
    import tempfile
    import traceback

    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tempflow-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.writelines(traceback.format_exception(error))
        return f"traceback in {file.name}"
    except OSError:
        return f"{TRACEBACK}=1 shows the traceback"


def _open_streams() -> None:
    """Closed streams swallow what is written; what an encoding lacks is written as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 (for the process)
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
