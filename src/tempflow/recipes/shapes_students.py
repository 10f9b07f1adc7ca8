"""Few-step students of the embedded `shapes` model: stages from one recipe, minutes on a laptop's CPU, offline.

A student takes four steps, all useful, without guidance. Distillation walks σ = 1, .9, .75, .5, 0 and starts with
segment matching, which takes the guided teacher's path into these steps; the base model stays the teacher of all
stages. `shapes_student` has no teacher: a reward teaches the model as it is, on a grid whose steps lie later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config, Stages, parse_config
from tempflow.config.stages import parse_stages, stage_tree
from tempflow.recipes.shapes import EVALUATION, REWARDS

LATE = (1.0, 0.571, 0.289, 0.1)
"""Points of the grid σ = 1, .8, .55, .25, 0, whose steps lie later. The untrained model draws better on it, and
training on rewards rises for longer, than on σ = 1, .9, .75, .5, 0, whose last step is a jump from .5."""

STEPS, GUIDANCE = 4, 2.0
"""The student's steps, and the guidance of the teacher's path. In ten steps of its own the teacher is best at 1.5."""

TAUGHT = {"steps": STEPS, "teacher_guidance": GUIDANCE, "noises": 2}
FAKE = {**TAUGHT, "fake_rate": 2.0}

REWARD = {
    "algorithm": {"name": "v_grpo", "steps": STEPS, "group": 12, "pairs": 4, "eps": 0.1},
    "iterations": 50,  # it was seen to fall after that
}

STAGES: Mapping[str, Mapping[str, Any]] = {
    "match": {
        "algorithm": {"name": "segment_matching", **TAUGHT, "turns": 4},
        "iterations": 20,
        "data": {"prompts_per_iteration": 18},
        "optimizer": {"learning_rate": 2e-4},
    },
    "dmd2": {
        "algorithm": {"name": "dmd2", **FAKE, "fake_updates": 3, "stop": "end", "turns": 4},
        "iterations": 16,
    },
    "dp_dmd": {
        "algorithm": {
            "name": "dp_dmd",
            **FAKE,
            "teacher_steps": 10,
            "taught": 2,
            "fake_updates": 3,
            "turns": 4,
        },
        "iterations": 12,
    },
    "gdmd": {"algorithm": {"name": "gdmd", **FAKE, "turns": 8}, "iterations": 8},
    "rats": {"algorithm": {"name": "rats", "steps": STEPS, "noises": 8, "parts": 3}, "iterations": 30},
    "opd": {"algorithm": {"name": "opd", **TAUGHT, "turns": 4}, "iterations": 20},
    "rtdmd-cold": {
        "algorithm": {"name": "rtdmd", "stage": "cold_start", **FAKE, "fake_updates": 3, "turns": 4},
        "iterations": 16,
    },
    "rtdmd": {
        "algorithm": {"name": "rtdmd", **FAKE, "group": 12, "fake_updates": 3, "clip": 1e-2, "eps": 0.1},
        "iterations": 60,
    },
    "reward": REWARD,
    "awm": {
        "algorithm": {
            "name": "awm",
            "steps": STEPS,
            "group": 12,
            "pairs": 4,
            "times": "discrete_with_init",
            "fraction": 1.0,
            "kl": 0.0,
            "eps": 0.1,
            "std": "group",
        },
        "model": {"grid": LATE},
        "iterations": 50,
        "optimizer": {"learning_rate": 1.5e-4},
    },
    "late": {**REWARD, "model": {"grid": LATE}},
    "again": {**REWARD, "model": {"grid": LATE}, "iterations": 20},
}
"""Stages by name, as `docs/students.md` compares them; those of distillation also stand behind "match" alone."""

SHARED: Mapping[str, Any] = {
    "rollout_rows": 192,
    "train_rows": 192,
    "model": {"dtype": "auto", "grid": "useful"},
    "data": {"prompts_per_iteration": 12},
    "rewards": REWARDS,
    "optimizer": {"learning_rate": 1e-4, "warmup_iterations": 5, "ema_decay": 0.9},
    "evaluation": {**EVALUATION, "every": 4, "steps": STEPS},
}


def shapes_student() -> Config:
    """A four-step student of the shapes model that a reward teaches, by AWM: no teacher, one run."""
    whole = stage_tree(SHARED, STAGES["awm"]) | {"name": "shapes-student"}
    return parse_config(stage_tree(whole, {"evaluation": {"every": 10}}))


def shapes_distilled() -> Stages:
    """A four-step student of the shapes model: its guided teacher's path, its teacher's law, then a reward."""
    return _student("shapes-distilled", "match", "dmd2", "reward")


def shapes_dmd2() -> Stages:
    """A four-step student of the shapes model by DMD2."""
    return _student("shapes-dmd2", "match", "dmd2")


def shapes_gdmd() -> Stages:
    """A four-step student of the shapes model by GDMD, whose targets the verifier judges."""
    return _student("shapes-gdmd", "match", "gdmd")


def shapes_dp_dmd() -> Stages:
    """A four-step student of the shapes model by DP-DMD, whose first step stays with the teacher's."""
    return _student("shapes-dp-dmd", "match", "dp_dmd")


def shapes_rats() -> Stages:
    """A four-step student of the shapes model by RATS: its own many-step average, and the verifier."""
    return _student("shapes-rats", "match", "rats")


def shapes_opd() -> Stages:
    """A four-step student of the shapes model that follows its guided teacher's velocities at its own states."""
    return _student("shapes-opd", "match", "opd")


def shapes_rtdmd() -> Stages:
    """A four-step student of the shapes model by noisy steps: a cold start, then GRPO through them (RTDMD-like)."""
    return _student("shapes-rtdmd", "match", "rtdmd-cold", "rtdmd")


def _student(name: str, *stages: str) -> Stages:
    listed = [{"name": stage, **STAGES[stage]} for stage in stages]
    for stage in listed:
        stage["evaluation"] = {"every": max(1, stage["iterations"] // 5)}
    return parse_stages({"name": name, **SHARED, "stages": listed})
