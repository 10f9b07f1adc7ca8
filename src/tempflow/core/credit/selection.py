"""Rules that select: a prompt's best and worst leaves, or the prompts whose groups have spread.

Each wraps an `inner` rule. Leaves are valued by the inner rule itself, on the forest in which every leaf stands as an
edge (`Forest.as_leaves`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.credit.rule import Advantage, Around
from tempflow.core.credit.tree import any_below, ranks
from tempflow.core.forest import Forest
from tempflow.core.groups import dense
from tempflow.core.scores import Scores

Among = Literal["prompt", "branch"]
By = Literal["advantage", "reward"]


@dataclass(frozen=True)
class Extremes(Around):
    """Keeps the `best` and `worst` leaves; an edge stays if a kept leaf descends from it (DanceGRPO, BranchGRPO).

    Leaves are ranked by the inner credit's advantage, or `by` the weighted sum of rewards, where that credit compares
    less than a prompt or bounds what it gives; ties by their order. They are ranked `among` those of a "prompt", or of
    a "branch": those whose last split is the same. Statistics are the full group's: what goes is not `ok` any more,
    what stays keeps its advantage. A failed leaf is never kept. Raises ValueError unless best ≥ 0, worst ≥ 0 and one
    is > 0.
    """

    decides = True
    best: int
    worst: int
    among: Among = "prompt"
    by: By = "advantage"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("best", self.best), ("worst", self.worst)):
            if value < 0:
                raise ValueError(f"{name}: {value} must be at least 0; nearest valid: 0")
        if self.best + self.worst == 0:
            raise ValueError("best: 0 with worst 0 keeps no leaf; nearest valid: 1")
        if self.among not in get_args(Among):
            raise ValueError(f"among: {self.among!r} is not one of {', '.join(get_args(Among))}")
        if self.by not in get_args(By):
            raise ValueError(f"by: {self.by!r} is not one of {', '.join(get_args(By))}")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges."""
        given = self.inner(scores, forest)
        leaves = self.inner(scores, forest.as_leaves())
        group = dense(forest.leaves.prompt) if self.among == "prompt" else _last_split(forest)
        value = leaves.value if self.by == "advantage" else scores.total(self.reward_weights)[0]
        rank, count = ranks(value, leaves.ok, group)
        kept = leaves.ok & ((rank < self.best) | (rank >= count - self.worst))
        stays = any_below(forest, kept)
        live = given.live & stays
        return replace(given, value=torch.where(live, given.value, 0.0), ok=given.ok & stays, live=live)


@dataclass(frozen=True)
class DynamicSampling(Around):
    """Keeps the first `prompts` prompts (by slot) whose trained edges have spread; all others are left out (DAPO).

    Left out means out of the loss's mean too, so that a loss is normalised over what is kept. Fewer with spread keep
    all of these. Where the published method draws prompts until enough have spread, here a fixed pool is drawn: its
    rollouts are paid for whether kept or not. None keeps all with spread. The inner credit sees the whole pool, so a
    batch-wide scale of its counts what is then left out; what it said stays as `Advantage.pool`. Raises ValueError for
    less than one prompt.

    Of several rewards it stands around the rule that joins them, and keeps the prompts on which any has spread.
    """

    decides = True
    prompts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return replace(given, value=value, ok=given.ok & kept, live=given.live & kept, pool=given.pool or given)


def _last_split(forest: Forest) -> Tensor:
    """Dense numbers [N], equal for leaves whose deepest split is the same node; a leaf without any is alone."""
    edges, (edge, leaf) = forest.edges, forest.descent
    splits = torch.bincount(edges.parent)[edges.parent] > 1
    at = torch.where(splits[edge], edges.step[edge], -1)
    deepest = torch.full_like(forest.leaves.prompt, -1).scatter_reduce(0, leaf, at, "amax")
    last = (at >= 0) & (at == deepest[leaf])
    group = torch.arange(len(forest.leaves), device=leaf.device) + int(edges.parent.max()) + 1
    group[leaf[last]] = edges.parent[edge[last]]
    return dense(group)
