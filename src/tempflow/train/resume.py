"""Whether a run can be gone on with, and from where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tempflow.config import Config, load_config, parse_config
from tempflow.folder import MARKER, check, contents, foreign, kind_of
from tempflow.train import checkpoint
from tempflow.train.identity import Identity, changed_contents, check_given, go_on, read_identity, same_contents

FREE = ("output",)
"""Fields that may differ: the folder may have been moved."""

RUN = "run"
"""What a run's folder is marked as."""

LOCK = ".lock"
"""Held while a run goes on; the system lets go of it when the process ends, however it ends."""


def check_new(folder: Path, write: bool = True) -> None:
    """Raises ValueError unless a new run may take the folder. `write`: whether this rank is the one that will."""
    if not write:
        return
    begun = kind_of(folder) == RUN and [name for name in contents(folder) if name != LOCK]
    if begun or (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"output: {str(folder)!r} already holds a run; choose another folder, remove it, or go on with it: "
            f"{go_on(folder, read_identity(folder))}"
        )
    check(folder, RUN)


def check_resumable(folder: Path, config: Config, given: Sequence[str]) -> None:
    """What can be told without work.

    Raises CheckpointError where there is no run; ValueError where the folder is not a run's own, where the run would
    write over its own model, and where it was given objects in Python that are not `given` now.
    """
    if not (folder / "config.yaml").is_file() and not (folder / checkpoint.FOLDER).is_dir():
        checkpoint.newest(folder)  # no run at all: raises, naming what is there
    if kind_of(folder) != RUN:
        raise ValueError(
            f"resume: {str(folder)!r} has no {MARKER} of a run, so nothing is written there; nearest valid: a folder "
            "that `tempflow train` made (of a copied run, copy that file too)"
        )
    fault = foreign(folder / "model")
    if fault is not None:
        raise ValueError(
            f"resume: {str(folder / fault)!r} was not written by this run, which writes model/ anew; move it away"
        )
    own, path = folder.resolve(), Path(config.model.path).expanduser()
    if config.model.path != "shapes" and path.exists() and path.resolve().is_relative_to(own):
        raise ValueError(f"model.path: {config.model.path!r} lies in the run's own folder, which it would write over")
    was = read_identity(folder)
    if was is not None:
        check_given(folder, was, given)


def resumable(
    folder: Path, config: Config, now: Identity, allow_changes: bool, say: Callable[[str], None]
) -> checkpoint.Saved | None:
    """The newest whole checkpoint of the run in `folder`; None when it died before the first.

    now   what the run depends on as it is called this time

    Raises CheckpointError when the folder holds no run or all its checkpoints are damaged, and ValueError, naming all
    that differs, when configuration, contents or objects are not the checkpoint's own (those of config.yaml and
    identity.json, where there is no checkpoint) and changes are not allowed.
    """
    file, root, saved = folder / "config.yaml", folder / checkpoint.FOLDER, None
    if not file.is_file() or (root.is_dir() and any(p.name.isdigit() for p in root.iterdir())):
        saved = checkpoint.read_newest(folder, say)
    config_was = load_config(file) if saved is None else parse_config(yaml.safe_load(saved.state["config"]))
    was = read_identity(folder) if saved is None else read_identity(saved.state)
    free, changes = FREE, list[str]()
    if was is not None:
        check_given(folder, was, now.objects)
        free, changes = (*FREE, *same_contents(was, now)), changed_contents(was, now)
    changes = changed_fields(config_was, config, free) + changes
    if changes and not allow_changes:
        raise ValueError(
            "the configuration is not the run's own: "
            + "; ".join(changes)
            + ". Take back the changes, or allow them: --allow-changes (in Python: allow_changes=True)"
        )
    for change in changes:
        say(f"changed on resuming: {change}")
    if saved is None:
        say(f"{folder} has no checkpoint yet: the run starts from the beginning")
    else:
        say(f"going on from {saved.path}")
    return saved


def changed_fields(was: Config, now: Config, free: Sequence[str] = FREE) -> list[str]:
    """ "field: a → b" for each leaf that differs, those in `free` apart."""
    old, new = _flat(was.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in free]
    return [f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
