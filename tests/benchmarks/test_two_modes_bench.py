"""The figure of two modes: its exact parts against closed forms, and the figure itself at a reduced size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.two_modes import METHODS, MODES, SPREAD, near, posterior_mean, pretrained, rarer, run, teacher
from tempflow.core.schedule import linear
from tempflow.core.unroll import unroll


def test_the_teachers_path_ends_in_both_modes_alike() -> None:
    noise, rows = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)), torch.zeros(4000).long()
    x = unroll(noise, linear(100, 3.0), teacher, rows, last=0).x[:, 0]
    assert rarer(x) == pytest.approx(0.5, abs=0.03) and near(x) > 0.98
    right = x[x > 0]
    assert float(right.mean()) == pytest.approx(float(MODES[1]), abs=0.03)
    assert float(right.std()) == pytest.approx(SPREAD, abs=0.03)


def test_the_posterior_mean_over_many_samples_is_the_teachers() -> None:
    g = torch.Generator().manual_seed(2)
    samples = MODES[torch.arange(20000) % 2, None] + SPREAD * torch.randn(20000, 1, generator=g)
    x, t = torch.linspace(-1.5, 1.5, 13)[:, None], torch.full((13,), 0.6)
    want = x - 0.6 * teacher(x, t, torch.zeros(13).long())
    torch.testing.assert_close(posterior_mean(samples, x, t), want, rtol=0, atol=0.03)


def test_shares_count_what_lies_where() -> None:
    x = torch.tensor([-1.5, -1.0, -0.2, 1.4])
    assert rarer(x) == 0.25 and near(x) == 0.75 and rarer(-x.abs()) == 0.0


@pytest.mark.slow
def test_matching_with_a_fake_score_that_lags_loses_a_mode_and_dp_dmd_keeps_both() -> None:
    start = pretrained()
    (alone, taught) = (run(start, method, "lagging", 300, seed=0).rarer for method in METHODS)
    assert min(alone) < 0.05 and min(taught) > 0.25
