"""How every algorithm is set on `shapes`: one table for recipes (`tempflow train shapes_NAME`) and the leaderboard.

Settings are chosen from what each method is, not tuned; an iteration has about 1 500 counted forwards. What a recipe
leaves out has its paper's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tempflow.config import Config
from tempflow.recipes.shapes import COMMON, EVALUATION, OPTIMIZER, REWARDS


@dataclass(frozen=True)
class Entry:
    """An algorithm on `shapes`.

    name       of the entry: the algorithm's, or with a variant behind it
    algorithm  its configuration
    prompts    an iteration's
    kind       "paper": a method as published; "knob": a part of one, changed
    optimizer  settings other than the recipes'
    """

    name: str
    algorithm: Mapping[str, Any]
    prompts: int = 12
    kind: Literal["paper", "knob"] = "paper"
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])


NOISELESS = {key: value for key, value in COMMON.items() if key != "noise_level"}
"""For algorithms whose step has no noise level to set."""

ENTRIES: tuple[Entry, ...] = (
    Entry("tempflow_grpo", {"name": "tempflow_grpo", "seeds": 2, "branches": 6, **COMMON}, 6),
    Entry("flow_grpo_global", {"name": "flow_grpo", "group": 12, "std": "global", **COMMON}),
    Entry("flow_grpo_group", {"name": "flow_grpo", "group": 12, "std": "group", **COMMON}),
    Entry("flow_grpo_fast", {"name": "flow_grpo_fast", "group": 12, "window": 2, **COMMON}, 16),
    Entry("flash_grpo", {"name": "flash_grpo", "group": 12, **NOISELESS}, 18),
)
"""In the order of papers/trajectory, then papers/forward."""


def recipe(entry: Entry) -> Config:
    """The entry as a run of about half a million forwards."""
    return Config.model_validate(
        {
            "name": f"shapes-{entry.name.replace('_', '-')}",
            "iterations": 300,
            "algorithm": dict(entry.algorithm),
            "rollout_rows": 192,
            "model": {"dtype": "bfloat16"},
            "data": {"prompts_per_iteration": entry.prompts},
            "rewards": REWARDS,
            "optimizer": {**OPTIMIZER, **entry.optimizer},
            "evaluation": EVALUATION,
        }
    )
