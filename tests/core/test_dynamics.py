"""Steps against explicit formulas, diffusers' Euler step, and the closed laws of linear-Gaussian toys."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core.dynamics import (
    CPS,
    DDIM,
    ODE,
    DanceSDE,
    Dynamics,
    FlowSDE,
    LinearSDE,
    gradient_scale,
)
from tempflow.core.schedule import Schedule, linear, shifted, token_shifted

NOISY: list[Dynamics] = [FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0), DDIM(0.4), CPS(1.0)]
SDES = [FlowSDE(0.7), FlowSDE(1.2), DanceSDE(0.3), LinearSDE()]
SILENT: list[Dynamics] = [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), DDIM(0.0)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(dynamics: Dynamics, schedule: Schedule) -> list[tuple[float, float, float, float, float]]:
    """(σ, σ', a, b, s) of every step, in float64."""
    schedule, steps = schedule.double(), torch.arange(schedule.steps)
    columns = [schedule.at(steps), schedule.after(steps), *dynamics.coefficients(schedule, steps)]
    return [tuple(row) for row in torch.stack(columns, dim=1).tolist()]


@st.composite
def grids(draw_: st.DrawFn) -> Schedule:
    """Any grid from 1 (or below) to 0, in float64."""
    inner = draw_(st.lists(st.floats(0.002, 0.998), min_size=1, max_size=12, unique_by=lambda s: round(s, 3)))
    first = draw_(st.sampled_from([1.0, 0.9997, 0.9985]))
    return Schedule(torch.tensor([first, *sorted(inner, reverse=True), 0.0], dtype=torch.float64))


# ---- the deterministic step


@pytest.mark.parametrize("dynamics", [ODE(), *SILENT], ids=str)
@pytest.mark.parametrize(
    "schedule", [shifted(10), token_shifted(6, 4096), linear(16, 3.0)], ids=["sd3", "flux", "linear"]
)
def test_no_noise_has_the_bits_of_diffusers_euler(dynamics: Dynamics, schedule: Schedule) -> None:
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(schedule.steps)
    theirs.sigmas, theirs.timesteps = schedule.sigmas, schedule.sigmas[:-1] * 1000
    x = theirs_x = draw(0, 2, 4, 8, 8)
    for i in range(schedule.steps):
        v = draw(i + 1, 2, 4, 8, 8)
        law = dynamics.transition(x, v, schedule, torch.tensor([i, i]))
        assert law.std.tolist() == [0, 0]
        x = law.sample(draw(99, 2, 4, 8, 8))
        theirs_x = theirs.step(v, theirs.timesteps[i], theirs_x, return_dict=False)[0]
        assert torch.equal(x, theirs_x)
    assert not dynamics.stochastic


@given(grids())
@settings(deadline=None)
def test_scale_zero_is_the_ode_to_the_last_bit(schedule: Schedule) -> None:
    for grid in (schedule, Schedule(schedule.sigmas.float())):
        steps = torch.arange(grid.steps)
        for dynamics in NOISY:
            for ours, ode in zip(dynamics.coefficients(grid, steps, 0.0), ODE().coefficients(grid, steps), strict=True):
                assert torch.equal(ours, ode)


def test_a_deterministic_step_has_no_log_prob() -> None:
    x, step = draw(0, 2, 3), torch.tensor([0, 9])
    for dynamics in (ODE(), FlowSDE(0.0), CPS(0.8)):  # CPS is deterministic into σ = 0
        law = dynamics.transition(x, x, shifted(10), step)
        assert law.stochastic is False
        with pytest.raises(ValueError, match=r"a deterministic \(ODE\) step has no log-probability"):
            law.log_prob(x)
        with pytest.raises(ValueError, match=r"step: (0|9) .*\(ODE\)"):
            gradient_scale(dynamics, shifted(10), step)


# ---- the coefficients


def explicit(dynamics: Dynamics, sigma: float, below: float, second: float) -> tuple[float, float, float]:
    """The table of the literature, as printed: A, B, S."""
    delta = sigma - below
    if isinstance(dynamics, CPS | DDIM):
        if isinstance(dynamics, CPS):
            std = below * math.sin(dynamics.noise_level * math.pi / 2)
        else:
            ratio = below**2 * (1 - sigma) ** 2 / (sigma**2 * (1 - below) ** 2)
            std = dynamics.eta * below * math.sqrt(1 - ratio)
        q = math.sqrt(max(below**2 - std**2, 0.0))
        return (1 - below) + q, -sigma * (1 - below) + (1 - sigma) * q, std
    if isinstance(dynamics, FlowSDE):
        s = dynamics.noise_level * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
    elif isinstance(dynamics, DanceSDE):
        s = dynamics.eta
    else:
        s = second * sigma
    a = 1 - s**2 * delta / (2 * sigma)
    return a, -delta * (1 + s**2 * (1 - sigma) / (2 * sigma)), s * math.sqrt(delta)


@pytest.mark.parametrize("dynamics", NOISY, ids=str)
@pytest.mark.parametrize(
    "schedule", [shifted(10), token_shifted(6, 4096), linear(16, 3.0), linear(1)], ids=lambda s: str(s.steps)
)
def test_coefficients_are_the_literatures(dynamics: Dynamics, schedule: Schedule) -> None:
    second = float(schedule.sigmas[1])
    for sigma, below, a, b, s in numbers(dynamics, schedule):
        np.testing.assert_allclose((a, b, s), explicit(dynamics, sigma, below, second), rtol=1e-11, atol=1e-12)
    steps = torch.arange(schedule.steps)
    single = torch.stack(dynamics.coefficients(schedule, steps))
    double = torch.stack(dynamics.coefficients(schedule.double(), steps))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-7)


