"""Chunks: partitions of every path, GCPO's recursion, and draws without replacement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import skeleton
from tempflow.core.units import (
    AdaptiveChunks,
    ChunkSampler,
    FixedChunks,
    cuts,
    leaf_of,
    signal_by_place,
    whole_path,
)


def forest(plan: Plan, prompts: int = 3, signal: Tensor | None = None) -> Forest:
    """No states; the trait "l1rel" is `signal` at every edge's step."""
    bare = skeleton([plan] * prompts, range(prompts))
    if signal is None:
        return bare
    return replace(bare, edges=replace(bare.edges, traits={"l1rel": signal[bare.edges.step]}))


CHAINS = P.chain(7, 4)
"""Six trained steps of seven."""


def chunks_by_path(whole: Forest, unit: Tensor) -> list[list[int]]:
    """Per leaf: the unit of each trained edge, in order of step."""
    leaf, edges = leaf_of(whole), whole.edges
    out = []
    for n in range(len(whole.leaves)):
        rows = ((leaf == n) & edges.trained).nonzero()[:, 0]
        rows = rows[torch.argsort(edges.step[rows])]
        out.append(unit[rows].tolist())
    return out


def test_leaf_of_names_the_one_leaf_below_and_refuses_trees() -> None:
    whole = forest(CHAINS)
    leaf = leaf_of(whole)
    assert torch.equal(whole.leaves.prompt[leaf], whole.edges.prompt)
    assert torch.equal(whole.leaves.root[leaf], whole.edges.root)
    with pytest.raises(
        ValueError, match=r"forest: 2 leaves descend from edge 0, and a path needs one; nearest valid: "
    ):
        leaf_of(forest(P.tree(3, 1, {1: 2})))
    unscored = replace(CHAINS, scored=CHAINS.scored[1:])
    with pytest.raises(ValueError, match="forest: 0 leaves descend from edge 0"):
        whole_path(forest(unscored), 0)


def test_whole_path_is_one_chunk_a_leaf_and_leaves_out_untrained_steps() -> None:
    whole = forest(CHAINS)
    unit = whole_path(whole, 5)
    assert torch.equal(unit == -1, ~whole.edges.trained)
    assert chunks_by_path(whole, unit) == [[n] * 6 for n in range(12)]


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (1, 2, 3), (4, 2)])
def test_fixed_chunks_partition_every_path(sizes: tuple[int, ...]) -> None:
    whole = forest(CHAINS)
    unit = FixedChunks(sizes)(whole, 0)
    assert torch.equal(unit == -1, ~whole.edges.trained)
    paths = chunks_by_path(whole, unit)
    for path in paths:
        runs = list(dict.fromkeys(path))
        assert tuple(path.count(run) for run in runs) == sizes
        assert path == [run for run, size in zip(runs, sizes, strict=True) for _ in range(size)]  # neighbours
    numbers = [set(path) for path in paths]
    assert sum(len(n) for n in numbers) == len(set().union(*numbers))  # no chunk spans two paths


def test_steps_not_trained_inside_a_path_do_not_count() -> None:
    whole = forest(P.chain(8, 2, train=[0, 3, 4, 6]), prompts=1)
    unit = FixedChunks((1, 3))(whole, 0)
    assert [len(set(p)) for p in chunks_by_path(whole, unit)] == [2, 2]
    mine = unit[(leaf_of(whole) == 0) & (whole.edges.step == 3)]
    assert torch.equal(mine, unit[(leaf_of(whole) == 0) & (whole.edges.step == 6)])
    assert bool((unit[whole.edges.step == 5] == -1).all())


def test_order_of_edges_does_not_matter() -> None:
    whole = forest(CHAINS, signal=torch.arange(7.0))
    order = torch.randperm(len(whole.edges), generator=torch.Generator().manual_seed(0))
    shuffled = whole.select(order)
    chunks = FixedChunks((1, 2, 3), ChunkSampler(0.67, weighted=True))
    a, b = chunks(shuffled, 4), chunks(whole, 4)[order]
    assert torch.equal(a < 0, b < 0) and torch.equal(a[:, None] == a, b[:, None] == b)


