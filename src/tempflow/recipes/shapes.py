"""Runs on the embedded `shapes` world: minutes on a laptop's CPU, offline."""

from __future__ import annotations

from tempflow.config import Config

OPTIMIZER = {"learning_rate": 2e-4, "warmup_iterations": 10, "ema_decay": 0.9}
REWARDS = [{"name": "shapes"}, {"name": "shapes_strict"}]
EVALUATION = {
    "every": 10,
    "validation_prompts": 360,
    "test_prompts": 1008,
    "metric": "shapes_strict",
    "seed": 4321,  # noise that no choice of model or setting has seen
}
COMMON = {
    "steps": 6,  # trained with few steps, evaluated with ten: Flow-GRPO's denoising reduction
    "clip": 1e-2,  # never reached with one update an iteration; with more, 3e-4 is where it begins to bite
    "kl": 0.0,
    "noise_level": 0.9,
    "eps": 0.1,  # late steps hardly move the picture: their rewards' spread must not be blown up to 1
}

TOKENS_KINDS = "single,color"
"""One object each: two at once the model of tokens has not learned to draw."""


def shapes_tempflow() -> Config:
    """TempFlow-GRPO trains all of the shapes model to follow its prompts."""
    return Config.model_validate(
        {
            "name": "shapes-tempflow",
            "iterations": 110,
            "algorithm": {"name": "tempflow_grpo", "seeds": 2, "branches": 6, **COMMON},
            "rollout_rows": 192,
            "model": {"dtype": "auto"},
            "data": {"prompts_per_iteration": 18},
            "rewards": REWARDS,
            "optimizer": OPTIMIZER,
            "evaluation": EVALUATION,
        }
    )


def shapes_flow() -> Config:
    """Flow-GRPO on the same model and prompts, with the prompt's own standard deviation."""
    return Config.model_validate(
        {
            "name": "shapes-flow",
            "iterations": 110,
            "algorithm": {"name": "flow_grpo", "group": 12, "std": "group", **COMMON},
            "rollout_rows": 192,
            "model": {"dtype": "auto"},
            "data": {"prompts_per_iteration": 36},
            "rewards": REWARDS,
            "optimizer": OPTIMIZER,
            "evaluation": EVALUATION,
        }
    )


def shapes_lora() -> Config:
    """As shapes_tempflow, but a LoRA is trained and the model's own weights stay."""
    base = shapes_tempflow().model_dump()
    base |= {"name": "shapes-lora", "output": "runs/shapes-lora"}
    base["model"] |= {"training": "lora"}
    base["optimizer"] |= {"learning_rate": 1e-3}
    return Config.model_validate(base)


def demo() -> Config:
    """What `make demo` runs: V-GRPO trains all of the shapes model, and the untrained model's best guidance is the
    yardstick."""
    return Config.model_validate(
        {
            "name": "demo",
            "iterations": 100,
            "algorithm": {"name": "v_grpo", "steps": COMMON["steps"], "group": 12, "pairs": 4, "eps": COMMON["eps"]},
            "rollout_rows": 192,
            "model": {"dtype": "auto"},
            "data": {"prompts_per_iteration": 12},
            "rewards": REWARDS,
            # at 2e-4 it learns faster, and collapses after sixty iterations: the rate alone holds it
            "optimizer": {**OPTIMIZER, "learning_rate": 1e-4},
            "evaluation": {**EVALUATION, "yardstick": (1.0, 1.25, 1.5, 2.0)},
        }
    )


def shapes_tokens() -> Config:
    """UDM-GRPO trains all of the shapes model of tokens: clean tokens are the actions."""
    return Config.model_validate(
        {
            "name": "shapes-tokens",
            "iterations": 100,
            "algorithm": {"name": "udm_grpo", "steps": 8, "group": 12, "eps": COMMON["eps"]},
            "rollout_rows": 144,
            "train_rows": 144,
            "model": {"path": "shapes_tokens", "dtype": "auto"},
            "data": {
                **{split: f"shapes:{split}:{TOKENS_KINDS}" for split in ("train", "validation", "test")},
                "prompts_per_iteration": 12,
            },
            "rewards": REWARDS,
            # at 3e-4, with half the prompts and ten steps, it collapses within 36 iterations
            "optimizer": {**OPTIMIZER, "learning_rate": 1e-4, "warmup_iterations": 3},
            "evaluation": EVALUATION,
        }
    )
