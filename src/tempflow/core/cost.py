"""What a plan costs, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a plan costs: rows given to the model, samples decoded and scored, transitions a loss uses.

    `forwards` counts every node that has a child once, guidance not doubled.  Costs add up, and scale with an int.
    """

    forwards: int
    leaves: int
    trained_edges: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards, self.leaves + other.leaves, self.trained_edges + other.trained_edges
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.forwards * times, self.leaves * times, self.trained_edges * times)

    __rmul__ = __mul__
