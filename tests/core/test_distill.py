"""Distribution matching, a teacher's paths and gates: official numbers, limits, and fixed points in one dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tempflow.core.distill import (
    guided,
    implicit_target,
    matching_gradient,
    mean_velocity,
    nearest_nodes,
    negative_aware,
    pull,
    reward_gate,
    segment_targets,
    shaping,
    signed_squares,
    surrogate,
    target_optimality,
    teacher_path,
    velocity_error,
)
from tempflow.core.likelihood_proxy import corrupt, x0_of_velocity
from tempflow.core.schedule import Schedule, explicit, linear, shifted
from tempflow.core.state import StateLayout, streams_along
from tempflow.core.unroll import unroll

GRID = explicit((1, 0.75, 0.5, 0.25), 3.0).double()
MEAN, STD = 0.7, 0.5  # the teacher's law
LAW = torch.tensor([MEAN, STD], dtype=torch.float64).unbind()


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Distribution matching


def predictions(t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, noise, real, fake = (seeded(len(t), 4, 3, 3, seed=s, dtype=dtype) for s in range(4))
    at = corrupt(x, noise, t)
    return x, at, x0_of_velocity(at, real, t), x0_of_velocity(at, fake, t), real, fake


@pytest.mark.parametrize("anchor", ["clean", "noisy"])
def test_the_gradient_is_the_codes_normalised_difference(anchor: str) -> None:
    """DMD2's p_real − p_fake over mean |p_real| with p = x − x̂, and DP-DMD's with p = x_t − x̂; loss and its gradient
    by MSE to sg[x − g], mean over all."""
    x, at, real, fake, _, _ = predictions(torch.tensor([0.02, 0.3, 0.7, 0.98]))
    base = x if anchor == "clean" else at
    p_real, p_fake = base - real, base - fake
    want = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    g = matching_gradient(fake, real, base)
    torch.testing.assert_close(g, want, rtol=2e-5, atol=2e-6)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    loss = surrogate(mine, g).mean()
    reference = 0.5 * torch.nn.functional.mse_loss(theirs, (theirs - want).detach())
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(loss, mine)
    torch.testing.assert_close(got, g / g.numel(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got, torch.autograd.grad(reference, theirs)[0], rtol=1e-3, atol=1e-7)


def test_the_surrogates_gradient_is_g_where_x_minus_g_would_round_it_away() -> None:
    x, g = torch.tensor([[256.0, 3.0]]).bfloat16().requires_grad_(), torch.tensor([[1e-3, -2e-4]])
    (got,) = torch.autograd.grad(surrogate(x, g).mean(), x)
    torch.testing.assert_close(got, (g / 2).bfloat16(), rtol=0, atol=0)
    assert float((x.detach() - g.bfloat16())[0, 0]) == 256


def test_no_normaliser_is_the_difference_itself() -> None:
    _, _, real, fake, _, _ = predictions(torch.tensor([0.4]))
    assert torch.equal(matching_gradient(fake, real), fake - real)


@pytest.mark.parametrize("t", [0.0, 1e-12, 1e-9, 1e-4, 0.02])
@pytest.mark.parametrize("anchor", ["clean", "noisy"])
def test_it_is_finite_and_bounded_where_sigma_goes_to_zero(t: float, anchor: str) -> None:
    x, at, real, fake, v_real, v_fake = predictions(torch.full((3,), t, dtype=torch.float64), torch.float64)
    g = matching_gradient(fake, real, x if anchor == "clean" else at)
    assert bool(g.isfinite().all()) and float(g.abs().max()) < 20
    if t == 0:
        assert not g.any()
    if t >= 1e-4 and anchor == "noisy":
        want = (v_real - v_fake) / v_real.abs().mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-9)


def test_a_networks_nan_is_not_hidden() -> None:
    _, at, real, fake, _, _ = predictions(torch.tensor([0.4, 0.4]))
    real[0, 0, 0, 0] = math.nan
    g = matching_gradient(fake, real, at)
    assert bool(g[0].isnan().all()) and bool(g[1].isfinite().all())


def test_streams_and_held_elements_have_a_part_of_their_own() -> None:
    x, _, real, fake, _, _ = predictions(torch.tensor([0.4, 0.6]))
    streams = streams_along((4, 3, 3), 0, {"video": 3, "sound": 1})
    loud = torch.cat([real[:, :3], 100 * real[:, 3:]], 1)
    g = matching_gradient(fake, loud, x, StateLayout(streams=streams))
    torch.testing.assert_close(g[:, :3], matching_gradient(fake[:, :3], real[:, :3], x[:, :3]))
    torch.testing.assert_close(g[:, 3:], matching_gradient(fake[:, 3:], loud[:, 3:], x[:, 3:]))
    free = torch.ones(1, 4, 3, 3, dtype=torch.bool)
    free[:, 0] = False
    layout = StateLayout(free, torch.zeros(1, 4, 3, 3))
    real[:, 0] = math.nan
    g = matching_gradient(fake, real, x, layout)
    torch.testing.assert_close(g[:, 1:], matching_gradient(fake[:, 1:], real[:, 1:], x[:, 1:]))
    assert not g[:, 0].any()
    x.requires_grad_()
    (got,) = torch.autograd.grad(surrogate(x, g, layout).sum(), x)
    torch.testing.assert_close(got, g / 27)


def test_shapes_must_agree() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 1)
    for call in (
        lambda: matching_gradient(a, b),
        lambda: matching_gradient(a, a, b),
        lambda: surrogate(a, b),
        lambda: pull(a, b),
        lambda: implicit_target(a, b),
        lambda: velocity_error(a, b),
        lambda: shaping(a, b),
        lambda: mean_velocity(a, b, torch.ones(2), torch.zeros(2)),
        lambda: negative_aware(a, b, a, torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"shape \[2, 1\] must be \[2, 3\]"):
            call()


# One dimension: data N(m, s²) have closed velocities, and a student that moves by z -> a + b·z closed laws


def velocity(mean: Tensor, std: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """E[ε − x0 | x_t] of x0 ~ N(mean, std²)."""
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    x0 = mean + gain * (x - (1 - t) * mean)
    return (x - x0) / t


def teacher(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    t = sigma.to(x).view(-1, *[1] * (x.dim() - 1))
    return velocity(*LAW, x, t)


def quadrature(count: int = 24) -> tuple[Tensor, Tensor]:
    """Normals at even quantiles, and their weights; exact mean, and variance 1 by scaling."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return z / z.square().mean().sqrt(), torch.full_like(z, 1 / count)


