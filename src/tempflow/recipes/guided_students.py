"""Four-step students of SD 3.5 Medium that a reward guides: GDMD, and RTDMD-like runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config
from tempflow.recipes.sd35 import sd35_medium_tempflow

STEPS = 4
GRID = "useful"
"""σ = 1, .9, .75, .5, 0 at shift 3."""


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
