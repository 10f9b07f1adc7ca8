"""Per-edge loss weights [E]. Each has mean 1 over the distinct trained steps of the forest.

On-policy, a step's score-function gradient has size c_i = |b_i|/s_i, about 26 times larger late than early on SD 3.5's
grid. Every published remedy is a weight on this one quantity (trajectory.md §0).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tempflow.core.dynamics import Dynamics
from tempflow.core.forest import Forest
from tempflow.core.schedule import Schedule

Weight = Callable[[Forest, Schedule, Dynamics], Tensor]


def uniform(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """1 for every edge (Flow-GRPO)."""
    return torch.ones_like(forest.edges.scale)


def noise_aware(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i = S_i / mean(S) (TempFlow-GRPO, arXiv 2508.04324, Eq. 7–8): steps count by the noise they inject.

    The mean runs over *trained* steps: this reproduces the official code's constants 2.25 (SD 3.5, a = .7),
    1.73 (FLUX 1024², a = .9) and 1.53 (Qwen-Image 512², a = 1.2) as its reciprocals.
    """
    step, scale = forest.edges.step, forest.edges.scale
    return mean_one(forest, dynamics.coefficients(schedule, step, scale)[2])


def ratio_norm(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i ∝ S_i / Δ_i: by which GRPO-Guard (ratio exponent × S_i, loss × 1/Δ_i) rescales a step's gradient."""
    step, scale = forest.edges.step, forest.edges.scale
    return mean_one(forest, dynamics.coefficients(schedule, step, scale)[2] / schedule.delta(step))


def equalised(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i ∝ 1/|b_i|: with GRPO-Guard's ratio, whose gradient has size |b_i|, equal gradients at all steps."""
    b = dynamics.coefficients(schedule, forest.edges.step, forest.edges.scale)[1]
    return mean_one(forest, 1 / b.abs())


def inverse_step(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i ∝ 1/Δ_i: GRPO-Guard's loss weight beside its normalised ratio, in its flow_sde form."""
    return mean_one(forest, 1 / schedule.delta(forest.edges.step))


def rectified(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i ∝ 1 / c_i, equal gradients at all steps (Flash-GRPO's A/λ, λ = c computed instead of tabulated)."""
    _, b, std = dynamics.coefficients(schedule, forest.edges.step, forest.edges.scale)
    return mean_one(forest, std / b.abs())  # so written, an untrained edge without noise (CPS into σ = 0) gives 0


def mean_one(forest: Forest, raw: Tensor) -> Tensor:
    """`raw` [E] divided by its mean over trained steps, each counted once however many edges it has."""
    trained = forest.edges.trained.to(raw.dtype)
    nothing = torch.zeros(forest.steps, dtype=raw.dtype, device=raw.device)
    total = nothing.index_add(0, forest.edges.step, trained * raw)
    count = nothing.index_add(0, forest.edges.step, trained)
    return (raw / (total / count)[count > 0].mean()).float()
