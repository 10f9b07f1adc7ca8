"""Rules that join several rewards: advantages of each, the min-norm point between them, win rates in their place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.core.credit.rule import Advantage, Around, CreditRule, alike
from tempflow.core.credit.zscore import GroupZScore
from tempflow.core.forest import Forest
from tempflow.core.groups import dense, moments
from tempflow.core.scores import Scores


@dataclass(frozen=True)
class PerReward(Around):
    """A = clamp(Σ_k w_k·A_k / Σ_k |w_k|, ±clip), A_k the inner credit on reward k alone (MixGRPO, multi-reward).

    A reward of large spread does not drown the others, as it does in a sum of scores. A leaf on which one of them
    failed counts for none. `restandardise`: the sum is then centred and scaled over all the iteration's edges (GDPO;
    second-hand). An edge is live if it is for any reward: what selects edges or prompts stands around it, and then has
    those on which any reward has spread. Raises ValueError for a negative eps, a clip that is not positive, or an inner
    credit that selects.
    """

    values_only = True
    clip: float | None = 5.0
    restandardise: bool = False
    eps: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: {self.eps} must be a finite number ≥ 0; 1e-4 is usual")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: {self.clip} must be > 0, or None for no bound; 5 is usual")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        given = self.reward_weights
        weights = {name: w for name, w in (given or dict.fromkeys(scores.names, 1.0)).items() if w != 0}
        whole = scores.total(given)[1]
        common = Scores(scores.value, scores.ok & whole[:, None], scores.names)
        parts = [self.inner.weighted({name: 1.0})(common, forest) for name in weights]
        size = sum(abs(w) for w in weights.values())
        value = torch.zeros_like(parts[0].value, dtype=torch.float64)
        for part, w in zip(parts, weights.values(), strict=True):
            value = value + part.value.double() * (w / size)
        first = alike(self, parts)
        ok, live = first.ok, torch.stack([part.live for part in parts]).any(0)
        if self.restandardise:
            mean, deviation, _ = moments(value, ok, torch.zeros_like(forest.edges.step), False)
            value = (value - mean) / (deviation + self.eps)
        if self.clip is not None:
            value = value.clamp(-self.clip, self.clip)
        return replace(first, value=torch.where(live, value, 0.0).float(), live=live)


def normalised(rule: CreditRule) -> CreditRule:
    """`rule` with its innermost credit taken on each reward alone, and these summed by weight and restandardised (GDPO,
    arXiv 2601.05242). The sum keeps the innermost credit's bound, which its objective may need. A rule that has such a
    sum already stays as it is.

    Raises ValueError where the innermost credit selects or marks edges, or the rule joins rewards in another way.
    """
    if isinstance(rule, PerReward):
        return rule
    if isinstance(rule, MinNorm):
        raise ValueError("the min-norm point joins the rewards already")
    if isinstance(rule, Around):
        return replace(rule, inner=normalised(rule.inner))
    return PerReward(rule, clip=rule.clip if isinstance(rule, GroupZScore) else None, restandardise=True)


@dataclass(frozen=True)
class MinNorm(Around):
    """OTCA's multi-objective credit: A = (1−explore)·m + explore·Σ u_k A_k, m the point of the hull of {A_k} nearest 0.

    All objectives of a sample push along one direction, ∇log π of its action, so the min-norm problem
    min ‖Σ c_k A_k ∇log π‖² over the simplex is one of numbers: the hull of the A_k is an interval. All of one sign: m
    is the smallest in size. Of two signs: m = 0, the sample teaches only by exploration; without any it is not `live`.
    For two objectives c_1 = |A_2| / (|A_1| + |A_2|) there.

    A_k are the inner credit's advantages by reward k alone, with the sign of its weight; rewards of weight 0 take no
    part. u ∝ |weight| (all weights 1: uniform), so explore = 1 is the weighted average. An objective whose group has no
    spread takes no part in m, or one saturated reward would silence the others (our choice). An edge without a valid
    score of every objective is not ok. `explore` (ρ) is unknown in the paper, as is whether u is random.

    Raises ValueError for explore outside [0, 1], or an inner credit that selects: that stands around this one.
    """

    values_only = True
    explore: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore: {self.explore} must be in [0, 1]; nearest valid: {float(self.explore > 0)}")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """Fused advantages of the forest's recorded edges. Raises whatever `Scores.total` does for the weights."""
        sound = scores.total(self.reward_weights)[1]
        valid = Scores(scores.value, scores.ok & sound[:, None], scores.names)
        given = self.reward_weights or dict.fromkeys(scores.names, 1.0)
        used = {name: float(given[name]) for name in scores.names if given.get(name, 0.0) != 0}
        parts = [self.inner.weighted({name: math.copysign(1.0, w)})(valid, forest) for name, w in used.items()]
        value = torch.stack([part.value for part in parts]).double()
        live = torch.stack([part.live for part in parts])
        weight = torch.tensor([abs(w) for w in used.values()], dtype=torch.float64, device=value.device)
        mixed = (weight[:, None] * value).sum(0) / weight.sum()
        fused = (1 - self.explore) * nearest_to_zero(value, live) + self.explore * mixed
        first = alike(self, parts)
        alive = live.any(0) & (fused != 0)
        return replace(first, value=torch.where(alive, fused, 0.0).float(), live=alive)


