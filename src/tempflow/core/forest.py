"""What a rollout grew: nodes stored once, edges and leaves as indices into them, and who descends from whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def _no_traits() -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True, eq=False)
class Edges:
    """E recorded transitions, every field [E] and on one device; LongTensors unless said.

    parent      index into `Forest.nodes` of the state it leaves; edges with equal parents are siblings
    child       index into `Forest.nodes` of the state it reaches
    step        i: from σ_i to σ_{i+1}
    prompt      the prompt slot it belongs to
    root        root above it, 0 … R − 1 within its prompt
    depth       number of stochastic edges above it on its path
    scale       float32, multiplier of the dynamics' noise level that it was drawn with
    log_prob    float32, mean log-density over the latent's elements when it was drawn; NaN where the transition has no
                spread (an ODE edge, or a kernel whose std is 0 at that step)
    stochastic  bool
    trained     bool, the plan gives it to the loss
    mean        [E, *S], mean of the transition it was drawn from, in the dtype log_prob was computed in; None unless
                the rollout was asked for it
    traits      named columns [E, …]: what was observed of the edges after they were grown
    """

    parent: Tensor
    child: Tensor
    step: Tensor
    prompt: Tensor
    root: Tensor
    depth: Tensor
    scale: Tensor
    log_prob: Tensor
    stochastic: Tensor
    trained: Tensor
    mean: Tensor | None = None
    traits: Mapping[str, Tensor] = field(default_factory=_no_traits)

    def __len__(self) -> int:
        return self.parent.shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Edges:
        """The edges with `fn` applied to every field, trait columns and (where there is one) the mean included."""
        return Edges(
            parent=fn(self.parent),
            child=fn(self.child),
            step=fn(self.step),
            prompt=fn(self.prompt),
            root=fn(self.root),
            depth=fn(self.depth),
            scale=fn(self.scale),
            log_prob=fn(self.log_prob),
            stochastic=fn(self.stochastic),
            trained=fn(self.trained),
            mean=None if self.mean is None else fn(self.mean),
            traits={name: fn(column) for name, column in self.traits.items()},
        )


@dataclass(frozen=True, eq=False)
class Leaves:
    """N scored samples, what the last step reaches, LongTensors [N]; `node` is −1 once the latent has been dropped.

    traits  named columns [N, …]: what was observed of the samples
    """

    node: Tensor
    prompt: Tensor
    root: Tensor
    traits: Mapping[str, Tensor] = field(default_factory=_no_traits)

    def __len__(self) -> int:
        return self.node.shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Leaves:
        """The leaves with `fn` applied to every field and trait column."""
        columns = {name: fn(column) for name, column in self.traits.items()}
        return Leaves(node=fn(self.node), prompt=fn(self.prompt), root=fn(self.root), traits=columns)


@dataclass(frozen=True, eq=False)
class Forest:
    """A grown forest.

    nodes    [M, *S] states in the rollout's storage dtype, each once, and only those an edge or a leaf refers to
    edges    the E recorded edges: per prompt in the order the prompts were given, inside it in the plan's order
    leaves   the N scored leaves, in the same order
    descent  (edge, leaf): LongTensors [P], all pairs in which the leaf descends from the edge, ascending by edge
    steps    T
    """

    nodes: Tensor
    edges: Edges
    leaves: Leaves
    descent: tuple[Tensor, Tensor]
    steps: int

    @property
    def slots(self) -> Tensor:
        """The prompt slot of every node, LongTensor [M]."""
        slots = torch.empty(len(self.nodes), dtype=torch.long, device=self.edges.step.device)
        slots[self.edges.parent], slots[self.edges.child] = self.edges.prompt, self.edges.prompt
        there = self.leaves.node >= 0
        slots[self.leaves.node[there]] = self.leaves.prompt[there]
        return slots

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        self._map(count)
        return total

    def to(self, device: torch.device | str) -> Forest:
        """The forest on another device."""
        return self._map(lambda t: t.to(device))

    def backup(self, value: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """Value of every edge: the mean over its valid descendant leaves (BranchGRPO, `papers/trajectory.md` §3.3).

        value: float[N] and ok: bool[N], one per leaf, on one device with the forest.  Returns (value[E] in the same
        dtype, ok[E]).  A failed leaf takes no part, whatever its value; an edge without a valid leaf is not ok and NaN.
        ValueError on another shape.
        """
        for name, given in (("value", value), ("ok", ok)):
            if given.shape != (len(self.leaves),):
                raise ValueError(
                    f"{name} has shape {list(given.shape)}; nearest valid: [{len(self.leaves)}], one per leaf"
                )
        edge, leaf = self.descent
        # In float64 the mean of equal scores is that very score: a group of equal leaves keeps a spread of exactly 0.
        zeros = torch.zeros(len(self.edges), dtype=torch.float64, device=value.device)
        total = zeros.index_add(0, edge, value.double().masked_fill(~ok, 0.0)[leaf])
        count = zeros.index_add(0, edge, ok.double()[leaf])
        valid = count > 0
        return (total / count).masked_fill(~valid, math.nan).to(value.dtype), valid

    def select(self, edges: Tensor) -> Forest:
        """Keep only those edges, in that order: a LongTensor of distinct indices or a BoolTensor[E].

        Leaves stay, with their latents; all other nodes that no kept edge refers to are freed.
        """
        kept = torch.arange(len(self.edges), device=self.edges.step.device)[edges]
        place = torch.full((len(self.edges),), -1, dtype=torch.long, device=kept.device)
        place[kept] = torch.arange(len(kept), device=kept.device)
        if not torch.equal(place[kept], torch.arange(len(kept), device=kept.device)):
            raise ValueError(f"edges names {len(kept)} edges, some twice; nearest valid: distinct indices or a mask")
        edge, leaf = self.descent
        new, alive = place[edge], place[edge] >= 0
        new, leaf = new[alive], leaf[alive]
        order = torch.argsort(new, stable=True)
        chosen = replace(self, edges=self.edges.map(lambda t: t[kept]), descent=(new[order], leaf[order]))
        return chosen._compact()

    def drop_leaf_states(self) -> Forest:
        """Free the leaf latents that no edge refers to, once they are decoded; their `leaves.node` becomes −1."""
        used = torch.zeros(self.nodes.shape[0] + 1, dtype=torch.bool, device=self.nodes.device)
        used[self.edges.parent] = True
        used[self.edges.child] = True
        node = torch.where(
            used[self.leaves.node], self.leaves.node, -1
        )  # −1 reads the extra last entry, which is False
        return replace(self, leaves=replace(self.leaves, node=node))._compact()

    def as_leaves(self) -> Forest:
        """A forest in which every leaf stands as one trained edge, in leaf order.

        Credits value edges; with this, they value leaves: a forward-process method (DiffusionNFT, AWM, …) samples by
        ODE and trains on its leaves, so its plans have no stochastic edge to give credit to.  Edge n has leaf n's node
        as parent and child (−1 where the latent was dropped), its prompt, root and traits, step T − 1 (at least 0),
        depth 0 and scale 1; it is trained but not stochastic, has no log_prob (NaN) and no mean, and leaf n alone
        descends from it.  Nodes and leaves stay as they are.
        """
        leaves = self.leaves
        alone = torch.arange(len(leaves), device=leaves.node.device)
        edges = Edges(
            parent=leaves.node,
            child=leaves.node,
            step=torch.full_like(alone, max(self.steps - 1, 0)),
            prompt=leaves.prompt,
            root=leaves.root,
            depth=torch.zeros_like(alone),
            scale=torch.ones_like(alone, dtype=self.edges.scale.dtype),
            log_prob=torch.full_like(alone, math.nan, dtype=self.edges.log_prob.dtype),
            stochastic=torch.zeros_like(alone, dtype=torch.bool),
            trained=torch.ones_like(alone, dtype=torch.bool),
            traits=leaves.traits,
        )
        return replace(self, edges=edges, descent=(alone, alone))

    def as_candidates(self) -> Forest:
        """A forest in which every edge is scored itself: leaf e stands for the state that edge e reaches, and descends
        from it alone. It lets every credit that works on leaves' scores take a latent reward's, one for each edge."""
        edges, numbers = self.edges, torch.arange(len(self.edges), device=self.edges.step.device)
        return replace(self, leaves=Leaves(edges.child, edges.prompt, edges.root), descent=(numbers, numbers))

    @staticmethod
    def cat(forests: Sequence[Forest]) -> Forest:
        """One forest from several; prompt slots are kept, indices of nodes, edges and leaves shift.

        ValueError if there is none, or if they differ in `steps`, latent shape or dtype, in the names of their edges'
        or leaves' traits, or in whether their edges have a mean.
        """
        if not forests:
            raise ValueError("forests = []: nothing to join; nearest valid: one Forest")
        first = forests[0]
        for other in forests[1:]:
            if other.steps != first.steps:
                raise ValueError(f"steps = {other.steps} in one forest; nearest valid: {first.steps}, as in the first")
            if other.nodes.shape[1:] != first.nodes.shape[1:] or other.nodes.dtype != first.nodes.dtype:
                raise ValueError(
                    f"nodes are {list(other.nodes.shape[1:])} {other.nodes.dtype} in one forest; "
                    f"nearest valid: {list(first.nodes.shape[1:])} {first.nodes.dtype}, as in the first"
                )
        shifted: list[Forest] = []
        node = edge = leaf = 0
        for forest in forests:
            shifted.append(forest._shift(node, edge, leaf))
            node, edge, leaf = node + len(forest.nodes), edge + len(forest.edges), leaf + len(forest.leaves)
        return Forest(
            nodes=torch.cat([f.nodes for f in shifted]),
            edges=_cat_edges([f.edges for f in shifted]),
            leaves=Leaves(
                node=torch.cat([f.leaves.node for f in shifted]),
                prompt=torch.cat([f.leaves.prompt for f in shifted]),
                root=torch.cat([f.leaves.root for f in shifted]),
                traits=_cat_traits("leaves", [f.leaves.traits for f in shifted]),
            ),
            descent=(torch.cat([f.descent[0] for f in shifted]), torch.cat([f.descent[1] for f in shifted])),
            steps=first.steps,
        )

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Forest:
        return Forest(
            nodes=fn(self.nodes),
            edges=self.edges.map(fn),
            leaves=self.leaves.map(fn),
            descent=(fn(self.descent[0]), fn(self.descent[1])),
            steps=self.steps,
        )

    def _shift(self, node: int, edge: int, leaf: int) -> Forest:
        """The same forest with larger indices: only for being put behind others."""

        def moved(index: Tensor) -> Tensor:
            return torch.where(index < 0, index, index + node)  # a dropped leaf's −1 stays

        return replace(
            self,
            edges=replace(self.edges, parent=moved(self.edges.parent), child=moved(self.edges.child)),
            leaves=replace(self.leaves, node=moved(self.leaves.node)),
            descent=(self.descent[0] + edge, self.descent[1] + leaf),
        )

    def _compact(self) -> Forest:
        """Free the nodes that neither an edge nor a leaf refers to."""
        # one entry more than nodes: where a dropped leaf's −1 points
        used = torch.zeros(self.nodes.shape[0] + 1, dtype=torch.bool, device=self.nodes.device)
        for index in (self.edges.parent, self.edges.child, self.leaves.node):
            used[index] = True
        if bool(used[:-1].all()):
            return self
        place = torch.cumsum(used, 0) - 1
        place[-1] = -1
        return replace(
            self,
            nodes=self.nodes[used[:-1]],
            edges=replace(self.edges, parent=place[self.edges.parent], child=place[self.edges.child]),
            leaves=replace(self.leaves, node=place[self.leaves.node]),
        )


def _cat_edges(parts: Sequence[Edges]) -> Edges:
    return Edges(
        parent=torch.cat([p.parent for p in parts]),
        child=torch.cat([p.child for p in parts]),
        step=torch.cat([p.step for p in parts]),
        prompt=torch.cat([p.prompt for p in parts]),
        root=torch.cat([p.root for p in parts]),
        depth=torch.cat([p.depth for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
        log_prob=torch.cat([p.log_prob for p in parts]),
        stochastic=torch.cat([p.stochastic for p in parts]),
        trained=torch.cat([p.trained for p in parts]),
        mean=_cat_means([p.mean for p in parts]),
        traits=_cat_traits("edges", [p.traits for p in parts]),
    )


def _cat_means(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise ValueError(f"mean: {len(there)} of {len(parts)} forests have one; nearest valid: all of them, or none")
    return torch.cat(there) if there else None


def _cat_traits(of: str, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = sorted(parts[0])
    for part in parts[1:]:
        if sorted(part) != names:
            raise ValueError(f"{of}.traits = {sorted(part)} in one forest; nearest valid: {names}, as in the first")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
