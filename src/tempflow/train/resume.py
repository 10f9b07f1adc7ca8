"""Whether a run can be gone on with, and from where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tempflow.config import Config, load_config, parse_config
from tempflow.train import checkpoint

FREE = ("output",)
"""Fields that may differ: the folder may have been moved."""


def resumable(folder: Path, config: Config, allow_changes: bool, say: Callable[[str], None]) -> checkpoint.Saved | None:
    """The newest whole checkpoint of the run in `folder`; None when it died before the first.

    Raises CheckpointError when the folder holds no run or all its checkpoints are damaged, and ValueError, naming the
    fields, when the configuration is not the checkpoint's own (that of config.yaml, where there is no checkpoint) and
    changes are not allowed.
    """
    file, root, saved = folder / "config.yaml", folder / checkpoint.FOLDER, None
    if not file.is_file() or (root.is_dir() and any(p.name.isdigit() for p in root.iterdir())):
        saved = checkpoint.read_newest(folder, say)
    was = load_config(file) if saved is None else parse_config(yaml.safe_load(saved.state["config"]))
    changes = changed_fields(was, config)
    if changes and not allow_changes:
        raise ValueError(
            "the configuration is not the run's own: "
            + "; ".join(changes)
            + ". Take back the changes, or allow them: --allow-changes"
        )
    for change in changes:
        say(f"changed on resuming: {change}")
    if saved is None:
        say(f"{folder} has no checkpoint yet: the run starts from the beginning")
    else:
        say(f"going on from {saved.path}")
    return saved


def changed_fields(was: Config, now: Config) -> list[str]:
    """ "field: a → b" for each leaf that differs, FREE ones apart."""
    old, new = _flat(was.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in FREE]
    return [f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in names]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
