"""Direct reward gradients: ReFL, DRaFT-K and SRPO's alignment step, on `shapes` and on Stable Diffusion 3.5 Medium.

On `shapes` the reward is `shapes_scorer`, a small network that was trained on the verifier; the verifier itself has no
gradients, and looks on. On SD 3.5 it is PickScore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config
from tempflow.recipes.shapes import EVALUATION

SCORER = "shapes_scorer"


def shapes_refl() -> Config:
    """ReFL on the shapes model, by the gradient of a scorer that was trained on the verifier."""
    return _shapes("refl", {"steps": 6, "late": 3, "noises": 2, "turns": 4})


def shapes_draft() -> Config:
    """DRaFT-K on the shapes model, K = 1, by the gradient of a scorer that was trained on the verifier."""
    return _shapes("draft", {"steps": 6, "last": 1, "noises": 2, "turns": 4})


def shapes_srpo() -> Config:
    """SRPO's alignment step on the shapes model, by the gradient of a scorer that was trained on the verifier."""
    return _shapes("srpo", {"steps": 6, "noises": 2, "pairs": 2, "turns": 4})


def sd35_medium_refl() -> Config:
    """ReFL on SD 3.5 Medium by PickScore: 40 steps, one of the last ten with gradients, LoRA. Not run on real weights.

    The paper's steps (from memory); rate, LoRA and prompts are this package's other recipes'. With ImageReward, which
    the paper trains on, take `algorithm.margin` 2.0.
    """
    return _sd35("refl", {"steps": 40, "late": 10})


def sd35_medium_draft() -> Config:
    """DRaFT-1 on SD 3.5 Medium by PickScore: 50 steps, the last with gradients, LoRA. Not run on real weights.

    The paper's steps and K (from memory); rate, LoRA and prompts are this package's other recipes'.
    """
    return _sd35("draft", {"steps": 50, "last": 1})


def sd35_medium_srpo() -> Config:
    """SRPO's alignment step on SD 3.5 Medium by PickScore: 25 steps, four noises a picture, LoRA. Not run on real
    weights.

    The paper's steps on FLUX.1 (from memory); the rest is this package's.
    """
    return _sd35("srpo", {"steps": 25, "pairs": 4})


def _shapes(name: str, algorithm: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": f"shapes-{name}",
            "iterations": 60,
            "algorithm": {"name": name, **algorithm},
            "rollout_rows": 192,
            "model": {"dtype": "float32"},
            "data": {"prompts_per_iteration": 12},
            "rewards": [{"name": SCORER}],
            "optimizer": {"learning_rate": 1e-4, "warmup_iterations": 5, "ema_decay": 0.9},
            "evaluation": {**EVALUATION, "gold": ["shapes", "shapes_strict"]},
        }
    )


def _sd35(name: str, algorithm: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": f"sd35-medium-{name}",
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": 16,
            "train_rows": 4,
            "algorithm": {"name": name, **algorithm},
            "model": {
                "path": "stabilityai/stable-diffusion-3.5-medium",
                "dtype": "bfloat16",
                "height": 512,
                "width": 512,
                "guidance": 4.5,
                "training": "lora",
                "lora_rank": 32,
                "lora_alpha": 64,
                "checkpointing": True,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": 32,
            },
            "rewards": [{"name": "pickscore", "options": {"device": "auto"}}],
            "optimizer": {"learning_rate": 1e-4, "beta2": 0.999, "weight_decay": 1e-4, "ema_decay": 0.9},
            "evaluation": {
                "every": 50,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": 40,
                "guidance": 4.5,
                "metric": "pickscore",
            },
        }
    )
