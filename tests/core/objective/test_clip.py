"""Gates against their closed forms and autograd; the sampled KL estimates against the exact KL."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core.dynamics import CPS, Dynamics, FlowSDE
from tempflow.core.objective.clip import Clip, ClipRule, Score, SoftGate, Truncate
from tempflow.core.objective.edges import EdgeBatch, replay
from tempflow.core.objective.regularizer import Divergence, KLForm
from tempflow.core.schedule import shifted

NONE: dict[str, Tensor] = {}
TAUS = st.floats(0.125, 20, width=32)  # the gate rounds τ to float32
log_ratios = st.lists(st.floats(-0.7, 0.7), min_size=1, max_size=6)


def leaf(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def slope(gate: ClipRule, log_ratio: Tensor, advantage: Tensor, columns: dict[str, Tensor] = NONE) -> Tensor:
    """∂loss/∂log r of every entry."""
    return torch.autograd.grad(gate(log_ratio, advantage, columns).loss.sum(), log_ratio)[0]


# ------------------------------------------------------------------------------------------------------ all gates
GATES = [Clip(0.1, 0.2), Truncate(0.1, 0.2), Truncate(1.0, 0.2), SoftGate(5.0, 6.0), Score(), Clip(0.1, 0.2, 0.5)]


@pytest.mark.parametrize("gate", GATES, ids=repr)
@pytest.mark.parametrize("advantage", [-2.0, -0.3, 0.7, 3.0])
def test_at_ratio_one_every_gate_has_the_policy_gradient(gate: ClipRule, advantage: float) -> None:
    """f'(1) = 1: the slope is −A, so the first update is the same whatever the gate."""
    columns = {"standing": torch.tensor([0.5], dtype=torch.float64)}
    got = slope(gate, leaf([0.0]), torch.tensor([advantage], dtype=torch.float64), columns)
    assert float(got) == pytest.approx(-advantage, rel=1e-12)


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_no_advantage_no_gradient(gate: ClipRule) -> None:
    columns = {"standing": torch.zeros(3, dtype=torch.float64)}
    log_ratio = leaf([-0.5, 0.0, 0.5])
    assert bool((slope(gate, log_ratio, torch.zeros(3, dtype=torch.float64), columns) == 0).all())


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_metrics_bear_no_gradient_and_have_the_shape_of_the_ratio(gate: ClipRule) -> None:
    log_ratio = torch.zeros(2, 3, 4, requires_grad=True)
    gated = gate(log_ratio, torch.ones(2, 3, 4), {"standing": torch.zeros(2, 3, 4)})
    assert gated.loss.requires_grad and gated.loss.shape == (2, 3, 4)
    for metric in (gated.blocked, gated.outside):
        assert not metric.requires_grad and metric.shape == (2, 3, 4) and float(metric.sum()) == 0


