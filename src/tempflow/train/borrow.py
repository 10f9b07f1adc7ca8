"""The untrained model's test, taken over from another run that began alike."""

from __future__ import annotations

from pathlib import Path

import yaml

from tempflow.config import Config, parse_config
from tempflow.train import checkpoint
from tempflow.train.identity import Identity, changed_contents, read_identity, same_contents
from tempflow.train.kept import Looks, restored
from tempflow.train.resume import changed_fields

ALIKE = ("model", "reward", "prompts", "test_prompts", "data.validation", "data.test", "evaluation.", "device")
"""Fields and objects, or beginnings of their names, that the untrained model's test depends on."""

APART = ("evaluation.every", "evaluation.before", "model.training", "model.lora_", "model.reference")
"""Of these, what it does not: a fresh LoRA changes nothing."""


def borrowed(config: Config, own: Identity | None = None) -> Looks:
    """What the untrained model showed in the run in `config.evaluation.before`, from its newest whole checkpoint.

    `own`: what this run depends on; None compares the configuration alone. Raises ValueError, naming what differs,
    where that run was not set alike; CheckpointError where it has no checkpoint.
    """
    folder = Path(config.evaluation.before)
    saved = checkpoint.read_newest(folder)
    was = parse_config(yaml.safe_load(saved.state["config"]))
    theirs = read_identity(saved.state)
    changes = changed_fields(was, config)
    if own is not None and theirs is not None:
        changes = changed_fields(was, config, same_contents(theirs, own)) + changed_contents(theirs, own)
    other = [c for c in changes if c.startswith(ALIKE) and not c.startswith(APART)]
    if other:
        raise ValueError(
            f"evaluation.before: the run in {str(folder)!r} was set otherwise: {'; '.join(other)}; "
            "nearest valid: '', the untrained model is tested anew"
        )
    return restored(saved.state["looks"], saved.tensors["looks"])