def nearest_to_zero(value: Tensor, counts: Tensor) -> Tensor:
    """The point nearest 0 of the interval that the counted values of each column span: [K, E], bool [K, E] -> [E].

    0 for a column without any.
    """
    low = torch.where(counts, value, math.inf).amin(0)
    high = torch.where(counts, value, -math.inf).amax(0)
    nearest = torch.where(low > 0, low, torch.where(high < 0, high, 0.0))
    return torch.where(counts.any(0), nearest, 0.0)


@dataclass(frozen=True)
class WinRate(Around):
    """Every reward becomes its win rate inside the prompt's group, (wins + ties/2) / (n − 1) (Pref-GRPO).

    A reward is taken as a judge that prefers the larger of two scores, so only their order matters; equal scores tie.
    n counts the leaves that the reward scored; one alone has ½. `rounding`: decimals (the official code's 3), or None.
    Reward weights are then weights of win rates. Over a group the mean is exactly ½: it says nothing of progress.
    Official code: fastvideo/rewards/unifiedreward_think.py (read). Raises ValueError for a negative rounding.
    """

    rounding: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding is not None and self.rounding < 0:
            raise ValueError(f"rounding: {self.rounding} must be at least 0, or None; nearest valid: 0")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the inner credit's advantages of their win rates."""
        value = torch.full_like(scores.value, math.nan)
        group = dense(forest.leaves.prompt)
        for number in range(int(group.max()) + 1 if len(group) else 0):
            rows = (group == number).nonzero()[:, 0]
            value[rows] = win_rates(scores.value[rows], scores.ok[rows], self.rounding).to(value)
        return self.inner(Scores(value, scores.ok, scores.names), forest)


def win_rates(value: Tensor, ok: Tensor, rounding: int | None = None) -> Tensor:
    """Win rate of every row against the others of its column, float64 [n, R]; `value` and `ok` are [n, R].

    Rows that are not ok neither play nor count; their own entry is NaN. A row that plays alone has ½.
    """
    played = ok[:, None] & ok[None]
    won = (value[:, None] > value[None]).double() + 0.5 * (value[:, None] == value[None]).double()
    # a row ties with itself: half a win that it did not earn
    wins = torch.where(played, won, 0.0).sum(1) - 0.5
    others = ok.sum(0) - 1
    rate = torch.where(others > 0, wins / others.clamp(min=1), 0.5)
    if rounding is not None:
        rate = rate.round(decimals=rounding)
    return rate.masked_fill(~ok, math.nan)
