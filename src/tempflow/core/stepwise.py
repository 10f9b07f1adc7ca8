"""Step by step: what a rollout's steps did to the latent, and credits that tell steps, rewards or places apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.credit import Advantage, Around
from tempflow.core.distribution import upcast
from tempflow.core.forest import Forest
from tempflow.core.scores import Scores
from tempflow.core.units import leaf_of


@dataclass(frozen=True)
class Progress:
    """OTCA: cos(x', x_T) − cos(x, x_T) of every edge x → x', how much nearer its step takes the latent to its end.

    An observation of edges, in [−2, 2]: not truncated yet. Needs chains (one leaf per edge; ValueError otherwise).
    """

    name: str = "progress"

    @property
    def of(self) -> Literal["edge"]:
        return "edge"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        """float64 [E] on the CPU; `forest` with leaf latents. `media` is not looked at."""
        edges = forest.edges
        end = _flat(forest, forest.leaves.node[leaf_of(forest)])
        before, after = (_flat(forest, node) for node in (edges.parent, edges.child))
        return (_cosine(after, end) - _cosine(before, end)).cpu()


@dataclass(frozen=True)
class RelativeChange:
    """GCPO's L1rel: ‖x' − x‖₁ / ‖x‖₁ of every edge x → x'. An observation of edges, ≥ 0, of any forest."""

    name: str = "l1rel"

    @property
    def of(self) -> Literal["edge"]:
        return "edge"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        """float64 [E] on the CPU. `media` is not looked at."""
        before, after = (_flat(forest, node) for node in (forest.edges.parent, forest.edges.child))
        return ((after - before).abs().sum(1) / before.abs().sum(1).clamp(min=1e-12)).cpu()


@dataclass(frozen=True)
class StepCredit(Around):
    """OTCA's trajectory-level credit: A_t = w_t·A with w_t = n·d_t / Σ d, d = max(trait_t, 0) + floor.

    The sum runs over the path's n trained edges, so w ≥ 0 has mean 1 on every path, and a large `floor` gives w = 1.
    Weights multiply after the inner credit's clip. The form is our reading; the paper may normalise to sum 1.

    inner  the credit that is spread over steps
    trait  of edges, one number each, such as `Progress` gives
    floor  ε, finite and above 0 (unknown in the paper)

    Raises ValueError for such a floor; when called, for a missing trait, or edges with another number of leaves than 1.
    """

    trait: str = "progress"
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"floor: {self.floor} must be finite and above 0; 0.01 is ours")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """The inner credit's advantages, each times its step's weight."""
        given = self.inner(scores, forest)
        share = self.shares(forest)
        return replace(given, value=torch.where(given.live, given.value * share.to(given.value), 0.0))

    def shares(self, forest: Forest) -> Tensor:
        """w, float64 [E]; of untrained edges too, which do not count in the mean."""
        d = _trait(forest.edges.traits, self.trait, len(forest.edges), "edges").double().clamp(min=0) + self.floor
        leaf, trained = leaf_of(forest), forest.edges.trained.double()
        nothing = torch.zeros(len(forest.leaves), dtype=torch.float64, device=d.device)
        total, count = nothing.index_add(0, leaf, d * trained), nothing.index_add(0, leaf, trained)
        mean = torch.where(count > 0, total / count.clamp(min=1), 1.0)
        return d / mean[leaf]


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

    Raises ValueError for explore outside [0, 1].
    """

    explore: float = 0.2

    def __post_init__(self) -> None:
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
        first = parts[0]
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
class Mapped(Around):
    """The inner credit, with a trait of each edge's leaf as a column of the edge: ViPO's map, for `PositionRatio`.

    Advantages stay as they are: the objective multiplies them with the map (never the rewards, which would make a group
    incomparable).

    inner   the credit
    trait   of leaves, [N, …], such as a map [N, h, w]
    column  what the objective calls it

    When called, raises ValueError for a missing trait, or edges with another number of leaves than one.
    """

    trait: str = "map"
    column: str = "map"

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """The inner credit's advantages, with the column [E, …]."""
        given = self.inner(scores, forest)
        if self.trait not in forest.leaves.traits:
            raise ValueError(_missing(self.trait, "leaves"))
        return replace(given, columns={**given.columns, self.column: forest.leaves.traits[self.trait][leaf_of(forest)]})


def _flat(forest: Forest, node: Tensor) -> Tensor:
    """States of those nodes, [E, D] in at least float32."""
    if bool((node < 0).any()):
        raise ValueError("forest: leaf latents were dropped; nearest valid: observe before drop_leaf_states()")
    return upcast(forest.nodes[node]).flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """float64 [E]; 0 where a state is all zeros."""
    a, b = a.double(), b.double()
    sizes = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return (a * b).sum(1) / sizes.clamp(min=1e-12)


def _trait(traits: Mapping[str, Tensor], name: str, rows: int, of: str) -> Tensor:
    if name not in traits:
        raise ValueError(_missing(name, of))
    if traits[name].shape != (rows,):
        raise ValueError(f"trait: {name!r} has shape {list(traits[name].shape)}; nearest valid: [{rows}]")
    return traits[name]


def _missing(name: str, of: str) -> str:
    return f"trait: {of} have no {name!r}; list its observation in Algorithm.observe"
