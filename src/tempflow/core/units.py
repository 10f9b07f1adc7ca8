"""Which edges share a chunk: the `units` of a chunk objective (GCPO, GSPO).

All of these want chains: one leaf below every edge. A path is then the trained edges above one leaf, in order of step,
and a chunk is a run of neighbours on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from tempflow.core.forest import Forest
from tempflow.core.rng import Stream


def leaf_of(forest: Forest) -> Tensor:
    """The one leaf below every edge, LongTensor [E]. Raises ValueError where an edge has none or several."""
    edge, leaf = forest.descent
    count = torch.bincount(edge, minlength=len(forest.edges))
    if bool((count != 1).any()):
        worst = int((count != 1).nonzero()[0, 0])
        raise ValueError(
            f"forest: {int(count[worst])} leaves descend from edge {worst}, and a path needs one; "
            "nearest valid: chains (plan.chain, plan.window)"
        )
    return torch.empty_like(edge).index_copy_(0, edge, leaf)


def whole_path(forest: Forest, iteration: int) -> Tensor:
    """A path's trained edges are one chunk (GSPO's sequence ratio). LongTensor [E], −1 for untrained edges.

    Raises ValueError where an edge has another number of leaves than one.
    """
    return torch.where(forest.edges.trained, leaf_of(forest), -1)


@dataclass(frozen=True)
class ChunkSampler:
    """Some of a path's K chunks, drawn for every path and iteration: max(1, ⌊share·K⌋), without replacement.

    share     1 takes all
    weighted  a chunk is drawn with probability ∝ the mean over its steps of the path's own signal (so the next one
              among those left), as GCPO's code does; else all alike
    name      of the stream of draws
    seed      the run's; 0 until `seeded` says it

    Raises ValueError for a share outside (0, 1].
    """

    share: float = 1.0
    weighted: bool = False
    name: str = "gcpo.chunks"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share) and 0 < self.share <= 1):
            raise ValueError(f"share: {self.share} must be in (0, 1]; 0.5 and 1 are usual")

    def count(self, chunks: int) -> int:
        """How many of K chunks are taken."""
        return max(1, math.floor(self.share * chunks + 1e-9))

    def taken(self, weight: Tensor, identity: tuple[int, ...]) -> Tensor:
        """Whether each chunk is taken, bool [K]. weight: float64 [K] > 0, read where `weighted`."""
        keep = self.count(len(weight))
        if keep == len(weight):
            return torch.ones_like(weight, dtype=torch.bool)
        # The largest u^(1/w) are a draw without replacement by w (Efraimidis and Spirakis, 2006).
        u = Stream(self.seed, self.name).uniform([identity], (len(weight),))[0]
        key = u.log() / weight if self.weighted else u.log()
        return torch.zeros_like(weight, dtype=torch.bool).index_fill(0, key.topk(keep).indices, True)


@dataclass(frozen=True)
class FixedChunks:
    """Chunks of given sizes, from the noisiest trained step on; they must add up to a path's trained steps.

    sizes    steps of each chunk
    sampler  which of them are trained
    signal   the edge trait that weighs chunks, where the sampler is weighted

    Raises ValueError for sizes below 1 or none at all; when called, where they do not add up, for edges with another
    number of leaves than one, or without the trait that is asked for.
    """

    sizes: tuple[int, ...]
    sampler: ChunkSampler = ChunkSampler()
    signal: str = "l1rel"

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes: {self.sizes} must be chunks of at least one step; nearest valid: (1,)")

    def seeded(self, seed: int) -> Self:
        """The same, drawing from that seed."""
        return replace(self, sampler=replace(self.sampler, seed=seed))

    def __call__(self, forest: Forest, iteration: int) -> Tensor:
        """LongTensor [E]: a chunk's number; −1 for untrained edges and for chunks that were not drawn."""
        place, length = _places(forest)
        if length != sum(self.sizes):
            raise ValueError(
                f"sizes: {self.sizes} add up to {sum(self.sizes)}, but a path has {length} trained steps; "
                f"nearest valid: {_fitted(self.sizes, length)}"
            )
        return _numbered(forest, iteration, place, self.sizes, self.signal, self.sampler)


@dataclass(frozen=True)
class AdaptiveChunks:
    """Chunks cut where the signal's dynamics turn (GCPO): `cuts` of the signal's mean by step over the iteration.

    largest  chunks of at most that many steps are not cut further; the paper gives no number, 4 is our choice
    sampler, signal, errors as for `FixedChunks`; also raises ValueError for `largest` below 1
    """

    largest: int = 4
    sampler: ChunkSampler = ChunkSampler()
    signal: str = "l1rel"

    def __post_init__(self) -> None:
        if self.largest < 1:
            raise ValueError(f"largest: {self.largest} must be at least 1; nearest valid: 1")

    def seeded(self, seed: int) -> Self:
        """The same, drawing from that seed."""
        return replace(self, sampler=replace(self.sampler, seed=seed))

    def __call__(self, forest: Forest, iteration: int) -> Tensor:
        """LongTensor [E]: a chunk's number; −1 for untrained edges and for chunks that were not drawn."""
        place, _ = _places(forest)
        sizes = cuts([float(w) for w in signal_by_place(forest, place, self.signal)], self.largest)
        return _numbered(forest, iteration, place, sizes, self.signal, self.sampler)