@given(grids(), st.floats(0.05, 1.5))
@settings(deadline=None)
def test_flow_sde_below_one(schedule: Schedule, level: float) -> None:
    """B = −Δ(1 + a²/2) wherever σ is clear of 1."""
    for sigma, below, _, b, s in numbers(FlowSDE(level), schedule):
        if sigma < 0.999:
            assert b == pytest.approx(-(sigma - below) * (1 + level**2 / 2), rel=1e-9)
            assert s == pytest.approx(level * math.sqrt(sigma / (1 - sigma) * (sigma - below)), rel=1e-9)


@given(grids(), st.sampled_from(NOISY), st.floats(0, 1))
@settings(deadline=None)
def test_every_kind_keeps_the_coefficient_of_the_data(schedule: Schedule, dynamics: Dynamics, scale: float) -> None:
    """With x = (1−σ)x0 + σε and v = ε − x0 the mean holds (1−σ')·x0; CPS and DDIM keep the noise's variance too."""
    steps = torch.arange(schedule.steps)
    a, b, s = dynamics.coefficients(schedule, steps, scale)
    sigma, below = schedule.at(steps), schedule.after(steps)
    torch.testing.assert_close(a * (1 - sigma) - b, 1 - below, rtol=1e-9, atol=1e-9)
    if isinstance(dynamics, CPS | DDIM):
        torch.testing.assert_close((a * sigma + b).square() + s.square(), below.square(), rtol=1e-9, atol=1e-12)


def test_ddim_at_eta_one_is_the_posterior_of_the_chain() -> None:
    """x' given (x, x0), where x = (α/α')x' + w and x' ~ N(α'x0, σ'²): ordinary Gaussian conditioning."""
    x0, x = 0.7, -0.4
    for sigma, below, a, b, s in numbers(DDIM(1.0), shifted(10)):
        alpha, alpha_below = 1 - sigma, 1 - below
        gain = alpha / alpha_below * below**2 / sigma**2
        mean = alpha_below * x0 + gain * (x - alpha * x0)
        variance = below**2 - gain * alpha / alpha_below * below**2
        assert a * x + b * (x - x0) / sigma == pytest.approx(mean, abs=1e-12)
        assert s == pytest.approx(math.sqrt(max(variance, 0)), abs=1e-9)


# ---- the pole at σ = 1


@given(st.floats(0.05, 1.4), st.integers(1, 300), st.floats(0.5, 8))
@settings(deadline=None)
def test_first_std_is_the_noise_level_on_any_grid_from_one(level: float, steps: int, shift: float) -> None:
    schedule = linear(steps, shift).double()
    a, b, s = FlowSDE(level).coefficients(schedule, torch.tensor([0]))
    delta = float(schedule.delta(torch.tensor([0])))
    assert float(s) == pytest.approx(level, rel=1e-9)
    assert float(b) == -delta
    assert float(a) == pytest.approx(1 - level**2 / 2, rel=1e-9)


