"""How each algorithm is run on the toys: one entry per registered name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tempflow.algorithms import Algorithm


@dataclass(frozen=True)
class Toy:
    """Settings for one algorithm.

    fields      arguments of its function, beside those of `COMMON` that it has
    iterations  of training on the mixture, each with `repeat` groups for every one of the four prompts
    rate        AdamW's first learning rate; it falls to 0 on a straight line
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 30
    repeat: int = 2
    rate: float = 1e-2


COMMON: dict[str, Any] = {
    "steps": 6,
    "group": 12,
    "noise_level": 0.9,
    "clip": 0.2,  # a latent has two elements, so the mean log-density is no smaller than that of plain PPO
    "kl": 0.0,
    "std": "group",
    "eps": 1e-2,
}

TOYS: dict[str, Toy] = {
    "flow_grpo": Toy(),
    "flow_grpo_fast": Toy({"noise_level": 0.8}),
    "flash_grpo": Toy(iterations=40, repeat=4),
    "tempflow_grpo": Toy({"seeds": 2, "branches": 6}, repeat=1),
    # knobs known from language models
    "rloo": Toy(),
    "dr_grpo": Toy(),
    "reinforce_pp": Toy(),
    "dapo": Toy({"clip_high": 0.28}),
    "gspo": Toy({"clip": 0.1}),
    "cispo": Toy(),
    "sapo": Toy({"temperature": 5.0, "temperature_negative": 5.25}),
    # comparisons, advantage shapes, bonuses
    "pref_grpo": Toy({"train_steps": 5}),
    "slas": Toy({"train_steps": 5, "noise_level": 0.6}),
    "perceptual_entropy": Toy(),
    "ddpo": Toy(),
}


def toy(name: str) -> Toy:
    """The entry of that algorithm. Raises AssertionError saying how to add one."""
    assert name in TOYS, (
        f"{name!r} is registered in tempflow.algorithms but has no toy settings: add it to TOYS in "
        f"tests/toys/settings.py, as '{name}': Toy(), and give fields until it closes 0.6 of the gap with three seeds"
    )
    return TOYS[name]


def build(function: Callable[..., Algorithm], toy: Toy) -> Algorithm:
    """The algorithm with the common arguments that its function has, and its own."""
    known = inspect.signature(function).parameters
    return function(**{**{k: v for k, v in COMMON.items() if k in known}, **toy.fields})
