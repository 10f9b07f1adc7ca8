"""Sana 1.6B at 1024² with Sol-RL's settings (forward-process methods, LoRA)."""

from __future__ import annotations

from tempflow.config import Config


def sana_sol_rl() -> Config:
    """Sol-RL on Sana 1.6B with the official code's settings (8 GPUs); bring your prompt files and your reward.

    From configs/sol_rl/sana.py (read in source): 1024², pools of 96 drafted in 6 steps, 24 kept and drawn in 10 (40 in
    evaluation), no guidance, KL 1e-4, 48 prompts and 1 update an iteration, 16 rows at once in training, LoRA on both
    attentions. From the paper's table (second-hand): six of ten times are trained. What that file leaves to another
    one is DiffusionNFT's: rank 32, alpha 64, AdamW (3e-4, .9, .999, decay 1e-4), EMA .9.
    Theirs drafts in NVFP4 (`algorithm.draft_precision nvfp4`, on a GPU that has it), starts from a checkpoint of its
    own (SANA_LinearFFN) and gives no instruction before the prompt, as the pipeline does.
    JPEG compressibility stands in for PickScore, CLIPScore, HPSv2 or ImageReward, and it is to be replaced.
    """
    return Config.model_validate(
        {
            "name": "sana-sol-rl",
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": 24,
            "train_rows": 16,
            "algorithm": {"name": "sol_rl", "fraction": 0.6},
            "model": {
                "path": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
                "dtype": "bfloat16",
                "height": 1024,
                "width": 1024,
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
            "optimizer": {"learning_rate": 3e-4, "beta2": 0.999, "weight_decay": 1e-4, "ema_decay": 0.9},
            "evaluation": {
                "every": 50,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": 40,
                "metric": "jpeg_compressibility",
            },
        }
    )
