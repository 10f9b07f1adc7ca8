"""Weights that a run starts from, or holds to: another run's best ones, or a LoRA in any form.

A run that trains a LoRA goes on with the LoRA that it is given: its layers, each with its own rank. The scale is the
configuration's (`lora_alpha / lora_rank`); where the file's is another, B takes up the quotient. A run that trains the
whole network merges the LoRA into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempflow.config import load_config
from tempflow.models.lora import Lora, lora_of, paired, parameter_names, ranks_of
from tempflow.models.lora_files import LoraFile, read_lora
from tempflow.train import checkpoint
from tempflow.train.weightsets import Trainable, check_names

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, eq=False)
class Given:
    """What a field names: all weights of a run by parameter name, a run's LoRA, or a LoRA's file. One of the three."""

    field: str
    path: str
    weights: Mapping[str, Tensor] | None = None
    lora: Lora | None = None
    file: LoraFile | None = None

    def lora_for(self, model: Any) -> Lora | None:
        """The LoRA in the names of the model's layers; None where whole weights are given.

        Raises ValueError where it does not fit, or is of a text encoder too, which no run trains or keeps.
        """
        if self.file is None:
            return self.lora
        if not hasattr(model, "fit_lora"):
            raise ValueError(f"{self.field}: {self.path!r} is a LoRA; this model takes none; nearest valid: ''")
        try:
            parts: Mapping[str, Lora] = model.fit_lora(self.file)
        except ValueError as error:
            raise ValueError(f"{self.field}: {error}") from error
        others = [part for part in parts if part != "transformer"]
        if others:
            raise ValueError(
                f"{self.field}: {self.path!r} has {len(parts[others[0]])} layers of {others[0]} too, which a run would "
                "not keep; nearest valid: the file without them, or `model.path` with them merged in"
            )
        return parts["transformer"]


def given(path: str, field: str) -> Given:
    """Reads what `path` names. Raises ValueError, naming `field`, where that is neither a run nor a LoRA."""
    place = Path(path).expanduser()
    try:
        if (place / "model_index.json").is_file():
            raise ValueError(f"{path!r} is a whole pipeline; nearest valid: --model.path {path}")
        if (place / CONFIG_FILE).is_file() or (place / checkpoint.FOLDER).is_dir():
            return _of_run(place, path, field)
        return Given(field, path, file=read_lora(place))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _of_run(run: Path, path: str, field: str) -> Given:
    weights = checkpoint.best_weights(run)
    if not any(".lora_A." in name for name in weights):
        return Given(field, path, weights=weights)
    trained = load_config(run / CONFIG_FILE).model
    return Given(field, path, lora=paired(weights, trained.lora_alpha / trained.lora_rank))


def check_kind(start: Given, training: str) -> None:
    """Raises ValueError for whole weights where a LoRA is trained: that LoRA's file alone would not be the model."""
    if training == "lora" and start.weights is not None:
        raise ValueError(
            f"{start.field}: {start.path!r} trained the whole network, and this run trains a LoRA; "
            f"nearest valid: --model.path {Path(start.path) / 'model'}"
        )


def started(start: Given, trainable: Trainable, base: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """The trained parameters with what is given: `base` is what they are without it, `lora` what `lora_for` gave.

    Raises ValueError, naming the field, where names or shapes do not agree.
    """
    state = dict(base)
    if lora is None:
        state = dict(start.weights or {})
    elif any(".lora_A." in name for name in base):
        state |= _as_lora(start, lora, trainable.network)
    else:
        for layer, factors in lora.items():
            name = f"{layer}.weight"
            if name not in base:
                raise ValueError(f"{start.field}: {layer!r} is no layer that is trained; another base?")
            state[name] = base[name] + factors.dense().to(base[name].device)
    try:
        check_names(trainable, state)
    except ValueError as error:
        raise ValueError(f"{start.field}: {start.path!r}: {error}") from error
    return state


def _as_lora(start: Given, lora: Lora, network: nn.Module) -> dict[str, Tensor]:
    own, told = lora_of(network), ranks_of(lora)
    state: dict[str, Tensor] = {}
    for layer, factors in lora.items():
        if layer not in own or own[layer].rank != told[layer]:
            has = f"rank {own[layer].rank}" if layer in own else "none"
            raise ValueError(
                f"{start.field}: {start.path!r} has a LoRA of rank {told[layer]} on {layer!r}, and what is trained has "
                f"{has} there"
            )
        a, b = parameter_names(layer)
        state[a] = factors.a.float()
        state[b] = (factors.b.double() * (factors.scale / own[layer].scale)).float()
    return state


def summary(start: Given, lora: Lora | None, training: str) -> str:
    """What is done with it, for the run's first lines."""
    if lora is None:
        return f"best weights of {start.path}"
    ranks = " and ".join(map(str, sorted(set(ranks_of(lora).values()))))
    done = "goes on being trained" if training == "lora" else "is merged into the weights"
    return f"the LoRA of {start.path} ({len(lora)} layers, rank {ranks}) {done}"
