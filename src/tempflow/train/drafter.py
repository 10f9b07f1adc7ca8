"""The network that drafts: a low-precision copy of the weights that sample, made to follow them before each rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tempflow.algorithms.base import Algorithm
from tempflow.models.precision import CheapCopy, cheap_copy, check_precision
from tempflow.models.protocol import Model
from tempflow.train.weightsets import Trainable, WeightSet


@dataclass(frozen=True, eq=False)
class Drafter:
    """`copy` holds the weights that `source` had when `fresh` was last called; nothing of it is trained or kept.

    network: the policy's, whose untrained weights the copy shares in value.
    """

    copy: CheapCopy
    network: nn.Module
    source: Trainable | WeightSet

    @staticmethod
    def of(algorithm: Algorithm, model: Model, trainable: Trainable, sets: Mapping[str, WeightSet]) -> Drafter | None:
        """None where nothing is drafted, or by the sampler itself.

        sets: by name, the sampler's among them unless that is the policy. Raises ValueError for a device without that
        precision or a network that has no use for it; ImportError where torchao is missing.
        """
        draft = algorithm.draft
        if draft is None or draft.precision == "full":
            return None
        source = trainable if algorithm.sampler == "policy" else sets[algorithm.sampler]
        copy = cheap_copy(model.network, model.blocks(model.network), draft.precision)
        return Drafter(copy, model.network, source)

    def fresh(self) -> nn.Module:
        """The copy, with the source's weights as they are now."""
        self.copy.refresh(self.network, self.source.named())
        return self.copy


def check_draft(algorithm: Algorithm, device: torch.device, sharded: bool) -> None:
    """Before a model is loaded. Raises ValueError for a precision that `device` or a sharded network cannot have,
    ImportError where torchao is missing."""
    if algorithm.draft is None or algorithm.draft.precision == "full":
        return
    if sharded:
        raise ValueError(
            f"draft_precision: {algorithm.draft.precision!r} copies the network in one piece, and parallel.mode 'fsdp' "
            "has it in parts; nearest valid: 'full', or parallel.mode 'ddp'"
        )
    check_precision(algorithm.draft.precision, device)
