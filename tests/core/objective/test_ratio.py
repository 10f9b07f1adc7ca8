"""The clipped ratio against torch.distributions, finite differences, and the laws its clip and weights must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from tempflow.core import plan as P
from tempflow.core.dynamics import CPS, DDIM, ODE, DanceSDE, Dynamics, FlowSDE, LinearSDE, gradient_scale
from tempflow.core.forest import Forest
from tempflow.core.objective.edges import EdgeBatch, Predict
from tempflow.core.objective.ratio import clipped
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.core.weight import Weight, noise_aware, ratio_norm, rectified, uniform

SHAPE = (2, 3, 4)
D = math.prod(SHAPE)
SCHEDULE = shifted(6)
KINDS: tuple[Dynamics, ...] = (FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0))
PLANS = {
    "chain": P.chain(6, 4),
    "window": P.window(6, 3, start=1, size=2),
    "fan_out": P.fan_out(6, seeds=2, branches=3, at=2, window=2),
    "branch_each_step": P.branch_each_step(6, seeds=2, branches=3),
    "one_step": P.one_step(6, 4, at=3),
    "tree": P.tree(6, roots=1, splits={0: 2, 2: 3}, train=range(5)),
}


class Velocity(nn.Module):
    """v = θ_0·x + θ_1·x²·σ + θ_2·(row + 1)."""

    def __init__(self, theta: tuple[float, ...] = (0.4, 0.05, -0.1), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=dtype))

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return field(self.theta, x, sigma, rows)


def field(theta: Tensor, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    s, c = (t.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for t in (sigma, rows + 1))
    return theta[0] * x + theta[1] * x * x * s + theta[2] * c


def grow(plan: Plan, dynamics: Dynamics, predict: Predict, max_rows: int | None = None) -> Forest:
    return rollout([plan] * 3, dynamics, SCHEDULE, predict, Noise(7), shape=SHAPE, max_rows=max_rows)


def batch_of(forest: Forest, dynamics: Dynamics, weight: Weight = uniform, seed: int = 0) -> EdgeBatch:
    """Every trained edge, with random advantages."""
    rows = forest.edges.trained.nonzero()[:, 0]
    edges = forest.edges
    return EdgeBatch(
        x=forest.nodes[edges.parent[rows]],
        y=forest.nodes[edges.child[rows]],
        step=edges.step[rows],
        scale=edges.scale[rows],
        rows=edges.prompt[rows],
        log_prob=edges.log_prob[rows],
        advantage=torch.randn(len(rows), generator=torch.Generator().manual_seed(seed)),
        weight=weight(forest, SCHEDULE, dynamics)[rows],
        schedule=SCHEDULE,
        dynamics=dynamics,
    )


def take(batch: EdgeBatch, rows: Tensor | slice) -> EdgeBatch:
    names = ("x", "y", "step", "scale", "rows", "log_prob", "advantage", "weight")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in names})


def doubled(batch: EdgeBatch) -> EdgeBatch:
    names = ("x", "y", "log_prob", "advantage", "weight", "scale")
    return replace(batch, schedule=batch.schedule.double(), **{n: getattr(batch, n).double() for n in names})


def sample(dynamics: Dynamics = KINDS[0], weight: Weight = noise_aware) -> EdgeBatch:
    return batch_of(grow(PLANS["branch_each_step"], dynamics, Velocity()), dynamics, weight)


def with_ratio(batch: EdgeBatch, policy: Predict, ratio: Tensor) -> EdgeBatch:
    """The same transitions with old log-probabilities such that r = `ratio`."""
    with torch.no_grad():
        v = policy(batch.x, batch.schedule.at(batch.step), batch.rows)
        now = batch.dynamics.transition(batch.x, v, batch.schedule, batch.step, batch.scale).log_prob(batch.y)
    return replace(batch, log_prob=now - ratio.log())


def normals(batch: EdgeBatch, velocity: Tensor) -> Normal:
    """The transition as torch.distributions has it."""
    a, b, s = (t.to(batch.x.dtype).view(-1, 1, 1, 1) for t in batch.dynamics.coefficients(
        batch.schedule, batch.step, batch.scale))  # fmt: skip
    return Normal(a * batch.x + b * velocity, s)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_ratio_is_exactly_one_before_any_update(dynamics: Dynamics, plan: Plan) -> None:
    """float32, whatever the rollout's chunks: the density is taken at the state as stored."""
    policy = Velocity()
    for max_rows in (None, 5):
        batch = batch_of(grow(plan, dynamics, policy, max_rows), dynamics)
        objective = clipped(1e-6, 1e-6, kl=0.5)
        loss = objective({"policy": policy, "reference": policy}, batch)
        assert len(batch.step) == 3 * plan.cost().trained_edges
        assert float(loss.metrics["log_ratio_abs"].max()) == 0.0
        assert float(loss.metrics["clip_fraction"].sum()) == float(loss.metrics["outside_clip"].sum()) == 0.0
        assert float(loss.metrics["kl"].abs().max()) == 0.0
        assert loss.value.item() == pytest.approx(-float(batch.advantage.mean()), abs=1e-6)


