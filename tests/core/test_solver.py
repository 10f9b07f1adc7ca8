"""Multistep steps: the textbook formula, diffusers' scheduler, Euler as a limit, order of convergence."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.dynamics import CPS, ODE, FlowSDE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear
from tempflow.core.solver import SOLVERS, DPMSolver2, OneStep, Solver, UniPC2, predict_clean

MEAN, SPREAD = 0.7, 0.4  # of the 1-D Gaussian data below


def textbook(x: float, v: float, before: float, sigma: float, below: float, previous: float) -> float:
    """DPM-Solver++(2M), midpoint, with α = 1 − σ: written with λ, h and r as in the paper."""

    def lam(s: float) -> float:
        return math.log(1 - s) - math.log(s)

    h, h_before = lam(below) - lam(sigma), lam(sigma) - lam(before)
    r = h_before / h
    clean = x - sigma * v
    mix = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * previous
    return below / sigma * x - (1 - below) * math.expm1(-h) * mix


def exact_velocity(x: Tensor, sigma: Tensor, rows: Tensor | None = None) -> Tensor:
    """E[ε − x0 | x_σ = x] for data N(MEAN, SPREAD²): the velocity of the exact probability-flow ODE."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    standard = (x - (1 - s) * MEAN) / ((1 - s).square() * SPREAD**2 + s.square())
    return s * standard - (MEAN + (1 - s) * SPREAD**2 * standard)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.8 * x - 0.3 * torch.sin(3 * x) + 0.5 * sigma


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 12), st.sampled_from([0.999999, 0.9999, 0.97, 0.6]))
def test_steps_are_the_textbook_ones(seed: int, steps: int, first: float) -> None:
    """Rows of different steps in one call, on an uneven grid that starts a little below 1."""
    g = torch.Generator().manual_seed(seed)
    inner = torch.rand(steps - 1, generator=g, dtype=torch.float64).sort(descending=True).values * (first - 0.02) + 0.01
    sigmas = torch.cat([torch.tensor([first]).double(), inner, torch.zeros(1).double()])
    if bool((sigmas.diff() > -1e-6).any()):
        return  # two entries fell together
    grid, step = Schedule(sigmas), torch.arange(1, steps - 1)
    x, v, previous = torch.randn(3, steps - 2, 2, generator=g, dtype=torch.float64)
    got = DPMSolver2().transition(x, v, grid, step, (previous,))
    assert got.mean.dtype == torch.float64 and not bool(got.std.any())
    for n, i in enumerate(step.tolist()):
        before, sigma, below = (float(s) for s in sigmas[i - 1 : i + 2])
        for d in range(2):
            want = textbook(float(x[n, d]), float(v[n, d]), before, sigma, below, float(previous[n, d]))
            assert float(got.mean[n, d]) == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