@pytest.mark.parametrize(("level", "printed"), [(0.7, 1.001), (0.9, 1.118), (1.2, 1.498)])
def test_first_marginal_variance_is_inflated(level: float, printed: float) -> None:
    _, below, a, b, s = numbers(FlowSDE(level), shifted(10))[0]
    variance = (a + b) ** 2 + s**2  # data at 0, so v = x at σ = 1
    d = 1 - below
    assert variance == pytest.approx((1 - d) ** 2 + level**2 * d + level**4 / 4, rel=1e-9)
    assert variance == pytest.approx(printed, abs=6e-4)
    assert below**2 == pytest.approx(0.922, abs=6e-4)


def unipc(steps: int, shift: float) -> Schedule:
    """The grid of Wan's UniPC sampler: from .9997, not from 1."""
    u = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)
    return Schedule(shift * u / (1 + (shift - 1) * u))


def test_a_grid_that_starts_a_hair_below_one_is_taken_to_start_at_one() -> None:
    schedule = unipc(20, 3.0)
    sigma, second = schedule.sigmas[0], schedule.sigmas[1]
    assert float((sigma / (1 - sigma)).sqrt()) > 50
    rate = FlowSDE(0.7).rate(schedule, torch.arange(20))
    torch.testing.assert_close(rate[0], 0.7 * (sigma / (1 - second)).sqrt())
    assert float(rate[0]) < 5.4


def test_later_steps_of_a_fine_grid_keep_their_own_rate() -> None:
    schedule = linear(1000, 3.0).double()
    assert float(schedule.sigmas[2]) > 0.999
    sigma = schedule.at(torch.arange(1, 1000))
    rate = FlowSDE(0.7).rate(schedule, torch.arange(1000))
    torch.testing.assert_close(rate[1:], 0.7 * (sigma / (1 - sigma)).sqrt())
    assert float(rate[0]) == pytest.approx(0.7 / math.sqrt(1 - float(schedule.sigmas[1])))


# ---- sizes of gradients and of weights


def test_gradient_scale_of_sd35() -> None:
    schedule, steps = shifted(10).double(), torch.arange(9)
    c = gradient_scale(FlowSDE(0.7), schedule, steps)
    want = [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487]
    assert [round(value, 3) for value in c.tolist()] == want
    sigma, delta, a = schedule.at(steps), schedule.delta(steps), 0.7
    closed = (1 + a**2 / 2) / a * (delta * (1 - sigma) / sigma).sqrt()
    torch.testing.assert_close(c[1:], closed[1:])


@pytest.mark.parametrize("dynamics", SDES, ids=str)
def test_gradient_scale_from_the_rate(dynamics) -> None:
    schedule, steps = shifted(10).double(), torch.arange(10)
    s, sigma, delta = dynamics.rate(schedule, steps), schedule.at(steps), schedule.delta(steps)
    want = delta.sqrt() / s + s * delta.sqrt() * (1 - sigma) / (2 * sigma)
    torch.testing.assert_close(gradient_scale(dynamics, schedule, steps), want)
    torch.testing.assert_close(dynamics.coefficients(schedule, steps)[2], s * delta.sqrt())


@pytest.mark.parametrize("dynamics", NOISY, ids=str)
def test_score_of_the_velocity_is_proportional_to_gradient_scale(dynamics: Dynamics) -> None:
    schedule, steps, n = shifted(10).double(), torch.arange(9), 20000
    x, z = draw(0, 9, n).double(), draw(1, 9, n).double()
    v = draw(2, 9, n).double().requires_grad_()
    law = dynamics.transition(x, v, schedule, steps)
    (law.log_prob(law.sample(z).detach()).sum() * n).backward()
    c = gradient_scale(dynamics, schedule, steps)
    _, b, s = dynamics.coefficients(schedule, steps)
    torch.testing.assert_close(v.grad, (b / s)[:, None] * z)
    torch.testing.assert_close(v.grad.abs().mean(1), c * math.sqrt(2 / math.pi), rtol=0.02, atol=0)


