"""Runs on the embedded `shapes` world: minutes on a laptop's CPU, offline."""

from __future__ import annotations

from tempflow.config import Config

OPTIMIZER = {"learning_rate": 2e-4, "ema_decay": 0.9, "warmup_iterations": 2}


def shapes_tempflow() -> Config:
    """TempFlow-GRPO trains all of the shapes model to follow its prompts."""
    return Config.model_validate(
        {
            "name": "shapes-tempflow",
            "iterations": 60,
            "algorithm": {
                "name": "tempflow_grpo",
                "seeds": 2,
                "branches": 6,
                "branch_steps": 4,
                "clip": 5e-3,
                "kl": 0.0,
            },
            "data": {"prompts_per_iteration": 12},
            "optimizer": OPTIMIZER,
        }
    )


def shapes_flow() -> Config:
    """Flow-GRPO on the same model and prompts, with the prompt's own standard deviation."""
    return Config.model_validate(
        {
            "name": "shapes-flow",
            "iterations": 60,
            "algorithm": {"name": "flow_grpo", "group": 12, "clip": 5e-3, "kl": 0.0, "std": "group"},
            "data": {"prompts_per_iteration": 12},
            "optimizer": OPTIMIZER,
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
    """What `make demo` runs: shapes_tempflow, a few minutes long."""
    return Config.model_validate(shapes_tempflow().model_dump() | {"name": "demo", "output": "runs/demo"})
