"""Choosing from a pool: counts, ties, failures; Kendall's τ against scipy."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tempflow.core.draft import Draft, agreement, from_noises, kendall, overlap
from tempflow.core.plan import Cost, ode
from tempflow.core.rng import Stream

STREAM = Stream(3, "test")
MODES = ("best_worst", "mean_deviation", "random", "extremes_random")


def choose(
    values: list[float], keep: int, mode: str = "best_worst", failed: tuple[int, ...] = (), id: int = 0
) -> tuple[int, ...]:
    ok = torch.tensor([i not in failed for i in range(len(values))])
    return Draft(len(values), 2, mode).choose(torch.tensor(values), ok, keep, STREAM, (id,))  # type: ignore[arg-type]


def test_best_and_worst_by_hand() -> None:
    assert choose([0.1, 0.9, 0.5, 0.3, 0.7, 0.2], 4) == (0, 1, 4, 5)
    assert choose([0.1, 0.9, 0.5, 0.3, 0.7, 0.2], 3) == (0, 1, 5)  # one best, two worst
    assert choose([0.5] * 5, 2) == (0, 4)  # ties by index: the first leads, the last ends


def test_mean_deviation_by_hand() -> None:
    assert choose([0.0, 5.0, 5.1, 4.9, 9.0], 2, "mean_deviation") == (0, 4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_laws_of_every_mode(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    keep = data.draw(st.integers(1, size))
    values = data.draw(st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size))
    failed = tuple(data.draw(st.sets(st.integers(0, size - 1), max_size=size)))
    for mode in MODES:
        got = choose(values, keep, mode, failed)
        assert len(got) == keep == len(set(got)) and list(got) == sorted(got)
        assert all(0 <= i < size for i in got)
        if size - len(failed) >= keep:  # a failed draft is never preferred
            assert not set(got) & set(failed)
        assert got == choose(values, keep, mode, failed)


def test_the_kept_ends_bracket_the_rest() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    kept = set(choose(values, 10))
    rest = [values[i] for i in range(30) if i not in kept]
    best, worst = sorted((values[i] for i in kept), reverse=True)[:5], sorted(values[i] for i in kept)[:5]
    assert min(best) > max(rest) and max(worst) < min(rest)


def test_random_depends_on_the_id_and_not_on_scores() -> None:
    a = choose([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 3, "random")
    assert a == choose([9.0, 1.0, 2.0, -3.0, 4.0, 0.0], 3, "random")
    assert len({choose([0.0] * 6, 3, "random", id=i) for i in range(12)}) > 3


def test_extremes_random_keeps_half_by_rank() -> None:
    values = [float(i) for i in range(20)]
    got = choose(values, 8, "extremes_random")
    assert {19, 18, 0, 1} <= set(got) and len(got) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=15))
def test_kendall_is_scipys_tau_b(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    want = float(kendalltau(a.numpy(), b.numpy()).statistic)
    got = kendall(a, b)
    assert math.isnan(got) if math.isnan(want) else got == pytest.approx(want, abs=1e-12)


def test_more_than_the_pool_is_all_of_it() -> None:
    for mode in MODES:
        assert choose([0.3, 0.1, 0.2], 9, mode, failed=(1,)) == (0, 1, 2)


def test_agreement_is_kendall_by_prompt_without_failures() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 1.0, math.nan, 0.0]), torch.tensor([1.0, 2.0, math.nan, 4.0, 9.0, 5.0])
    got = agreement(a, b, torch.tensor([4, 4, 4, 7, 7, 7]), [7, 4, 9])
    assert got.dtype == torch.float64 and got[:2].tolist() == [-1.0, 1.0] and math.isnan(got[2])


def best_sets(scores: list[int], k: int) -> list[set[int]]:
    """All sets of k that nothing outside of beats."""
    every = set(range(len(scores)))
    whole = [set(c) for c in combinations(range(len(scores)), k)]
    return [s for s in whole if min(scores[i] for i in s) >= max((scores[i] for i in every - s), default=-9)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6), st.data())
def test_overlap_is_the_mean_over_all_ways_to_break_ties(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    k = data.draw(st.integers(1, len(a)))
    ways = [len(s & t) / k for s in best_sets(a, k) for t in best_sets(b, k)]
    got = overlap(torch.tensor(a).float(), torch.tensor(b).float(), k)
    assert got == pytest.approx(sum(ways) / len(ways), abs=1e-12)


def test_overlap_of_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="k: 4 of 3 scores; nearest valid: 3"):
        overlap(torch.zeros(3), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="scores: 3 and 3; two lists"):
        overlap(torch.zeros(3), torch.tensor([0.0, math.nan, 1.0]), 1)


def pools(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def test_agreement_falls_with_the_noise_of_a_draft() -> None:
    full = pools(60, 96)
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = {"tau": list[float](), "best": list[float](), "worst": list[float]()}
    for level in (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 8.0):
        rows = list(zip(full + level * noise, full, strict=True))
        seen["tau"].append(sum(kendall(a, b) for a, b in rows) / len(rows))
        seen["best"].append(sum(overlap(a, b, 12) for a, b in rows) / len(rows))
        seen["worst"].append(sum(overlap(-a, -b, 12) for a, b in rows) / len(rows))
    for curve in seen.values():
        assert curve[0] == pytest.approx(1, abs=1e-12) and curve == sorted(curve, reverse=True)
        assert len(set(curve)) == len(curve)
    assert abs(seen["tau"][-1]) < 0.15 and abs(seen["best"][-1] - 12 / 96) < 0.12


@pytest.mark.parametrize(
    ("pool", "contrast", "spread"), [(24, 0.78, 0.97), (48, 1.25, None), (72, 1.48, None), (96, 1.63, 1.68)]
)
def test_the_ends_of_a_gaussian_pool_have_more_contrast(pool: int, contrast: float, spread: float | None) -> None:
    """Mean |R − mean of the kept| of 24 of `pool`, and their standard deviation, in σ: the notes' order statistics."""
    rewards, ok = pools(200, pool), torch.ones(pool, dtype=torch.bool)
    draft = Draft(pool, 2)
    kept = torch.stack([r[list(draft.choose(r, ok, 24, STREAM, (0,)))] for r in rewards])
    centred = kept - kept.mean(1, keepdim=True)
    assert float(centred.abs().mean()) == pytest.approx(contrast, abs=0.025)
    if spread is not None:
        assert float(centred.square().mean(1).sqrt().mean()) == pytest.approx(spread, abs=0.025)


def test_costs_and_starts() -> None:
    assert Draft(96, 6).cost() == Cost(576, 96, 0) == Draft(96, 6).plan.cost() == Draft(96, 6, precision="int8").cost()
    assert from_noises(ode(4, 3), (7, 0, 90)).start == (7, 0, 90)
    with pytest.raises(ValueError, match=r"start\[1\] = -1: must be at least 0"):
        from_noises(ode(4, 2), (0, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "pool: 0 must be at least 1"),
        ((3, 0), "draft_steps: 0 must be"),
        ((3, 3, "best"), "mode: 'best' is not one of"),
        ((3, 3, "random", "int4"), "draft_precision: 'int4' is not one of full, bfloat16, .*; nearest valid: 'full'"),
    ],
)
def test_bad_arguments(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draft(*arguments)