@pytest.mark.parametrize("start", ["own grid", "exactly 1"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with a new numpy
def test_steps_are_those_of_diffusers(steps: int, start: str, shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        flow_shift=shift,
    )
    scheduler.set_timesteps(steps)
    assert (float(scheduler.sigmas[0]) < 1) and len(scheduler.timesteps) == steps
    if start == "exactly 1":
        scheduler.sigmas[0] = 1.0  # then λ = −∞: an infinite h and r, which its formula survives
    grid = Schedule(scheduler.sigmas.clone())
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(steps))
    previous, corrected = (), list[bool]()
    for i, t in enumerate(scheduler.timesteps):
        v, step = curved(x, grid.sigmas[i]), torch.full((4,), i)
        want = scheduler.step(v, t, x, return_dict=False)[0]
        got = DPMSolver2().transition(x, v, grid, step, previous).mean
        torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)
        corrected.append(not torch.equal(got, ODE().transition(x, v, grid, step).mean))
        previous, x = (predict_clean(x, v, grid, step),), want
    first = 1 if start == "own grid" else 2
    assert corrected == [first <= i < steps - 1 for i in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("start", ["own grid", "exactly 1"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with a new numpy
def test_corrected_steps_are_those_of_diffusers(steps: int, start: str, shift: float) -> None:
    """The velocity is asked at the predicted state; diffusers is given the state that it last returned, too."""
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        solver_order=2,
        solver_type="bh2",
        final_sigmas_type="zero",
        flow_shift=shift,
    )
    scheduler.set_timesteps(steps)
    if start == "exactly 1":
        scheduler.sigmas[0] = 1 - 1e-7  # its linear systems have no answer at 1 itself
    grid = Schedule(scheduler.sigmas.double())
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    previous, moved = (), list[bool]()
    for i, t in enumerate(scheduler.timesteps):
        v, step = curved(x, grid.sigmas[i]), torch.full((4,), i)
        want = scheduler.step(v, t, x, return_dict=False)[0]
        got = UniPC2().transition(x, v, grid, step, previous).mean
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)  # its coefficients are float32
        moved.append(not torch.allclose(got, DPMSolver2().transition(x, v, grid, step, previous[:1]).mean, atol=1e-4))
        previous, x = (predict_clean(x, v, grid, step), *previous)[:2], got
    assert moved == [i > 0 and grid.sigmas[i + 1] > 0 for i in range(steps)]


def test_where_there_is_no_second_order_the_step_is_eulers_bit_for_bit() -> None:
    grid = linear(5, 3.0)
    x, v, previous = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    step = torch.arange(5)
    euler = ODE().transition(x, v, grid, step).mean
    assert torch.equal(DPMSolver2().transition(x, v, grid, step, ()).mean, euler)
    got = DPMSolver2().transition(x, v, grid, step, (previous,)).mean
    same = (got == euler).all(dim=1)
    assert same.tolist() == [True, True, False, False, True]  # step 0, after σ = 1, …, into σ = 0
    constant = predict_clean(x, v, grid, step)
    assert torch.equal(DPMSolver2().transition(x, v, grid, step, (constant,)).mean, euler)


def test_ddim_without_noise_is_the_euler_step() -> None:
    """x' = (1−σ')·x̂0 + σ'·ε̂ is x − Δ·v, so the first-order DPM-Solver++ is ODE()."""
    grid = linear(6, 3.0).double()
    x, v = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = torch.arange(6)
    sigma, below = grid.at(step)[:, None], grid.after(step)[:, None]
    clean = predict_clean(x, v, grid, step)
    torch.testing.assert_close(clean, x - sigma * v, rtol=0, atol=0)
    noise = (x - (1 - sigma) * clean) / sigma
    got = DPMSolver2().transition(x, v, grid, step, ()).mean
    torch.testing.assert_close(got, (1 - below) * clean + below * noise, rtol=1e-12, atol=1e-12)


def error(solver: Solver, sigmas: Tensor) -> float:
    """Largest distance from the exact ODE map, which keeps a sample's standard score."""
    steps, first = len(sigmas) - 1, float(sigmas[0])
    forest = rollout(
        [P.ode(steps, 16)],
        ODE(),
        Schedule(sigmas),
        exact_velocity,
        Noise(4),
        shape=(1,),
        solver=solver,
        store_dtype=torch.float64,
    )
    x = Noise(4).initial([(0, s) for s in range(16)], (1,)).double()
    score = (x - (1 - first) * MEAN) / math.sqrt((1 - first) ** 2 * SPREAD**2 + first**2)
    return float((forest.nodes[forest.leaves.node] - (MEAN + SPREAD * score)).abs().max())


def fine_at_both_ends(steps: int) -> Tensor:
    """sin²: steps shrink towards σ = 1 and 0 as λ's slope grows there."""
    sigmas = (torch.linspace(1, 0, steps + 1, dtype=torch.float64) * math.pi / 2).sin().square()
    return sigmas / sigmas[0]


@pytest.mark.parametrize("first", [1.0, 0.999])
def test_order_of_convergence(first: float) -> None:
    for solver, order in ((OneStep(ODE()), 1), (DPMSolver2(), 2), (UniPC2(), 3)):
        errors = [error(solver, first * fine_at_both_ends(steps)) for steps in (80, 160, 320)]
        slopes = [math.log2(a / b) for a, b in pairwise(errors)]
        assert order - 0.1 < slopes[-1] < order + 0.1, (errors, slopes)


def test_order_on_an_even_grid() -> None:
    """Near σ = 0 steps even in σ do not shrink in λ: there the error is Δ²·log(1/Δ), still far below Euler's Δ."""

    def even(steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    errors = [error(DPMSolver2(), even(steps)) for steps in (160, 320, 640)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert 1.7 < slopes[0] < slopes[1] < 2, slopes
    assert error(DPMSolver2(), even(20)) < error(OneStep(ODE()), even(40))


def test_history_passes_through_stochastic_steps() -> None:
    """MixGRPO-Flash: ODE steps 0-1 and 4-5 around two SDE steps; step 4's history is x̂0 at the SDE step 3."""
    T, sde, noise = 6, FlowSDE(0.7), Noise(9)
    grid = Schedule(torch.linspace(0.98, 0, T + 1, dtype=torch.float64))
    forest = rollout(
        [P.window(T, 3, 2, 2)],
        sde,
        grid,
        exact_velocity,
        noise,
        shape=(1,),
        solver=DPMSolver2(),
        store_dtype=torch.float64,
    )
    for root in range(3):
        x, clean = noise.initial([(0, root)], (1,)).double(), math.nan
        for i in range(T):
            sigma, below = float(grid.sigmas[i]), float(grid.sigmas[i + 1])
            v = exact_velocity(x, grid.sigmas[i : i + 1])
            if i in (2, 3):
                law = sde.transition(x, v, grid, torch.tensor([i]))
                after = law.sample(noise.edge([(0, root, *[0] * (i + 1), i)], (1,)))
            elif i in (0, T - 1):
                after = x + (below - sigma) * v
            else:
                before = float(grid.sigmas[i - 1])
                after = torch.tensor([[textbook(float(x), float(v), before, sigma, below, clean)]], dtype=torch.float64)
            x, clean = after, float(x - sigma * v)
        torch.testing.assert_close(forest.nodes[forest.leaves.node[root]], x[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    grid = linear(5, 3.0)
    x, v, previous = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = DPMSolver2().transition(x, v, grid, torch.tensor([2, 3]), (previous,))
    wide = torch.promote_types(dtype, torch.float32)
    assert got.mean.dtype == wide and predict_clean(x, v, grid, torch.tensor([2, 3])).dtype == wide
    want = DPMSolver2().transition(x.double(), v.double(), grid, torch.tensor([2, 3]), (previous.double(),))
    torch.testing.assert_close(got.mean.double(), want.mean, rtol=1e-6, atol=1e-6)


def test_a_predictor_that_was_right_moves_nothing() -> None:
    grid, step = linear(5, 3.0).double(), torch.arange(1, 5)
    x, v = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    same = predict_clean(x, v, grid, step)
    got = UniPC2().transition(x, v, grid, step, (same, same)).mean
    torch.testing.assert_close(got, ODE().transition(x, v, grid, step).mean, rtol=0, atol=1e-12)


def test_a_starting_sigma_of_one_is_the_limit_of_those_below() -> None:
    """λ = −∞ there: the corrector's coefficients have a limit, which is taken and not divided by."""
    x, v, one, two = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step, rest = torch.tensor([1, 2, 3]), [0.8, 0.5, 0.2, 0.0]
    at, near = (
        UniPC2().transition(x, v, Schedule(torch.tensor([first, *rest]).double()), step, (one, two)).mean
        for first in (1.0, 1 - 1e-12)
    )
    assert bool(at.isfinite().all())
    torch.testing.assert_close(at[[0, 2]], near[[0, 2]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at[1], near[1], rtol=0.05, atol=0.2)  # 1/h_0 vanishes only as 1/log


def test_one_step_is_the_dynamics() -> None:
    grid, step = linear(4, 3.0), torch.tensor([1, 2])
    x, v, previous = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(3))
    got = OneStep(ODE()).transition(x, v, grid, step, (previous,))
    assert torch.equal(got.mean, ODE().transition(x, v, grid, step).mean)
    assert all(isinstance(s, Solver) for s in (OneStep(ODE()), DPMSolver2(), UniPC2()))
    assert [0 if s is None else s.memory for s in SOLVERS.values()] == [0, 1, 2]
    assert not isinstance(ODE(), Solver)  # so that `rollout` can tell them apart


def test_bad_arguments() -> None:
    grid = linear(4, 3.0)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"solver = CPS.*nearest valid: ODE\(\)"):
        OneStep(CPS(0.8))
    with pytest.raises(ValueError, match=r"previous\[0\]: shape \(1, 3\) must be that of x, \(2, 3\)"):
        DPMSolver2().transition(x, x, grid, torch.tensor([1, 2]), (x[:1],))
    with pytest.raises(ValueError, match="velocity: shape"):
        DPMSolver2().transition(x, x[:, :2], grid, torch.tensor([1, 2]), (x,))
    with pytest.raises(ValueError, match="step: 4 is outside"):
        DPMSolver2().transition(x, x, grid, torch.tensor([1, 4]), (x,))