# ------------------------------------------------------------------------------------------------------- truncate
@settings(deadline=None, max_examples=60)
@given(values=log_ratios, advantage=st.floats(-3, 3), low=st.floats(0.05, 1.0), high=st.floats(0.05, 3.0))
def test_truncate_weighs_the_score_and_never_drops_it(
    values: list[float], advantage: float, low: float, high: float
) -> None:
    log_ratio, a = leaf(values), torch.full((len(values),), advantage, dtype=torch.float64)
    gated = Truncate(low, high)(log_ratio, a, NONE)
    weight = [min(max(math.exp(v), 1 - low), 1 + high) for v in values]
    want = [-w * advantage * v for w, v in zip(weight, values, strict=True)]
    torch.testing.assert_close(gated.loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    got = slope(Truncate(low, high), log_ratio, a)
    want = torch.tensor([-w * advantage for w in weight], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    assert float(gated.blocked.sum()) == 0
    outside = [float(not 1 - low <= math.exp(v) <= 1 + high) for v in values]
    assert gated.outside.tolist() == outside


def test_truncate_without_bounds_has_the_plain_ratios_gradient() -> None:
    """∇(−A·r) = −A·r·∇log r."""
    log_ratio, a = leaf([-0.6, 0.0, 0.4]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got = slope(Truncate(1.0, 1e9), log_ratio, a)
    want = torch.autograd.grad((-a * log_ratio.exp()).sum(), log_ratio)[0]
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------------ soft gate
@settings(deadline=None, max_examples=60)
@given(values=log_ratios, advantage=st.floats(-3, 3), positive=TAUS, negative=TAUS)
def test_soft_gate_is_the_published_sigmoid(
    values: list[float], advantage: float, positive: float, negative: float
) -> None:
    tau = positive if advantage > 0 else negative
    log_ratio, a = leaf(values), torch.full((len(values),), advantage, dtype=torch.float64)
    gate = SoftGate(positive, negative)
    s = [1 / (1 + math.exp(-tau * (math.exp(v) - 1))) for v in values]
    want = torch.tensor([-advantage * 4 / tau * p for p in s], dtype=torch.float64)
    torch.testing.assert_close(gate(log_ratio, a, NONE).loss, want, rtol=1e-9, atol=1e-12)
    # d/dr = 4·p·(1 − p), then times r
    want = torch.tensor(
        [-advantage * 4 * p * (1 - p) * math.exp(v) for p, v in zip(s, values, strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(slope(gate, log_ratio, a), want, rtol=1e-9, atol=1e-12)


def test_soft_gate_fades_on_both_sides_and_faster_where_the_advantage_is_negative() -> None:
    ratio = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    up, down = (slope(SoftGate(5.0, 8.0), log_ratio, torch.full_like(ratio, a)).abs() / ratio for a in (1.0, -1.0))
    for size in (up, down):
        assert float(size[2]) == pytest.approx(1.0) and bool((size[:2].diff() > 0).all())
        assert bool((size[2:].diff() < 0).all())
    assert bool((down[[0, 1, 3, 4]] < up[[0, 1, 3, 4]]).all())


def test_soft_gate_tends_to_the_plain_ratio() -> None:
    log_ratio, a = leaf([-0.6, 0.4]), torch.tensor([1.0, -2.0], dtype=torch.float64)
    want = torch.autograd.grad((-a * log_ratio.exp()).sum(), log_ratio)[0]
    torch.testing.assert_close(slope(SoftGate(1e-5, 1e-5), log_ratio, a), want, rtol=1e-8, atol=0)


def test_soft_gate_says_what_is_outside_one_over_tau() -> None:
    gated = SoftGate(5.0, 10.0)(
        torch.tensor([1.15, 1.25, 0.85, 0.75]).log(), torch.tensor([1.0, 1.0, -1.0, -1.0]), NONE
    )
    assert gated.outside.tolist() == [0, 1, 1, 1] and gated.blocked.tolist() == [0, 0, 0, 0]
    assert SoftGate(5.0, 10.0).tightest == 0.1


# ---------------------------------------------------------------------------------------------------------- score
def test_score_is_the_log_ratio_times_the_advantage() -> None:
    log_ratio, a = leaf([-3.0, 0.0, 5.0]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert Score()(log_ratio, a, NONE).loss.tolist() == [3.0, 0.0, -2.5]
    assert slope(Score(), log_ratio, a).tolist() == [-1.0, 2.0, -0.5]


# --------------------------------------------------------------------------------------------------- sensitive clip
@settings(deadline=None, max_examples=80)
@given(
    value=st.floats(-0.7, 0.7),
    advantage=st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3),
    standing=st.floats(-1, 1),
    eta=st.floats(0.01, 0.95),
)
def test_sensitivity_bends_the_range_by_standing(value: float, advantage: float, standing: float, eta: float) -> None:
    low, high = 0.2 * (1 - eta * standing), 0.3 * (1 + eta * standing)
    r, c = math.exp(value), min(max(math.exp(value), 1 - low), 1 + high)
    log_ratio, a = leaf([value]), torch.tensor([advantage], dtype=torch.float64)
    columns = {"standing": torch.tensor([standing], dtype=torch.float64)}
    gated = Clip(0.2, 0.3, eta)(log_ratio, a, columns)
    assert gated.loss.item() == pytest.approx(max(-advantage * r, -advantage * c), rel=1e-9)
    bound = -advantage * c > -advantage * r
    got = slope(Clip(0.2, 0.3, eta), log_ratio, a, columns)
    assert float(got) == pytest.approx(0.0 if bound else -advantage * r, rel=1e-9)
    assert bool(gated.blocked) is bound


def test_a_good_path_has_more_room_above_and_less_below() -> None:
    columns = {"standing": torch.tensor([1.0, 0.0, -1.0])}
    above = Clip(0.2, 0.2, 0.5)(torch.full((3,), 1.25).log(), torch.ones(3), columns)
    assert above.blocked.tolist() == [0, 1, 1]
    below = Clip(0.2, 0.2, 0.5)(torch.full((3,), 0.85).log(), -torch.ones(3), columns)
    assert below.blocked.tolist() == [1, 0, 0]


def test_where_standing_is_the_clamped_advantage_the_side_that_binds_is_wider() -> None:
    advantage = torch.tensor([2.0, 0.4, -0.4, -2.0])
    room = 0.2 * (1 + 0.5 * advantage.abs().clamp(max=1))
    for factor, blocked in ((0.99, 0), (1.01, 1)):
        ratio = 1 + factor * room * advantage.sign()
        gated = Clip(0.2, 0.2, 0.5)(ratio.log(), advantage, {"standing": advantage.clamp(-1, 1)})
        assert gated.blocked.tolist() == [blocked] * 4


def test_no_standing_no_bend_and_a_missing_column_is_named() -> None:
    log_ratio, a = torch.linspace(-0.5, 0.5, 9), torch.tensor([1.0, -1.0, 2.0] * 3)
    bent = Clip(0.2, 0.3, 0.5)(log_ratio, a, {"standing": torch.zeros(9)})
    plain = Clip(0.2, 0.3)(log_ratio, a, NONE)
    torch.testing.assert_close(bent.loss, plain.loss)
    assert torch.equal(bent.blocked, plain.blocked) and 0 < float(plain.blocked.sum()) < 9
    with pytest.raises(ValueError, match="columns: 'standing' is missing, which sensitivity > 0 reads"):
        Clip(0.2, 0.3, 0.5)(log_ratio, a, NONE)
    assert Clip(0.2, 0.3, 0.5).tightest == 0.1 and Clip(0.2, 0.3).tightest == 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(1.0, 0.1), "clip_low: 1.0 must be below 1"),
        (lambda: Clip(0.1, math.inf), "clip_high: inf must be finite and above 0"),
        (lambda: Clip(0.1, 0.1, 1.0), r"sensitivity: 1.0 must be in \[0, 1\)"),
        (lambda: Truncate(1.5, 0.1), "clip_low: 1.5 must be at most 1, which is no bound"),
        (lambda: Truncate(0.0, 0.1), "clip_low: 0.0 must be finite and above 0"),
        (lambda: SoftGate(0.0, 1.0), "positive: 0.0 must be finite and above 0"),
        (lambda: SoftGate(1.0, math.nan), "negative: nan must be finite and above 0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------- sampled KL forms
ELEMENTS = 200_000
"""Latent elements of a row: the mean over them is the Monte-Carlo mean over samples."""


def sampled(dynamics: Dynamics, offset: Tensor) -> tuple[EdgeBatch, Tensor, Tensor]:
    """Children drawn from the policy at steps 0 … 4, its velocity (a leaf) and the reference's, `offset` apart."""
    g = torch.Generator().manual_seed(11)
    step, schedule = torch.arange(5), shifted(6).double()
    x, v = (torch.randn(5, ELEMENTS, generator=g, dtype=torch.float64) for _ in range(2))
    law = dynamics.transition(x, v, schedule, step)
    y = law.sample(torch.randn(5, ELEMENTS, generator=g, dtype=torch.float64))
    one = torch.ones(5, dtype=torch.float64)
    batch = EdgeBatch(x, y, step, one, step * 0, law.log_prob(y), one, one, schedule, dynamics)
    return batch, v.requires_grad_(), v.detach() + offset[:, None]


def gap(dynamics: Dynamics, size: float) -> Tensor:
    """Velocity offsets that put the two means `size` stds apart at every step."""
    _, b, s = dynamics.coefficients(shifted(6).double(), torch.arange(5))
    return size * s / b.abs()


def estimate(form: KLForm, batch: EdgeBatch, v: Tensor, v_ref: Tensor) -> Tensor:
    at = replay({"policy": lambda x, s, r: v, "reference": lambda x, s, r: v_ref}, ("policy", "reference"), batch)
    return Divergence(1.0, form)(at)


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.8)], ids=repr)
@pytest.mark.parametrize("size", [0.3, 1.0])
def test_k1_and_k3_average_to_the_exact_kl(dynamics: Dynamics, size: float) -> None:
    batch, v, v_ref = sampled(dynamics, gap(dynamics, size))
    exact = estimate("exact", batch, v, v_ref)
    torch.testing.assert_close(exact, torch.full_like(exact, size**2 / 2), rtol=1e-9, atol=0)
    # d ~ N(size²/2, size²); k3's variance is that of e^(−d) + d
    error = {"k1": size, "k3": math.sqrt(math.exp(size**2) - 1 - size**2)}
    for form, deviation in error.items():
        off = (estimate(form, batch, v, v_ref) - exact).abs()  # type: ignore[arg-type]
        assert off.max().item() < 5 * deviation / math.sqrt(ELEMENTS), form
    k2 = estimate("k2", batch, v, v_ref)
    want = torch.full_like(k2, (size**2 + size**4 / 4) / 2)  # biased: half the second moment of d
    torch.testing.assert_close(k2, want, rtol=0.03, atol=0)


def test_sampled_forms_element_by_element() -> None:
    """Against Schulman's formulas on torch.distributions' log-densities; k3 is never negative."""
    batch, v, v_ref = sampled(FlowSDE(0.7), gap(FlowSDE(0.7), 0.5))
    rows = slice(0, 7)
    small = replace(batch, x=batch.x[:, rows], y=batch.y[:, rows])
    v, v_ref = v.detach()[:, rows], v_ref[:, rows]
    a, b, s = (t[:, None] for t in small.dynamics.coefficients(small.schedule, small.step))
    d = [torch.distributions.Normal(a * small.x + b * u, s).log_prob(small.y) for u in (v, v_ref)]
    d = d[0] - d[1]
    for form, want in {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}.items():
        torch.testing.assert_close(estimate(form, small, v, v_ref), want.mean(1), rtol=1e-8, atol=1e-10)  # type: ignore[arg-type]
    assert float((torch.exp(-d) - 1 + d).min()) >= 0


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.8)], ids=repr)
def test_gradients_on_fixed_samples(dynamics: Dynamics) -> None:
    """Summed over elements: k2's gradient by the velocity is the exact KL's on average, k1's is 0 on average."""
    size = 0.5
    batch, v, v_ref = sampled(dynamics, gap(dynamics, size))

    def mean_slope(form: KLForm) -> Tensor:
        value = estimate(form, batch, v, v_ref)
        return torch.autograd.grad(value.sum(), v)[0].sum(1)

    _, b, s = dynamics.coefficients(batch.schedule, batch.step)
    exact = mean_slope("exact")
    torch.testing.assert_close(exact.abs(), size * b.abs() / s, rtol=1e-9, atol=0)
    unit = (b / s).abs()  # the spread of ∂log p/∂v of one element
    noise = 5 / math.sqrt(ELEMENTS)
    assert bool((mean_slope("k1").abs() < noise * unit).all())
    assert bool(((mean_slope("k2") - exact).abs() < noise * unit).all())
    assert bool(((mean_slope("k3") - exact).abs() < noise * unit).all())  # equal stds: the reverse KL's is the same
