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
    iterations: int = 50
    repeat: int = 2
    rate: float = 6e-3


COMMON: dict[str, Any] = {
    "steps": 6,
    "group": 12,
    "noise_level": 0.9,
    "clip": 0.2,  # a latent has two elements, so the mean log-density is no smaller than that of plain PPO
    "kl": 0.0,
    "std": "group",
    "eps": 1e-2,
}

CHAIN = {"steps": 4}  # one reward for all steps of a path: the fewer, the less noise in each one's share

PAIR = {"steps": 4, "fake_updates": 2, "fake_rate": 2.0, "turns": 2}
"""A student of four steps and its fake score."""

TOYS: dict[str, Toy] = {
    "flow_grpo": Toy(CHAIN, iterations=60),
    "flow_grpo_fast": Toy({"noise_level": 0.8}),
    "flash_grpo": Toy(iterations=40, repeat=4),
    "tempflow_grpo": Toy({"seeds": 2, "branches": 6}, iterations=40, repeat=1),
    # knobs known from language models
    "rloo": Toy(CHAIN, iterations=60),
    "dr_grpo": Toy(CHAIN, iterations=60),
    "reinforce_pp": Toy(CHAIN, iterations=60),
    "dapo": Toy({"clip_high": 0.28, **CHAIN}, iterations=60),
    "gspo": Toy({"clip": 0.1, **CHAIN}, iterations=60),
    "cispo": Toy(CHAIN, iterations=60),
    "sapo": Toy({"temperature": 5.0, "temperature_negative": 5.25, **CHAIN}, iterations=60),
    # comparisons, advantage shapes, bonuses
    "pref_grpo": Toy({"train_steps": 5}),
    "slas": Toy({"train_steps": 5, "noise_level": 0.6}),
    "perceptual_entropy": Toy(),
    "ddpo": Toy(),
    # the step, the ratio, and credit along and across the latent
    "flow_cps": Toy({"noise_level": 0.8}),
    "flow_dppo": Toy({"noisy_steps": 3, "first_steps": 5, "threshold": 1e-2}, iterations=60),
    "grpo_guard": Toy({"weight": "equalised"}),
    "gcpo": Toy({"sizes": (1, 2, 2), "share": 1.0}),
    "otca": Toy({"noise_level": 0.6}),
    "vipo": Toy({"noise_level": 0.6}, iterations=40, rate=1e-2),
    # windows and trees
    "dance_grpo": Toy({"noise_level": 0.6}, iterations=40),
    "mix_grpo": Toy({"window": 3, "order": "random", "every": 1}),
    "mix_grpo_flash": Toy({"window": 3, "order": "random", "every": 1, "shift": 1.0}),
    "branch_grpo": Toy({"trees": 2, "splits": (0, 1, 2), "noise_level": 0.3}),
    "drm_grpo": Toy({"candidates": 4}),
    "dynamic_treerpo": Toy({"trees": 2, "depth": 3, "order": "random", "every": 1}, iterations=40, repeat=3),
    # the forward process: leaves and their (t, ε)
    "diffusion_nft": Toy(),
    "sol_rl": Toy({"pool": 24, "draft_steps": 3}, iterations=35),
    "e2po": Toy({"noises": 3, "conditions": 4}),
    "awm": Toy({"steps": 8}),
    "advantage_flow": Toy({"pairs": 4}),
    "v_grpo": Toy(repeat=4),
    # by initial noises alone its points come to lie on each other, short of the corner, and nothing is left to compare
    "elbo_pg": Toy({"steps": 4, "rollout": "sde", "scale": "group"}, iterations=40),
    "dgpo": Toy({"beta": 1.0}),
    "crd": Toy(),
    "online_dpo": Toy({"beta": 1.0}),
    "rejection_sft": Toy({"best": 3}, rate=1e-2),
    # the reward's own gradient
    "refl": Toy({"late": 3, "noises": 8}, iterations=60, repeat=1, rate=1e-2),
    "draft": Toy({"last": 2, "noises": 8}, iterations=60, repeat=1, rate=1e-2),
    "srpo": Toy({"noises": 8}, iterations=60, repeat=1, rate=1e-2),
    # pictures of what the untrained model draws
    "diffusion_dpo": Toy({"beta": 1.0}),
    "sft": Toy(rate=1e-2),
    # students of a teacher that knows the corner
    "segment_matching": Toy({"steps": 4, "noises": 12}, iterations=40, repeat=1, rate=1e-2),
    "dmd2": Toy({"noises": 12, **PAIR}, iterations=40, repeat=1, rate=1e-2),
    "dp_dmd": Toy({"noises": 12, **PAIR}, iterations=40, repeat=1, rate=1e-2),
    "gdmd": Toy({"steps": 4, "noises": 12, "turns": 4}, iterations=40, repeat=1, rate=1e-2),
    "rtdmd": Toy({"noises": 4, "fake_updates": 2, "train_steps": None, **CHAIN}, iterations=60),
    # it starts as its teacher, so only the reward leads anywhere
    "rats": Toy({"noises": 12, "parts": 2, "weight": 0.1, "turns": 2}, iterations=40, rate=1e-2),
    "opd": Toy({"noises": 12}, iterations=40, repeat=1, rate=1e-2),
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
