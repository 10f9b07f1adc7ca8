"""Bootstrap intervals against scipy's and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tempflow import stats
from tempflow.stats import interval, macro_interval, paired_interval

VALUES = np.random.default_rng(7).gamma(2.0, size=80)


def scipy_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    found = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20000, confidence_level=level, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    return found.low, found.high


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_agrees_with_scipy(level: float) -> None:
    low, high = interval(VALUES, draws=20000, level=level)
    want = scipy_interval(VALUES, level)
    assert (low, high) == pytest.approx(want, abs=0.04 * VALUES.std() / math.sqrt(80) * 3)
    assert low < VALUES.mean() < high


def test_failures_are_left_out_and_never_zero() -> None:
    holed = np.concatenate([VALUES, np.full(40, np.nan)])
    assert interval(holed) == interval(VALUES)
    assert np.isnan(interval([np.nan, np.nan])).all() and np.isnan(interval([])).all()
    assert interval([0.3]) == (0.3, 0.3)


def test_paired_is_of_the_differences() -> None:
    rng = np.random.default_rng(11)
    a = VALUES + 0.1 + rng.normal(0, 0.01, 80)
    low, high = paired_interval(a, VALUES, draws=20000)
    assert (low, high) == pytest.approx(scipy_interval(a - VALUES), abs=5e-4)
    assert 0.09 < low < high < 0.11  # the two intervals apart are thirty times as wide
    b = VALUES.copy()
    b[3] = np.nan
    assert paired_interval(a, b) == interval(np.delete(a - VALUES, 3))
    low_b, high_b = paired_interval(VALUES, a)
    assert low_b < high_b < 0  # a − b, not b − a


def test_strata_keep_their_shares() -> None:
    """Two kinds far apart: only what varies inside a kind is uncertain."""
    rng = np.random.default_rng(11)
    kinds = ["a"] * 40 + ["b"] * 20
    values = np.concatenate([rng.normal(0, 1, 40), rng.normal(100, 1, 20)])
    low, high = interval(values, draws=20000, strata=kinds)
    variance = (40 * values[:40].var() + 20 * values[40:].var()) / 60**2
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance), rel=0.05)
    assert interval(values)[1] - interval(values)[0] > 20 * (high - low)


def test_strata_and_clusters_need_not_lie_together() -> None:
    rng = np.random.default_rng(11)
    order = rng.permutation(60)
    kinds = np.array(["a"] * 40 + ["b"] * 20)
    values = np.where(kinds == "a", 0.0, 100.0)
    assert interval(values[order], strata=kinds[order].tolist()) == pytest.approx((100 / 3, 100 / 3))


def test_a_cluster_is_drawn_whole() -> None:
    """Eight copies of each value are worth no more than one."""
    copies = np.repeat(VALUES, 8)
    clusters = np.repeat(np.arange(80), 8).tolist()
    assert interval(copies, clusters=clusters) == pytest.approx(interval(VALUES), rel=1e-12)
    width = interval(VALUES)[1] - interval(VALUES)[0]
    assert interval(copies)[1] - interval(copies)[0] < width / 2
    ragged = np.array([1.0, 3.0, np.nan, 5.0])  # the mean over valid pictures, 3, and not 3.5, that of prompts' means
    low, high = interval(ragged, clusters=["p", "p", "q", "q"], draws=4000)
    assert (low, high) == (2.0, 5.0)


def test_runs_are_resampled_too_all_on_the_same_samples() -> None:
    """The variance of a mean over runs and samples that are drawn independently, by simulation of the same scheme."""
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, (3, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.1, (3, 60))
    low, high = interval(values, draws=20000)
    runs, samples = rng.integers(0, 3, (20000, 3)), rng.integers(0, 60, (20000, 60))
    means = [values[r][:, s].mean() for r, s in zip(runs, samples, strict=True)]
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    assert high - low > 1.5 * (interval(values.mean(0))[1] - interval(values.mean(0))[0])
    one = interval(values[:1], draws=500, clusters=[n // 2 for n in range(60)])
    assert one == interval(values[0], draws=500, clusters=[n // 2 for n in range(60)])  # one run: samples alone


def test_seeded_and_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval(VALUES, draws=500)
    assert interval(VALUES, draws=500) == whole != interval(VALUES, draws=500, seed=1)
    monkeypatch.setattr(stats, "CELLS_AT_ONCE", 333)
    assert interval(VALUES, draws=500) == whole


def test_coverage_is_what_it_says() -> None:
    hits, rng = 0, np.random.default_rng(3)
    for _ in range(300):
        low, high = interval(rng.normal(size=50), draws=400)
        hits += low < 0 < high
    assert 0.90 < hits / 300 < 0.985


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0.1, 10), st.floats(-10, 10))
def test_moves_and_scales_with_the_values(values: list[float], scale: float, shift: float) -> None:
    low, high = interval(values, draws=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    moved = interval(np.array(values) * scale + shift, draws=200)
    assert moved == pytest.approx((low * scale + shift, high * scale + shift), abs=1e-8)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: interval([[[1.0]]]), r"shape \[1, 1, 1\]; nearest valid: \[1\]"),
        (lambda: interval([1.0, 2.0], strata=["a"]), "strata has 1 labels for 2 values; nearest valid: 2"),
        (lambda: interval([1.0], clusters=[1, 2]), "clusters has 2 labels for 1 values"),
        (lambda: interval([1.0, 2.0], strata="ab", clusters="cc"), "one lies in two strata"),
        (lambda: interval([1.0], draws=0), "draws: 0 is too few; nearest valid: 1"),
        (lambda: interval([1.0], level=1.0), "level: 1.0 is not between 0 and 1"),
        (lambda: paired_interval([1.0], [1.0, 2.0]), r"a has shape \[1\], b \[2\]"),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mean_of_means_by_hand() -> None:
    """Two groups of one value each prompt: the resamples of two prompts are (a, a), (a, b), (b, a), (b, b)."""
    values, groups, prompts = [0.0, 1.0, 1.0, 1.0], ["x", "y", "x", "y"], ["a", "a", "b", "b"]
    assert macro_interval(values, groups, clusters=prompts) == (0.5, 1.0)
    assert macro_interval([1.0, 0.0], ["x", "y"], strata=["x", "y"]) == (0.5, 0.5)  # each group keeps its value
    even = np.random.default_rng(2).normal(0, 1, 200)
    label = ["x", "y"] * 100  # groups of one size: nearly the interval of the plain mean
    assert macro_interval(even, label, strata=label) == pytest.approx(interval(even, strata=label), abs=0.02)
    few = np.r_[np.zeros(190), np.ones(10)]
    low, high = macro_interval(few, ["x"] * 190 + ["y"] * 10)
    assert low == high == 0.5  # groups count alike, however many values they have
    assert macro_interval([math.nan, 2.0], ["x", "y"]) == (2.0, 2.0)
    assert all(map(math.isnan, macro_interval([math.nan], ["x"])))


def test_a_mean_of_means_refuses() -> None:
    with pytest.raises(ValueError, match="groups has 1 labels"):
        macro_interval([1.0, 2.0], ["x"])
    with pytest.raises(ValueError, match="one lies in two strata"):
        macro_interval([1.0, 2.0], ["x", "y"], strata=[0, 1], clusters=["p", "p"])
