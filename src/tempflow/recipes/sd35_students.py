"""Few-step students of Stable Diffusion 3.5 Medium with the papers' settings. None has been run here on real weights.

All but one walk four useful steps, σ = 1, .9, .75, .5, 0, without guidance; the weights they save carry that grid. JPEG
compressibility stands in for a reward: it needs no further model. It judges validation and test, and where an algorithm
has samples scored it is to be replaced.
"""

from __future__ import annotations

from typing import Any

from tempflow.config import Config

RTDMD_LORA = {"height": 512, "width": 512, "training": "lora", "lora_rank": 32, "lora_alpha": 64}
"""Student and fake score are LoRAs on one base."""

RTDMD_OPTIMIZER = {"learning_rate": 3e-5, "beta2": 0.999, "ema_decay": 0.99}


def sd35_medium_segment_matching() -> Config:
    """Segment matching on SD 3.5 Medium: a student's first hours, before `sd35_medium_dmd2` (`model.start`). Ours.

    Nobody published it. Guidance, LoRA, size, batch and rates are those that RTDMD distils with (`sd35_medium_dmd2`);
    the teacher's path has eight steps, two of them within each of the student's.
    """
    return _student(
        "segment-matching", {"name": "segment_matching", "noises": 1}, RTDMD_LORA, RTDMD_OPTIMIZER, 1000, 72, 9
    )


def sd35_medium_dmd2() -> Config:
    """DMD2 on SD 3.5 Medium with the settings of RTDMD's cold start (code Harahan/RTDMD), for DMD2 has none there.

    Guidance 4.5, 10 fake updates for each of the student's, LoRA of rank 32 and alpha 64 for both, 3e-5 for both, EMA
    .99, 512², 9 pictures a GPU (72 here: of eight), 15 000 iterations of which the student's are every eleventh. Theirs
    steps by CPS with noise .9 and draws the fake's times logit-normally; here steps are Euler's.
    """
    return _student("dmd2", {"name": "dmd2", "noises": 1, "fake_updates": 10}, RTDMD_LORA, RTDMD_OPTIMIZER, 1364, 72, 9)


def sd35_medium_dp_dmd() -> Config:
    """DP-DMD on SD 3.5 Medium as its authors' code has it (train_sd35_dpdmd.py), on 8 GPUs at 4 pictures.

    All of the network, 1024², guidance 3.5, 30 teacher steps of which 5 are taught (the released script passes 10), λ
    .05, 5 fake updates, AdamW (1e-5 for both, no decay), gradient norm 1, 6 000 iterations, of which every sixth is the
    student's: 1 000 here. Their prompts are DiffusionDB's. They train on SD3's own grid of four steps, whose last one
    does next to nothing. They shard by FSDP; two roles cannot be sharded here, so weights, gradients and moments of
    both stand on each GPU, some 90 GB (an estimate); `optimizer.kind: adamw_8bit` or a LoRA takes less.
    """
    model = {"height": 1024, "width": 1024, "training": "full", "checkpointing": True}
    return _student(
        "dp-dmd", {"name": "dp_dmd", "noises": 1}, model, {"learning_rate": 1e-5, "beta2": 0.999}, 1000, 32, 4
    )


def sd35_medium_opd() -> Config:
    """On-policy distillation on SD 3.5 Medium: ten guided steps become ten plain ones, at half the forwards. Ours.

    Nobody published it. LoRA, size, batch and rates are those that RTDMD distils with. Another teacher than the
    untrained model is `model.reference`: a run's folder or a LoRA.
    """
    model = {**RTDMD_LORA, "grid": "scheduler"}
    return _student("opd", {"name": "opd", "noises": 1}, model, RTDMD_OPTIMIZER, 1000, 72, 9, steps=10)


def sd35_medium_rats() -> Config:
    """RATS on SD 3.5 Medium: four steps beside 48 of their own average, and DiffusionNFT's loss on their samples. Ours.

    Nobody published it: the paper's students are of FLUX.1 and Wan2.1, and its reward's term and constants are unknown.
    The teacher has 50 steps there, 48 here, which contain the student's. Start from a distilled student
    (`model.start`); the reward here is a stand-in, and it is trained on.
    """
    return _student("rats", {"name": "rats"}, RTDMD_LORA, RTDMD_OPTIMIZER, 400, 16, 9)


def _student(
    name: str,
    algorithm: dict[str, Any],
    model: dict[str, Any],
    optimizer: dict[str, Any],
    iterations: int,
    prompts: int,
    rows: int,
    steps: int = 4,
) -> Config:
    """`rows`: what a rank draws, or trains on, at once; the algorithm says how many noises a prompt has."""
    return Config.model_validate(
        {
            "name": f"sd35-medium-{name}",
            "iterations": iterations,
            "device": "auto",
            "rollout_rows": rows,
            "train_rows": rows,
            "algorithm": algorithm,
            "model": {
                "path": "stabilityai/stable-diffusion-3.5-medium",
                "dtype": "bfloat16",
                "grid": "useful",
                **model,
            },
            "data": {
                "train": "prompts/train.txt",
                "validation": "prompts/validation.txt",
                "test": "prompts/test.txt",
                "prompts_per_iteration": prompts,
            },
            "rewards": [{"name": "jpeg_compressibility"}],
            "optimizer": optimizer,
            "evaluation": {
                "every": 50,
                "validation_prompts": 64,
                "test_prompts": 512,
                "steps": steps,
                "metric": "jpeg_compressibility",
            },
        }
    )
