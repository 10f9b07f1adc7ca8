"""The weight sets that follow the policy over a run: old, averages; what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.train.checkpoint import POLICY
from tempflow.train.weightsets import Trainable, WeightSet

PREFIX = f"{POLICY}/set."
"""Of their files' names in a checkpoint."""


@dataclass(frozen=True)
class Followers:
    """By name."""

    sets: Mapping[str, WeightSet] = field(default_factory=dict[str, WeightSet])

    @staticmethod
    def of(algorithm: Algorithm, trainable: Trainable) -> Followers:
        """Those that the algorithm asks for, holding the policy as it is now."""
        rules = {name: algorithm.rule(name) for name in algorithm.sets}
        return Followers({name: WeightSet(trainable, rule) for name, rule in rules.items() if rule.moves})

    def update(self) -> None:
        """After an iteration's updates."""
        for weights in self.sets.values():
            weights.update()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """A checkpoint's tensors by file: the sets' own, no copies."""
        return {PREFIX + name: weights.named() for name, weights in self.sets.items()}

    def updates(self) -> dict[str, int]:
        """How often each has followed, for the checkpoint's JSON."""
        return {name: weights.updates for name, weights in self.sets.items()}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], updates: Mapping[str, int]) -> None:
        """Puts back what `tensors` and `updates` gave."""
        for name, weights in self.sets.items():
            weights.load(tensors[PREFIX + name], updates[name])
