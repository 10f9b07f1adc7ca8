"""How a weight set follows the policy: set ← decay·set + (1−decay)·policy, at each of its updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Rule(Protocol):
    """The decay at every update."""

    @property
    def moves(self) -> bool:
        """Whether the set ever changes."""
        ...

    def decay(self, update: int) -> float:
        """The share of the set that stays at its `update`-th update, counted from 1."""
        ...


@dataclass(frozen=True)
class Copy:
    """The policy as it stands, at every update."""

    moves = True

    def decay(self, update: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Frozen:
    """Never follows."""

    moves = False

    def decay(self, update: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Ema:
    """Warmed-up average: min(rate, (1+n)/(10+n)), n from 1 (DiffusionNFT's and Flow-GRPO's evaluation weights)."""

    rate: float
    moves = True

    def decay(self, update: int) -> float:
        return min(self.rate, (1 + update) / (10 + update))


@dataclass(frozen=True)
class Ramp:
    """Old policy of the forward-process family: min(slope·(i − flat), hold) at update i, and 0 up to i = flat.

    DiffusionNFT's types (scripts/train_nft_sd3.py): 0 is Ramp(0, 0, 0), 1 is Ramp(0, .001, .5), 2 is
    Ramp(75, .0075, .999); "type 3" of "Rethinking the design space" is Ramp(10, .01, .5). The codes of DiffusionNFT,
    AWM, CRD and "Rethinking" raise their counter before they blend, so i is 1 at the first update; DGPO's raises it
    after, which is one more in `flat` (read in source, sure).
    """

    flat: int
    slope: float
    hold: float
    moves = True

    def decay(self, update: int) -> float:
        return min(max(0.0, self.slope * (update - self.flat)), self.hold)
