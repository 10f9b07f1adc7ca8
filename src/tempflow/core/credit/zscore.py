"""From scores to advantages: centre by group, scale, clip.

One mechanism serves the field: an edge's value is the mean score of the valid leaves below it, edges are grouped by any
key, centred on their group's mean and divided by a standard deviation. Flow-GRPO groups by prompt (at each step every
leaf has one edge, so statistics by (prompt, step) are the statistics of the leaves); TempFlow-GRPO's seed group adds
the root. A group whose values are all equal teaches nothing: its advantages are exactly 0, its edges are not `live`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.credit.rule import Advantage, Key, group_index
from tempflow.core.forest import Edges, Forest
from tempflow.core.groups import moments
from tempflow.core.scores import Scores

Scale = Literal["group", "global", "batch", "pooled", "none"]
Center = Literal["group", "others", "batch"]


@dataclass(frozen=True)
class AsScored:
    """A = R: the score itself, against no baseline; for samples whose scores say what they are for (`core.offline`).

    `reward_weights`: weights of the named rewards' sum (None: all 1). Every edge with a valid score is live.
    """

    reward_weights: Mapping[str, float] | None = None
    peers = False

    def weighted(self, reward_weights: Mapping[str, float] | None) -> AsScored:
        """The same credit with other reward weights."""
        return replace(self, reward_weights=reward_weights)

    def groups(self, edges: Edges) -> Tensor:
        """Dense group numbers [E]: a prompt's edges are one group."""
        return group_index(edges, ("prompt",))

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        value, ok = forest.backup(*scores.total(self.reward_weights))
        return Advantage(torch.where(ok, value, 0.0), ok, ok)


@dataclass(frozen=True)
class GroupZScore:
    """A = clamp(gain · d / (scale + eps), ±clip), d = sign(c)·|c|^power, c = R − centre.

    `by`: which edges are compared. Any subset of prompt, root (the seed), step, depth, parent.
    `center`: the mean of the "group"; "others": of the group's other edges (RLOO's leave-one-out baseline, which is
    n/(n−1) times the plain centring); "batch": of all the iteration's edges (REINFORCE++).
    `power`: 1 + γ of SLAS; 1 leaves c as it is.
    `scale`: the standard deviation of the "group"; "global": of all the iteration's leaf scores (Flow-GRPO's
    `global_std`); "batch": of all the iteration's edge values at the same step (TempFlow-GRPO's batch group); "pooled":
    the root mean square of d over all the iteration's edges (REINFORCE++, SLAS, AdvantageFlow); "none": 1, without eps
    (Dr. GRPO). `unbiased`: n−1 instead of n. `eps` is added to the scale. `clip` bounds |A| (None: no bound).
    `gain` multiplies A before that bound. `reward_weights`: weights of the named rewards' sum (None: all 1).

    Sources: Flow-GRPO `stat_tracking.py` (population std, eps 1e-4, clip 5); TempFlow-GRPO §seed group; DanceGRPO
    (unbiased, eps 1e-8). Raises ValueError on an unknown key, scale or centre, a negative eps, or a clip, power or gain
    that is not positive.
    """

    by: tuple[Key, ...] = ("prompt", "step")
    scale: Scale = "group"
    unbiased: bool = False
    eps: float = 1e-4
    clip: float | None = 5.0
    reward_weights: Mapping[str, float] | None = None
    center: Center = "group"
    power: float = 1.0
    gain: float = 1.0
    peers = False

    def __post_init__(self) -> None:
        if self.center not in get_args(Center):
            raise ValueError(f"center: {self.center!r} is not one of {', '.join(get_args(Center))}")
        positive("power", self.power, 1)
        positive("gain", self.gain, 1)
        for key in self.by:
            if key not in get_args(Key):
                raise ValueError(f"by: {key!r} is not one of {', '.join(get_args(Key))}")
        if self.scale not in get_args(Scale):
            raise ValueError(f"scale: {self.scale!r} is not one of {', '.join(get_args(Scale))}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: {self.eps} must be a finite number ≥ 0; 1e-4 is usual")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: {self.clip} must be > 0, or None for no bound; 5 is usual")

    def weighted(self, reward_weights: Mapping[str, float] | None) -> GroupZScore:
        """The same credit with other reward weights."""
        return replace(self, reward_weights=reward_weights)

    def groups(self, edges: Edges) -> Tensor:
        """Dense group numbers [E]: edges of one group are compared with each other."""
        return group_index(edges, self.by)

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        leaf_value, leaf_ok = scores.total(self.reward_weights)
        value, ok = forest.backup(leaf_value, leaf_ok)
        group = self.groups(forest.edges)
        centred, live = self._centred(value, ok, group)
        if self.power != 1:
            centred = centred.sign() * centred.abs() ** self.power
        z = centred * self.gain
        if self.scale != "none":
            z = z / (self._scale(centred, value, ok, group, forest, leaf_value, leaf_ok) + self.eps)
        if self.clip is not None:
            z = z.clamp(-self.clip, self.clip)
        return Advantage(torch.where(live, z, 0.0).float(), ok, live)

    def _centred(self, value: Tensor, ok: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """R − centre in float64, and which edges are compared with different ones."""
        compared = torch.zeros_like(group) if self.center == "batch" else group
        mean, deviation, count = moments(value, ok, compared, self.unbiased)
        # Rounding leaves equal values with a spread near 1e-8 of their size: not a difference worth a gradient.
        live = ok & (deviation > 1e-6 * mean.abs().clamp(min=1e-3))
        centred = value.double() - mean
        if self.center == "others":
            centred = centred * count / (count - 1).clamp(min=1)
        return centred, live

    def _scale(
        self,
        centred: Tensor,
        value: Tensor,
        ok: Tensor,
        group: Tensor,
        forest: Forest,
        leaf_value: Tensor,
        leaf_ok: Tensor,
    ) -> Tensor:
        if self.scale == "global":
            everyone = torch.zeros(len(leaf_value), dtype=torch.long, device=leaf_value.device)
            return moments(leaf_value, leaf_ok, everyone, self.unbiased)[1][:1].expand(len(value))
        if self.scale == "pooled":
            return (torch.where(ok, centred, 0.0).square().sum() / ok.sum().clamp(min=1)).sqrt()
        by_step = group_index(forest.edges, ("step",)) if self.scale == "batch" else group
        return moments(value, ok, by_step, self.unbiased)[1]