def qwen_image() -> Schedule:
    """Qwen-Image at 512² (1024 tokens), T = 10, from diffusers with that model's scheduler settings."""
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    theirs.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=0.5 + 0.4 * (1024 - 256) / (8192 - 256))
    return Schedule(theirs.sigmas)


@pytest.mark.parametrize(
    ("make", "level", "printed"),
    [(lambda: shifted(10), 0.7, 2.252), (lambda: token_shifted(10, 4096), 0.9, 1.726), (qwen_image, 1.2, 1.533)],
    ids=["sd35", "flux", "qwen"],
)
def test_tempflows_reciprocal_mean_stds(make, level: float, printed: float) -> None:
    _, _, s = FlowSDE(level).coefficients(make(), torch.arange(9))
    assert float(1 / s.mean()) == pytest.approx(printed, abs=5e-4)


def test_tempflows_weights_of_sd35() -> None:
    _, _, s = FlowSDE(0.7).coefficients(shifted(10), torch.arange(9))
    want = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    np.testing.assert_allclose((s / s.mean()).numpy(), want, atol=6e-4)


def test_flashs_table_of_weights() -> None:
    schedule = unipc(20, 3.0)
    assert (1000 * schedule.sigmas[:10]).int().tolist() == [999, 982, 963, 944, 922, 899, 874, 847, 817, 785]
    want = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    np.testing.assert_allclose(1 / gradient_scale(LinearSDE(), schedule, torch.arange(10)).numpy(), want, atol=6e-5)


# ---- laws of whole trajectories


def final_variance(dynamics: Dynamics, schedule: Schedule) -> float:
    """Variance at σ = 0 for data N(0, 1/4) and its exact velocity E[ε − x0 | x], which is linear in x."""
    variance = 1.0
    for sigma, _, a, b, s in numbers(dynamics, schedule):
        slope = (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2)
        variance = (a + b * slope) ** 2 * variance + s**2
    return variance


@pytest.mark.parametrize(
    ("dynamics", "printed"),
    [
        (ODE(), (0.129, 0.196, 0.236, 0.250)),
        (FlowSDE(0.7), (0.176, 0.218, 0.242, 0.249)),
        (FlowSDE(1.2), (0.230, 0.234, 0.246, 0.248)),
        (DanceSDE(0.3), (0.141, 0.203, 0.238, 0.248)),
        (CPS(0.8), (0.094, 0.126, 0.150, 0.160)),
    ],
    ids=str,
)
def test_marginals_on_sd3_grids(dynamics: Dynamics, printed: tuple[float, ...]) -> None:
    got = [final_variance(dynamics, shifted(steps)) for steps in (10, 25, 100, 1000)]
    np.testing.assert_allclose(got, printed, atol=2e-3)  # the printed ones were sampled


def test_sdes_converge_to_the_data_and_cps_does_not() -> None:
    for dynamics in (ODE(), *SDES, DDIM(1.0)):
        errors = [abs(final_variance(dynamics, linear(steps, 3.0)) - 0.25) for steps in (50, 500, 5000)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-3
    assert abs(final_variance(CPS(0.8), linear(5000, 3.0)) - 0.25) > 0.08


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), LinearSDE(), CPS(0.8), DDIM(1.0)], ids=str)
def test_sampled_trajectories_have_the_propagated_variance(dynamics: Dynamics) -> None:
    schedule, n = shifted(10), 40000
    x = draw(0, 1, n)
    for i in range(10):
        sigma = float(schedule.sigmas[i])
        v = (sigma - (1 - sigma) / 4) / ((1 - sigma) ** 2 / 4 + sigma**2) * x
        x = dynamics.transition(x, v, schedule, torch.tensor([i])).sample(draw(i + 1, 1, n))
    assert float(x.var()) == pytest.approx(final_variance(dynamics, schedule), rel=4 * math.sqrt(2 / n))


def point_mass_ratios(dynamics: Dynamics, schedule: Schedule) -> list[float]:
    """Variance of x_i over σ_i² at each σ > 0, for data at one point (v = (x − x0)/σ)."""
    variance, ratios = 1.0, []
    for sigma, below, a, b, s in numbers(dynamics, schedule):
        variance = (a + b / sigma) ** 2 * variance + s**2
        ratios.append(variance / below**2 if below else variance)
    return ratios


