"""Distribution matching whose first step is taught by the teacher, so that a few-step student keeps its variety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.cost import Cost, rows_of
from tempflow.core.distill import mean_velocity, velocity_error
from tempflow.core.objective.distill import DistributionMatching, check_models
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.schedule import Schedule, refined
from tempflow.core.unroll import unroll


@dataclass(frozen=True)
class TaughtFirstStep:
    """L_DMD(x_θ) + λ·mean (v_θ(ε, σ_0) − ṽ)²: DP-DMD (arXiv 2602.03139).

    The student walks all its steps from ε to x_θ, and a cut behind the first gives that step no gradient of L_DMD. Its
    own loss regresses ṽ = (ε − z̃)/(σ_0 − t̃), the mean velocity of the first `taught` of the teacher's own Euler steps
    from the same ε, with its guidance: by it one step lands on z̃ at t̃.

    matching       L_DMD with its teacher; its `samples` and `last` play no part here
    weight         λ
    taught         K; with all the teacher's steps t̃ is its last σ
    teacher_steps  of the teacher from the student's first σ to its last
    shift          how these are spaced (`schedule.refined`)

    Raises ValueError for a weight that is negative or not finite, `taught` outside 1 … `teacher_steps`, or a shift that
    is not above 0.
    """

    matching: DistributionMatching = field(default_factory=lambda: DistributionMatching(anchor="noisy"))
    weight: float = 0.05
    taught: int = 5
    teacher_steps: int = 30
    shift: float = 3.0

    def __post_init__(self) -> None:
        not_negative("weight", self.weight, "0 leaves the first step untaught")
        positive("shift", self.shift, 3.0)
        if not 1 <= self.taught <= self.teacher_steps:
            near = min(max(self.taught, 1), max(1, self.teacher_steps))
            raise ValueError(f"taught: {self.taught} of {self.teacher_steps} steps; nearest valid: {near}")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return self.matching.weight_sets

    @property
    def guidance(self) -> Mapping[str, float]:
        return self.matching.guidance

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps."""
        walked, strength = self.taught + 1, self.matching.strength
        return Cost(1 + walked, 0, steps) if strength is None else Cost(1, 0, steps, walked * rows_of(strength))

    def grid(self, schedule: Schedule) -> Schedule:
        """The teacher's, for a student on that one."""
        ends = replace(schedule, sigmas=schedule.sigmas[[0, -1]])
        return refined(ends, self.teacher_steps, self.shift)

    def target(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Tensor:
        """ṽ [B, *S], without gradients."""
        grid, teacher = self.grid(batch.schedule), models[self.matching.teacher]
        part = unroll(batch.x, grid, teacher, batch.rows, stop=self.taught, look=False, last=0, layout=batch.layout)
        return mean_velocity(batch.x, part.x, grid.at(torch.zeros_like(part.stop)), part.sigma.cpu())

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only. Raises ValueError for a grid of
        one step, behind whose first there is nothing to match."""
        check_models(models, self.weight_sets)
        if batch.schedule.steps < 2:
            raise ValueError("steps: 1, and what follows the first step is matched; nearest valid: 2")
        walk = unroll(batch.x, batch.schedule, models["policy"], batch.rows, cuts=[1], layout=batch.layout)
        matched, metrics = self.matching.matched(models, walk.x0(), batch)
        with torch.no_grad():
            target = self.target(models, batch)
        error = velocity_error(walk.visits[0].velocity, target, batch.layout)
        return Loss((matched + self.weight * error).mean(), {**metrics, "first_error": error.detach()})
