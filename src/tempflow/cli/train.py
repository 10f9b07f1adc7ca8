"""`tempflow train` and `tempflow cost`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tempflow.cli import TRACEBACK
from tempflow.cli.parse import configured, fail
from tempflow.strict import ConfigError

if TYPE_CHECKING:
    from tempflow.config import Config


def train_verb(args: Sequence[str]) -> int:
    """Trains, or goes on with a run: `--resume RUN`, with `--allow-changes` where its configuration may differ."""
    rest = list(args)
    run = _taken(rest, "--resume")
    allow = "--allow-changes" in rest
    if allow:
        rest.remove("--allow-changes")
    if allow and run is None:
        return fail("--allow-changes: nothing is resumed; nearest valid: --resume RUN --allow-changes")
    if run is not None and (not rest or rest[0].startswith("-")):
        rest = [str(Path(run) / "config.yaml"), *rest]
    config = configured("train", rest)
    if run is not None:
        config = config.replace(output=run)
    _check_prompts(config)
    from tempflow.train.guards import GuardError
    from tempflow.train.interrupt import Interrupted
    from tempflow.train.loop import train

    try:
        train(config, resume=run is not None, allow_changes=allow)
    except GuardError as error:
        return fail(str(error), 1)
    except Interrupted as stop:
        return int(str(stop.code))
    except RuntimeError as error:  # as torch says that memory is short
        if os.environ.get(TRACEBACK):
            raise
        return fail(f"{type(error).__name__}: {error}", 1)
    return 0


def _taken(args: list[str], flag: str) -> str | None:
    """The value of `flag`, which is taken out of `args` with it; None where it is not given.

    Raises ConfigError for a flag without a value.
    """
    for place, word in enumerate(args):
        if word.startswith(f"{flag}="):
            return args.pop(place).partition("=")[2]
        if word == flag:
            if place + 1 == len(args):
                raise ConfigError(f"{flag}: the run's folder is missing; nearest valid: {flag} runs/demo")
            return args.pop(place) and args.pop(place)
    return None


def _check_prompts(config: Config) -> None:
    """Raises ConfigError, naming the field, for a prompt file that is missing or broken."""
    from tempflow.data.prompts import load_prompts

    for field in ("train", "validation", "test"):
        try:
            load_prompts(dict(config.data)[field])
        except ValueError as error:
            raise ConfigError(f"data.{field}: {error}") from error


def cost_verb(args: Sequence[str]) -> int:
    config = configured("cost", args)
    from rich.console import Console

    from tempflow.cost import run_cost

    Console().print(run_cost(config).table())
    return 0
