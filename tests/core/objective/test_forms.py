"""The forms of the ratio and their weights, in float64: identities, means, gradients, and what they reduce to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.dynamics import CPS, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.edges import EdgeBatch, Replayed, replay
from tempflow.core.objective.ratio import ChunkRatio, NormRatio, PositionRatio, RegionRatio, StepRatio, clipped
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.core.weight import Weight, equalised, inverse_step, uniform

SHAPE = (3, 4, 5)
CHANNELS, D = 3, 60
SCHEDULE = shifted(6)
KINDS: tuple[Dynamics, ...] = (FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8))


def field(theta: Tensor, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    s, c = (t.to(x.dtype).view(-1, 1, 1, 1) for t in (sigma, rows + 1))
    return theta[0] * x + theta[1] * x * x * s + theta[2] * c


def old(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return field(torch.tensor([0.4, 0.05, -0.1]), x, sigma, rows)


def new(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return field(torch.tensor([0.42, 0.055, -0.12]), x, sigma, rows)


def grow(dynamics: Dynamics, group: int = 3) -> Forest:
    chains = P.chain(6, group, stochastic=range(5))
    return rollout(
        [chains] * 2, dynamics, SCHEDULE.double(), old, Noise(1), shape=SHAPE, store_dtype=torch.float64, keep_mean=True
    )


def batch_of(dynamics: Dynamics = KINDS[0], weight: Weight = uniform, seed: int = 0) -> EdgeBatch:
    forest = grow(dynamics)
    edges, g = forest.edges, torch.Generator().manual_seed(seed)
    mean = edges.mean
    assert mean is not None and mean.dtype == torch.float64
    std = dynamics.coefficients(SCHEDULE.double(), edges.step)[2].view(-1, 1, 1, 1)
    z = (forest.nodes[edges.child] - mean) / std
    log_prob = (-z.square() / 2 - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))).mean(
        (1, 2, 3)
    )
    return EdgeBatch(
        x=forest.nodes[edges.parent],
        y=forest.nodes[edges.child],
        step=edges.step,
        scale=edges.scale,
        rows=edges.prompt,
        log_prob=log_prob,
        advantage=torch.randn(len(edges), generator=g).double(),
        weight=weight(forest, SCHEDULE, dynamics).double(),
        schedule=SCHEDULE.double(),
        dynamics=dynamics,
        mean=mean,
        unit=forest.descent[1].index_select(0, torch.argsort(forest.descent[0])),
        columns={"map": torch.rand(len(edges), *SHAPE[1:], generator=g).double()},
    )


def at(batch: EdgeBatch, policy=new) -> Replayed:
    return replay({"policy": policy}, ("policy",), batch)


def std_of(batch: EdgeBatch) -> Tensor:
    return batch.dynamics.coefficients(batch.schedule, batch.step)[2]


# ----------------------------------------------------------------------------------------------------- RatioNorm
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_ratio_norm_is_s_times_log_r_plus_its_bias(dynamics: Dynamics) -> None:
    """log r̂ = S·(log r + mean Δμ²/(2S²)): the published form, against the code's form without cancellation."""
    batch = batch_of(dynamics)
    replayed = at(batch)
    s, moved = std_of(batch), (batch.drawn_from() - replayed.policy.mean).square().mean((1, 2, 3))
    want = s * (StepRatio()(replayed) + moved / (2 * s.square()))
    got = NormRatio()(replayed)
    assert float(got.abs().min()) > 1e-6
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


