"""The verifier of the embedded world, without partial credit."""

from __future__ import annotations

from tempflow.rewards.shapes import LICENCE, NEEDS, ShapesReward

__all__ = ["LICENCE", "NEEDS", "RANGE", "shapes_strict"]

RANGE = "0 or 1"


def shapes_strict() -> ShapesReward:
    """The shapes verifier: 1 where the picture is right, else 0."""
    return ShapesReward(graded=False)
