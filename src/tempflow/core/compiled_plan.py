"""Plans compiled for the engine: every step as index tensors, so that a rollout only gathers and scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.forest import Edges, Forest, Leaves
from tempflow.core.plan import Plan

Keep = Literal["stochastic", "all"]


@dataclass(frozen=True, eq=False)
class Level:
    """One step of a plan (or of several, merged) as index tensors on the CPU.

    "Front" is the list of nodes at that step; the next front lists their children, ordered by parent.
    """

    front: int  # nodes in the front
    born: int  # nodes in the next front
    parents: Tensor  # positions in the front of the nodes that have children, ascending
    rows: Tensor  # condition of each of these: its root's variant; after merging slot · variants + variant
    parent_of: Tensor  # per child: index into `parents`, ascending
    calm: Tensor  # positions of the children of deterministic edges
    noisy: Tensor  # … and of stochastic ones; the next three go with it
    scale: Tensor
    edge_to: Tensor  # index of the recorded edge
    ids: tuple[tuple[int, ...], ...]  # (root, *path, step); after merging with the slot in front
    node_at: Tensor  # positions of the children that are recorded …
    node_to: Tensor  # … and their index among the recorded nodes


@dataclass(frozen=True, eq=False)
class Program:
    """A plan compiled for the engine: its levels, and the forest it gives but for states and log-probabilities."""

    born: Level  # records the roots
    levels: tuple[Level, ...]
    frame: Forest

    def frame_for(self, slot: int) -> Forest:
        """The frame of a plan grown at that prompt slot."""
        edges, leaves = self.frame.edges, self.frame.leaves
        return replace(
            self.frame,
            edges=replace(edges, prompt=torch.full_like(edges.prompt, slot)),
            leaves=replace(leaves, prompt=torch.full_like(leaves.prompt, slot)),
        )


def merged(
    levels: Sequence[Level], slots: Sequence[int], nodes: Sequence[int], edges: Sequence[int], variants: int
) -> Level:
    """Lay the prompts' levels side by side; `nodes` and `edges` are how many each prompt records, and each has that
    many `variants` of its condition."""
    front = _offsets([level.front for level in levels])
    live = _offsets([len(level.parents) for level in levels])
    born = _offsets([level.born for level in levels])
    node, edge = _offsets(nodes), _offsets(edges)
    return Level(
        front=sum(level.front for level in levels),
        born=sum(level.born for level in levels),
        parents=torch.cat([v.parents + o for v, o in zip(levels, front, strict=True)]),
        rows=torch.cat([v.rows + slot * variants for v, slot in zip(levels, slots, strict=True)]),
        parent_of=torch.cat([v.parent_of + o for v, o in zip(levels, live, strict=True)]),
        calm=torch.cat([v.calm + o for v, o in zip(levels, born, strict=True)]),
        noisy=torch.cat([v.noisy + o for v, o in zip(levels, born, strict=True)]),
        scale=torch.cat([v.scale for v in levels]),
        edge_to=torch.cat([v.edge_to + o for v, o in zip(levels, edge, strict=True)]),
        ids=tuple((slot, *rest) for v, slot in zip(levels, slots, strict=True) for rest in v.ids),
        node_at=torch.cat([v.node_at + o for v, o in zip(levels, born, strict=True)]),
        node_to=torch.cat([v.node_to + o for v, o in zip(levels, node, strict=True)]),
    )


@lru_cache(maxsize=512)
def compiled(plan: Plan, keep: Keep) -> Program:
    """The plan's program, with these edges recorded; made once for equal plans."""
    kept = [e for e, stochastic in enumerate(plan.stochastic) if stochastic or keep == "all"]
    used = {plan.parent[e] for e in kept} | {plan.roots + e for e in kept} | set(plan.scored)
    node_to = {node: n for n, node in enumerate(sorted(used))}
    edge_to = {e: n for n, e in enumerate(kept)}
    by_step: list[list[int]] = [[] for _ in range(plan.steps)]
    for e, i in enumerate(plan.step):
        by_step[i].append(e)
    front = list(range(plan.roots))
    born = _level(plan, [], [], front, node_to, edge_to)
    levels: list[Level] = []
    for edges in by_step:
        position = {node: n for n, node in enumerate(front)}
        edges.sort(key=lambda e: position[plan.parent[e]])
        children = [plan.roots + e for e in edges]
        levels.append(_level(plan, front, edges, children, node_to, edge_to))
        front = children
    return Program(born=born, levels=tuple(levels), frame=_frame(plan, kept, node_to, edge_to))


def _level(
    plan: Plan,
    front: Sequence[int],
    edges: Sequence[int],
    children: Sequence[int],
    node_to: dict[int, int],
    edge_to: dict[int, int],
) -> Level:
    fertile = {plan.parent[e] for e in edges}
    parents = [n for n, node in enumerate(front) if node in fertile]
    rank = {front[n]: k for k, n in enumerate(parents)}
    noisy = [n for n, e in enumerate(edges) if plan.stochastic[e]]
    recorded = [n for n, node in enumerate(children) if node in node_to]
    return Level(
        front=len(front),
        born=len(children),
        parents=long(parents),
        rows=long([plan.variant[plan.node_root[front[n]]] for n in parents]),
        parent_of=long([rank[plan.parent[e]] for e in edges]),
        calm=long([n for n, e in enumerate(edges) if not plan.stochastic[e]]),
        noisy=long(noisy),
        scale=torch.tensor([plan.scale[edges[n]] for n in noisy], dtype=torch.float32),
        edge_to=long([edge_to[edges[n]] for n in noisy]),
        ids=tuple((plan.node_root[children[n]], *plan.path(children[n]), plan.step[edges[n]]) for n in noisy),
        node_at=long(recorded),
        node_to=long([node_to[children[n]] for n in recorded]),
    )


def _frame(plan: Plan, kept: Sequence[int], node_to: dict[int, int], edge_to: dict[int, int]) -> Forest:
    """The forest's indices; states of no elements and log-probabilities of NaN, to be replaced."""
    pairs = [(edge_to[e], leaf) for e in kept for leaf in plan.leaves_below[e]]
    edges = Edges(
        parent=long([node_to[plan.parent[e]] for e in kept]),
        child=long([node_to[plan.roots + e] for e in kept]),
        step=long([plan.step[e] for e in kept]),
        prompt=torch.zeros(len(kept), dtype=torch.long),
        root=long([plan.node_root[plan.parent[e]] for e in kept]),
        depth=long([plan.action_depth[e] for e in kept]),
        scale=torch.tensor([plan.scale[e] for e in kept], dtype=torch.float32),
        log_prob=torch.full((len(kept),), math.nan),
        stochastic=torch.tensor([plan.stochastic[e] for e in kept], dtype=torch.bool),
        trained=torch.tensor([plan.trained[e] for e in kept], dtype=torch.bool),
    )
    leaves = Leaves(
        node=long([node_to[node] for node in plan.scored]),
        prompt=torch.zeros(len(plan.scored), dtype=torch.long),
        root=long([plan.node_root[node] for node in plan.scored]),
    )
    descent = (long([e for e, _ in pairs]), long([leaf for _, leaf in pairs]))
    return Forest(torch.empty(len(node_to), 0), edges, leaves, descent, plan.steps)


def _offsets(sizes: Sequence[int]) -> list[int]:
    total, offsets = 0, list[int]()
    for size in sizes:
        offsets.append(total)
        total += size
    return offsets


def long(values: Sequence[int]) -> Tensor:
    """LongTensor on the CPU."""
    return torch.tensor(values, dtype=torch.long)
