"""Algorithms: one file per paper, each a function of its hyper-parameters that returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.drm_grpo import drm_grpo
from tempflow.algorithms.flash_grpo import flash_grpo
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.flow_grpo_fast import flow_grpo_fast
from tempflow.algorithms.tempflow_grpo import tempflow_grpo

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "drm_grpo": drm_grpo,
    "flash_grpo": flash_grpo,
    "flow_grpo": flow_grpo,
    "flow_grpo_fast": flow_grpo_fast,
    "tempflow_grpo": tempflow_grpo,
}

ENTRY_POINTS = "tempflow.algorithms"

__all__ = [
    "ALGORITHMS",
    "ENTRY_POINTS",
    "Algorithm",
    "drm_grpo",
    "find",
    "flash_grpo",
    "flow_grpo",
    "flow_grpo_fast",
    "tempflow_grpo",
]


def find(name: str) -> Callable[..., Algorithm]:
    """The algorithm of that name: ours, or an installed package's by the entry point group "tempflow.algorithms".

    Raises ValueError naming the nearest known name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    others = entry_points(group=ENTRY_POINTS)
    if name in others.names:
        return others[name].load()
    nearest = get_close_matches(name, [*ALGORITHMS, *others.names], n=1, cutoff=0.0)[0]
    raise ValueError(f"name: {name!r} is no known algorithm; nearest valid: {nearest!r}")
