"""Stable Diffusion 1.5 and XL: the first family that was trained so (DDPO), by DDIM's steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tempflow.config import Config

DDPO = {"name": "ddpo", "steps": 50, "group": 16, "clip": 1e-4, "advantage_clip": 5.0}
OPTIMIZER = {"learning_rate": 3e-4, "beta2": 0.999, "weight_decay": 1e-4, "updates_per_iteration": 4}


def sd15_ddpo() -> Config:
    """DDPO on Stable Diffusion 1.5 with the settings of its authors' PyTorch code; bring your prompts and reward.

    As recalled, not read again: 50 steps of DDIM with η 1, guidance 5, 256 pictures and 4 updates an iteration, clip
    1e-4, AdamW (3e-4, .9, .999, decay 1e-4), LoRA of rank 4; 8 GPUs. There a prompt's statistics gather over many
    iterations; here 16 prompts have 16 pictures each. JPEG compressibility is one of the paper's own rewards.
    """
    return _run("sd15-ddpo", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, {"lora_rank": 4, "lora_alpha": 4})


def sdxl_ddpo() -> Config:
    """The same on Stable Diffusion XL at 1024²; bring your prompts and your reward.

    No settings of XL were published with the method: those of SD 1.5 but for the LoRA (rank 32, alpha 64) and for
    activation checkpointing are kept, as a start. Not run on the released weights.
    """
    lora = {"lora_rank": 32, "lora_alpha": 64, "checkpointing": True}
    return _run("sdxl-ddpo", "stabilityai/stable-diffusion-xl-base-1.0", 1024, lora)


def _run(name: str, path: str, side: int, lora: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "iterations": 100,
            "device": "auto",
            "rollout_rows": 16,
            "train_rows": 4,
            "algorithm": DDPO,
            "model": {
                "path": path,
                "dtype": "bfloat16",
                "height": side,
                "width": side,
                "guidance": 5.0,
                "training": "lora",
                **lora,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": 16,
            },
            "rewards": [{"name": "jpeg_compressibility"}],
            "optimizer": OPTIMIZER,
            "evaluation": {
                "every": 10,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": 50,
                "guidance": 5.0,
                "metric": "jpeg_compressibility",
            },
        }
    )
