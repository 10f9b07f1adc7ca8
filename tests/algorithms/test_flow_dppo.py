"""Flow-DPPO: its mask by hand in float64, what it reduces to, and its place in the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loop_checks import (
    bench_of,
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
    second,
)
from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_dppo import flow_dppo
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.clip import DivergenceMask
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.plan import Cost
from tempflow.core.schedule import shifted


def small(**fields: Any) -> Algorithm:
    return flow_dppo(**{"steps": 4, "group": 5, "noisy_steps": 2, "std": "group", **fields})


def test_defaults_and_cost() -> None:
    a = flow_dppo()
    assert a.cost(0, 1) == Cost(160, 16, 48) and a.objective.clip == DivergenceMask(1e-5, True)
    assert (a.credit.scale, a.dynamics, a.objective.keeps_mean) == ("global", FlowSDE(0.7), True)
    plans = [a.plan(i, 0) for i in range(40)]
    noisy = [{i for i, s in zip(p.step, p.stochastic, strict=True) if s} for p in plans]
    assert all(len(at) == 3 and at <= set(range(5)) for at in noisy) and len({tuple(at) for at in noisy}) > 5
    assert all(p.stochastic == p.trained for p in plans) and a.plan(3, 0) is a.plan(3, 7)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scaled", [True, False])
def test_loss_and_gradient_against_the_published_mask(scaled: bool) -> None:
    """Every edge by itself: κ = mean (μ − μ_old)²/(2S²), S = 1 unless scaled; dropped where κ ≥ δ and A(ρ − 1) > 0."""
    n = 64
    x, z, old, step = draw(n, 3, 4, seed=1), draw(n, 3, 4, seed=2), draw(n, 3, 4, seed=3), torch.arange(n) % 9
    grid, dynamics, one = shifted(10), FlowSDE(0.7), torch.ones(n, dtype=torch.float64)
    v = (old + draw(n, 3, 4, seed=4) * torch.logspace(-3, 0, n, dtype=torch.float64).view(-1, 1, 1)).requires_grad_()
    was = dynamics.transition(x, old, grid, step, one)
    y, advantage = was.sample(z), draw(n, seed=5)
    batch = EdgeBatch(x, y, step, one, step, was.log_prob(y), advantage, one, grid, dynamics, mean=was.mean)
    delta = 1e-5
    loss = flow_dppo(threshold=delta, scaled=scaled).objective({"policy": lambda *_: v}, batch)
    (found,) = torch.autograd.grad(loss.value, [v])

    a, b, s = dynamics.coefficients(grid, step)
    other = v.detach().clone().requires_grad_()
    total, dropped = torch.zeros((), dtype=torch.float64), []
    for e in range(n):
        mean, mean_old = a[e] * x[e] + b[e] * other[e], a[e] * x[e] + b[e] * old[e]
        log_ratio = (((y[e] - mean_old) ** 2 - (y[e] - mean) ** 2) / (2 * s[e] ** 2)).mean()
        divergence = ((mean - mean_old) ** 2).mean() / (2 * (s[e] ** 2 if scaled else 1))
        drop = bool(divergence >= delta) and float(advantage[e] * (log_ratio.detach().exp() - 1)) > 0
        dropped.append(drop)
        total = total + (0 if drop else -advantage[e] * log_ratio.exp())
    (want,) = torch.autograd.grad(total / n, [other])
    assert 3 < sum(dropped) < n - 3
    torch.testing.assert_close(loss.value, total / n)
    torch.testing.assert_close(found, want)
    assert loss.metrics["clip_fraction"].bool().tolist() == dropped
    assert loss.metrics["outside_clip"].sum() > sum(dropped)  # some are far, and coming back


def test_in_the_loop() -> None:
    check_counts(small())
    check_counts(small(kl=0.1))
    check_first_ratio(small())
    check_no_spread(small())
    check_learns(small(group=8))


def test_its_first_gradient_is_flow_grpos() -> None:
    """At r = 1 nothing has diverged, whatever the threshold."""
    bench = bench_of(small())
    plan = bench.context.algorithm.plan
    flow = flow_grpo(steps=4, group=5, kl=0.0, std="group", clip=0.02)
    want = gradient(replace(flow, plan=plan))
    torch.testing.assert_close(gradient(small(threshold=1e-12)), want, rtol=1e-5, atol=1e-7)


def test_a_threshold_binds_on_later_updates() -> None:
    loose, tight = second(small(threshold=1e6)), second(small(threshold=1e-6))
    assert not torch.equal(loose, tight)
    assert torch.equal(loose, second(small(threshold=1e5)))


def test_bad_arguments() -> None:
    check_errors(
        flow_dppo,
        [
            ({"noisy_steps": 0}, "noisy_steps: 0 must be in 1 … 9; nearest valid: 1"),
            ({"noisy_steps": 10}, "noisy_steps: 10 must be in 1 … 9; nearest valid: 9"),
            ({"first_steps": 2}, "first_steps: 2 must be in 3 … 9; nearest valid: 3"),
            ({"first_steps": 10}, "first_steps: 10 must be in 3 … 9; nearest valid: 9"),
            ({"threshold": 0.0}, "threshold: 0.0 must be finite and above 0; 1e-5 is usual"),
            ({"std": "all"}, "std: 'all' is not one of 'global', 'group'"),
        ],
    )
