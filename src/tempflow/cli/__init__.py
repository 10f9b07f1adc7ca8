"""The command line. `tempflow` alone imports next to nothing; a verb imports what it needs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from tempflow.cli.parse import fail
from tempflow.train.interrupt import let_go

USAGE = """usage: tempflow VERB …

Reinforcement learning for flow-matching image generators.

  train [RECIPE | config.yaml] [--field value …]   train, by default the recipe `demo`
  train --resume RUN [--allow-changes]             go on with a run from its newest whole checkpoint
  cost [RECIPE | config.yaml] [--field value …]    what that would take: forwards, decodes, reward calls, memory
  sample [PATH] --prompt TEXT …                    draw pictures
  eval [WHAT] [--base MODEL] [--gold NAME …]       score a model, a run or a LoRA on fixed prompts and noise
  report RUN [RUN …] [--out page.html]             one page about a run, or several side by side
  export RUN --to FOLDER [--form merged]           a run's weights as a folder for diffusers
  doctor [RECIPE | config.yaml] [--field value …]  what stands between this machine and a run
  algorithms | models | rewards | recipes          what there is

`tempflow VERB --help` lists a verb's fields. TEMPFLOW_TRACEBACK=1 shows where an error came from."""

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
    "report": "report",
    "export": "export",
    "doctor": "doctor",
}
"""Verb → the file here whose function VERB_verb runs it."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status: 0, 1 when a guard stopped a run, 2 for bad input, 128 + the number of the
    signal that ended it (130 after Ctrl-C, 143 after SIGTERM, 129 where the terminal went)."""
    try:
        return _main(args)
    finally:
        for stream in (sys.stdout, sys.stderr):
            let_go(stream)


def _main(args: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    verb = words[0]
    if verb not in VERBS:
        close = get_close_matches(verb, list(VERBS), n=1, cutoff=0.0)[0]
        return fail(f"{verb!r} is no verb; nearest valid: {close!r}. `tempflow --help` lists them")
    try:
        return _verb(verb)(words[1:])
    except SystemExit as stop:  # tyro's, after it printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; nothing is left to tell it
        return 0
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        return fail(str(error) or type(error).__name__)


def _verb(name: str) -> Callable[[Sequence[str]], int]:
    return vars(importlib.import_module(f"tempflow.cli.{VERBS[name]}"))[f"{name}_verb"]
