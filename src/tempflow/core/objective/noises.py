"""Starting noises as a loss sees them: what a few-step generator is unrolled from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, StateLayout
from tempflow.core.times import Id


@dataclass(frozen=True, eq=False)
class NoiseBatch:
    """B states to start from.

    x         [B, *S], the states at the grid's first σ
    rows      LongTensor[B], what `predict` finds the condition by
    ids       B distinct identities (iteration, update, prompt slot, number): what else is drawn for a row (`core.rng`)
              is a function of the seed and of its id, whatever the batch and the rank
    seed      the run's
    schedule  the grid to walk
    layout    of the B states

    Raises ValueError where the parts are not of one size.
    """

    x: Tensor
    rows: Tensor
    ids: tuple[Id, ...]
    seed: int
    schedule: Schedule
    layout: StateLayout = WHOLE

    def __post_init__(self) -> None:
        size = (len(self.x),)
        if self.rows.shape != size or len(self.ids) != len(self.x):
            raise ValueError(f"rows, ids: {list(self.rows.shape)}, {len(self.ids)}; nearest valid: {size[0]} of each")

    def __len__(self) -> int:
        return len(self.x)


class NoiseObjective(Protocol):
    """The loss of a micro-batch of starting noises. What it samples on the way it samples itself."""

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The networks that `__call__` asks of `models`: "policy", roles, weight sets."""
        ...

    def forwards(self, steps: int) -> tuple[int, int]:
        """For one noise on a grid of so many steps, at most: rows without gradient, and rows with."""
        ...

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """Gradients flow through the network of the role that learns alone; no other bears any."""
        ...
