"""Credits that look at a prompt's whole group first: win rates, perceptual surprisal, and which groups are kept.

Each wraps another credit, `inner`, which turns what they make of the scores into advantages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.credit import Advantage, Around
from tempflow.core.forest import Forest
from tempflow.core.groups import dense
from tempflow.core.scores import Scores

PATH_LOG_PROB = "path_log_prob"
"""The leaf trait that `PathLogProb` gives and `Surprisal(latent=True)` reads."""


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


@dataclass(frozen=True)
class Surprisal(Around):
    """R + coefficient · surprisal, added before the inner credit compares (perceptual entropy, arXiv 2605.12112).

    surprisal of leaf k = |φ_k − φ̄|² / (2·scale²): −log density, up to a constant, of a Gaussian around the group's
    mean embedding φ̄, which includes φ_k. φ is the leaf trait `trait`, [N, d]. With `latent` the leaf trait
    "path_log_prob" is added, −log p of the latent policy being taken away (PCVAE): both up to constants of the group.

    The page names the two terms and no density; the Gaussian, `scale` and the weight ω = 1 are the plain reading of it.
    Failed leaves take no part in φ̄. A group of equal scores still has spread where its pictures differ. Raises
    ValueError for a coefficient that is negative, a scale that is not positive, or a missing trait.
    """

    trait: str = "embedding"
    coefficient: float = 0.05
    scale: float = 1.0
    latent: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise ValueError(f"coefficient: {self.coefficient} must be finite and ≥ 0; 0.05 is usual")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale} must be finite and above 0; 1 is usual")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the inner credit's advantages of their sum with the bonus."""
        value, ok = scores.total(self.reward_weights)
        bonus = surprisal(_trait(forest, self.trait), ok, forest.leaves.prompt) / self.scale**2
        if self.latent:
            bonus = bonus + _trait(forest, PATH_LOG_PROB).double()
        total = (value + self.coefficient * bonus).float().masked_fill(~ok, math.nan)[:, None]
        return self.inner.weighted(None)(Scores(total, ok[:, None], ("total",)), forest)


def surprisal(embedding: Tensor, ok: Tensor, group: Tensor) -> Tensor:
    """|φ − mean of the group's valid φ|² / 2, float64 [N]; `embedding` [N, …], `ok` and `group` [N].

    Exactly 0 where all rows of a group are equal.
    """
    phi = embedding.double().flatten(1)
    index = dense(group)
    count = torch.bincount(index[ok], minlength=int(index.max()) + 1 if len(index) else 0)
    total = torch.zeros(len(count), phi.shape[1], dtype=phi.dtype, device=phi.device).index_add(0, index[ok], phi[ok])
    centre = total / count.clamp(min=1)[:, None]
    return (phi - centre[index]).square().sum(1) / 2


def _trait(forest: Forest, name: str) -> Tensor:
    if name not in forest.leaves.traits:
        seen = ", ".join(sorted(forest.leaves.traits)) or "none"
        raise ValueError(f"trait: {name!r} was not observed of the leaves (there: {seen}); observe it in the algorithm")
    return forest.leaves.traits[name]


@dataclass(frozen=True)
class PathLogProb:
    """Leaf observation: the mean of log p over the noisy edges above a leaf, each a mean over latent elements, [N].

    Leaves without a noisy edge above them have 0.
    """

    name: str = PATH_LOG_PROB

    @property
    def of(self) -> Literal["edge", "leaf"]:
        return "leaf"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        """float64 [N] on the CPU; `media` is not looked at."""
        edge, leaf = (index.cpu() for index in forest.descent)
        log_prob = forest.edges.log_prob.cpu().double()[edge]
        there = log_prob.isfinite()
        nothing = torch.zeros(len(forest.leaves), dtype=torch.float64)
        total = nothing.index_add(0, leaf[there], log_prob[there])
        return total / nothing.index_add(0, leaf, there.double()).clamp(min=1)


@dataclass(frozen=True)
class DynamicSampling(Around):
    """Keeps the first `prompts` prompts (by slot) whose trained edges have spread; all others are left out (DAPO).

    Left out means out of the loss's mean too, so that a loss is normalised over what is kept. Fewer with spread keep
    all of these. Where the published method draws prompts until enough have spread, here a fixed pool is drawn: its
    rollouts are paid for whether kept or not. None keeps all with spread. The inner credit sees the whole pool, so a
    batch-wide scale of its counts what is then left out; what it said stays as `Advantage.pool`. Raises ValueError for
    less than one prompt.
    """

    prompts: int | None = None

    def __post_init__(self) -> None:
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts: {self.prompts} must be at least 1, or None for all; nearest valid: 1")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """The inner credit's advantages, those of prompts that are left out 0 and neither ok nor live."""
        given, edges = self.inner(scores, forest), forest.edges
        slot = dense(edges.prompt)
        spread = torch.zeros_like(slot)  # by slot, of which there are no more than edges
        spread[slot[given.live & edges.trained]] = 1
        kept = spread[slot] == 1
        if self.prompts is not None:
            kept = kept & (spread.cumsum(0)[slot] <= self.prompts)
        value = torch.where(kept, given.value, 0.0)
        return replace(given, value=value, ok=given.ok & kept, live=given.live & kept, pool=given)
