"""Where a sliding window of steps is at an iteration (MixGRPO, `papers/trajectory.md` §3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tempflow.core.rng import Stream

Order = Literal["progressive", "random", "decay", "exp_decay"]

DECAY, THRESHOLD = 0.1, 13
"""k and λ of "exp_decay", as released; λ counts steps of a rollout of 25."""


@dataclass(frozen=True)
class SlidingWindow:
    """A window of `size` steps inside 0 … end − 1.

    order      "progressive": `every` iterations (τ) at a place, then `stride` steps on; "decay": the same, staying
               int(τ·(1 − p) + max(1, τ//4)·p) of them, p = start/end; "exp_decay": ⌈τ·exp(−k·max(0, start − λ))⌉ of
               them; "random": a place drawn for every iteration, evenly
    stride     0 leaves it at step 0
    roll_back  after its last place it starts anew; else it stays there
    whole      it never shrinks; else its last places have fewer steps than `size`, but one at least

    Raises ValueError for a size, every or stride that is too small, a range too short, or an unknown order.
    """

    size: int
    end: int
    order: Order = "progressive"
    every: int = 25
    stride: int = 1
    roll_back: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        for name, value, low in (("window", self.size, 1), ("every", self.every, 1), ("stride", self.stride, 0)):
            if value < low:
                raise ValueError(f"{name}: {value} must be at least {low}; nearest valid: {low}")
        if self.order not in get_args(Order):
            raise ValueError(f"order: {self.order!r} is not one of {', '.join(get_args(Order))}")
        if self.size > self.end:
            raise ValueError(f"window: {self.size} does not fit into {self.end} steps; nearest valid: {self.end}")

    @staticmethod
    def of(
        steps: int,
        size: int,
        end: int | None,
        order: Order,
        every: int,
        stride: int,
        roll_back: bool,
        whole: bool = False,
    ) -> SlidingWindow:
        """The window of a rollout of `steps` steps whose last is not trained: it ends at T − 1 at most.

        A window of all T steps may reach T, and is whole: its last place would be the untrained step alone.
        Raises ValueError naming argument, value and nearest valid value.
        """
        if size > steps:
            raise ValueError(f"window: {size} is longer than the rollout; nearest valid: {steps}")
        top = steps if size == steps else steps - 1
        last = top if end is None else end
        if size >= 1 and not size <= last <= top:
            nearest = min(max(last, size), top)
            raise ValueError(f"window_end: {last} must be in {size} … {top}; nearest valid: {nearest}")
        return SlidingWindow(size, last, order, every, stride, roll_back, whole or size == steps)

    @property
    def starts(self) -> tuple[int, ...]:
        """Its places in their order; of "random", all it may be at."""
        if self.order == "random":
            return tuple(range(self.end - self.size + 1))
        past = self.end - self.size + 1 if self.whole else self.end
        return tuple(range(0, past, self.stride)) if self.stride else (0,)

    def stay(self, start: int) -> int:
        """Iterations that it stays at that place, ≥ 1."""
        if self.order == "random":
            return 1
        if self.order == "decay":
            least, past = max(1, self.every // 4), start / self.end
            return max(least, int(self.every * (1 - past) + least * past))
        if self.order == "exp_decay":
            return math.ceil(self.every * math.exp(-DECAY * max(0, start - THRESHOLD)))
        return self.every

    def at(self, seed: int, iteration: int) -> range:
        """Its steps in that iteration, never none. Only "random" reads the seed."""
        if self.order == "random":
            start = Stream(seed, "slide.window").integers((iteration,), len(self.starts), 1)[0]
            return range(start, start + self.size)
        stays = [self.stay(start) for start in self.starts]
        left = iteration % sum(stays) if self.roll_back else min(iteration, sum(stays) - 1)
        place = 0
        while left >= stays[place]:
            left -= stays[place]
            place += 1
        start = self.starts[place]
        return range(start, min(start + self.size, self.end))
