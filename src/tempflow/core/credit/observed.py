"""What a rollout's states and pictures show of edges and leaves, and rules that read it (`Algorithm.observe`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.checks import not_negative, positive
from tempflow.core.credit.rule import Advantage, Around
from tempflow.core.forest import Forest
from tempflow.core.groups import dense
from tempflow.core.scores import Scores
from tempflow.core.state import double, upcast
from tempflow.core.units import leaf_of

PATH_LOG_PROB = "path_log_prob"
"""The leaf trait that `PathLogProb` gives and `Surprisal(latent=True)` reads."""


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
        super().__post_init__()
        positive("floor", self.floor, 0.01)

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """The inner credit's advantages, each times its step's weight."""
        given = self.inner(scores, forest)
        share = self.shares(forest)
        return replace(given, value=torch.where(given.live, given.value * share.to(given.value), 0.0))

    def shares(self, forest: Forest) -> Tensor:
        """w, float64 [E]; of untrained edges too, which do not count in the mean."""
        trait = _trait(forest.edges.traits, self.trait, "edges")
        if trait.shape != (len(forest.edges),):
            raise ValueError(
                f"trait: {self.trait!r} has shape {list(trait.shape)}; nearest valid: [{len(forest.edges)}]"
            )
        d = trait.double().clamp(min=0) + self.floor
        leaf, trained = leaf_of(forest), forest.edges.trained.double()
        nothing = torch.zeros(len(forest.leaves), dtype=torch.float64, device=d.device)
        total, count = nothing.index_add(0, leaf, d * trained), nothing.index_add(0, leaf, trained)
        mean = torch.where(count > 0, total / count.clamp(min=1), 1.0)
        return d / mean[leaf]


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

    decides = True
    trait: str = "map"
    column: str = "map"

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """The inner credit's advantages, with the column [E, …]."""
        given = self.inner(scores, forest)
        trait = _trait(forest.leaves.traits, self.trait, "leaves")
        return replace(given, columns={**given.columns, self.column: trait[leaf_of(forest)]})


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
        super().__post_init__()
        not_negative("coefficient", self.coefficient, "0.05 is usual")
        positive("scale", self.scale, 1)

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the inner credit's advantages of their sum with the bonus."""
        value, ok = scores.total(self.reward_weights)
        bonus = surprisal(_trait(forest.leaves.traits, self.trait, "leaves"), ok, forest.leaves.prompt) / self.scale**2
        if self.latent:
            bonus = bonus + _trait(forest.leaves.traits, PATH_LOG_PROB, "leaves").double()
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


def _flat(forest: Forest, node: Tensor) -> Tensor:
    """States of those nodes, [E, D] in at least float32. Raises ValueError for tokens, which are names, no numbers."""
    if not forest.nodes.is_floating_point():
        raise ValueError("observe: compares states as numbers, and these are tokens; nearest valid: PathLogProb()")
    if bool((node < 0).any()):
        raise ValueError("forest: leaf latents were dropped; nearest valid: observe before drop_leaf_states()")
    return upcast(forest.nodes[node]).flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """float64 [E]; 0 where a state is all zeros."""
    a, b = double(a), double(b)
    sizes = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return (a * b).sum(1) / sizes.clamp(min=1e-12)


def _trait(traits: Mapping[str, Tensor], name: str, of: str) -> Tensor:
    if name not in traits:
        there = ", ".join(sorted(traits)) or "none"
        raise ValueError(f"trait: {of} have no {name!r} (there: {there}); list its observation in Algorithm.observe")
    return traits[name]
