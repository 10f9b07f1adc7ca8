"""`tempflow doctor`: what stands between this machine and a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tempflow.cli import fail
from tempflow.doctor.check import Check, by_stage, failed, table, to_json
from tempflow.doctor.libraries import library_checks
from tempflow.folder import check_file, write_json
from tempflow.names import cut

USAGE = """usage: tempflow doctor [RECIPE | config.yaml] [--field value …] [--json FILE]

Checks Python, libraries, devices, dtypes and settings; with a configuration also its model, licences, prompts, output
folder and disk space. Changes nothing. The status is 1 if a check fails. The fields are those of `tempflow train`."""


def doctor_verb(args: Sequence[str]) -> int:
    words, file = _without_json(list(args))
    words, again = _without_json(words)
    if not words[1:] and {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    if file == "":
        return fail("json: no file given; nearest valid: --json doctor.json")
    if file is not None and again is not None:
        both = f"{cut(file)} and {cut(again)}"
        return fail(f"--json: is given twice, {both}; nearest valid: --json {cut(again)} alone")
    if file is not None:
        file = str(Path(file).expanduser())
        check_file(file, "json")
    checks = _checks(words)
    from rich.console import Console

    Console().print(table(checks))
    if file is not None:
        from tempflow.cli.parse import writing

        with writing("json", file):
            write_json(file, to_json(checks), "json")
    return 1 if failed(checks) else 0


def _checks(words: Sequence[str]) -> list[Check]:
    if find_spec("torch") is None:  # nothing else can be looked at, not even a configuration
        return library_checks()
    from tempflow.doctor.machine import machine_checks

    if not words:
        return [*library_checks(), *machine_checks(_device("auto"), None, None)]
    from tempflow.cli.parse import configured, runs_of
    from tempflow.doctor.run import draft_checks, needed_extras, run_checks
    from tempflow.models import resolved_dtype
    from tempflow.rewards import notes

    config, known = configured("doctor", words), notes()
    needs, drafts = dict[str, list[str]](), list[list[Check]]()
    machine: dict[tuple[str, str, int | None], list[Check]] = {}  # it measures, so once for what is alike
    for _, run in runs_of(config):
        device = _device(run.device)
        for extra, users in needed_extras(run, known, device).items():
            needs[extra] = list(dict.fromkeys([*needs.get(extra, []), *users]))
        settings = (device, resolved_dtype(run.model.dtype, device), run.threads)
        machine[settings] = machine.get(settings) or machine_checks(*settings)
        drafts.append(draft_checks(run, device))
    looked = [check for checks in machine.values() for check in checks]
    return [
        *library_checks(needs),
        *dict.fromkeys(looked),
        *by_stage(drafts),
        *run_checks(config, known, os.environ),
    ]


def _device(name: str) -> str:
    """As a run resolves it."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _without_json(words: list[str]) -> tuple[list[str], str | None]:
    """The words without `--json FILE`, and the file: None where the flag is not there, "" where it names none."""
    for place, word in enumerate(words):
        if word.startswith("--json="):
            return words[:place] + words[place + 1 :], word.removeprefix("--json=")
        if word == "--json":
            return words[:place] + words[place + 2 :], words[place + 1] if place + 1 < len(words) else ""
    return words, None