def cuts(signal: Sequence[float], largest: int, order: int = 1) -> tuple[int, ...]:
    """Sizes of the chunks of a sequence of steps, by GCPO's recursion.

    A part of at most `largest` steps is a chunk. Another is cut wherever its difference of that order changes sign
    (first at order 1, at the turning point, which opens the next part), or at its middle where that never happens, and
    its parts are cut by the next order. Differences of 0 keep the sign before them. The paper's words leave open to
    which side a turning point belongs and when to stop.
    """
    if len(signal) <= max(1, largest):
        return (len(signal),)
    difference = list(signal)
    for _ in range(order):
        difference = [b - a for a, b in pairwise(difference)]
    # a difference of this order is centred order/2 steps after its index
    at = [0, *(k + order // 2 for k in _turns(difference)), len(signal)]
    if len(at) == 2:
        at.insert(1, len(signal) // 2)
    parts = [signal[a:b] for a, b in pairwise(at)]
    return tuple(size for part in parts for size in cuts(part, largest, order + 1))


def _turns(difference: Sequence[float]) -> list[int]:
    """Indices at which the sign differs from the last one that was not 0."""
    found: list[int] = []
    last = 0.0
    for k, d in enumerate(difference):
        if d * last < 0:
            found.append(k)
        last = d or last
    return found


def signal_by_place(forest: Forest, place: Tensor, name: str) -> Tensor:
    """Mean of an edge trait over the iteration's paths at each place of a path, float64 [length], on the CPU.

    Values that are not finite (of paths that broke) take no part. Raises ValueError where the trait is missing or not
    one number per edge.
    """
    value = _signal(forest, name)
    used = (place >= 0) & value.isfinite()
    nothing = torch.zeros(int(place.max()) + 1, dtype=torch.float64)
    total = nothing.index_add(0, place[used], value[used].double())
    return total / nothing.index_add(0, place[used], torch.ones_like(value[used].double())).clamp(min=1)


def _signal(forest: Forest, name: str) -> Tensor:
    """The trait, [E] on the CPU."""
    if name not in forest.edges.traits:
        raise ValueError(f"signal: edges have no trait {name!r}; observe it, as by core.credit.RelativeChange()")
    value = forest.edges.traits[name]
    if value.shape != (len(forest.edges),):
        raise ValueError(f"signal: {name!r} has shape {list(value.shape)}; nearest valid: [{len(forest.edges)}]")
    return value


def _places(forest: Forest) -> tuple[Tensor, int]:
    """Every edge's place among its path's trained edges, 0, 1, … by step, −1 for untrained ones; and a path's length.

    Raises ValueError where paths differ in their trained steps' number, or none is trained.
    """
    edges, leaf = forest.edges, leaf_of(forest)
    rows = edges.trained.nonzero()[:, 0]
    length = torch.bincount(leaf[rows])
    length = length[length > 0]
    if len(length) == 0 or bool((length != length[0]).any()):
        raise ValueError(
            f"forest: paths have {sorted({int(n) for n in length})} trained steps; nearest valid: plans that train "
            "equally many steps on every path"
        )
    n = int(length[0])
    order = torch.argsort(leaf[rows] * forest.steps + edges.step[rows], stable=True)
    place = torch.full_like(leaf, -1)
    place[rows[order]] = torch.arange(n, device=leaf.device).repeat(len(length))
    return place, n


def _numbered(
    forest: Forest, iteration: int, place: Tensor, sizes: Sequence[int], signal: str, sampler: ChunkSampler
) -> Tensor:
    """The chunks that the sampler takes of each path, numbered by their first edge: chunks of one are edges as such."""
    leaf, chunks = leaf_of(forest), len(sizes)
    chunk_at = torch.repeat_interleave(torch.arange(chunks), torch.tensor(sizes))
    chunk = torch.where(place >= 0, chunk_at[place], -1)
    code = (leaf * chunks + chunk)[place >= 0]
    edge = torch.arange(len(place))
    first_edge = edge.new_full((len(forest.leaves) * chunks,), len(edge))
    first_edge = first_edge.scatter_reduce(0, code, edge[place >= 0], "amin")
    number = edge.new_full(edge.shape, -1).index_put((place >= 0,), first_edge[code])
    if sampler.count(chunks) == chunks:
        return number
    weight = torch.ones(len(forest.leaves) * chunks, dtype=torch.float64)
    if sampler.weighted:
        # a path that broke is not trained, and any positive weight will do for it
        change = _signal(forest, signal)[place >= 0].double().nan_to_num(0.0, 0.0, 0.0)
        weight = torch.zeros_like(weight).index_add(0, code, change).clamp(min=1e-12)
    weight = weight.view(-1, chunks) / torch.tensor(sizes)
    prompt = [int(slot) for slot in forest.leaves.prompt]
    first: dict[int, int] = {}  # leaf of each prompt
    taken = torch.stack(
        [
            # a leaf is named by its place in its prompt, so that a draw does not depend on the prompts before
            sampler.taken(weight[n], (iteration, slot, n - first.setdefault(slot, n)))
            for n, slot in enumerate(prompt)
        ]
    )
    return torch.where((place >= 0) & taken[leaf, chunk], number, -1)


def _fitted(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """The same chunks, shrunk or grown at the end to add up to `total`."""
    out: list[int] = []
    for size in sizes:
        if sum(out) < total:
            out.append(min(size, total - sum(out)))
    return (*out[:-1], out[-1] + total - sum(out))
