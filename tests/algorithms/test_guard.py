"""GRPO-Guard: its weights by step and dynamics, and its first update as a reweighted Flow-GRPO."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
    phased,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.grpo_guard import dance_published, grpo_guard
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.objective.ratio import NormRatio
from tempflow.core.plan import Cost
from tempflow.core.rollout import skeleton
from tempflow.core.schedule import linear
from tempflow.core.weight import equalised, inverse_step, noise_aware


def small(**fields) -> Algorithm:
    return grpo_guard(**{"steps": 4, "group": 5, "clip": 0.01, "std": "group", **fields})


def test_defaults_and_cost() -> None:
    a = grpo_guard()
    assert a.cost(0, 1) == Cost(240, 24, 216) and a.objective.ratio == NormRatio() and a.objective.keeps_mean
    assert (a.objective.clip.low, a.objective.clip.high, a.first.weight) == (2e-6, 2e-6, inverse_step)
    assert a.plan(0, 0) == flow_grpo().plan(0, 0) and a.dynamics == FlowSDE(0.7)
    dance = grpo_guard(kind="dance", noise_level=0.3)
    assert dance.first.weight is dance_published and dance.dynamics == DanceSDE(0.3)
    last = [noisy for i, noisy in zip(dance.plan(0, 0).step, dance.plan(0, 0).stochastic, strict=True) if i == 9]
    assert not any(last)
    assert grpo_guard(weight="equalised").first.weight is equalised
    assert grpo_guard(clip_high=4e-6).objective.clip.high == 4e-6


@pytest.mark.parametrize("kind", ["flow", "dance"])
@pytest.mark.parametrize("weight", ["published", "equalised"])
def test_in_the_loop(kind: str, weight: str) -> None:
    algorithm = small(kind=kind, weight=weight, noise_level=0.7 if kind == "flow" else 0.3)
    check_counts(algorithm)
    check_first_ratio(algorithm)
    check_no_spread(algorithm)


def test_it_learns_and_takes_a_kl() -> None:
    check_learns(small(group=8))
    check_counts(small(kl=0.1))


def weights_by_step(algorithm: Algorithm) -> torch.Tensor:
    whole = skeleton([algorithm.plan(0, 0)], [0])
    got = algorithm.first.weight(whole, linear(10, 3.0), algorithm.dynamics)
    return torch.stack([got[whole.edges.step == i][0] for i in range(9)]).double()


def test_published_and_equalised_weights_by_hand() -> None:
    """The codes' δ: 1/Δ, and (1 + η²(1−σ)/(2σ))/Δ for DanceGRPO's step; equalised divides instead."""
    sigma = linear(10, 3.0).sigmas.double()
    delta, s = sigma[:9] - sigma[1:10], sigma[:9]
    eta = 1 + 0.3**2 * (1 - s) / (2 * s)
    flow = torch.where(s < 1, 1 + 0.7**2 / 2, 1.0)
    wanted = {
        ("flow", "published", 0.7): 1 / delta,
        ("flow", "equalised", 0.7): 1 / (delta * flow),
        ("dance", "published", 0.3): eta / delta,
        ("dance", "equalised", 0.3): 1 / (eta * delta),
    }
    for (kind, weight, level), raw in wanted.items():
        got = weights_by_step(grpo_guard(kind=kind, weight=weight, noise_level=level))
        torch.testing.assert_close(got, raw / raw.mean(), rtol=1e-4, atol=0)


def test_only_the_equalised_weight_evens_dance_gradients() -> None:
    """Gradient of r̂ is |b|."""
    b = DanceSDE(0.3).coefficients(linear(10, 3.0), torch.arange(9))[1].abs().double()
    even = weights_by_step(grpo_guard(kind="dance", weight="equalised", noise_level=0.3)) * b
    published = weights_by_step(grpo_guard(kind="dance", noise_level=0.3)) * b
    torch.testing.assert_close(even, even[:1].expand(9), rtol=1e-4, atol=0)
    assert float(published.max() / published.min()) > 1.05


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_the_first_update_is_flow_grpos_with_weights_times_s(kind: str) -> None:
    """At r = 1 ∇ log r̂ = S·∇ log r: the same gradient from the plain ratio with weight w·S, to 1e-5."""
    guard = small(kind=kind, weight="equalised", noise_level=0.7 if kind == "flow" else 0.3)

    def times_s(forest, schedule, dynamics):
        edges = forest.edges
        s = dynamics.coefficients(schedule, edges.step, edges.scale)[2]
        return equalised(forest, schedule, dynamics) * s

    plain = flow_grpo(steps=4, group=5, clip=0.01, kl=0.0, std="group")
    plain = phased(replace(plain, plan=guard.plan, dynamics=guard.dynamics), weight=times_s)
    a, b = gradient(guard), gradient(plain)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
    other = gradient(phased(plain, weight=noise_aware))
    cosine = torch.nn.functional.cosine_similarity(a, other, 0)
    assert float(a.abs().max()) > 1e-4 and float(cosine) < 0.9999


def test_bad_arguments() -> None:
    check_errors(
        grpo_guard,
        [
            ({"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained; nearest valid: 2"),
            ({"group": 1}, "group: 1 must be at least 2"),
            ({"kind": "cps"}, "kind: 'cps' is not one of 'flow', 'dance'; nearest valid: 'flow'"),
            ({"weight": "equal"}, "weight: 'equal' is not one of 'published', 'equalised'"),
            ({"noise_level": -1.0}, "noise_level: -1.0 must be finite and above 0; 0.7 is usual"),
            ({"kind": "dance", "noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.3 is usual"),
            ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 2e-06 is usual"),
            ({"std": "seed"}, "std: 'seed' is not one of 'global', 'group'"),
            ({"kl": -1.0}, "kl: -1.0 must be"),
            ({"advantage_clip": -2.0}, "advantage_clip: -2.0 must be finite and above 0"),
        ],
    )