@pytest.mark.parametrize("dynamics", [ODE(), CPS(0.8), CPS(0.3), DDIM(1.0)], ids=str)
def test_coefficient_preserving_kinds_are_exact_on_a_point(dynamics: Dynamics) -> None:
    *ratios, last = point_mass_ratios(dynamics, shifted(10))
    np.testing.assert_allclose(ratios, 1.0, rtol=1e-9)
    assert last == pytest.approx(0, abs=1e-12)


def test_sde_kinds_are_not() -> None:
    ratios = point_mass_ratios(FlowSDE(0.7), shifted(10))[:8]
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (1.09, 1.64)
    assert point_mass_ratios(DanceSDE(0.3), shifted(10))[-1] == pytest.approx(0.65, abs=5e-3)


@given(grids(), st.sampled_from(SDES), st.floats(-3, 3))
@settings(deadline=None)
def test_stability_law(schedule: Schedule, dynamics: Dynamics, x0: float) -> None:
    """A deviation from the exact path of a point is multiplied by σ'/σ − S²/(2σ²)."""
    for sigma, below, a, b, s in numbers(dynamics, schedule):
        on_path = (1 - sigma) * x0 + sigma * 0.3
        means = [a * x + b * (x - x0) / sigma for x in (on_path, on_path + 1.0)]
        want = below / sigma - s**2 / (2 * sigma**2)
        assert means[1] - means[0] == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_gain_of_the_last_step() -> None:
    def gain(dynamics: Dynamics, schedule: Schedule) -> float:
        sigma, _, a, b, _ = numbers(dynamics, schedule)[-1]
        return a + b / sigma

    assert gain(FlowSDE(0.7), linear(16, 3.0)) == pytest.approx(-0.245 / (1 - 1 / 6), rel=1e-6)
    assert gain(FlowSDE(0.7), shifted(10)) == pytest.approx(-0.245, rel=0.01)  # −a²/2 as σ → 0
    assert gain(DanceSDE(0.3), shifted(10)) == pytest.approx(-5, abs=0.06)
    assert gain(DanceSDE(0.3), linear(16, 3.0)) == pytest.approx(-0.27, abs=1e-6)


# ---- transitions


@pytest.mark.parametrize("dynamics", NOISY, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4, 5), ()])
def test_rows_of_a_batch_take_their_own_steps(dynamics: Dynamics, shape: tuple[int, ...]) -> None:
    x, v = draw(0, 4, *shape), draw(1, 4, *shape)
    schedule, steps, scale = shifted(10), torch.tensor([8, 0, 3, 3]), torch.tensor([1.0, 0.5, 0.25, 1.0])
    law = dynamics.transition(x, v, schedule, steps, scale)
    assert law.mean.shape == x.shape
    assert law.std.shape == (4,)
    assert law.stochastic is True
    for row in range(4):
        alone = dynamics.transition(
            x[row : row + 1], v[row : row + 1], schedule, steps[row : row + 1], scale[row].item()
        )
        assert torch.equal(law.mean[row], alone.mean[0])
        assert torch.equal(law.std[row], alone.std[0])


@pytest.mark.parametrize("dynamics", NOISY, ids=str)
def test_entropy_does_not_depend_on_the_velocity(dynamics: Dynamics) -> None:
    x, z, steps = draw(0, 3, 50).double(), draw(1, 3, 50).double(), torch.tensor([0, 4, 8])
    laws = [dynamics.transition(x, draw(seed, 3, 50).double(), shifted(10), steps) for seed in (2, 3)]
    assert not torch.allclose(laws[0].mean, laws[1].mean)
    torch.testing.assert_close(laws[0].log_prob(laws[0].sample(z)), laws[1].log_prob(laws[1].sample(z)))


def test_maths_is_in_float32_at_least() -> None:
    x, v, step = draw(0, 2, 3), draw(1, 2, 3), torch.tensor([1, 2])
    half = FlowSDE().transition(x.bfloat16(), v.bfloat16(), shifted(10), step)
    full = FlowSDE().transition(x.bfloat16().float(), v.bfloat16().float(), shifted(10), step)
    assert half.mean.dtype == torch.float32
    assert torch.equal(half.mean, full.mean)
    assert FlowSDE().transition(x.bfloat16(), v.double(), shifted(10), step).mean.dtype == torch.float64
    assert FlowSDE().transition(x.double(), v.half(), shifted(10), step).mean.dtype == torch.float64
    assert FlowSDE().transition(x, v, shifted(10).double(), step).mean.dtype == torch.float32


