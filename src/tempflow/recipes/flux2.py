"""FLUX.2 with Flow-Factory's settings, as far as they are known (read in its configurations)."""

from __future__ import annotations

from tempflow.config import Config


def flux2_dev_flow_grpo() -> Config:
    """Flow-GRPO with one noisy step on FLUX.2 [dev], by Flow-Factory's settings; bring your prompts and your reward.

    512², 8 steps, embedded guidance 4, noise 1.0 at one step (of 1 to 3 there, of 0 to 3 here), 48 prompts of 16
    pictures, LoRA of rank 64 and alpha 128, learning rate 3e-4, clip 1e-4, no KL; 8 processes, their GPUs are not
    stated. JPEG compressibility stands in for a reward of yours. The weights alone are 60 GiB in bfloat16, the text
    encoder's 45. Their licence is non-commercial: `model.accept_licence` wants its name.
    """
    return _run("flux2-dev-flow-grpo", "black-forest-labs/FLUX.2-dev", 512, 8, 1.0)


def flux2_klein_flow_grpo() -> Config:
    """The same on FLUX.2 [klein] base 9B: 384², classifier-free guidance 4 against the empty text, noise 0.7.

    8 processes again. `black-forest-labs/FLUX.2-klein-base-4B` is smaller, and its licence is Apache-2.0; 9B's is
    non-commercial. Prompts have no negative texts: klein takes none.
    """
    return _run("flux2-klein-flow-grpo", "black-forest-labs/FLUX.2-klein-base-9B", 384, 8, 0.7)


def _run(name: str, path: str, side: int, steps: int, noise: float) -> Config:
    return Config.model_validate(
        {
            "name": name,
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": 8,
            "train_rows": 1,
            "algorithm": {
                "name": "flow_grpo_fast",
                "kind": "sde",
                "steps": steps,
                "group": 16,
                "window": 1,
                "window_end": 4,
                "noise_level": noise,
                "clip": 1e-4,
                "std": "group",
            },
            "model": {
                "path": path,
                "dtype": "bfloat16",
                "height": side,
                "width": side,
                "guidance": 4.0,
                "training": "lora",
                "lora_rank": 64,
                "lora_alpha": 128,
                "checkpointing": True,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": 48,
            },
            "rewards": [{"name": "jpeg_compressibility"}],
            "optimizer": {"learning_rate": 3e-4},
            "evaluation": {
                "every": 20,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": 28,
                "guidance": 4.0,
                "metric": "jpeg_compressibility",
            },
        }
    )
