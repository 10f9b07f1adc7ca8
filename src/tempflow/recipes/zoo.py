"""How every algorithm is set on `shapes`: one table for the leaderboard and its recipes (leaderboard_NAME).

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
    trained    rows that an iteration trains, where its credit trains a selection, of which the plan does not know
    """

    name: str
    algorithm: Mapping[str, Any]
    prompts: int = 12
    kind: Literal["paper", "knob"] = "paper"
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trained: int | None = None


def _less(*names: str) -> dict[str, Any]:
    """What the recipes have in common, without what an algorithm does not take."""
    return {key: value for key, value in COMMON.items() if key not in names}


NOISELESS = _less("noise_level")
"""For algorithms whose step has no noise level to set."""

_FLOW = {"group": 12, **COMMON}
_RECTIFIED = {**COMMON, "seeds": 2, "branches": 6, "weight": "rectified"}
_FORWARD = {"steps": 6, "group": 12}
_TWO = {"updates_per_iteration": 2}
"""With one update the ratio is 1 throughout, and gates that differ beside it are one and the same."""

_TIGHT = 3e-4
"""Clips a sixth of the second update's edges (rate 2e-4; |log r| is about as large in the mean). 1e-2, next to none."""

ENTRIES: tuple[Entry, ...] = (
    Entry("tempflow_grpo", {"name": "tempflow_grpo", "seeds": 2, "branches": 6, **COMMON}, 6),
    Entry("tempflow_grpo_rectified", {"name": "tempflow_grpo", **_RECTIFIED}, 6, "knob"),
    # what keeps its gain small on a shifted grid: the noise of the last noisy step, groups of few, or too few steps
    Entry("tempflow_grpo_calm", {"name": "tempflow_grpo", **_RECTIFIED, "noise_level": 0.5}, 6, "knob"),
    Entry("tempflow_grpo_pooled", {"name": "tempflow_grpo", **_RECTIFIED, "std_group": "prompt"}, 6, "knob"),
    Entry("tempflow_grpo_eight_steps", {"name": "tempflow_grpo", **_RECTIFIED, "steps": 8}, 4, "knob"),
    Entry("flow_grpo_global", {"name": "flow_grpo", "std": "global", **_FLOW}),
    Entry("flow_grpo_group", {"name": "flow_grpo", "std": "group", **_FLOW}),
    Entry("flow_grpo_fast", {"name": "flow_grpo_fast", "group": 12, "window": 2, **COMMON}, 16),
    Entry("flash_grpo", {"name": "flash_grpo", "group": 12, **NOISELESS}, 18),
    # a constant η of 0.9 would overshoot in the long step before the last
    Entry("dance_grpo", {"name": "dance_grpo", "group": 12, **COMMON, "noise_level": 0.6}, 14),
    Entry("mix_grpo", {"name": "mix_grpo", "group": 12, "window": 2, "every": 5, **COMMON}, 16),
    # 0.4 of six steps would leave a single step after the first window
    Entry(
        "mix_grpo_flash",
        {"name": "mix_grpo_flash", "group": 12, "window": 2, "every": 5, "compress": 0.6, "shift": 3.0, **COMMON},
        18,
    ),
    Entry(
        "branch_grpo",
        {"name": "branch_grpo", "splits": (0, 1, 2), "split_scale": 2.0, **COMMON, "noise_level": 0.6},
        24,
    ),
    # sensitivity 0.5 halves the narrowest side, by which the guard of the first ratio goes
    Entry(
        "dynamic_treerpo",
        {"name": "dynamic_treerpo", "depth": 4, "every": 10, **COMMON, "clip": 2e-2, "noise_level": 0.7},
        22,
    ),
    # the official code's log-prob, without 1/(2S²): the true one is all last step on this grid
    Entry("flow_cps", {"name": "flow_cps", "log_prob": "unscaled", "std": "group", **_FLOW, "noise_level": 0.8}),
    # two updates, as published: at a first one nothing has diverged
    Entry(
        "flow_dppo",
        {"name": "flow_dppo", "group": 12, "std": "group", **_less("clip", "kl"), "threshold": 1e-4},
        16,
        optimizer=_TWO,
    ),
    # the normalised ratio is S times the plain one, and S is about .75 here
    Entry("grpo_guard", {"name": "grpo_guard", "kind": "flow", "std": "group", **_FLOW, "clip": 7e-3}),
    Entry("gcpo", {"name": "gcpo", "sizes": (1, 2, 2), "share": 1.0, "shared_noise": False, **_FLOW}),
    Entry("otca", {"name": "otca", "kind": "flow", **_FLOW}),
    # a ratio at every position strays √(channels · elements) = 64 times as far as a mean over all
    Entry("vipo", {"name": "vipo", "kind": "flow", "train_fraction": 1.0, **_FLOW, "clip": 0.5}),
    Entry(
        "pref_grpo",
        {"name": "pref_grpo", "group": 12, "train_steps": None, "shared_noise": False, **_less("kl"), "clip": 7e-3},
    ),
    # a constant η is hardly any noise on this grid; eps is in the unit of reward^(1+γ)
    Entry(
        "slas",
        {
            "name": "slas",
            "group": 12,
            "train_steps": None,
            "dynamics": "flow",
            "shared_noise": False,
            **_less("kl", "eps"),
        },
    ),
    # pictures of a prompt are about .16 apart, so a scale of .1 makes the bonus about .03
    Entry(
        "perceptual_entropy",
        {"name": "perceptual_entropy", "group": 12, "std": "group", "scale": 0.1, **_less("kl")},
    ),
    # beside a prompt's 24 + 120 forwards the latent reward scores 120 candidates, which are not counted
    # the SDE's candidates are noisier than their σ says, and its last noisy step has three quarters of the gradient
    Entry(
        "drm_grpo",
        {
            "name": "drm_grpo",
            "reward": "shapes",
            "chains": 4,
            "candidates": 6,
            "dynamics": "cps",
            **COMMON,
            "noise_level": 0.8,
        },
        10,
    ),
    # the last noisy step draws a noise of .009 and has 60 times the gradient of the one before
    Entry("ddpo", {"name": "ddpo", "group": 12, "skip_last": 2, **_less("kl", "noise_level")}),
    Entry("rloo", {"name": "rloo", "group": 12, **_less("eps")}, kind="knob"),
    Entry("dr_grpo", {"name": "dr_grpo", "group": 12, **_less("eps")}, kind="knob"),
    Entry("reinforce_pp", {"name": "reinforce_pp", "group": 12, **_less("eps")}, kind="knob"),
    Entry(
        "flow_grpo_two_updates",
        {"name": "flow_grpo", "std": "group", **_FLOW, "clip": _TIGHT},
        kind="knob",
        optimizer=_TWO,
    ),
    Entry(
        "dapo",
        {"name": "dapo", "group": 12, **_less("kl"), "clip": _TIGHT, "clip_high": 4.2e-4},
        kind="knob",
        optimizer=_TWO,
    ),
    Entry("gspo", {"name": "gspo", "group": 12, **_less("kl"), "clip": _TIGHT}, kind="knob", optimizer=_TWO),
    Entry("cispo", {"name": "cispo", "group": 12, **_less("kl"), "clip": _TIGHT}, kind="knob", optimizer=_TWO),
    Entry(
        "sapo",
        {"name": "sapo", "group": 12, "temperature": 3.3e3, "temperature_negative": 3.465e3, **_less("kl", "clip")},
        kind="knob",
        optimizer=_TWO,
    ),
    # the forward-process family: sampled without noise, trained at drawn (t, ε)
    Entry("diffusion_nft", {"name": "diffusion_nft", **_FORWARD, "fraction": 0.5, "kl": 0.0, "eps": 0.1}, 10),
    Entry(
        "sol_rl",
        {"name": "sol_rl", **_FORWARD, "pool": 24, "draft_steps": 3, "fraction": 0.5, "kl": 0.0, "eps": 0.1},
        7,
    ),
    Entry(
        "e2po",
        {"name": "e2po", "steps": 6, "noises": 3, "conditions": 4, "fraction": 0.5, "kl": 0.0, "eps": 0.1},
        10,
    ),
    Entry("awm", {"name": "awm", **_FORWARD, "pairs": 4, "kl": 0.0, "eps": 0.1}, 9),
    Entry("advantage_flow", {"name": "advantage_flow", **_FORWARD, "pairs": 3, "reference": 0.0}, 10),
    Entry("v_grpo", {"name": "v_grpo", **_FORWARD, "pairs": 4, "eps": 0.1}, 12),
    Entry("elbo_epg", {"name": "elbo_pg", **_FORWARD, "kl": 0.0, "fraction": 0.5, "scale": "group", "gain": 1.0}, 10),
    Entry(
        "elbo_par",
        {"name": "elbo_pg", "kind": "par", **_FORWARD, "kl": 0.0, "fraction": 0.5, "scale": "none", "gain": 0.1},
        10,
    ),
    Entry("dgpo", {"name": "dgpo", **_FORWARD, "clip": None, "eps": 0.1}, 10),
    Entry("crd", {"name": "crd", **_FORWARD, "kl": 0.0, "fraction": 0.5, "eps": 0.1}, 10),
    Entry("online_dpo", {"name": "online_dpo", **_FORWARD}, 17, trained=136),
    Entry("rejection_sft", {"name": "rejection_sft", **_FORWARD, "best": 3}, 18, trained=216),
)
"""In the order of papers/trajectory, then papers/forward."""


def recipe(entry: Entry) -> Config:
    """The entry as a run of about half a million forwards."""
    return Config.model_validate(
        {
            "name": f"leaderboard-{entry.name.replace('_', '-')}",
            "iterations": 300,
            "algorithm": dict(entry.algorithm),
            "rollout_rows": 192,
            "model": {"dtype": "auto"},
            "data": {"prompts_per_iteration": entry.prompts},
            "rewards": REWARDS,
            "optimizer": {**OPTIMIZER, **entry.optimizer},
            "evaluation": EVALUATION,
        }
    )
