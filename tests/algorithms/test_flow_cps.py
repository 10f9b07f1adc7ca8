"""Flow-CPS: its plan, the official log-prob against the density's, and what it shares with its neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loop_checks import check_counts, check_errors, check_first_ratio, check_learns, check_no_spread, second

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_cps import UnscaledRatio, flow_cps
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.flow_grpo_fast import flow_grpo_fast
from tempflow.core.dynamics import CPS, FlowSDE
from tempflow.core.objective.edges import EdgeBatch, replay
from tempflow.core.objective.ratio import StepRatio
from tempflow.core.plan import Cost
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted


def small(**fields) -> Algorithm:
    return flow_cps(**{"steps": 4, "group": 5, "clip": 0.02, "std": "group", **fields})


def test_defaults_and_cost() -> None:
    assert flow_cps().cost(0, 1) == Cost(240, 24, 216)
    assert flow_cps().dynamics == CPS(0.8) and flow_cps().objective.ratio == UnscaledRatio()
    assert flow_cps().objective.tightest_clip == 1e-5
    density = flow_cps(log_prob="density")
    assert density.objective.ratio == StepRatio() and density.objective.tightest_clip == 1e-4
    assert flow_cps(log_prob="density", clip=3e-3).objective.tightest_clip == 3e-3
    part = flow_cps().plan(0, 0)
    assert [i for i, noisy in zip(part.step, part.stochastic, strict=True) if noisy] == sorted([*range(9)] * 24)


@pytest.mark.parametrize("log_prob", ["unscaled", "density"])
def test_in_the_loop(log_prob: str) -> None:
    check_counts(small(log_prob=log_prob))
    check_counts(small(log_prob=log_prob, kl=0.1, kl_form="velocity"))
    check_first_ratio(small(log_prob=log_prob))
    check_no_spread(small(log_prob=log_prob))
    check_learns(small(log_prob=log_prob, group=8))


def edges_of(algorithm: Algorithm, predict) -> EdgeBatch:
    schedule = shifted(algorithm.steps).double()
    forest = rollout([algorithm.plan(0, 0)], algorithm.dynamics, schedule, predict, Noise(1), shape=(3, 4))
    e = forest.edges
    n = len(e)
    return EdgeBatch(
        *(forest.nodes[e.parent].double(), forest.nodes[e.child].double(), e.step, e.scale, e.prompt, e.log_prob),
        *(torch.ones(n), torch.ones(n), schedule, algorithm.dynamics),
    )


def test_unscaled_ratio_is_the_difference_of_squares() -> None:
    """mean (y − μ_old)² − mean (y − μ)², with μ by the CPS formula x̂0, ε̂ written out."""
    batch = edges_of(small(), lambda x, s, r: 0.8 * x - 0.3)
    now = lambda x, s, r: 0.9 * x - 0.4  # noqa: E731
    at = replay({"policy": now}, ("policy",), batch)
    sigma, below = (t.view(-1, 1, 1) for t in (batch.schedule.at(batch.step), batch.schedule.after(batch.step)))
    std = below * torch.sin(torch.tensor(0.8 * torch.pi / 2, dtype=torch.float64))

    def mean(v: torch.Tensor) -> torch.Tensor:
        clean, noise = batch.x - sigma * v, batch.x + (1 - sigma) * v
        return (1 - below) * clean + (below**2 - std**2).sqrt() * noise

    gap = [(batch.y - mean(v)).square().mean((1, 2)) for v in (0.8 * batch.x - 0.3, now(batch.x, None, None))]
    torch.testing.assert_close(UnscaledRatio()(at), gap[0] - gap[1], rtol=1e-4, atol=1e-6)
    assert float((gap[0] - gap[1]).abs().max()) > 1e-2
    torch.testing.assert_close(UnscaledRatio()(at), 2 * std.flatten() ** 2 * StepRatio()(at), rtol=1e-9, atol=0)


def test_the_density_drowns_all_steps_in_the_last_one_of_sd3s_grid_and_the_unscaled_one_does_not() -> None:
    """|b|/S and 2S|b| of every trained step; the numbers in the docstring."""
    schedule, steps = shifted(10), torch.arange(9)
    _, b, std = CPS(0.8).coefficients(schedule, steps)
    density, unscaled = b.abs() / std, 2 * std * b.abs()
    assert 28 < float(density[-1] / density[-2]) < 31 and float(density[-1] / density[:-1].sum()) > 5
    assert float(unscaled.max() / unscaled[:-1].min()) < 6 and unscaled.argmin() == 8


def test_with_flow_grpos_step_it_is_flow_grpo() -> None:
    """Bitwise, but for Flow-GRPO's noise in the untrained last step, which is taken out."""
    ours = replace(small(log_prob="density"), dynamics=FlowSDE(0.7))
    theirs = flow_grpo(steps=4, group=5, clip=0.02, kl=0.0, std="group")
    theirs = replace(theirs, plan=ours.plan)
    assert torch.equal(second(ours), second(theirs))
    assert not torch.equal(second(ours), second(small()))


def test_a_full_window_of_flow_grpo_fast_is_the_same_policy_on_the_same_noise() -> None:
    """CPS has no noise in the last step whether or not it is asked for."""
    for form in ("density", "unscaled"):
        fast = flow_grpo_fast(steps=4, group=5, window=4, log_prob=form, clip=0.02, std="group")
        assert torch.equal(second(fast), second(small(log_prob=form)))


def test_bad_arguments() -> None:
    check_errors(
        flow_cps,
        [
            ({"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained; nearest valid: 2"),
            ({"group": 1}, "group: 1 must be at least 2"),
            ({"noise_level": 1.2}, "noise_level: 1.2 must be at most 1.0"),
            ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.8 is usual"),
            ({"log_prob": "plain"}, "log_prob: 'plain' is not one of 'unscaled', 'density'"),
            ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 1e-05 is usual"),
            ({"std": "batch"}, "std: 'batch' is not one of 'global', 'group'; nearest valid: 'global'"),
            ({"kl": -1.0}, "kl: -1.0 must be"),
            ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0; 5.0 is usual"),
        ],
    )
