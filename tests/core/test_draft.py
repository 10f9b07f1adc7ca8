"""Choosing from a pool: counts, ties, failures; Kendall's τ against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tempflow.core.draft import Draft, from_noises, kendall
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


def test_costs_and_starts() -> None:
    assert Draft(96, 6).cost() == Cost(576, 96, 0) == Draft(96, 6).plan.cost()
    assert from_noises(ode(4, 3), (7, 0, 90)).start == (7, 0, 90)
    with pytest.raises(ValueError, match=r"start\[1\] = -1: must be at least 0"):
        from_noises(ode(4, 2), (0, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "pool: 0 must be at least 1"),
        ((3, 0), "draft_steps: 0 must be"),
        ((3, 3, "best"), "mode: 'best' is not one of"),
    ],
)
def test_bad_arguments(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draft(*arguments)
