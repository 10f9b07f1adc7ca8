"""Four-step students that a reward guides: RTDMD-like runs, and GDMD on SD 3.5 Medium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config
from tempflow.recipes.sd35 import sd35_medium_tempflow
from tempflow.recipes.shapes import EVALUATION, REWARDS

STEPS = 4
GRID = "useful"
"""σ = 1, .9, .75, .5, 0 at shift 3."""

TEACHER = 2.0
"""The shapes model's best guidance of 1, 1.25, 1.5, 2 and 3 on validation."""


def shapes_rtdmd_cold_start() -> Config:
    """A four-step student of the shapes model by noisy steps, for shapes_rtdmd to go on with."""
    algorithm = {"name": "rtdmd", "stage": "cold_start", "noises": 2, "fake_updates": 3, "turns": 4}
    return _shapes("shapes-rtdmd-cold-start", {**algorithm, "teacher_guidance": TEACHER, "fake_rate": 2.0}, 25)


def shapes_rtdmd() -> Config:
    """GRPO through the noisy steps of shapes_rtdmd_cold_start's student, whose last step matches the teacher."""
    algorithm = {"name": "rtdmd", "group": 12, "noises": 2, "fake_updates": 3, "clip": 1e-2, "eps": 0.1}
    return _shapes(
        "shapes-rtdmd",
        {**algorithm, "teacher_guidance": TEACHER, "fake_rate": 2.0},
        60,
        start=shapes_rtdmd_cold_start().output,
    )


def sd35_medium_gdmd() -> Config:
    """GDMD on SD 3.5 Medium, LoRA; bring your prompt files and your reward.

    The paper gives SD3-Medium, 4 steps, CLIP score + HPS and prompts of text-to-image-2M, and neither rates nor sizes:
    rates, guidance and LoRA are RTDMD's on this model, prompts an iteration and turns are ours.
    """
    return _sd35("sd35-medium-gdmd", {"name": "gdmd"}, 3e-5, 3000)


def sd35_medium_rtdmd_cold_start() -> Config:
    """The cold start of RTDMD on SD 3.5 Medium with its configuration: rate 3e-5, EMA .99, LoRA of rank 32 and alpha 64
    for student and fake, 15 000 updates; bring your prompt files."""
    return _sd35("sd35-medium-rtdmd-cold-start", {"name": "rtdmd", "stage": "cold_start"}, 3e-5, 15_000)


def sd35_medium_rtdmd() -> Config:
    """The second stage of RTDMD on SD 3.5 Medium: rate 3e-6, 24 chains a prompt; bring your prompt files and your
    reward. Its number of iterations is ours."""
    start = sd35_medium_rtdmd_cold_start().output
    return _sd35("sd35-medium-rtdmd", {"name": "rtdmd"}, 3e-6, 1000, start)


def _shapes(name: str, algorithm: Mapping[str, Any], iterations: int, start: str = "") -> Config:
    return Config.model_validate(
        {
            "name": name,
            "iterations": iterations,
            "algorithm": {"steps": STEPS, **algorithm},
            "rollout_rows": 192,
            "train_rows": 192,
            "model": {"dtype": "auto", "grid": GRID, "start": start},
            "data": {"prompts_per_iteration": 12},
            "rewards": REWARDS,
            "optimizer": {"learning_rate": 1e-4, "warmup_iterations": 5, "ema_decay": 0.9},
            "evaluation": {**EVALUATION, "steps": STEPS},
        }
    )


def _sd35(name: str, algorithm: Mapping[str, Any], rate: float, iterations: int, start: str = "") -> Config:
    base = sd35_medium_tempflow().model_dump()
    base |= {
        "name": name,
        "output": f"runs/{name}",
        "iterations": iterations,
        "algorithm": {"steps": STEPS, **algorithm},
    }
    base["model"] |= {"guidance": 1.0, "grid": GRID, "start": start}
    base["data"] |= {"prompts_per_iteration": 9}
    base["optimizer"] |= {"learning_rate": rate, "updates_per_iteration": 1, "ema_decay": 0.99}
    base["evaluation"] |= {"every": 100, "steps": STEPS, "guidance": 1.0}
    return Config.model_validate(base)
