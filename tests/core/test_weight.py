"""Weights on real forests: the papers' constants, and what they do to the gradient's scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempflow.core import plan as P
from tempflow.core.dynamics import CPS, DDIM, DanceSDE, Dynamics, FlowSDE, LinearSDE, gradient_scale
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear, shifted, token_shifted
from tempflow.core.weight import Weight, noise_aware, ratio_norm, rectified, uniform

WEIGHTS: dict[str, Weight] = {
    "uniform": uniform,
    "noise_aware": noise_aware,
    "ratio_norm": ratio_norm,
    "rectified": rectified,
}
KINDS: tuple[Dynamics, ...] = (FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0))


def grow(plan: Plan, schedule: Schedule, dynamics: Dynamics) -> Forest:
    return rollout([plan] * 2, dynamics, schedule, lambda x, sigma, rows: 0.5 * x, Noise(1), shape=(2,))


def by_step(forest: Forest, weight: torch.Tensor) -> list[float]:
    """One weight per trained step, after checking that all edges of a step share it."""
    out = []
    for step in forest.edges.step[forest.edges.trained].unique().tolist():
        here = weight[(forest.edges.step == step) & forest.edges.trained]
        assert bool((here == here[0]).all())
        out.append(float(here[0]))
    return out


def qwen_image(steps: int) -> Schedule:
    """Qwen-Image at 512²: FLUX's shift with its own constants, then stretched so that the last σ is .02."""
    u = 1 - token_shifted(steps, 1024, 0.5, 0.9, 256, 8192).sigmas[:-1]
    return Schedule(torch.cat([1 - u * (1 - 0.02) / u[-1], torch.zeros(1)]))


