"""Times at which a clean sample is re-noised, as pure functions of (stream, id).

A sample is named by its id, a tuple of integers such as (iteration, prompt slot, root, *path); what is drawn for it
depends on nothing else, so not on batch size, order, rank or on who else is drawn for. Equal ids get equal draws:
that is how draws are shared, by handing the samples of a group the id that they have in common (`draws.Renoise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule

Id = tuple[int, ...]


class Times(Protocol):
    """M times for each id. Frozen dataclasses below; a schedule is asked only by those on the rollout's grid."""

    def count(self, steps: int) -> int:
        """M, for a rollout of that many steps."""
        ...

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        """Times in (0, 1], float64 [len(ids), M]."""
        ...


@dataclass(frozen=True)
class GridTimes:
    """The rollout's own σ_0 … σ_{T−1}, in a random order for each id; of these the first int(T·fraction).

    DiffusionNFT and "Rethinking the design space" (fraction 0.99: all but one of up to 100 steps; pure noise and the
    smallest σ take part). Certain: read in code. Raises ValueError unless 0 < fraction ≤ 1, or where no time is left.
    """

    fraction: float = 0.99

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def count(self, steps: int) -> int:
        count = int(steps * self.fraction)
        if count < 1:
            raise ValueError(f"fraction: {self.fraction} of {steps} steps leaves none; nearest valid: {1 / steps:.3g}")
        return count

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        count = self.count(schedule.steps)
        order = [_order(stream, i, schedule.steps)[:count] for i in ids]
        return _on_grid(schedule, torch.tensor(order, dtype=torch.long).view(-1, count))