def clean_at(mean: Tensor, std: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return x - t * velocity(mean, std, x, t)


def test_the_difference_is_one_of_scores() -> None:
    t, x, law = torch.tensor(0.6).double(), seeded(50), (torch.tensor(0.1).double(), torch.tensor(1.2).double())
    real, fake = clean_at(*LAW, x, t), clean_at(*law, x, t)

    def score(mean: Tensor | float, std: Tensor | float) -> Tensor:
        return -(x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)

    torch.testing.assert_close(fake - real, t**2 / (1 - t) * (score(*law) - score(MEAN, STD)))


@pytest.mark.parametrize("anchor", [None, "clean", "noisy"])
def test_distribution_matching_stands_still_at_the_teachers_mean_and_std(anchor: str | None) -> None:
    """With the exact score of the student's own law; any weights, so either normaliser, keep the fixed point."""
    z, _ = quadrature()
    z, noise = z[:, None].expand(24, 24), z[None, :].expand(24, 24)  # each sample is a state of 24 elements
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 1.6))
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    times = torch.tensor([0.2, 0.5, 0.8]).double()
    for update in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.985**update
        x = a + b * z
        losses = list[Tensor]()
        for t in times:
            at = (1 - t) * x.detach() + t * noise
            real, fake = clean_at(*LAW, at, t), clean_at(a.detach(), b.detach(), at, t)
            g = matching_gradient(fake, real, {None: None, "clean": x, "noisy": at}[anchor])
            losses.append(surrogate(x, g).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    assert a.item() == pytest.approx(MEAN, abs=2e-3) and b.abs().item() == pytest.approx(STD, abs=2e-3)


def test_a_four_step_student_reaches_them_through_its_own_steps() -> None:
    """Gradients through all the steps of the sampler; the fake score is that of the law which the steps make."""
    z = quadrature(16)[0]
    weights = torch.tensor([[-0.5, 1.3]] * 4, dtype=torch.float64, requires_grad=True)

    def student(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        here = weights[int((GRID.sigmas == sigma[0]).nonzero())]
        return velocity(here[0], here[1], x, sigma.view(-1, 1))

    optimizer = torch.optim.Adam([weights], lr=0.05)
    noise = z[None, :].expand(16, 16)
    for update in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.97**update
        x = unroll(z[:, None].expand(16, 16), GRID, student, torch.zeros(16).long()).x
        mean, std = x.detach().mean(), x.detach().std(correction=0)
        losses = list[Tensor]()
        for t in torch.tensor([0.3, 0.7]).double():
            at = (1 - t) * x.detach() + t * noise
            g = matching_gradient(clean_at(mean, std, at, t), clean_at(*LAW, at, t))
            losses.append(surrogate(x, g).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    assert float(mean) == pytest.approx(MEAN, abs=5e-3) and float(std) == pytest.approx(STD, abs=5e-3)


# Paths of a teacher


def fitted(x: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The affine function that `velocity_error` asks for: least squares."""
    design = torch.stack([torch.ones_like(x), x], 1)
    weights = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    return lambda y: weights[0] + weights[1] * y


def test_segment_matching_stands_still_at_the_teachers_own_path() -> None:
    """Gaussian paths are affine, so a student of four steps can follow the teacher's many: and ends where it ends."""
    z = quadrature(32)[0][:, None]
    rows = torch.zeros(32).long()
    ends = list[Tensor]()
    for parts in (1, 4, 64):
        path = teacher_path(z, GRID, teacher, rows, parts, shift=3.0)
        assert path.shape == (5, 32, 1) and torch.equal(path[0], z) and not path.requires_grad
        targets = segment_targets(path, GRID)
        steps = [fitted(x[:, 0], v[:, 0]) for x, v in zip(path[:-1], targets, strict=True)]

        def student(x: Tensor, sigma: Tensor, rows: Tensor, steps: list[Callable[[Tensor], Tensor]] = steps) -> Tensor:
            return steps[int((GRID.sigmas == sigma[0]).nonzero())](x)

        walked = unroll(z, GRID, student, rows)
        torch.testing.assert_close(walked.x, path[-1])
        for visit, v in zip(walked.visits, targets, strict=True):
            assert float(velocity_error(visit.velocity, v).max()) < 1e-20
        ends.append(walked.x)
    # one part is the teacher on the student's grid; many come to the law itself
    torch.testing.assert_close(ends[0], unroll(z, GRID, teacher, rows).x)
    errors = [abs(float(end.mean()) - MEAN) + abs(float(end.std(correction=0)) - STD) for end in ends]
    assert errors[2] < errors[1] / 5 < errors[0] / 10 and errors[2] < 0.01


@pytest.mark.parametrize("nodes", [1, 3, 5, 10])
def test_the_first_steps_target_lands_on_the_teachers_state(nodes: int) -> None:
    """DP-DMD: ε − (1 − t̃)·ṽ = z̃, and ṽ = ε − z̃ where the teacher went all the way."""
    noise, schedule = seeded(6, 2, 3), shifted(10).double()
    rows = torch.zeros(6).long()
    reached = unroll(noise, schedule, teacher, rows, stop=nodes, look=False, last=0)
    one = torch.ones(6, dtype=torch.float64)
    v = mean_velocity(noise, reached.x, one, reached.sigma)
    below = reached.sigma.view(-1, 1, 1)
    torch.testing.assert_close(noise - (1 - below) * v, reached.x)
    if nodes == 10:
        assert torch.equal(v, noise - reached.x)
    student = seeded(6, 2, 3, seed=9).requires_grad_()
    loss = velocity_error(student, v)
    torch.testing.assert_close(loss, (student - v).square().mean((1, 2)))
    (slope,) = torch.autograd.grad(loss.mean(), student)
    torch.testing.assert_close(slope, 2 * (student - v).detach() / v.numel())


def test_a_straight_teacher_has_its_own_velocity_for_target() -> None:
    noise, drift = seeded(4, 3), seeded(4, 3, seed=1)
    for stop in (1, 4, 10):
        walk = unroll(noise, shifted(10).double(), lambda x, s, r: drift, torch.zeros(4).long(), stop=stop, look=False)
        v = mean_velocity(noise, walk.x, torch.ones(4).double(), walk.sigma)
        torch.testing.assert_close(v, drift)


def test_targets_need_a_way_down_and_the_schedules_nodes() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"below: 0.5 must be below sigma, 0.5; nearest valid: 0.0"):
        mean_velocity(x, x, torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"path: 4 nodes; nearest valid: 5"):
        segment_targets(torch.zeros(4, 2, 3), GRID)


# RATS


def test_nodes_are_matched_by_sigma() -> None:
    many, few = linear(50, 3.0), explicit((1, 0.75, 0.5, 0.25), 3.0)
    nodes = nearest_nodes(few, many)
    for sigma, node in zip(few.sigmas, nodes, strict=True):
        assert float((many.sigmas - sigma).abs().min()) == float((many.sigmas[node] - sigma).abs())
    assert nearest_nodes(many, many).tolist() == list(range(51))
    assert nearest_nodes(linear(4), linear(8)).tolist() == [0, 2, 4, 6, 8]
    assert nearest_nodes(Schedule(torch.tensor([0.5, 0.0])), Schedule(torch.tensor([0.75, 0.25]))).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("gap", "temperature", "gate"),
    [
        (0.0, 1.0, 0.5),
        (0.0, 0.1, 0.5),
        (1.0, 1.0, 0.7310586),
        (-1.0, 1.0, 0.2689414),
        (2.0, 0.5, 0.9820138),
        (-2.0, 0.5, 0.0179862),
        (30.0, 1.0, 1.0),
        (math.nan, 1.0, 0.0),
    ],
)
def test_the_gate_table(gap: float, temperature: float, gate: float) -> None:
    given = torch.tensor([gap], requires_grad=True)
    got = reward_gate(given, temperature)
    assert float(got) == pytest.approx(gate, abs=1e-6) and not got.requires_grad


def test_the_gate_rises_never_closes_and_has_a_floor() -> None:
    gaps = torch.linspace(-20, 20, 41)
    assert bool((reward_gate(gaps.double()).diff() > 0).all()) and float(reward_gate(gaps)[0]) > 0
    floored = reward_gate(torch.tensor([-5.0, 0.0, 5.0, math.nan]), least=0.2)
    assert floored.tolist() == pytest.approx([0.2, 0.5, 0.9933071, 0.0])
    with pytest.raises(ValueError, match=r"temperature: 0.0 must be finite and above 0"):
        reward_gate(gaps, 0.0)
    with pytest.raises(ValueError, match=r"least: 1.5 must be in \[0, 1\]"):
        reward_gate(gaps, 1.0, 1.5)


def test_shaping_is_cosine_and_square() -> None:
    student, other = seeded(3, 2, 4).requires_grad_(), seeded(3, 2, 4, seed=1).requires_grad_()
    got = shaping(student, other, 0.5)
    cosine = torch.nn.functional.cosine_similarity(student.flatten(1), other.flatten(1))
    torch.testing.assert_close(got, 1 - cosine + 0.5 * (student - other).square().mean((1, 2)))
    (slope,) = torch.autograd.grad(got.sum(), student, retain_graph=True)
    assert float(slope.abs().min()) > 0
    with pytest.raises(RuntimeError, match=r"unused|not have been used"):
        torch.autograd.grad(got.sum(), other)
    torch.testing.assert_close(shaping(student, student), torch.zeros(3).double())
    torch.testing.assert_close(shaping(student, 3 * student, 0.0), torch.zeros(3).double())


# GDMD


def test_the_optimality_of_targets() -> None:
    target, own = torch.tensor([0.5, 0.9, 0.1, 3.0, -3.0, math.nan]).requires_grad_(), torch.full((6,), 0.5)
    r = target_optimality(target, own, 0.8)
    assert r.tolist()[:5] == pytest.approx([0.5, 0.75, 0.25, 1.0, 0.0]) and math.isnan(float(r[5]))
    assert not r.requires_grad
    torch.testing.assert_close(target_optimality(target, own, torch.full((6,), 0.8)), r, equal_nan=True)
    for scale in (0.0, torch.zeros(6)):
        with pytest.raises(ValueError, match=r"scale: 0.0 must be"):
            target_optimality(target, own, scale)
    with pytest.raises(ValueError, match=r"own: shape \[5\] must be \[6\]"):
        target_optimality(target, own[:5], 1.0)


def targets(count: int = 3) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = seeded(5, 2, 3).requires_grad_()
    gradients = [0.2 * seeded(5, 2, 3, seed=1 + k) for k in range(count)]
    return x, gradients, [implicit_target(x, g) for g in gradients]


def slope(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x)[0]


def test_a_target_is_x_minus_g_exactly_and_detached() -> None:
    x, gradients, made = targets()
    for g, y in zip(gradients, made, strict=True):
        assert torch.equal(y, x.detach() - g) and not y.requires_grad


def test_targets_that_are_all_best_are_plain_matching_averaged() -> None:
    x, gradients, made = targets()
    ones = torch.ones(5).double()
    loss = torch.stack([negative_aware(x, seeded(5, 2, 3, seed=8), y, ones).mean() for y in made]).mean()
    plain = torch.stack([surrogate(x, g).mean() for g in gradients]).mean()
    torch.testing.assert_close(loss, plain)
    got = slope(loss, x)
    torch.testing.assert_close(got, torch.stack(gradients).mean(0) / x.numel())
    torch.testing.assert_close(got, slope(plain, x))


@pytest.mark.parametrize("mix", [0.1, 0.37, 1.0, 1.7])
def test_equal_scores_give_no_gradient_while_the_student_is_old(mix: float) -> None:
    x, _, made = targets(1)
    r = target_optimality(torch.full((5,), 0.3).double(), torch.full((5,), 0.3).double(), 0.1)
    assert not slope(negative_aware(x, x, made[0], r, mix).sum(), x).any()
    assert not slope(signed_squares(x, x, made[0], r).sum(), x).any()
    # away from old the first head pulls back to it by β, the second by its anchor
    old = x.detach() + 0.1
    torch.testing.assert_close(slope(negative_aware(x, old, made[0], r, mix).sum(), x), mix * (x - old).detach() / 6)
    torch.testing.assert_close(slope(signed_squares(x, old, made[0], r, 1.5).sum(), x), 1.5 * (x - old).detach() / 6)


@pytest.mark.parametrize("r", [0.0, 0.2, 0.9, 1.0])
def test_both_heads_have_one_gradient_while_the_student_is_old(r: float) -> None:
    x, gradients, made = targets(1)
    score = torch.full((5,), r).double()
    for loss in (negative_aware(x, x, made[0], score, 0.3), signed_squares(x, x, made[0], score)):
        torch.testing.assert_close(slope(loss.sum(), x), (2 * r - 1) * gradients[0] / 6)


def test_both_terms_are_weighed_and_a_failed_score_leaves_the_first() -> None:
    x, _, made = targets(1)
    r = target_optimality(torch.tensor([0.4, math.nan, 0.1, 0.9, math.nan]), torch.full((5,), 0.3), 0.5)
    matching, head = pull(x, made[0]), negative_aware(x, x.detach() + 0.1, made[0], r)
    got = guided(matching, head, r, (0.7, 0.2))
    valid = ~r.isnan()
    torch.testing.assert_close(got, 0.7 * matching + 0.2 * torch.where(valid, head, 0.0))
    gradient = slope(got.sum(), x)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient[~valid], 0.7 * (x.detach() - made[0])[~valid] / 6)
    torch.testing.assert_close(guided(matching, head, r, (1.0, 0.0)), matching)
    with pytest.raises(ValueError, match=r"weights\[1\]: -1.0 must be finite and ≥ 0"):
        guided(matching, head, r, (1.0, -1.0))
    with pytest.raises(ValueError, match=r"anchor: 1.0 leaves a target of r = 0 without a minimum"):
        signed_squares(x, x, made[0], r, 1.0)


def test_with_exact_scores_rewarded_targets_stand_still_where_plain_ones_do() -> None:
    """At the teacher's law every target is the sample itself, whatever the reward: it sets the pace, not the place."""
    z, t = quadrature(24)[0], torch.tensor(0.5).double()

    def gradient(a: float, b: float, share: float, gamma: float) -> Tensor:
        place = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
        x = (place[0] + place[1] * z)[:, None].expand(24, 24)
        at = (1 - t) * x.detach() + t * z[None, :]
        fake, real = clean_at(place[0].detach(), place[1].detach(), at, t), clean_at(*LAW, at, t)
        y = implicit_target(x, matching_gradient(fake, real))
        r = target_optimality(y.mean(1), x.detach().mean(1), 0.3)  # the higher, the better
        return slope(guided(pull(x, y), negative_aware(x, x, y, r), r, (share, gamma)).mean(), place)

    assert not gradient(MEAN, STD, 1.0, 0.8).any()
    # below the teacher's mean targets are better than samples, and pull harder than plain ones; above it, less
    low, plain = gradient(MEAN - 0.2, STD, 1.0, 0.8), gradient(MEAN - 0.2, STD, 1.0, 0.0)
    assert float(low[0]) < float(plain[0]) < 0
    high, plain = gradient(MEAN + 0.2, STD, 1.0, 0.8), gradient(MEAN + 0.2, STD, 1.0, 0.0)
    assert 0 < float(high[0]) < float(plain[0])
    # where the reward's term outweighs the other, it turns round: the head pushes off from worse targets
    assert float(gradient(MEAN + 0.2, STD, 0.1, 2.0)[0]) < 0


def test_samples_of_zeros_have_no_direction_and_no_nan() -> None:
    """As a model of data around 0 predicts at pure noise."""
    zeros, other = torch.zeros(1, 3, dtype=torch.float64), seeded(1, 3)
    for mine, theirs, apart in ((zeros, zeros, 0.0), (zeros, other, 0.5), (other, zeros, 0.5), (other, other, 0.0)):
        mine = mine.clone().requires_grad_()
        value = shaping(mine, theirs, square=0.0)
        (slope,) = torch.autograd.grad(value.sum(), mine)
        assert value.item() == pytest.approx(apart, abs=1e-12) and bool(slope.isfinite().all())
