"""Rules for trees: how values are backed up from leaves to edges, and which path of a tree is best."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.credit.rule import Advantage, Around, alike
from tempflow.core.forest import Forest, Leaves
from tempflow.core.groups import dense
from tempflow.core.scores import Scores


@dataclass(frozen=True)
class FromLeaves(Around):
    """Edge advantages as means over the valid leaves below of the leaves' own advantages.

    So a tree's edges are judged by the statistics of the prompt's leaves, whatever their depth (Dynamic-TreeRPO;
    BranchGRPO's `use_group`), where the inner credit alone standardises the values at each depth.

    Raises ValueError for an inner credit that selects or marks edges: that stands around this one.
    """

    values_only = True

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        leaves = alike(self, [self.inner(scores, forest.as_leaves())])
        value, ok = forest.backup(leaves.value, leaves.ok)
        live = ok & any_below(forest, leaves.live)
        return Advantage(torch.where(live, value, 0.0), ok, live)


@dataclass(frozen=True)
class LogProbBackup(Around):
    """An edge's value is Σ softmax(log p of the edges that follow it)·their values (BranchGRPO's weighted back-up).

    Reads the edge trait "log_prob" (`LogProb`), a mean over latent elements, so siblings' weights differ little. An
    edge that no recorded edge follows has the mean of its leaves; branches without a valid leaf take no part. Raises
    ValueError where the trait is missing.
    """

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        above = _above(forest)
        if not bool((above >= 0).any()):
            return self.inner(scores, forest)
        if "log_prob" not in forest.edges.traits:
            raise ValueError("traits: 'log_prob' is missing, which the back-up reads; observe it by LogProb()")
        whole = scores.total(self.reward_weights)[1]
        columns = [
            _softmax_backup(forest, above, scores.value[:, r], scores.ok[:, r] & whole)
            for r in range(len(scores.names))
        ]
        of_edges = Scores(
            torch.stack([value for value, _ in columns], 1), torch.stack([ok for _, ok in columns], 1), scores.names
        )
        return self.inner(of_edges, _edges_as_leaves(forest))


@dataclass(frozen=True)
class LogProb:
    """Observes the edges' log-probabilities, for `LogProbBackup`."""

    @property
    def name(self) -> str:
        """The trait it becomes."""
        return "log_prob"

    @property
    def of(self) -> Literal["edge", "leaf"]:
        """A trait of edges."""
        return "edge"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        """[E]; NaN where a step has no spread."""
        return forest.edges.log_prob.cpu()


@dataclass(frozen=True)
class Standing(Around):
    """Adds the column "standing" in [−1, 1], the advantage clamped, by which `Clip.sensitivity` bends its range.

    With a z-score inside it is Dynamic-TreeRPO's reward condition in our reading; the paper's form is not known.
    """

    decides = True

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        given = self.inner(scores, forest)
        return replace(given, columns={**given.columns, "standing": given.value.clamp(-1.0, 1.0)})


@dataclass(frozen=True)
class BestPath(Around):
    """Points every edge to the edge at its step on the path to its prompt's best leaf (Dynamic-TreeRPO's imitation).

    Best by total reward, the first of equals: advantages are bounded, and may tie. Edges of that path point to
    themselves, as do edges at a step where the path has none, and those of a prompt without a valid leaf.
    """

    decides = True

    @property
    def peers(self) -> bool:
        return True

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        given = self.inner(scores, forest)
        leaves = self.inner(scores, forest.as_leaves())
        total = scores.total(self.reward_weights)[0]
        rank, _ = ranks(total, leaves.ok, dense(forest.leaves.prompt))
        best = leaves.ok & (rank == 0)
        edge, leaf = forest.descent
        on_path = edge[best[leaf]]
        place = forest.edges.prompt * forest.steps + forest.edges.step
        table = torch.full((int(place.max()) + 1 if len(place) else 0,), -1, dtype=torch.long, device=place.device)
        table[place[on_path]] = on_path
        peer = torch.where(table[place] < 0, torch.arange(len(place), device=place.device), table[place])
        return replace(given, peer=peer)


def ranks(value: Tensor, ok: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's place in its group by descending value, ties by order, failed rows last; and its valid rows' count."""
    by_value = torch.argsort(torch.where(ok, value, -math.inf), descending=True, stable=True)
    order = by_value[torch.argsort(group[by_value], stable=True)]
    size = torch.bincount(group)
    start = size.cumsum(0) - size
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    return rank, torch.zeros_like(size).index_add(0, group, ok.long())[group]


def any_below(forest: Forest, leaf_flag: Tensor) -> Tensor:
    """Whether a leaf with the flag descends from each edge, bool [E]."""
    edge, leaf = forest.descent
    seen = torch.zeros(len(forest.edges), dtype=torch.bool, device=leaf_flag.device)
    seen[edge[leaf_flag[leaf]]] = True
    return seen


def _above(forest: Forest) -> Tensor:
    """The nearest recorded edge above each edge, LongTensor [E]; −1 where there is none."""
    edge, leaf = forest.descent
    order = torch.argsort(leaf * forest.steps + forest.edges.step[edge])
    edge, leaf = edge[order], leaf[order]
    same = leaf[1:] == leaf[:-1]
    above = torch.full_like(forest.edges.step, -1)
    above[edge[1:][same]] = edge[:-1][same]
    return above


def _softmax_backup(forest: Forest, above: Tensor, leaf_value: Tensor, leaf_ok: Tensor) -> tuple[Tensor, Tensor]:
    """Value and validity [E] of every edge, from the deepest up."""
    edges = forest.edges
    mean, ok = forest.backup(leaf_value, leaf_ok)
    value = mean.double()
    log_prob = edges.traits["log_prob"].double().nan_to_num(0.0)
    follows = ok & (above >= 0)
    for step in range(forest.steps - 2, -1, -1):
        child = (follows & (edges.step[above.clamp(min=0)] == step)).nonzero()[:, 0]
        parent = above[child]
        top = torch.full_like(value, -math.inf).scatter_reduce(0, parent, log_prob[child], "amax")
        weight = (log_prob[child] - top[parent]).exp()
        total = torch.zeros_like(value).index_add(0, parent, weight)
        backed = torch.zeros_like(value).index_add(0, parent, weight * value[child]) / total
        value = torch.where(total > 0, backed, value)
    return value.to(leaf_value.dtype), ok


def _edges_as_leaves(forest: Forest) -> Forest:
    """The forest in which every edge has one leaf of its own below it."""
    edges = forest.edges
    alone = torch.arange(len(edges), device=edges.step.device)
    return replace(forest, leaves=Leaves(edges.child, edges.prompt, edges.root), descent=(alone, alone))