def test_nothing_waits_for_the_device_of_the_latents() -> None:
    """A meta tensor raises when its values are looked at, as a GPU would have to wait."""
    x, step = torch.empty(2, 3, device="meta"), torch.tensor([0, 4])
    for dynamics in (ODE(), *NOISY):
        law = dynamics.transition(x, x, shifted(10), step, torch.tensor([1.0, 0.5]))
        assert (law.mean.device.type, law.std.device.type) == ("meta", "meta")
        assert law.sample(x).shape == (2, 3)
        if law.stochastic:
            assert law.log_prob(x).shape == law.kl(law).shape == (2,)


def test_gradient_reaches_the_velocity() -> None:
    v = draw(1, 1, 3).requires_grad_()
    law = FlowSDE().transition(draw(0, 1, 3), v, shifted(10), torch.tensor([4]))
    law.mean.sum().backward()
    _, b, _ = FlowSDE().coefficients(shifted(10), torch.tensor([4]))
    torch.testing.assert_close(v.grad, b.expand(1, 3))


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_scale_multiplies_the_noise_level(level: float, scale: float) -> None:
    schedule, steps = shifted(10).double(), torch.arange(10)
    for kind in (FlowSDE, DanceSDE, CPS, DDIM):
        scaled = torch.stack(kind(level).coefficients(schedule, steps, scale))
        torch.testing.assert_close(scaled, torch.stack(kind(level * scale).coefficients(schedule, steps)))
        rows = kind(level).coefficients(schedule, steps, torch.full((10,), scale, dtype=torch.float64))
        assert torch.equal(scaled, torch.stack(rows))


def test_rates() -> None:
    schedule, steps = shifted(10).double(), torch.arange(10)
    assert DanceSDE(0.3).rate(schedule, steps, 0.5).tolist() == [0.15] * 10
    torch.testing.assert_close(LinearSDE().rate(schedule, steps), schedule.sigmas[1] * schedule.sigmas[:-1])
    torch.testing.assert_close(
        FlowSDE(0.7).rate(schedule, steps, 2.0), 2 * FlowSDE(0.7).rate(schedule, steps), rtol=1e-15, atol=0
    )


# ---- bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowSDE(-0.1), "noise_level: -0.1"),
        (lambda: FlowSDE(float("inf")), "noise_level: inf"),
        (lambda: DanceSDE(float("nan")), "eta: nan"),
        (lambda: CPS(1.1), "noise_level: 1.1 must be at most 1.0"),
        (lambda: DDIM(-1), "eta: -1"),
        (lambda: DDIM(2.0), "nearest valid value is 1.0"),
    ],
)
def test_bad_hyper_parameters(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("dynamics", [ODE(), *NOISY], ids=str)
def test_bad_calls(dynamics: Dynamics) -> None:
    schedule, step = shifted(10), torch.tensor([0, 1])
    for scale in (-0.5, float("nan"), torch.tensor([1.0, float("inf")])):
        with pytest.raises(ValueError, match="scale"):
            dynamics.coefficients(schedule, step, scale)
    with pytest.raises(ValueError, match="shape"):
        dynamics.coefficients(schedule, step, torch.ones(3))
    with pytest.raises(ValueError, match="step: 10"):
        dynamics.coefficients(schedule, torch.tensor([10]))
    with pytest.raises(ValueError, match="velocity"):
        dynamics.transition(draw(0, 2, 3), draw(0, 2, 1), schedule, step)
    with pytest.raises(ValueError, match="shape"):
        dynamics.transition(draw(0, 3, 3), draw(0, 3, 3), schedule, step)


def test_cps_and_ddim_refuse_more_noise_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"nearest valid value is 1\.25"):
        CPS(0.8).coefficients(shifted(10), torch.tensor([0]), 1.3)
    with pytest.raises(ValueError, match="exceeds 1"):
        DDIM(1.0).coefficients(shifted(10), torch.tensor([0]), torch.tensor([1.01]))
