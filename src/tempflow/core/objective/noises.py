"""Starting noises as a loss sees them: what a few-step generator is unrolled from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, StateLayout
from tempflow.core.times import Id


class Judge(Protocol):
    """The run's rewards, for a loss that has samples scored."""

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards' total [B] and bool [B], which of them are valid, both on x's device: of clean samples x [B, *S],
        decoded and scored without gradients, each for its prompt slot in `rows`."""
        ...


@runtime_checkable
class GradientJudge(Judge, Protocol):
    """A judge that can also be asked with gradients."""

    def through(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same with gradients to x, through decoder and rewards, whose own weights get none. A row that is not
        valid is worth 0 here and gives x exactly none."""
        ...


def through_rewards(objective: object) -> bool:
    """Whether a loss asks for scores with gradients, so that decoder and rewards must have them: it says so by a member
    of that name."""
    return bool(getattr(objective, "through_rewards", False))


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
    judge     scores samples; None where there are no rewards to ask
    spread    standard deviation of all scores that losses had asked for in the run before this phase, on all ranks: a
              unit for differences of scores that depends on no batch. None: there were fewer than two

    Raises ValueError where the parts are not of one size.
    """

    x: Tensor
    rows: Tensor
    ids: tuple[Id, ...]
    seed: int
    schedule: Schedule
    layout: StateLayout = WHOLE
    judge: Judge | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        size = (len(self.x),)
        if self.rows.shape != size or len(self.ids) != len(self.x):
            raise ValueError(f"rows, ids: {list(self.rows.shape)}, {len(self.ids)}; nearest valid: {size[0]} of each")

    def __len__(self) -> int:
        return len(self.x)

    def scored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the judge says of B samples. Raises ValueError where there is none."""
        if self.judge is None:
            raise ValueError("judge: None, and the loss has samples scored; nearest valid: a run with a reward")
        return self.judge(x.detach(), self.rows)

    def scored_through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the judge says with gradients to x, [k·B, *S]: k samples for each row, side by side. Raises ValueError
        where there is none, or none that has gradients."""
        if not isinstance(self.judge, GradientJudge):
            raise ValueError(
                f"judge: {self.judge!r:.60} gives no gradients; nearest valid: a run with differentiable rewards"
            )
        return self.judge.through(x, self.rows.repeat_interleave(len(x) // len(self)))


class NoiseObjective(Protocol):
    """The loss of a micro-batch of starting noises. What it samples on the way it samples itself."""

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The networks that `__call__` asks of `models`: "policy", roles, weight sets."""
        ...

    @property
    def guidance(self) -> Mapping[str, float]:
        """Networks that it asks with a guidance of their own, such as a teacher's; the run's is for all others."""
        ...

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most: rows without gradient, samples decoded and scored, rows
        with gradient, and (`alone`) rows of the networks in `guidance`."""
        ...

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """Gradients flow through the network of the role that learns alone; no other bears any."""
        ...
