"""Stable Diffusion 3.5 Medium with the papers' settings (trajectory methods, 512², LoRA)."""

from __future__ import annotations

from tempflow.config import Config


def sd35_medium_tempflow() -> Config:
    """TempFlow-GRPO on SD 3.5 Medium with the official code's settings; bring your prompt files and your reward.

    From config/dgx.py and config/base.py: 10 steps (40 in evaluation), guidance 4.5, 4 seeds of 6 branches, noise 0.7,
    clip 1e-4, exact KL 0.004, 48 prompts and 2 updates an iteration, LoRA of rank 32 and alpha 64 on the attention,
    AdamW (3e-4, .9, .999, decay 1e-4), EMA .9. The paper's runs use float16; bfloat16 here, as float16 is not offered.
    JPEG compressibility stands in for PickScore or GenEval: it needs no further model, and it is to be replaced.
    """
    return Config.model_validate(
        {
            "name": "sd35-medium-tempflow",
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": 24,
            "train_rows": 6,
            "algorithm": {"name": "tempflow_grpo"},
            "model": {
                "path": "stabilityai/stable-diffusion-3.5-medium",
                "dtype": "bfloat16",
                "height": 512,
                "width": 512,
                "guidance": 4.5,
                "training": "lora",
                "lora_rank": 32,
                "lora_alpha": 64,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": 48,
            },
            "rewards": [{"name": "jpeg_compressibility"}],
            "optimizer": {
                "learning_rate": 3e-4,
                "beta2": 0.999,
                "weight_decay": 1e-4,
                "updates_per_iteration": 2,
                "ema_decay": 0.9,
            },
            "evaluation": {
                "every": 50,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": 40,
                "guidance": 4.5,
                "metric": "jpeg_compressibility",
            },
        }
    )
