"""Base models for which nobody published a setting: Flow-GRPO as on SD 3.5 Medium, with the model's own guidance.

Nothing here was tuned, or run on the real weights. JPEG compressibility stands in for a reward: it is to be replaced.
"""

from __future__ import annotations

from tempflow.config import Config


def cogview4_flow_grpo() -> Config:
    """Flow-GRPO on CogView4 6B at 512², LoRA: settings of SD 3.5 Medium, as nobody published any for this model."""
    return _flow_grpo("cogview4-flow-grpo", "THUDM/CogView4-6B", 5.0)


def lumina2_flow_grpo() -> Config:
    """Flow-GRPO on Lumina-Image 2 at 512², LoRA: settings of SD 3.5 Medium, as nobody published any for this model."""
    return _flow_grpo("lumina2-flow-grpo", "Alpha-VLLM/Lumina-Image-2.0", 4.0)


def _flow_grpo(name: str, path: str, guidance: float) -> Config:
    """10 steps (40 in evaluation), groups of 24, noise 0.7, clip 1e-4, KL 0.04 (Flow-GRPO's form), 48 prompts and 2
    updates an iteration, LoRA of rank 32 and alpha 64 on the attention, AdamW (3e-4, .9, .999, decay 1e-4), EMA .9;
    `guidance` is the default of the model's pipeline."""
    return Config.model_validate(
        {
            "name": name,
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": 24,
            "train_rows": 6,
            "algorithm": {"name": "flow_grpo"},
            "model": {
                "path": path,
                "dtype": "bfloat16",
                "height": 512,
                "width": 512,
                "guidance": guidance,
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
                "guidance": guidance,
                "metric": "jpeg_compressibility",
            },
        }
    )
