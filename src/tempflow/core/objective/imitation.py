"""Losses from starting noises that imitate a teacher step by step. Who learns bears gradients, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.checks import not_negative
from tempflow.core.cost import Cost, rows_of
from tempflow.core.distill import segment_targets, teacher_path, velocity_error
from tempflow.core.objective.distill import NONE, asked, check_models
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.unroll import Unrolled, unroll


@dataclass(frozen=True)
class SegmentMatching:
    """mean over the student's steps of mean (v_θ(x_k, σ_k) − (x_k − x_{k+1})/(σ_k − σ_{k+1}))², where x_0 … x_T are the
    teacher's own path at the student's nodes: by these velocities T Euler steps land where the teacher does.

    parts     Euler steps of the teacher within one of the student's
    shift     how they are spaced (`schedule.refined`)
    strength  the teacher's guidance; None: the run's
    teacher   the network whose path is imitated

    It is DP-DMD's loss of the first step (arXiv 2602.03139) on every step, and progressive distillation (arXiv
    2202.00512) in one go. Raises ValueError for parts below 1.
    """

    parts: int = 2
    shift: float = 1.0
    strength: float | None = None
    teacher: str = "reference"

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts: {self.parts} must be at least 1; nearest valid: 1")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy", self.teacher)

    @property
    def guidance(self) -> Mapping[str, float]:
        return NONE if self.strength is None else {self.teacher: self.strength}

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps: the teacher's whole path, and every step of the student's."""
        walked = self.parts * steps
        return Cost(walked, 0, steps) if self.strength is None else Cost(0, 0, steps, walked * rows_of(self.strength))

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        check_models(models, self.weight_sets)
        grid, layout, rows = batch.schedule, batch.layout, batch.rows
        with torch.no_grad():
            path = teacher_path(batch.x, grid, models[self.teacher], rows, self.parts, self.shift, layout)
            target = segment_targets(path, grid)
        steps, size = grid.steps, len(batch)
        step = torch.arange(steps, device=batch.x.device).repeat_interleave(size)
        of_all = layout.take(torch.arange(size, device=batch.x.device).repeat(steps))
        said = asked(models, "policy", path[:-1].flatten(0, 1), grid.at(step), rows.repeat(steps), of_all)
        error = velocity_error(said, target.flatten(0, 1), of_all).view(steps, size)
        return Loss(error.mean(), {"error": error.detach().mean(0), **_ends(error)})


@dataclass(frozen=True)
class OnPolicyMatching:
    """mean over the student's steps of w_k·mean (v_θ(x_k, σ_k) − v_teacher(x_k, σ_k))² at the states x_k of its own
    walk, through which no gradient flows: on-policy distillation.

    power     w_k = σ_k^power, divided by its mean over the steps: 0 weighs velocities alike, 2 predicted clean samples
    strength  the teacher's guidance
    teacher   the network that is asked

    Raises ValueError for a power that is negative or not finite.
    """

    power: float = 0.0
    strength: float = 1.0
    teacher: str = "reference"

    def __post_init__(self) -> None:
        not_negative("power", self.power, "0 weighs all steps alike")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy", self.teacher)

    @property
    def guidance(self) -> Mapping[str, float]:
        return {self.teacher: self.strength}

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps: the walk itself is what is trained."""
        return Cost(0, 0, steps, steps * rows_of(self.strength))

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        check_models(models, self.weight_sets)
        visits = own_steps(models["policy"], batch).visits
        errors = list[Tensor]()
        for visit in visits:
            t = batch.schedule.at(visit.step).to(batch.x.device)
            with torch.no_grad():
                target = asked(models, self.teacher, visit.x, t, batch.rows, batch.layout)
            errors.append(velocity_error(visit.velocity, target, batch.layout))
        error = torch.stack(errors)
        weight = batch.schedule.sigmas[:-1].to(error).pow(self.power)
        loss = (weight / weight.mean()) @ error / len(visits)
        return Loss(loss.mean(), {"error": error.detach().mean(0), **_ends(error)})


def own_steps(predict: Predict, batch: NoiseBatch) -> Unrolled:
    """The student's own walk: every prediction has a gradient, and no state on the way."""
    cuts = range(1, batch.schedule.steps)
    return unroll(batch.x, batch.schedule, predict, batch.rows, cuts=cuts, layout=batch.layout)


def _ends(error: Tensor) -> dict[str, Tensor]:
    """What the first and the last step lack, of each row."""
    return {"error_first": error[0].detach(), "error_last": error[-1].detach()}