PAIRS = [(form, kind) for form in ("exact", "velocity") for kind in KINDS] + [("drift", kind) for kind in KINDS[:3]]


@pytest.mark.parametrize(("form", "dynamics"), PAIRS, ids=repr)
def test_loss_equals_the_hand_formula(form: str, dynamics: Dynamics) -> None:
    """Log-probabilities and the exact KL are torch.distributions', everything in float64."""
    batch = doubled(sample(dynamics))
    policy, reference = Velocity((0.43, 0.06, -0.12), torch.float64), Velocity(dtype=torch.float64)
    objective = clipped(2e-3, 5e-3, kl=0.3, kl_form=form)  # type: ignore[arg-type]
    loss = objective({"policy": policy, "reference": reference}, batch)

    sigma = batch.schedule.at(batch.step)
    v, v_ref = policy(batch.x, sigma, batch.rows), reference(batch.x, sigma, batch.rows)
    log_prob = normals(batch, v).log_prob(batch.y).flatten(1).mean(1)
    r, a = (log_prob - batch.log_prob).exp(), batch.advantage
    surrogate = torch.maximum(-a * r, -a * r.clamp(1 - 2e-3, 1 + 5e-3))
    exact = kl_divergence(normals(batch, v), normals(batch, v_ref)).flatten(1).mean(1)
    if form == "velocity":
        kl = (v - v_ref).square().flatten(1).mean(1)
    else:
        kl = exact if form == "exact" else exact * batch.schedule.delta(batch.step)
    assert 0.1 < float(loss.metrics["outside_clip"].mean()) < 1.0
    torch.testing.assert_close(loss.metrics["kl"], kl.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.metrics["log_ratio_abs"], r.log().abs().detach(), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(loss.value, (batch.weight * surrogate + 0.3 * kl).mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["none", "exact", "drift", "velocity"])
def test_gradient_equals_finite_differences(form: str) -> None:
    """float64, by torch's gradcheck; some edges are clipped, some not."""
    batch = doubled(sample())
    objective = clipped(2e-3, 5e-3) if form == "none" else clipped(2e-3, 5e-3, 0.3, form)  # type: ignore[arg-type]
    reference = Velocity(dtype=torch.float64)

    def value(theta: Tensor) -> Tensor:
        models: dict[str, Predict] = {"policy": lambda *given: field(theta, *given), "reference": reference}
        loss = objective(models, batch)
        assert 0 < float(loss.metrics["clip_fraction"].mean()) < 1
        return loss.value

    theta = torch.tensor([0.43, 0.06, -0.12], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (theta,), eps=1e-7, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["exact", "drift", "velocity"])
def test_kl_alone_has_a_gradient_towards_the_reference_and_none_into_it(form: str) -> None:
    batch = sample()
    batch = replace(batch, advantage=torch.zeros_like(batch.advantage))
    policy, reference = Velocity((0.5, 0.05, -0.1)), Velocity()
    models: dict[str, Predict] = {"policy": policy, "reference": reference}
    objective = clipped(kl=0.7, kl_form=form)  # type: ignore[arg-type]
    objective(models, batch).value.backward()
    assert reference.theta.grad is None and policy.theta.grad is not None
    assert float(policy.theta.grad[0]) > 1e-3  # θ_0 is above the reference's, so descent takes it down
    at_reference = Velocity()
    objective({"policy": at_reference, "reference": reference}, batch).value.backward()
    assert at_reference.theta.grad is not None and float(at_reference.theta.grad.abs().max()) == 0.0


def test_kl_forms_relate_as_the_papers_say() -> None:
    """drift = Δ·exact; exact = (b/S)²/2·velocity."""
    batch = sample()
    models: dict[str, Predict] = {"policy": Velocity((0.5, 0.05, -0.1)), "reference": Velocity()}
    kl = {f: clipped(kl=1.0, kl_form=f)(models, batch).metrics["kl"] for f in ("exact", "drift", "velocity")}  # type: ignore[arg-type]
    torch.testing.assert_close(kl["drift"], kl["exact"] * SCHEDULE.delta(batch.step), rtol=1e-4, atol=0)
    c = gradient_scale(batch.dynamics, SCHEDULE, batch.step)
    torch.testing.assert_close(kl["exact"], kl["velocity"] * c.square() / 2, rtol=1e-4, atol=0)


CASES = [
    # advantage, ratio, whether the clip binds: only where the step already went the way that the advantage asks for
    (1.0, 1.02, True),
    (1.0, 1.005, False),
    (1.0, 0.5, False),
    (-1.0, 0.98, False),
    (-1.0, 0.96, True),
    (-1.0, 1.5, False),
]


@pytest.mark.parametrize(("advantage", "ratio", "bound"), CASES)
def test_clip_is_asymmetric_and_its_gradient_zero_where_it_binds(advantage: float, ratio: float, bound: bool) -> None:
    """clip_low .03, clip_high .01."""
    policy = Velocity(dtype=torch.float64)
    batch = take(doubled(sample()), slice(0, 1))
    batch = replace(batch, advantage=torch.full_like(batch.advantage, advantage), weight=torch.ones_like(batch.weight))
    batch = with_ratio(batch, policy, torch.tensor([ratio], dtype=torch.float64))
    loss = clipped(0.03, 0.01)({"policy": policy}, batch)
    loss.value.backward()
    want = min(advantage * ratio, advantage * min(max(ratio, 0.97), 1.01))
    assert loss.value.item() == pytest.approx(-want, rel=1e-9)
    assert bool(loss.metrics["clip_fraction"]) is bound
    assert bool(loss.metrics["outside_clip"]) is (not 0.97 <= ratio <= 1.01)
    assert policy.theta.grad is not None and (float(policy.theta.grad.abs().max()) == 0.0) is bound


def test_a_far_ratio_is_not_clamped_before_the_clip() -> None:
    """With A < 0 the penalty grows with r without bound."""
    policy = Velocity(dtype=torch.float64)
    batch = take(doubled(sample()), slice(0, 1))
    batch = replace(batch, advantage=-torch.ones_like(batch.advantage), weight=torch.ones_like(batch.weight))
    batch = with_ratio(batch, policy, torch.tensor([1e9], dtype=torch.float64))
    assert clipped(0.1, 0.1)({"policy": policy}, batch).value.item() == pytest.approx(1e9, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_weights_scale_an_edge_and_do_not_move_its_clip(factor: float, seed: int) -> None:
    policy = Velocity((0.42, 0.06, -0.11), torch.float64)
    batch = take(DOUBLE, torch.randperm(len(DOUBLE.step), generator=torch.Generator().manual_seed(seed))[:6])
    objective = clipped(2e-3, 2e-3)
    plain = objective({"policy": policy}, batch)
    heavy = objective({"policy": policy}, replace(batch, weight=batch.weight * factor))
    assert torch.equal(plain.metrics["clip_fraction"], heavy.metrics["clip_fraction"])
    assert torch.equal(plain.metrics["outside_clip"], heavy.metrics["outside_clip"])
    grads = [torch.autograd.grad(loss.value, policy.theta)[0] for loss in (plain, heavy)]
    torch.testing.assert_close(grads[1], grads[0] * factor, rtol=1e-9, atol=0)


DOUBLE = doubled(sample())


def test_weights_do_not_touch_the_kl() -> None:
    batch = replace(sample(), advantage=torch.zeros(len(DOUBLE.step)))
    models: dict[str, Predict] = {"policy": Velocity((0.5, 0.05, -0.1)), "reference": Velocity()}
    values = [clipped(kl=1.0)(models, b).value.item() for b in (batch, replace(batch, weight=3 * batch.weight))]
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("size", [1, 4, 7])
def test_accumulation_over_micro_batches_equals_one_batch(size: int) -> None:
    """Each part counts by its number of edges, so uneven parts and mixed steps make no difference."""
    batch, n = DOUBLE, len(DOUBLE.step)
    reference = Velocity(dtype=torch.float64)
    objective = clipped(2e-3, 5e-3, kl=0.2)
    whole, parts = (Velocity((0.43, 0.06, -0.12), torch.float64) for _ in range(2))
    one = objective({"policy": whole, "reference": reference}, batch)
    one.value.backward()
    total = 0.0
    for rows in torch.randperm(n, generator=torch.Generator().manual_seed(1)).split(size):
        loss = objective({"policy": parts, "reference": reference}, take(batch, rows))
        (loss.value * len(rows) / n).backward()
        total += loss.value.item() * len(rows) / n
    assert total == pytest.approx(one.value.item(), rel=1e-9)
    torch.testing.assert_close(parts.theta.grad, whole.theta.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("weight", [uniform, noise_aware, ratio_norm, rectified])
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_a_steps_gradient_is_c_times_w_times_its_noise(dynamics: Dynamics, weight: Weight) -> None:
    """∂L/∂v = −A·w·(b/S)·z / (D·N) at r = 1: the score-function scale c_i = |b_i|/S_i of trajectory.md §0."""
    batch = sample(dynamics, weight=weight)
    velocity = Velocity()(batch.x, SCHEDULE.at(batch.step), batch.rows).detach().requires_grad_()
    clipped()({"policy": lambda x, sigma, rows: velocity}, batch).value.backward()
    z = (batch.y - normals(batch, velocity.detach()).mean) / normals(batch, velocity.detach()).stddev
    assert velocity.grad is not None
    norm, noise = velocity.grad.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1)
    c = gradient_scale(dynamics, SCHEDULE, batch.step)
    want = batch.advantage.abs() * batch.weight * c * noise / (D * len(batch.step))
    torch.testing.assert_close(norm, want, rtol=1e-3, atol=1e-9)
    if weight is rectified:
        even = norm / (batch.advantage.abs() * noise)
        torch.testing.assert_close(even, even[0].expand_as(even), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["step", "scale", "rows", "log_prob", "advantage", "weight"])
@pytest.mark.parametrize("reshape", [lambda t: t[:, None], lambda t: t[:1], lambda t: t.view(-1, 1, 1, 1)])
def test_a_factor_of_another_shape_is_refused(name: str, reshape: Callable[[Tensor], Tensor]) -> None:
    """The released TempFlow code broadcasts (B,1,1,1) × (B,) to (B,1,1,B); here that is an error."""
    batch = sample()
    wrong = replace(batch, **{name: reshape(getattr(batch, name))})
    with pytest.raises(ValueError, match=rf"{name}: shape .* must be \[{len(batch.step)}\]"):
        clipped()({"policy": Velocity()}, wrong)


def test_deterministic_steps_and_missing_rates_are_refused() -> None:
    batch = sample()
    with pytest.raises(ValueError, match="no log-probability"):
        clipped()({"policy": Velocity()}, replace(batch, dynamics=ODE()))
    models: dict[str, Predict] = {"policy": Velocity(), "reference": Velocity()}
    for dynamics in (CPS(0.8), DDIM(1.0)):
        with pytest.raises(ValueError, match=r"kl_form: 'drift' needs a diffusion rate, which (CPS|DDIM).*'exact'"):
            clipped(kl=0.1, kl_form="drift")(models, sample(dynamics))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_low": 0.0}, "clip_low: 0.0 must be finite and above 0"),
        ({"clip_high": -1e-4}, "clip_high: -0.0001 must be"),
        ({"clip_high": float("inf")}, "clip_high: inf must be"),
        ({"clip_low": 1.0}, "clip_low: 1.0 must be below 1"),
        ({"kl": -0.1}, "kl: -0.1 must be"),
        ({"kl": float("nan")}, "kl: nan must be"),
        ({"kl_form": "kl"}, "kl_form: 'kl' is not one of exact, drift, velocity"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped(**arguments)  # type: ignore[arg-type]


def test_what_the_loop_reads() -> None:
    assert clipped().weight_sets == ("policy",) and clipped(kl=0.1).weight_sets == ("policy", "reference")
    assert clipped(1e-3, 2e-3).tightest_clip == clipped(2e-3, 1e-3).tightest_clip == 1e-3
    assert clipped().unit == "edge"


def test_low_precision_predictions_are_upcast() -> None:
    """A bfloat16 velocity gives a float32 loss; the same rounded velocity gives a ratio of exactly 1."""

    def half(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return Velocity()(x, sigma, rows).bfloat16()

    batch = batch_of(grow(PLANS["chain"], FlowSDE(0.7), half), FlowSDE(0.7))
    loss = clipped(kl=0.1, kl_form="velocity")({"policy": half, "reference": Velocity()}, batch)
    assert loss.value.dtype == torch.float32
    assert float(loss.metrics["log_ratio_abs"].max()) == 0.0
    assert 0 < float(loss.metrics["kl"].max()) < 1e-3
