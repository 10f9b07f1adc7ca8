"""Targets of distribution matching that a reward has judged: what GDMD's student regresses (arXiv 2604.19009).

A step of distribution matching asks the student's sample x0 to become y = sg[x0 − g]. That is a clean sample, so it can
be decoded and scored; how much better it is than x0 says how far the student follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.cost import Cost, rows_of
from tempflow.core.distill import (
    guided,
    implicit_target,
    matching_gradient,
    negative_aware,
    pull,
    signed_squares,
    target_optimality,
)
from tempflow.core.likelihood_proxy import x0_of_velocity
from tempflow.core.objective.distill import NONE, Anchor, OwnSamples, asked, check_models, noised
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.solver import predict_clean
from tempflow.core.times import Times, UniformTimes
from tempflow.core.unroll import Visit

Head = Literal["nft", "signed"]

LEAST_SPREAD = 1e-4
"""Of scores: where all were equal so far, any difference counts in full."""


@dataclass(frozen=True)
class GuidedTargets:
    """λ·½·mean (x − y)² + γ·head(x, x_old, y, r), with r = ½ + ½·clip((R(y) − R(x0))/Z, −1, 1) (GDMD, Eq. 3–7).

    `old` walks from noise to a node drawn for each row, where x_old = x0 is its sample; y = sg[x0 − g] is made there
    from teacher and fake. The policy is asked at that same state: x = x_t − σ·v_θ(x_t), one prediction with gradient.

    weights   (λ, γ): of the plain regression and of the head
    head      "nft": `distill.negative_aware`, the paper's; "signed": `distill.signed_squares`, ours
    mix       β of the "nft" head
    anchor    γ' > 1 of the "signed" head
    spread    Z; None: the standard deviation of all scores that the run's losses had asked for (`NoiseBatch.spread`)
    times     of x_t for g, of which the first is taken, of each row
    normaliser  what g is divided by, as `DistributionMatching.anchor`: "none" moves y by x̂_fake − x̂_real itself
    strength  the teacher's guidance; None: the run's

    A row whose target or own sample has no score, and all rows while no spread is known, are left λ·½·mean (x − y)².
    Raises ValueError for an unknown head, weights below 0, and a mix, an anchor or a spread out of range.
    """

    weights: tuple[float, float] = (1.0, 1.0)
    head: Head = "nft"
    mix: float = 1.0
    anchor: float = 1.1
    spread: float | None = None
    times: Times = field(default_factory=lambda: UniformTimes(low=0.02, high=0.98))
    normaliser: Anchor = "clean"
    samples: OwnSamples = field(default_factory=OwnSamples)
    strength: float | None = None
    teacher: str = "reference"
    fake: str = "fake"
    old: str = "old"

    def __post_init__(self) -> None:
        if self.head not in get_args(Head):
            raise ValueError(f"head: {self.head!r} is not one of {', '.join(get_args(Head))}; nearest valid: 'nft'")
        if self.normaliser not in get_args(Anchor):
            raise ValueError(f"normaliser: {self.normaliser!r} is not one of {', '.join(get_args(Anchor))}")
        for name, value in zip(("weights[0]", "weights[1]"), self.weights, strict=True):
            not_negative(name, value)
        positive("mix", self.mix, 1.0)
        if not 1 < self.anchor < float("inf"):
            raise ValueError(f"anchor: {self.anchor} must be finite and above 1; 1.1 is usual")
        if self.spread is not None:
            positive("spread", self.spread, "None, which measures it,")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy", self.old, self.teacher, self.fake)

    @property
    def guidance(self) -> Mapping[str, float]:
        return NONE if self.strength is None else {self.teacher: self.strength}

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most: the walk of `old`, the two models at x_t; two samples."""
        asked, alone = (1, 0) if self.strength is None else (0, rows_of(self.strength))
        return Cost(steps + 1 + asked, 2, 1, alone)

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        check_models(models, self.weight_sets)
        layout, grid = batch.layout, batch.schedule
        with torch.no_grad():
            seen = self.samples.walk(models[self.old], batch, last=0).visits[-1]
            own = seen.clean(grid)
            gradient, gap = self._gradient(models, batch, own)
            target = implicit_target(own, gradient)
            optimality, told, counts = self._judged(batch, own, target)
        x = self._student(models, batch, seen)
        if self.head == "nft":
            head = negative_aware(x, own, target, optimality, self.mix, layout)
        else:
            head = signed_squares(x, own, target, optimality, self.anchor, layout)
        loss = guided(pull(x, target, layout), head, optimality, self.weights)
        sizes = {"gradient": gradient, "gap": gap, "moved": x.detach() - own}
        told |= {name: layout.mean(size.square()).sqrt() for name, size in sizes.items()}
        return Loss(loss.mean(), told, counts)

    def _gradient(self, models: Mapping[str, Predict], batch: NoiseBatch, own: Tensor) -> tuple[Tensor, Tensor]:
        """DMD's g at the sample, and x̂_fake − x̂_real."""
        at, _, t = noised(own, batch, self.times, "matching")
        real, fake = (
            x0_of_velocity(at, asked(models, name, at, t, batch.rows, batch.layout), t)
            for name in (self.teacher, self.fake)
        )
        anchor = {"clean": own, "noisy": at, "none": None}[self.normaliser]
        return matching_gradient(fake, real, anchor, batch.layout), fake - real

    def _judged(
        self, batch: NoiseBatch, own: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """r, NaN where it is not known, what a user wants to see of the scores, and which rows have that."""
        (before, ok), (after, fine) = batch.scored(own), batch.scored(target)
        both, spread = ok & fine, batch.spread if self.spread is None else self.spread
        known = both & torch.tensor(spread is not None, device=both.device)
        r = target_optimality(after, before, max(spread or 0.0, LEAST_SPREAD))
        r = torch.where(known, r, torch.nan)
        told = {
            "reward": before,
            "target_reward": after,
            "failed_rewards": 1 - both.to(before),
            "optimality": torch.where(known, r, 0.5),
        }
        return r, told, {"reward": ok, "target_reward": fine}

    def _student(self, models: Mapping[str, Predict], batch: NoiseBatch, seen: Visit) -> Tensor:
        """x̂0 of the policy, with gradients, where `old` was asked last."""
        sigma = batch.schedule.at(seen.step).to(seen.x.device)
        velocity = asked(models, "policy", seen.x, sigma, batch.rows, batch.layout)
        return predict_clean(seen.x, velocity, batch.schedule, seen.step)