@dataclass(frozen=True)
class StratifiedGridTimes:
    """One index drawn uniformly from each of `strata` consecutive chunks of the grid, noisiest first.

    The grid is cut to the indices first … int(T·fraction) − 1; chunk j starts at first + floor(j·length/strata).
    `initial`: index 0, pure noise, comes first and always, and the chunks follow it.
    AWM "discrete_wo_init" (strata 6, first 1, fraction 0.9), "discrete" (first 0) and "discrete_with_init" (strata 5,
    first 1, initial); certain: read in code. V-GRPO (strata 4, the whole grid; where its chunks end is not known).
    Raises ValueError for impossible fields, fewer indices than strata, or `initial` with a chunk that holds index 0.
    """

    strata: int
    first: int = 0
    fraction: float = 1.0
    initial: bool = False

    def __post_init__(self) -> None:
        _check_least("strata", self.strata, 1)
        _check_least("first", self.first, 0)
        _check_fraction(self.fraction)
        if self.initial and self.first == 0:
            raise ValueError("first: 0 would be drawn twice, as `initial` takes it; nearest valid: 1")

    def count(self, steps: int) -> int:
        self._check_room(steps)
        return self.strata + self.initial

    def room(self, steps: int) -> int:
        """How many indices of a grid of `steps` there are to draw from."""
        return max(int(steps * self.fraction) - self.first, 0)

    def _check_room(self, steps: int) -> None:
        room, last = self.room(steps), int(steps * self.fraction)
        if room < self.strata:
            raise ValueError(
                f"strata: {self.strata} do not fit the indices {self.first} … {last - 1} of {steps} steps; "
                f"nearest valid: {room}"
            )

    def edges(self, steps: int) -> list[int]:
        """The strata + 1 chunk boundaries: chunk j holds the indices edges[j] … edges[j + 1] − 1."""
        self._check_room(steps)
        length = int(steps * self.fraction) - self.first
        return [self.first + j * length // self.strata for j in range(self.strata + 1)]

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        low = torch.tensor(self.edges(schedule.steps), dtype=torch.float64)
        u = stream.uniform(ids, (self.strata,))
        index = (low[:-1] + (low.diff() * u).floor()).long()
        if self.initial:
            index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
        return _on_grid(schedule, index)


@dataclass(frozen=True)
class WindowTimes:
    """`size` consecutive grid times, noisiest first, from a start drawn uniformly from 0 … starts − 1.

    UDM-GRPO (size 3, starts 3 of ten steps; certain: read in code). OmniNFT's "first 40 %" is size = 0.4·T, starts 1.
    Raises ValueError for a count below 1, or a window that leaves the grid.
    """

    size: int
    starts: int = 1

    def __post_init__(self) -> None:
        _check_least("size", self.size, 1)
        _check_least("starts", self.starts, 1)

    def count(self, steps: int) -> int:
        if self.size + self.starts - 1 > steps:
            raise ValueError(
                f"size: {self.size} from the last of {self.starts} starts leaves the grid of {steps} steps; "
                f"nearest valid: {max(1, steps - self.starts + 1)}"
            )
        return self.size

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        count = self.count(schedule.steps)
        starts = torch.tensor([stream.integers(i, self.starts, 1)[0] for i in ids], dtype=torch.long)
        return _on_grid(schedule, starts[:, None] + torch.arange(count))


@dataclass(frozen=True)
class UniformTimes:
    """One time from each of `strata` equal parts of [low, high], then t -> shift·t / (1 + (shift−1)·t).

    AWM "uniform" (low 0.2, high 1, shift 3; certain: read in code). One stratum is a plain uniform time
    (AdvantageFlow's; its bounds are not known). Raises ValueError unless 0 ≤ low < high ≤ 1, strata ≥ 1 and shift > 0.
    """

    strata: int = 1
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_least("strata", self.strata, 1)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: {self.low}, {self.high} must keep 0 ≤ low < high ≤ 1; nearest valid: 0, 1")
        positive("shift", self.shift, 1.0)

    def count(self, steps: int) -> int:
        return self.strata

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        t = self.low + (self.high - self.low) * _strata(stream, ids, self.strata)
        return _shifted(t, self.shift)


@dataclass(frozen=True)
class LogitNormalTimes:
    """t = shift(sigmoid(mean + std·z)), z the standard normal's quantile at one point of each of `strata` equal parts.

    At least `low`. AWM "logit_normal" (shift 3, low 0.01; certain: read in code); with one stratum and shift 1 the
    time density of SD3's pre-training. Raises ValueError unless strata ≥ 1, std > 0, shift > 0 and 0 < low < 1.
    """

    strata: int = 1
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    low: float = 0.01

    def __post_init__(self) -> None:
        _check_least("strata", self.strata, 1)
        positive("std", self.std, 1.0)
        positive("shift", self.shift, 1.0)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: {self.mean} must be finite; 0 is usual")
        if not 0 < self.low < 1:
            raise ValueError(f"low: {self.low} must be in (0, 1); 0.01 is usual")

    def count(self, steps: int) -> int:
        return self.strata

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        u = _strata(stream, ids, self.strata)
        normal = NormalDist(self.mean, self.std)
        # one number at a time: a vector library's last bit depends on how many there are
        t = [0.5 * (1 + math.tanh(normal.inv_cdf(p) / 2)) for row in u for p in map(float, row)]
        return _shifted(torch.tensor(t, dtype=torch.float64).view(u.shape), self.shift).clamp(min=self.low)


@lru_cache(maxsize=8192)
def _order(stream: Stream, id: Id, n: int) -> tuple[int, ...]:
    """Kept, as micro-batches ask for the same sample's times again and again."""
    return tuple(stream.permutation(id, n))


def _on_grid(schedule: Schedule, index: Tensor) -> Tensor:
    return schedule.sigmas.to("cpu", torch.float64)[index]


def _strata(stream: Stream, ids: Sequence[Id], strata: int) -> Tensor:
    """One uniform in each of the equal parts of (0, 1), float64 [len(ids), strata]."""
    return (torch.arange(strata, dtype=torch.float64) + stream.uniform(ids, (strata,))) / strata


def _shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _check_fraction(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"fraction: {value} must be in (0, 1]; nearest valid: 1.0")


def _check_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name}: {value} is too small; nearest valid: {low}")
