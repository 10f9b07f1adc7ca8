"""The figures of benchmarks.surrogate: against closed forms and drawn numbers of known variance."""

from __future__ import annotations

import pytest
import torch

from benchmarks.surrogate import RandomTimes, gram, jackknife, noise_of, spreads, true_spread
from tempflow.core.rng import Stream
from tempflow.core.schedule import linear


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    rows = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double()
    value, error = jackknife(lambda r: float(r[:, 0].mean()), rows)
    assert value == pytest.approx(float(rows[:, 0].mean()))
    assert error == pytest.approx(float(rows[:, 0].std()) / 3, rel=1e-12)


def test_noise_is_the_trace_of_the_sample_covariance() -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)).double() + 3
    assert noise_of(gram(rows)) == pytest.approx(float(rows.var(0).sum()), rel=1e-12)


def test_spreads_find_what_was_put_in() -> None:
    """Estimates 10 + sample (std 1) + a redraw's common noise (std 2) + own noise (std 0.5)."""
    g = torch.Generator().manual_seed(2)
    redraws, prompts, group = 40, 60, 24
    sample, common = torch.randn(1, prompts, group, generator=g), torch.randn(redraws, prompts, 1, generator=g)
    found = (10 + sample + 2 * common + 0.5 * torch.randn(redraws, prompts, group, generator=g)).double()
    seen = spreads(found)
    assert seen.redraw[0] == pytest.approx((4.25**0.5) / 10, rel=0.05)
    assert seen.within[0] == pytest.approx((1.25**0.5) / 10, rel=0.05)
    assert seen.difference[0] == pytest.approx(0.05, rel=0.05)
    assert true_spread(found - 2 * common) == pytest.approx(0.1, rel=0.05)
    assert 0 < seen.difference[1] < 0.05


def test_random_times_are_drawn_from_the_whole_grid() -> None:
    t = RandomTimes(3)(Stream(0, "test"), [(i,) for i in range(200)], linear(4))
    share = [float((t == value).double().mean()) for value in linear(4).sigmas[:-1].double()]
    assert sum(share) == pytest.approx(1) and all(0.2 < s < 0.3 for s in share)