PLANS = {
    "branches": P.branch_each_step(10, seeds=2, branches=2),
    "uneven": P.branch_each_step(10, seeds=2, branches=3, at=(0, 4, 7)),
    "chains": P.chain(10, roots=3),
    "window": P.window(10, roots=2, start=2, size=3),
    "tree": P.tree(10, roots=1, splits={0: 2, 3: 2}, train=range(9)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
@pytest.mark.parametrize("name", WEIGHTS)
def test_mean_is_one_over_trained_steps(name: str, dynamics: Dynamics, plan: Plan) -> None:
    """Also where an untrained last step has no noise (CPS, DDIM), or where steps differ in their number of edges."""
    schedule = shifted(10)
    forest = grow(plan, schedule, dynamics)
    weight = WEIGHTS[name](forest, schedule, dynamics)
    assert weight.shape == forest.edges.step.shape and weight.dtype == torch.float32
    per_step = by_step(forest, weight)
    assert len(per_step) == len({i for i, t in zip(plan.step, plan.trained, strict=True) if t})
    assert sum(per_step) / len(per_step) == pytest.approx(1.0, abs=1e-5)
    assert bool(torch.isfinite(weight).all()) and min(per_step) > 0


@pytest.mark.parametrize(
    ("schedule", "level", "constant"),
    [(shifted(10), 0.7, 2.252), (token_shifted(10, 4096), 0.9, 1.726), (qwen_image(10), 1.2, 1.533)],
    ids=["sd3.5", "flux-1024", "qwen-512"],
)
def test_noise_aware_reproduces_the_official_reciprocal_means(
    schedule: Schedule, level: float, constant: float
) -> None:
    """The released code multiplies S by 2.25, 1.73 and 1.53: one over the mean of S over the nine trained steps."""
    dynamics = FlowSDE(level)
    forest = grow(P.branch_each_step(10, seeds=1, branches=2), schedule, dynamics)
    std = dynamics.coefficients(schedule, forest.edges.step)[2]
    factor = noise_aware(forest, schedule, dynamics) / std
    assert torch.allclose(factor, factor[0].expand_as(factor), rtol=1e-5)
    assert float(factor[0]) == pytest.approx(constant, abs=1.5e-3)


def test_noise_aware_weights_of_sd35() -> None:
    forest = grow(P.chain(10, roots=2), shifted(10), FlowSDE(0.7))
    want = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert by_step(forest, noise_aware(forest, shifted(10), FlowSDE(0.7))) == pytest.approx(want, abs=1e-3)


def test_noise_aware_makes_the_gradient_proportional_to_the_step_size() -> None:
    """TempFlow-GRPO's theorem times its weight: c·w ∝ Δ at σ < 1."""
    schedule, dynamics = shifted(10), FlowSDE(0.7)
    forest = grow(P.branch_each_step(10, 1, 2, at=range(1, 9)), schedule, dynamics)
    step = forest.edges.step
    product = gradient_scale(dynamics, schedule, step) * noise_aware(forest, schedule, dynamics)
    share = product / schedule.delta(step)
    assert torch.allclose(share, share[0].expand_as(share), rtol=1e-4)


@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_rectified_makes_the_gradient_equal_at_all_steps(dynamics: Dynamics) -> None:
    schedule = shifted(10)
    forest = grow(P.chain(10, roots=2, stochastic=range(9)), schedule, dynamics)
    product = gradient_scale(dynamics, schedule, forest.edges.step) * rectified(forest, schedule, dynamics)
    assert torch.allclose(product, product[0].expand_as(product), rtol=1e-5)
    raw = gradient_scale(dynamics, schedule, forest.edges.step)
    assert float(raw.max() / raw.min()) > 1.5


def test_ratio_norm_is_rectified_for_flow_sde_below_sigma_one() -> None:
    schedule, dynamics = shifted(10), FlowSDE(0.9)
    below = grow(P.branch_each_step(10, 1, 2, at=range(1, 9)), schedule, dynamics)
    torch.testing.assert_close(
        ratio_norm(below, schedule, dynamics), rectified(below, schedule, dynamics), rtol=1e-5, atol=1e-6
    )
    whole = grow(P.branch_each_step(10, 1, 2), schedule, dynamics)  # at σ = 1 the pole's rule parts them
    assert not torch.allclose(ratio_norm(whole, schedule, dynamics), rectified(whole, schedule, dynamics), rtol=1e-2)


def test_scale_enters_the_noise_aware_weight() -> None:
    """TreeRPO-like plans raise the noise at some steps; S, not the kind's nominal level, is what counts."""
    schedule, dynamics = linear(4, 3.0), FlowSDE(0.5)
    plain = P.tree(4, roots=2, splits={}, train=(0, 1, 2))
    louder = P.tree(4, roots=2, splits={}, train=(0, 1, 2), scale={1: 2.0})
    a, b = (by_step(f := grow(p, schedule, dynamics), noise_aware(f, schedule, dynamics)) for p in (plain, louder))
    assert b[1] / b[0] == pytest.approx(2 * a[1] / a[0], rel=1e-5)
    assert b[2] / b[0] == pytest.approx(a[2] / a[0], rel=1e-5)


def test_untrained_edges_take_no_part_in_the_mean() -> None:
    """Half of a step's edges, the louder ones, are given to no loss."""
    schedule, dynamics = linear(4, 3.0), FlowSDE(0.5)
    forest = grow(P.tree(4, roots=2, splits={}, train=(0, 1, 2)), schedule, dynamics)
    mute = (forest.edges.step == 1) & (forest.edges.root == 0)
    edges = replace(
        forest.edges,
        trained=forest.edges.trained & ~mute,
        scale=torch.where(mute, 2.0, 1.0),
    )
    changed = noise_aware(replace(forest, edges=edges), schedule, dynamics)
    torch.testing.assert_close(changed[~mute], noise_aware(forest, schedule, dynamics)[~mute])


def test_how_many_edges_a_step_has_does_not_matter() -> None:
    schedule, dynamics = shifted(10), FlowSDE(0.7)
    forest = grow(P.branch_each_step(10, seeds=2, branches=3), schedule, dynamics)
    thinned = forest.select((forest.edges.step != 2) | (torch.arange(len(forest.edges)) % 3 == 0))
    assert by_step(thinned, noise_aware(thinned, schedule, dynamics)) == pytest.approx(
        by_step(forest, noise_aware(forest, schedule, dynamics)), rel=1e-6
    )
