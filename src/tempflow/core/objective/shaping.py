"""A few-step student shaped by a teacher of more steps as far as that one is better, beside a reward's own term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.cost import Cost, rows_of
from tempflow.core.distill import nearest_nodes, reward_gate, shaping
from tempflow.core.objective.distill import NONE, check_models
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.guided_targets import LEAST_SPREAD
from tempflow.core.objective.imitation import own_steps
from tempflow.core.objective.leaves import LeafObjective, renoise_leaves
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import refined
from tempflow.core.times import GridTimes
from tempflow.core.unroll import Unrolled, unroll


@dataclass(frozen=True)
class GatedShaping:
    """L_reward + α·g·mean_h [1 − cos(x̂_S, x̂_T) + c·mean (x̂_S − x̂_T)²], g = sg sigmoid((R_T − R_S)/(τ·Z)): RATS
    (arXiv 2604.14910).

    Student and teacher walk from the same noise. At every node h of the student's own walk, whose states bear no
    gradient, x̂_S is its clean sample and x̂_T the teacher's at the node of its own walk whose σ is nearest. R_S and R_T
    are the rewards of both ends, Z the standard deviation of all scores that the run's losses had asked for.

    weight       α
    square       c
    temperature  τ, in units of Z
    parts        steps of the teacher within one of the student's, so that the student's nodes are among its nodes
    shift        how they are spaced (`schedule.refined`)
    strength     the teacher's guidance; None: the run's
    reward       L_reward: a loss of clean samples, given the student's own. Its advantage is (R_S − mean)/Z, the mean
                 over the valid of a prompt's samples in the batch, which must be all of them. None: no such term
    renoise      the (t, ε) at which it sees them

    A row without a score of both ends is not shaped, one without R_S has advantage 0. While no spread is known all rows
    have advantage 0, and gate ½. Raises ValueError for numbers out of range, and where neither term is left.
    """

    weight: float = 1.0
    square: float = 1.0
    temperature: float = 1.0
    parts: int = 12
    shift: float = 3.0
    strength: float | None = None
    reward: LeafObjective | None = None
    renoise: Renoise = field(default_factory=lambda: Renoise(GridTimes(1.0)))
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        not_negative("weight", self.weight, "0 leaves the reward's term alone")
        not_negative("square", self.square)
        positive("temperature", self.temperature, 1.0)
        positive("shift", self.shift, 3.0)
        if self.parts < 1:
            raise ValueError(f"parts: {self.parts} must be at least 1; nearest valid: 1")
        if not self.weight and self.reward is None:
            raise ValueError("weight: 0 beside no reward's term teaches nothing; nearest valid: 1.0")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        of_reward = () if self.reward is None else self.reward.weight_sets
        return tuple(dict.fromkeys(("policy", self.teacher, *of_reward)))

    @property
    def guidance(self) -> Mapping[str, float]:
        return NONE if self.strength is None else {self.teacher: self.strength}

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps: both walks, both ends scored, the reward's pairs."""
        walked = self.parts * steps
        plain, alone = (walked, 0) if self.strength is None else (0, walked * rows_of(self.strength))
        pairs = 0 if self.reward is None else self.renoise.times.count(steps)
        others = 0 if self.reward is None else len(self.reward.weight_sets) - 1
        return Cost(plain + pairs * others, 2, steps + pairs, alone)

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        check_models(models, self.weight_sets)
        own = own_steps(models["policy"], batch)
        end = own.x0().detach()
        targets, reached = self.targets(models, batch)
        (mine, ok), (theirs, fine) = batch.scored(end), batch.scored(reached)
        both, spread = ok & fine, max(batch.spread or 0.0, LEAST_SPREAD)
        known = torch.tensor(batch.spread is not None, device=ok.device)
        gap = torch.where(known, theirs - mine, 0.0) / spread
        gate = reward_gate(torch.where(both, gap, torch.nan), self.temperature)
        apart = self.shaped(own, targets, batch)
        loss = Loss((self.weight * gate.to(apart) * apart).mean())
        if self.reward is not None:
            advantage = torch.where(known, _above_mean(mine, ok, batch.rows), 0.0) / spread
            leaves = renoise_leaves(
                end,
                advantage,
                batch.rows,
                batch.ids,
                self.renoise,
                batch.seed,
                batch.schedule,
                layout=batch.layout,
            )
            taught = self.reward(models, leaves)
            loss = replace(taught, value=loss.value + taught.value)
        told = {
            "reward": mine,
            "teacher_reward": theirs,
            "failed_rewards": 1 - both.to(mine),
            "gate": gate,
            "shaping": apart.detach(),
        }
        scored = {"reward": ok, "teacher_reward": fine}
        return Loss(loss.value, {**told, **loss.metrics}, {**scored, **loss.counts})

    @torch.no_grad()
    def targets(self, models: Mapping[str, Predict], batch: NoiseBatch) -> tuple[Tensor, Tensor]:
        """The teacher's clean samples at the student's nodes, [T, B, *S], and the sample that it walks to."""
        fine = refined(batch.schedule, self.parts, self.shift)
        walk = unroll(batch.x, fine, models[self.teacher], batch.rows, last=0, layout=batch.layout)
        nodes = nearest_nodes(batch.schedule, fine)[:-1].numpy()
        return torch.stack([walk.visits[int(node)].clean(fine) for node in nodes]), walk.x0()

    def shaped(self, own: Unrolled, targets: Tensor, batch: NoiseBatch) -> Tensor:
        """The mean over nodes of how far the student's clean samples are from those, [B]."""
        pairs = zip(own.visits, targets, strict=True)
        apart = [shaping(visit.clean(batch.schedule), target, self.square, batch.layout) for visit, target in pairs]
        return torch.stack(apart).mean(0)


def _above_mean(value: Tensor, ok: Tensor, group: Tensor) -> Tensor:
    """Scores [B] less the mean of their group's valid ones; 0 for those that failed."""
    fellow = ((group[:, None] == group[None, :]) & ok[None, :]).to(value)
    mean = fellow @ torch.where(ok, value, 0.0) / fellow.sum(1).clamp(min=1)
    return torch.where(ok, value - mean, 0.0)