def test_ratio_norm_is_0_on_average_over_noise_where_log_r_is_below() -> None:
    """A thousand fresh children of every edge: 60 000 draws an edge, so errors are far below the bias tested."""
    one = batch_of()
    n, step = 1000, 2
    keep = (one.step == step).nonzero()[:1, 0].expand(n)
    g = torch.Generator().manual_seed(1)
    mean, s = one.drawn_from()[keep], std_of(one)[keep]
    z = torch.randn(mean.shape, generator=g, dtype=torch.float64)
    y = mean + s.view(-1, 1, 1, 1) * z
    log_prob = (-z.square() / 2 - s.log().view(-1, 1, 1, 1) - 0.9189385332046727).mean((1, 2, 3))
    names = ("x", "step", "scale", "rows", "advantage", "weight")
    many = replace(one, **{k: getattr(one, k)[keep] for k in names}, y=y, log_prob=log_prob, mean=mean, unit=None)

    def far(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return field(torch.tensor([1.4, 0.05, -0.1]), x, sigma, rows)

    replayed = at(many, far)
    bias = (mean - replayed.policy.mean).square().mean((1, 2, 3))[0] / (2 * s[0].square())
    norm, plain = NormRatio()(replayed), StepRatio()(replayed)
    error = norm.std() / n**0.5
    assert abs(float(norm.mean())) < 4 * float(error)
    assert abs(float(plain.mean() + bias)) < 4 * float(error / s[0])
    assert float(bias) > 10 * float(error / s[0])  # so the test would see it


@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_its_gradient_is_b_whatever_s_and_constant_with_equalised_weights(dynamics: Dynamics) -> None:
    """∂L/∂v = −A·w·b·z/(D·N) at r = 1."""
    for weight in (uniform, inverse_step, equalised):
        batch = batch_of(dynamics, weight)
        v = old(batch.x, batch.schedule.at(batch.step), batch.rows).requires_grad_()
        clipped(ratio=NormRatio())({"policy": lambda x, sigma, rows, v=v: v}, batch).value.backward()
        _, b, s = batch.dynamics.coefficients(batch.schedule, batch.step)
        z = (batch.y - batch.drawn_from()) / s.view(-1, 1, 1, 1)
        factor = -batch.advantage * batch.weight * b / (D * len(b))
        torch.testing.assert_close(v.grad, factor.view(-1, 1, 1, 1) * z, rtol=1e-6, atol=1e-12)
        if weight is equalised:
            size = v.grad.flatten(1).norm(dim=1) / (batch.advantage.abs() * z.flatten(1).norm(dim=1))
            torch.testing.assert_close(size, size[:1].expand_as(size), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("weight", "power"), [(equalised, "b"), (inverse_step, "delta")])
def test_weights_are_what_they_say_with_mean_one(weight: Weight, power: str) -> None:
    for dynamics in KINDS:
        batch = batch_of(dynamics, weight)
        by = {
            "b": batch.dynamics.coefficients(batch.schedule, batch.step)[1].abs(),
            "delta": batch.schedule.delta(batch.step),
        }[power]
        level = batch.weight * by
        torch.testing.assert_close(level, level[:1].expand_as(level), rtol=1e-5, atol=0)
        by_step = torch.stack([batch.weight[batch.step == i][0] for i in range(5)])
        assert float(by_step.mean()) == pytest.approx(1, abs=1e-6)


def test_the_two_weights_agree_for_flow_sde_below_the_pole() -> None:
    """b = −Δ(1 + a²/2) at σ < 1, −Δ at σ = 1: one ratio for all steps but the first."""
    a, b = batch_of(FlowSDE(0.7), equalised), batch_of(FlowSDE(0.7), inverse_step)
    ratio = a.weight / b.weight
    later = ratio[a.step > 0]
    torch.testing.assert_close(later, later[:1].expand_as(later), rtol=1e-5, atol=0)
    assert float(ratio[a.step == 0][0] / later[0]) == pytest.approx(1 + 0.7**2 / 2, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- chunks
def loss_and_gradient(objective, batch: EdgeBatch) -> tuple[Tensor, Tensor]:
    theta = torch.tensor([0.42, 0.055, -0.12], dtype=torch.float64, requires_grad=True)
    loss = objective({"policy": lambda *given: field(theta, *given)}, batch).value
    return loss.detach(), torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("inner", [StepRatio(), NormRatio()], ids=repr)
def test_singletons_are_the_per_step_loss_and_gradient(inner) -> None:
    batch = replace(batch_of(), unit=torch.arange(30).flip(0) * 7)
    want = loss_and_gradient(clipped(2e-3, 2e-3, ratio=inner), batch)
    got = loss_and_gradient(clipped(2e-3, 2e-3, ratio=ChunkRatio(inner)), batch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_one_chunk_is_the_exponential_of_the_mean() -> None:
    batch = batch_of()
    log_ratio = StepRatio()(at(batch))
    got = ChunkRatio()(at(batch))
    for path in range(6):
        mine = batch.unit == path
        assert int(mine.sum()) == 5
        torch.testing.assert_close(got[mine], log_ratio[mine].mean().expand(5), rtol=1e-12, atol=1e-15)
        product = log_ratio[mine].exp().prod() ** (1 / 5)
        assert float(got[mine][0].exp()) == pytest.approx(float(product), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(unit=st.lists(st.integers(0, 6), min_size=30, max_size=30), seed=st.integers(0, 99))
def test_uneven_chunks_against_a_loop(unit: list[int], seed: int) -> None:
    """L = mean over chunks of max(−A r, −A clip r), r = Π ratio^(1/n); advantages are one number a chunk."""
    number = torch.tensor(unit)
    by_chunk = torch.randn(7, generator=torch.Generator().manual_seed(seed)).double()
    batch = replace(BATCH, unit=number, advantage=by_chunk[number])
    log_ratio = StepRatio()(at(batch))
    losses = []
    for chunk in number.unique():
        r = log_ratio[number == chunk].mean().exp()
        a = by_chunk[chunk]
        losses.append(torch.maximum(-a * r, -a * r.clamp(1 - 1e-3, 1 + 2e-3)))
    got = clipped(1e-3, 2e-3, ratio=ChunkRatio())({"policy": new}, batch).value
    torch.testing.assert_close(got, torch.stack(losses).mean(), rtol=1e-10, atol=1e-14)


BATCH = batch_of()


def test_autograd_of_a_chunks_ratio_is_the_ratio_times_the_mean_gradient() -> None:
    theta = torch.tensor([0.42, 0.055, -0.12], dtype=torch.float64, requires_grad=True)
    replayed = at(BATCH, lambda *given: field(theta, *given))
    step, chunk = StepRatio()(replayed), ChunkRatio()(replayed)
    mine = BATCH.unit == 2
    parts = [torch.autograd.grad(step[e], theta, retain_graph=True)[0] for e in mine.nonzero()[:, 0]]
    ratio = chunk[mine][0].exp()
    got = torch.autograd.grad(ratio, theta, retain_graph=True)[0]
    torch.testing.assert_close(got, ratio.detach() * torch.stack(parts).mean(0), rtol=1e-10, atol=1e-14)
    assert float(got.abs().max()) > 1e-3


def test_a_chunk_is_clipped_as_one() -> None:
    """Steps far outside the clip on both sides: their mean is inside, so all of them keep their gradient."""
    batch = replace(BATCH, advantage=torch.ones_like(BATCH.advantage))
    log_ratio = StepRatio()(at(batch))
    shift = torch.where(batch.step % 2 == 0, 0.3, -0.45)  # +.3 three times and −.45 twice: 0 over the path's 5 steps
    batch = replace(batch, log_prob=batch.log_prob + log_ratio - shift)
    alone = clipped(1e-2, 1e-2)({"policy": new}, batch).metrics
    glued = clipped(1e-2, 1e-2, ratio=ChunkRatio())({"policy": new}, batch).metrics
    assert float(alone["clip_fraction"].mean()) == pytest.approx(3 / 5) and float(alone["outside_clip"].min()) == 1
    assert float(glued["outside_clip"].max()) == 0


def test_a_chunk_of_dense_ratios_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of: a chunk takes the mean of one ratio per edge; nearest valid: StepRatio"):
        ChunkRatio(PositionRatio())(at(BATCH))


# ------------------------------------------------------------------------------------------------------------ maps
def ones(batch: EdgeBatch) -> EdgeBatch:
    return replace(batch, columns={"map": torch.ones(len(batch.step), *SHAPE[1:])})


@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_region_ratio_with_an_even_map_is_the_steps_ratio(dynamics: Dynamics) -> None:
    batch = ones(batch_of(dynamics))
    torch.testing.assert_close(RegionRatio()(at(batch)), StepRatio()(at(batch)), rtol=1e-6, atol=1e-10)
    half = replace(batch, columns={"map": batch.columns["map"] / 2})
    torch.testing.assert_close(RegionRatio()(at(half)), RegionRatio()(at(batch)), rtol=1e-12, atol=0)
    for a, b in zip(
        loss_and_gradient(clipped(2e-3, 2e-3, ratio=RegionRatio()), batch),
        loss_and_gradient(clipped(2e-3, 2e-3), batch),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-10)


def log_density_gap(batch: EdgeBatch) -> Tensor:
    """log p − log p_old of every element, by torch.distributions."""
    s = std_of(batch).view(-1, 1, 1, 1)
    now = torch.distributions.Normal(at(batch).policy.mean, s).log_prob(batch.y)
    return now - torch.distributions.Normal(batch.drawn_from(), s).log_prob(batch.y)


def test_position_ratio_against_torch_distributions() -> None:
    gap = log_density_gap(BATCH)
    got = PositionRatio()(at(BATCH))
    assert got.shape == (30, 4, 5)
    torch.testing.assert_close(got, gap.sum(1), rtol=1e-8, atol=1e-10)
    # with M ≡ 1 its mean is C times the scalar's log ratio, not the scalar's
    torch.testing.assert_close(got.mean((1, 2)), CHANNELS * StepRatio()(at(BATCH)), rtol=1e-6, atol=1e-10)


def test_region_ratio_is_the_maps_weighted_mean_of_log_densities() -> None:
    where = BATCH.columns["map"]
    want = (log_density_gap(BATCH).mean(1) * where).sum((1, 2)) / where.sum((1, 2))
    torch.testing.assert_close(RegionRatio()(at(BATCH)), want, rtol=1e-8, atol=1e-10)


def test_a_map_of_zeros_looks_nowhere() -> None:
    """One picture's empty map must not spoil the others' loss."""
    where = BATCH.columns["map"].clone()
    where[3] = 0
    for ratio in (RegionRatio(), PositionRatio()):
        batch = replace(BATCH, columns={"map": where})
        v = old(batch.x, batch.schedule.at(batch.step), batch.rows).requires_grad_()
        clipped(ratio=ratio)({"policy": lambda x, sigma, rows, v=v: v}, batch).value.backward()
        assert bool(v.grad.isfinite().all()) and not bool(v.grad[3].any()) and bool(v.grad[4].any())


def test_position_loss_is_the_mean_over_places_of_clipped_terms() -> None:
    low, high = 0.02, 0.05
    objective = clipped(low, high, ratio=PositionRatio())
    r = log_density_gap(BATCH).sum(1).exp()
    a = BATCH.advantage.view(-1, 1, 1) * BATCH.columns["map"]
    want = torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high)).mean((1, 2))
    got = objective({"policy": new}, BATCH)
    torch.testing.assert_close(got.value, (BATCH.weight * want).mean(), rtol=1e-8, atol=1e-12)
    assert 0 < float(got.metrics["clip_fraction"].mean()) < 1


def test_places_with_a_map_of_0_bear_no_gradient_and_others_keep_the_sign() -> None:
    where = torch.zeros(30, 4, 5)
    where[:, 1:3, 2:] = 0.5
    for ratio in (PositionRatio(), RegionRatio()):
        batch = replace(BATCH, columns={"map": where})
        v = old(batch.x, batch.schedule.at(batch.step), batch.rows).requires_grad_()
        clipped(ratio=ratio)({"policy": lambda x, sigma, rows, v=v: v}, batch).value.backward()
        assert float(v.grad[:, :, where[0] == 0].abs().max()) == 0
        _, b, s = batch.dynamics.coefficients(batch.schedule, batch.step)
        push = v.grad / (-batch.advantage * b / s).view(-1, 1, 1, 1)  # along +z where A > 0
        z = (batch.y - batch.drawn_from())[:, :, where[0] > 0]
        assert bool((push[:, :, where[0] > 0].sign() == z.sign()).all())


def test_a_position_map_of_another_shape_or_none_is_refused() -> None:
    for wrong in (torch.ones(30, 5, 4), torch.ones(30, 1, 1), torch.ones(30)):
        with pytest.raises(ValueError, match=r"map: shape .* must be \[30, 4, 5\], a number per position"):
            clipped(ratio=PositionRatio())({"policy": new}, replace(BATCH, columns={"map": wrong}))
    with pytest.raises(ValueError, match="columns: 'map' is missing"):
        clipped(ratio=RegionRatio())({"policy": new}, replace(BATCH, columns={}))


@pytest.mark.parametrize("ratio", [NormRatio(), ChunkRatio(), PositionRatio(), RegionRatio()], ids=repr)
def test_every_form_is_exactly_one_before_an_update(ratio) -> None:
    loss = clipped(1e-6, 1e-6, ratio=ratio)({"policy": old}, BATCH)
    assert float(loss.metrics["log_ratio_abs"].max()) < 1e-9 and float(loss.metrics["outside_clip"].max()) == 0


@pytest.mark.parametrize("ratio", [NormRatio(), PositionRatio(), RegionRatio()], ids=repr)
def test_forms_that_need_the_old_mean_say_so(ratio) -> None:
    assert clipped(ratio=ratio).keeps_mean and not clipped().keeps_mean
    with pytest.raises(ValueError, match="mean: was not kept"):
        clipped(ratio=ratio)({"policy": new}, replace(BATCH, mean=None))
