"""FLUX.1 [dev], FLUX.2, Qwen-Image and Z-Image with the settings that others have published (512², LoRA of rank 64 and
alpha 128, PickScore as the reward, bfloat16). None of them has been run here on real weights.

JPEG compressibility stands in for PickScore: it needs no further model, and it is to be replaced.
"""

from __future__ import annotations

from typing import Any

from tempflow.config import Config


def flux1_dev_flow_grpo() -> Config:
    """Flow-GRPO on FLUX.1 [dev] as its authors' code has it (config/grpo.py `pickscore_flux`): 32 GPUs, or 8, at 3
    pictures a GPU.

    6 steps of which 5 are trained (28 in evaluation), embedded guidance 3.5, groups of 24, 48 prompts and 2 updates an
    iteration, noise 0.9, clip 1e-4, no KL, AdamW (3e-4, .9, .999, decay 1e-4), EMA .9. The LoRA is on attention and
    feed-forward layers. They cut prompts at 128 tokens of T5; here it is the pipeline's own 512. The weights' licence
    is a non-commercial one: `model.accept_licence`.
    """
    return _recipe(
        "flux1-dev-flow-grpo",
        {"name": "flow_grpo", "steps": 6, "group": 24, "noise_level": 0.9, "clip": 1e-4, "kl": 0.0},
        {"path": "black-forest-labs/FLUX.1-dev", "guidance": 3.5},
        prompts=48,
        rows=3,
        steps=28,
        ema=0.9,
    )


def qwen_image_flow_grpo() -> Config:
    """Flow-GRPO on Qwen-Image as its authors' code has it (config/grpo.py `pickscore_qwenimage`): 32 GPUs, or 8, at 4
    pictures a GPU, FSDP, optimizer states on the CPU.

    10 steps (50 in evaluation), of which a window of two in the first half draws noise and is trained, guidance 4,
    groups of 16, 32 prompts and 2 updates an iteration, noise 1.2, clip 1e-4, no KL, AdamW (3e-4, .9, .999, decay
    1e-4), no EMA, activation checkpointing. The LoRA's layers and rank are those of verl's recipe for this model.
    """
    return _recipe(
        "qwen-image-flow-grpo",
        {
            "name": "flow_grpo_fast",
            "kind": "sde",
            "steps": 10,
            "group": 16,
            "window": 2,
            "window_end": 5,
            "noise_level": 1.2,
            "clip": 1e-4,
        },
        {"path": "Qwen/Qwen-Image", "guidance": 4.0, "checkpointing": True},
        prompts=32,
        rows=4,
        steps=50,
        ema=0.0,
    )


def z_image_flow_grpo() -> Config:
    """Flow-GRPO on Z-Image as Flow-Factory has it (examples/grpo/lora/z_image): 8 processes at one picture each, of
    GPUs that it does not name.

    10 steps (40 in evaluation), one of which draws noise and is trained, guidance 5 (the pipeline's scale 4), groups of
    16, 48 prompts and 2 updates an iteration, noise 0.7, clip 1e-4, no KL, the group's own standard deviation, AdamW
    (3e-4, .9, .999, decay 1e-4), EMA .9. Theirs draws that step from steps 1 to 3, here it is from 0 to 3; theirs
    evaluates at 1024².
    """
    return _recipe(
        "z-image-flow-grpo",
        {
            "name": "flow_grpo_fast",
            "kind": "sde",
            "steps": 10,
            "group": 16,
            "window": 1,
            "window_end": 4,
            "noise_level": 0.7,
            "clip": 1e-4,
            "std": "group",
        },
        {"path": "Tongyi-MAI/Z-Image", "guidance": 5.0},
        prompts=48,
        rows=1,
        steps=40,
        ema=0.9,
    )


def flux2_dev_flow_grpo() -> Config:
    """Flow-GRPO on FLUX.2 [dev] as Flow-Factory has it: 8 processes, of GPUs that it does not name.

    8 steps, one of which draws noise (1.0) and is trained: of steps 1 to 3 there, 0 to 3 here. Embedded guidance 4, and
    what `z_image_flow_grpo` has beside, the evaluation's 40 steps at the size of training too (theirs were not looked
    up). Activation checkpointing is ours: the weights are 60 GiB in bfloat16, the text encoder's 45. Their licence is
    non-commercial: `model.accept_licence`.
    """
    return _flux2("flux2-dev-flow-grpo", "black-forest-labs/FLUX.2-dev", 512, 1.0)


def flux2_klein_flow_grpo() -> Config:
    """The same on FLUX.2 [klein] base 9B: 384², classifier-free guidance 4 against the empty text, noise 0.7.

    `black-forest-labs/FLUX.2-klein-base-4B` is smaller, and its licence is Apache-2.0; that of 9B is non-commercial.
    Prompts may have no negative texts.
    """
    return _flux2("flux2-klein-flow-grpo", "black-forest-labs/FLUX.2-klein-base-9B", 384, 0.7)


def _flux2(name: str, path: str, side: int, noise: float) -> Config:
    return _recipe(
        name,
        {
            "name": "flow_grpo_fast",
            "kind": "sde",
            "steps": 8,
            "group": 16,
            "window": 1,
            "window_end": 4,
            "noise_level": noise,
            "clip": 1e-4,
            "std": "group",
        },
        {"path": path, "guidance": 4.0, "height": side, "width": side, "checkpointing": True},
        prompts=48,
        rows=1,
        steps=40,
        ema=0.9,
    )


def _recipe(
    name: str, algorithm: dict[str, Any], model: dict[str, Any], *, prompts: int, rows: int, steps: int, ema: float
) -> Config:
    """`steps`: the evaluation's; `rows`: pictures that a rank draws, or trains on, at once."""
    return Config.model_validate(
        {
            "name": name,
            "iterations": 1000,
            "device": "auto",
            "rollout_rows": rows,
            "train_rows": rows,
            "algorithm": algorithm,
            "model": {
                "dtype": "bfloat16",
                "height": 512,
                "width": 512,
                "training": "lora",
                "lora_rank": 64,
                "lora_alpha": 128,
                **model,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": prompts,
            },
            "rewards": [{"name": "jpeg_compressibility"}],
            "optimizer": {
                "learning_rate": 3e-4,
                "beta2": 0.999,
                "weight_decay": 1e-4,
                "updates_per_iteration": 2,
                "ema_decay": ema,
            },
            "evaluation": {
                "every": 30,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": steps,
                "guidance": model["guidance"],
                "metric": "jpeg_compressibility",
            },
        }
    )
