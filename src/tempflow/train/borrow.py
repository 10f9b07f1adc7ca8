"""The untrained model's test, taken over from another run that began alike."""

from __future__ import annotations

from pathlib import Path

import yaml

from tempflow.config import Config, parse_config
from tempflow.train import checkpoint
from tempflow.train.kept import Looks, restored
from tempflow.train.resume import changed_fields

ALIKE = ("model.", "rewards", "data.validation", "data.test", "evaluation.", "device")
"""Fields, or beginnings of their names, that the untrained model's test depends on."""

APART = ("evaluation.every", "evaluation.before", "model.training", "model.lora_", "model.reference")
"""Of these, what it does not: a fresh LoRA changes nothing."""


def borrowed(config: Config) -> Looks:
    """What the untrained model showed in the run in `config.evaluation.before`, from its newest whole checkpoint.

    Raises ValueError, naming the fields, where that run was not set alike; CheckpointError where it has no checkpoint.
    """
    folder = Path(config.evaluation.before)
    saved = checkpoint.read_newest(folder)
    was = parse_config(yaml.safe_load(saved.state["config"]))
    other = [c for c in changed_fields(was, config) if c.startswith(ALIKE) and not c.startswith(APART)]
    if other:
        raise ValueError(
            f"evaluation.before: the run in {str(folder)!r} was set otherwise: {'; '.join(other)}; "
            "nearest valid: '', the untrained model is tested anew"
        )
    return restored(saved.state["looks"], saved.tensors["looks"])
