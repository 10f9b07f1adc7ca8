"""Runs on pictures from disk; `python scripts/make_shapes_pairs.py --output runs/pairs --pairs 200` makes some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config
from tempflow.recipes.shapes import EVALUATION, REWARDS

PAIRS = "runs/pairs"


def shapes_diffusion_dpo() -> Config:
    """Diffusion-DPO on preference pairs in runs/pairs, which scripts/make_shapes_pairs.py makes."""
    # the paper's β 2000 is for a mean over 65 536 latent elements; with 512 its sigmoid is full after a few steps
    return _run("shapes-diffusion-dpo", {"name": "diffusion_dpo", "beta": 100.0}, "pairs.jsonl")


def shapes_sft() -> Config:
    """Fine-tuning on the better pictures of runs/pairs, which scripts/make_shapes_pairs.py makes."""
    return _run("shapes-sft", {"name": "sft"}, "pictures.jsonl")


def _run(name: str, algorithm: Mapping[str, Any], file: str) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "iterations": 30,
            "algorithm": dict(algorithm),
            "model": {"dtype": "auto"},
            "data": {"train": f"{PAIRS}/{file}", "prompts_per_iteration": 16},
            "rewards": REWARDS,
            "optimizer": {"learning_rate": 5e-5},
            "evaluation": EVALUATION,
        }
    )