def test_a_chunk_is_numbered_by_its_first_edge() -> None:
    whole = forest(CHAINS)
    singles = FixedChunks((1,) * 6)(whole, 0)
    assert torch.equal(singles, torch.where(whole.edges.trained, torch.arange(len(whole.edges)), -1))
    pairs = FixedChunks((2, 2, 2))(whole, 0)
    for number in pairs[pairs >= 0].unique().tolist():
        assert number == int((pairs == number).nonzero()[0, 0])


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"sizes: \(2, 3\) add up to 5, but a path has 6 .* nearest valid: \(2, 4\)"):
        FixedChunks((2, 3))(forest(CHAINS), 0)
    with pytest.raises(ValueError, match=r"add up to 9.* nearest valid: \(4, 2\)"):
        FixedChunks((4, 5))(forest(CHAINS), 0)
    for bad in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"sizes: .* must be chunks of at least one step"):
            FixedChunks(bad)
    uneven = Forest.cat([forest(CHAINS, 1), forest(P.chain(7, 4, train=[1]), 1)])
    with pytest.raises(ValueError, match=r"forest: paths have \[1, 6\] trained steps"):
        FixedChunks((6,))(uneven, 0)


# ------------------------------------------------------------------------------------------------------- recursion
def test_cuts_by_hand() -> None:
    assert cuts([1.0, 2.0, 3.0], 3) == (3,)
    assert cuts([5.0, 4.0, 3.0, 2.0, 3.0, 4.0], 3) == (3, 3)  # falls, then rises from the 2 on
    assert cuts([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 3) == (3, 3)  # all of one sign: the middle
    assert cuts([1.0, 2.0, 2.0, 2.0, 3.0, 1.0], 4) == (4, 2)  # zeros keep the sign; the 3 turns
    assert cuts([float(i) for i in range(8)], 1) == (1, 1, 1, 1, 1, 1, 1, 1)


def test_second_order_cuts_at_the_inflection() -> None:
    """Order 1 finds no turn and halves; each half of i³ around its inflection is cut there by order 2."""
    cubic = [(i - 3.5) ** 3 for i in range(8)]  # rising throughout, inflection between the fourth and fifth
    assert cuts(cubic, 4) == (4, 4)
    assert cuts(cubic, 7, order=2) == (4, 4)
    shifted = [(i - 2.5) ** 3 for i in range(8)]
    assert cuts(shifted, 7, order=2) == (3, 5)


@settings(deadline=None, max_examples=100)
@given(signal=st.lists(st.floats(0.01, 2), min_size=1, max_size=24), largest=st.integers(1, 8), order=st.integers(1, 3))
def test_cuts_cover_every_step_once_in_chunks_no_larger_than_asked(
    signal: list[float], largest: int, order: int
) -> None:
    sizes = cuts(signal, largest, order)
    assert sum(sizes) == len(signal) and min(sizes) >= 1 and max(sizes) <= largest
    assert sizes == cuts([3 * s for s in signal], largest, order)


def test_adaptive_chunks_follow_the_iterations_mean_signal() -> None:
    falls_and_rises = torch.tensor([6.0, 5.0, 4.0, 3.0, 4.0, 5.0, 99.0])  # the last step is not trained
    whole = forest(CHAINS, signal=falls_and_rises)
    unit = AdaptiveChunks(3)(whole, 0)
    assert all([p.count(r) for r in dict.fromkeys(p)] == [3, 3] for p in chunks_by_path(whole, unit))
    # one path that says otherwise does not count for more than its share, one that broke for nothing
    trait = whole.edges.traits["l1rel"].clone()
    trait[leaf_of(whole) == 2] = torch.nan
    broken = replace(whole, edges=replace(whole.edges, traits={"l1rel": trait}))
    assert torch.equal(AdaptiveChunks(3)(broken, 0), unit)
    with pytest.raises(ValueError, match="signal: edges have no trait 'l1rel'; observe it"):
        AdaptiveChunks(3)(forest(CHAINS), 0)
    with pytest.raises(ValueError, match="largest: 0 must be at least 1"):
        AdaptiveChunks(0)


def test_signal_by_place_is_the_mean_over_paths() -> None:
    whole = forest(CHAINS, 1)
    value = torch.rand(len(whole.edges), generator=torch.Generator().manual_seed(3))
    named = replace(whole, edges=replace(whole.edges, traits={"l1rel": value}))
    place = torch.where(whole.edges.trained, whole.edges.step, -1)
    want = torch.stack([value[whole.edges.step == i].double().mean() for i in range(6)])
    torch.testing.assert_close(signal_by_place(named, place, "l1rel"), want)
    wrong = replace(whole, edges=replace(whole.edges, traits={"l1rel": value[:, None]}))
    with pytest.raises(ValueError, match=r"signal: 'l1rel' has shape \[28, 1\]; nearest valid: \[28\]"):
        signal_by_place(wrong, place, "l1rel")


# --------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(("share", "count"), [(1.0, 4), (0.5, 2), (0.3, 1), (0.1, 1), (0.75, 3), (0.6, 2)])
def test_how_many_chunks_are_drawn(share: float, count: int) -> None:
    assert ChunkSampler(share).count(4) == count
    whole = forest(CHAINS)
    unit = FixedChunks((1, 1, 2, 2), ChunkSampler(share))(whole, 3)
    assert {len(set(p) - {-1}) for p in chunks_by_path(whole, unit)} == {count}


def test_a_chunk_is_taken_whole_or_not_at_all_and_keeps_its_number() -> None:
    whole = forest(CHAINS)
    every, some = FixedChunks((1, 2, 3))(whole, 0), FixedChunks((1, 2, 3), ChunkSampler(0.4))(whole, 0)
    for chunk in every[every >= 0].unique():
        assert set(some[every == chunk].tolist()) in ({int(chunk)}, {-1})


def test_draws_differ_by_path_and_iteration_and_not_by_what_comes_before() -> None:
    whole, chunks = forest(CHAINS), FixedChunks((1, 2, 3), ChunkSampler(0.4))
    first, second = chunks(whole, 0), chunks(whole, 1)
    assert not torch.equal(first, second) and torch.equal(first, chunks(whole, 0))
    assert len({tuple(c >= 0 for c in p) for p in chunks_by_path(whole, first)}) > 1
    alone = skeleton([CHAINS], [2])
    mine = chunks(alone, 0)
    at_end = first[whole.edges.prompt == 2]
    assert torch.equal(mine >= 0, at_end >= 0)


def test_even_draws_take_every_chunk_alike_and_weighted_ones_by_the_law_of_successive_draws() -> None:
    """4 000 draws of two of three; probabilities of the ordered pairs summed by hand."""
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for weighted in (False, True):
        p = weight / weight.sum() if weighted else torch.full((3,), 1 / 3, dtype=torch.float64)
        want = torch.zeros(3, dtype=torch.float64)
        for a, b in permutations(range(3), 2):
            chance = p[a] * p[b] / (1 - p[a])
            want[a] += chance
            want[b] += chance
        sampler = ChunkSampler(0.7, weighted)
        taken = torch.stack([sampler.taken(weight, (i, 0, 0)) for i in range(4000)]).double()
        assert bool((taken.sum(1) == 2).all())
        torch.testing.assert_close(taken.mean(0), want, rtol=0, atol=0.03)


def test_weights_need_no_normalising() -> None:
    weight, sampler = torch.tensor([1.0, 2.0, 5.0, 0.5], dtype=torch.float64), ChunkSampler(0.5, weighted=True)
    for i in range(200):
        assert torch.equal(sampler.taken(weight, (i, 0, 0)), sampler.taken(8 * weight, (i, 0, 0)))


def test_weighted_draws_by_the_mean_signal_of_a_chunk_not_its_sum() -> None:
    """A chunk of three steps with the same mean is as likely as a chunk of one."""
    whole = forest(P.chain(7, 400), 1, torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 9.0]))
    unit = FixedChunks((1, 3, 2), ChunkSampler(0.34, weighted=True))(whole, 0)
    first_step = Counter([c >= 0 for c in p].index(True) for p in chunks_by_path(whole, unit))
    assert [first_step[s] / 400 for s in (0, 1, 4)] == pytest.approx([0.2, 0.2, 0.6], abs=0.07)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=r"share: .* must be in \(0, 1\]"):
        ChunkSampler(share)
