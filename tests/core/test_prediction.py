"""Predictions as velocities: closed forms, and diffusers' DDIM chains walked as ODE rollouts in flow coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from tempflow.core import plan
from tempflow.core.distribution import Gaussian
from tempflow.core.dynamics import DDIM, ODE, FlowSDE
from tempflow.core.prediction import Kind, VariancePreserving, predictor, scale, velocity_of
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule

SHAPE = (4, 6, 6)
FAMILY = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""The table of Stable Diffusion 1.5 and XL."""


def scheduler(kind: str, to_one: bool) -> Any:
    return DDIMScheduler(
        **FAMILY, prediction_type=kind, set_alpha_to_one=to_one, timestep_spacing="leading", clip_sample=False
    )


def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """Something that depends on all of what it is told, and not linearly."""
    s, c = (v.to(x).view(-1, 1, 1, 1) for v in (t / 1000, rows))
    return torch.tanh(0.8 * x.roll(1, -1) - 0.3 * x + s + 0.2 * c) + 0.5 * torch.sin(3 * s)


def ddim_chain(ddim: Any, x: Tensor, steps: int, eta: float = 0.0) -> Tensor:
    ddim.set_timesteps(steps)
    for t in ddim.timesteps:
        said = network(x, t.expand(len(x)), torch.zeros(len(x)))
        x = ddim.step(said, t, x, eta=eta).prev_sample
    return x


def grid_of(ddim: Any, steps: int, to_one: bool) -> tuple[VariancePreserving, Schedule]:
    path = VariancePreserving(ddim.alphas_cumprod)
    ddim.set_timesteps(steps)
    return path, path.schedule(ddim.timesteps.tolist(), 0.0 if to_one else None)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize(("name", "kind"), [("epsilon", "epsilon"), ("v_prediction", "v")])
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_an_ode_rollout_is_diffusers_ddim(name: str, kind: Kind, steps: int, to_one: bool) -> None:
    ddim = scheduler(name, to_one)
    path, grid = grid_of(ddim, steps, to_one)
    forest = rollout(
        [plan.ode(steps, 3)], ODE(), grid, predictor(network, path, kind), Noise(5), shape=SHAPE, keep="all"
    )
    start = forest.nodes[forest.edges.parent[forest.edges.step == 0]]
    z = forest.nodes[forest.leaves.node]
    x = ddim_chain(ddim, start * scale(grid.sigmas[:1]), steps)
    ours = grid.samples(z)
    size = max(1.0, float(x.abs().max()))
    assert float((ours - x).abs().max()) <= 1e-5 * size
    assert float((z - x).abs().max()) > 1e-3 or to_one  # the last state is not x itself, unless it is clean
    # x starts at the noise itself, so states start at it over a + b
    drawn = Noise(5).initial([(0, root) for root in range(3)], SHAPE)
    torch.testing.assert_close(start * scale(grid.sigmas[:1]), drawn, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_ddim_in_its_own_coordinates_in_float64(kind: Kind) -> None:
    """The chain of the DDIM paper written out in a and b, in float64, equals the Euler steps to rounding."""
    ddim = scheduler("epsilon", False)
    alphas = ddim.alphas_cumprod.double()
    path = VariancePreserving(alphas)
    times = [901 - 100 * i for i in range(10)]
    levels = torch.cat([alphas[times], alphas[:1]])
    a, b = levels.sqrt(), (1 - levels).sqrt()
    sigmas = torch.cat([path.sigma(torch.tensor(times)), path.sigma(torch.zeros(1))])
    torch.testing.assert_close(sigmas, b / (a + b), rtol=1e-13, atol=0)
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, grid, rows = x / (a + b)[0], Schedule(sigmas), torch.zeros(2)
    predict = predictor(network, path, kind)
    for i, t in enumerate(times):
        said = network(x, torch.full((2,), float(t), dtype=torch.float64), rows)
        noise = said if kind == "epsilon" else a[i] * said + b[i] * x
        clean = (x - b[i] * noise) / a[i]
        x = a[i + 1] * clean + b[i + 1] * noise
        step = torch.full((2,), i)
        z = ODE().transition(z, predict(z, grid.at(step), rows), grid, step).mean
    torch.testing.assert_close(z * (a + b)[-1], x, rtol=1e-12, atol=1e-12 * float(x.abs().max()))


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("step", [0, 4, 8])
def test_ddim_with_noise_is_diffusers_own_step(step: int, to_one: bool) -> None:
    """DDPO's step: mean, std and log-prob of eta = 1 in flow coordinates are those of diffusers' step times a + b."""
    ddim = scheduler("epsilon", to_one)
    path, grid = grid_of(ddim, 10, to_one)
    z = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    fresh = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    at, s = torch.full((2,), step), scale(grid.sigmas)
    predict = predictor(network, path, "epsilon")
    law = DDIM(1.0).transition(z, predict(z, grid.at(at), torch.zeros(2)), grid, at)
    t, x = ddim.timesteps[step], z * s[step]
    theirs = ddim.step(network(x, t.expand(2), torch.zeros(2)), t, x, eta=1.0, variance_noise=fresh).prev_sample
    size = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(law.sample(fresh) * s[step + 1], theirs, rtol=1e-5, atol=1e-5 * size)
    std = ddim._get_variance(int(t), int(t) - 100).sqrt()
    normal = torch.distributions.Normal(theirs - std * fresh, std)
    expected = normal.log_prob(theirs).flatten(1).mean(1) + s[step + 1].log()  # of z, a smaller state
    torch.testing.assert_close(law.log_prob(theirs / s[step + 1]), expected, rtol=1e-4, atol=1e-4)


def test_the_last_step_is_a_noisy_one_where_it_does_not_reach_data() -> None:
    ddim = scheduler("epsilon", False)
    path, grid = grid_of(ddim, 6, False)
    for dynamics in (DDIM(1.0), FlowSDE(0.7)):
        forest = rollout([plan.chain(6, 2)], dynamics, grid, predictor(network, path, "epsilon"), Noise(0), shape=SHAPE)
        last = forest.edges.step == 5
        assert bool(forest.edges.log_prob[last].isfinite().all()) and int(last.sum()) == 2
        x, y = (forest.nodes[i[last]] for i in (forest.edges.parent, forest.edges.child))
        at = torch.full((2,), 5)
        law = dynamics.transition(x, predictor(network, path, "epsilon")(x, grid.at(at), torch.zeros(2)), grid, at)
        assert isinstance(law, Gaussian)
        torch.testing.assert_close(forest.edges.log_prob[last], law.log_prob(y))


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v", "x0"])
def test_every_kind_says_the_same_velocity(kind: Kind) -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 3, 2, dtype=torch.float64, generator=g) for _ in range(2))
    sigma = torch.tensor([0.03, 0.2, 0.5, 0.8, 0.93], dtype=torch.float64)
    s = sigma.view(-1, 1, 1)
    z = (1 - s) * x0 + s * noise
    a, b = (1 - s) * scale(s), s * scale(s)
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))
    said = {"velocity": noise - x0, "epsilon": noise, "v": a * noise - b * x0, "x0": x0}[kind]
    torch.testing.assert_close(velocity_of(said, z, sigma, kind), noise - x0, rtol=1e-12, atol=1e-12)
    half = velocity_of(said.half(), z.half(), sigma, kind)
    assert half.dtype == torch.float32


def test_times_are_whole_on_the_table_and_linear_in_log_snr_between() -> None:
    path = VariancePreserving(scheduler("epsilon", False).alphas_cumprod)
    whole = torch.arange(1000)
    assert torch.equal(path.time(path.sigma(whole).float()), whole.double())
    t = torch.linspace(3.3, 990.7, 57, dtype=torch.float64)
    torch.testing.assert_close(path.time(path.sigma(t)), t, rtol=0, atol=2.1e-3)

    def logit(t: float) -> Tensor:
        s = path.sigma(torch.tensor([t]))
        return ((1 - s) / s).log()

    torch.testing.assert_close(logit(40.25), 0.75 * logit(40.0) + 0.25 * logit(41.0), rtol=1e-12, atol=0)
    # beyond the ends there is no other time to ask at
    assert path.time(torch.tensor([1.0, 0.99, 0.001, 0.0])).tolist() == [999.0, 999.0, 0.0, 0.0]


def test_the_network_sees_vp_states_and_whole_times() -> None:
    ddim = scheduler("epsilon", False)
    path, grid = grid_of(ddim, 10, False)
    seen: list[tuple[Tensor, Tensor]] = []

    def listens(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    z = torch.ones(2, *SHAPE)
    predictor(listens, path, "epsilon")(z, grid.at(torch.tensor([0, 9])), torch.zeros(2))
    x, t = seen[0]
    assert t.tolist() == [901.0, 1.0] and t.dtype == torch.float32
    s = grid.sigmas[[0, 9]].view(-1, 1, 1, 1)
    torch.testing.assert_close(x, z / ((1 - s) ** 2 + s**2).sqrt())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.tensor([0.9]), "N ≥ 2"),
        (torch.tensor([1.0, 0.5]), "1.0 must be above 0 and below 1"),
        (torch.tensor([0.9, 0.5, 0.5]), r"alphas_cumprod\[2\]"),
        (torch.tensor([0.9, float("nan")]), "must be above 0"),
    ],
)
def test_bad_tables(table: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VariancePreserving(table)


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (5000.0, r"5000 is outside \[0, 999\]; nearest valid: 999"),
        (-1.0, r"-1 is outside \[0, 999\]; nearest valid: 0"),
        (float("nan"), r"nan is outside \[0, 999\]; nearest valid: 0"),
        (float("inf"), r"inf is outside \[0, 999\]; nearest valid: 999"),
    ],
)
def test_times_that_the_table_has_not(time: float, words: str) -> None:
    path = VariancePreserving(scheduler("epsilon", False).alphas_cumprod)
    with pytest.raises(ValueError, match=f"times: {words}"):
        path.schedule([time, 500.0])
    with pytest.raises(ValueError, match=f"t: {words}"):
        path.sigma(torch.tensor([3.0, time]))
    assert path.schedule([999, 0.5, 0], 0.0).steps == 3


def test_where_a_kind_fixes_no_velocity() -> None:
    z, said = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])
    zero, one = torch.zeros(1), torch.ones(1)
    with pytest.raises(ValueError, match="sigma: 1 gives 'epsilon' no velocity; nearest valid: below 1"):
        velocity_of(z, z, one, "epsilon")
    with pytest.raises(ValueError, match="sigma: 0 gives 'x0' no velocity; nearest valid: above 0"):
        velocity_of(z, z, zero, "x0")
    for kind in ("epsilon", "x0", "v"):
        for bad in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=f"sigma: {bad:g} gives '{kind}' no velocity"):
                velocity_of(z, z, torch.tensor([bad]), kind)
    # at the other ends z is x0, or ε; v is ε there, or -x0
    assert torch.equal(velocity_of(said, z, zero, "epsilon"), said - z)
    assert torch.equal(velocity_of(said, z, one, "x0"), z - said)
    assert torch.equal(velocity_of(said, z, zero, "v"), said - z)
    assert torch.equal(velocity_of(said, z, one, "v"), said + z)


def test_bad_kinds_and_shapes() -> None:
    path = VariancePreserving(torch.tensor([0.9, 0.5]))
    with pytest.raises(ValueError, match="kind: 'score' is not one of velocity"):
        predictor(network, path, "score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: 'score'"):
        velocity_of(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1) / 2, "score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prediction: shape \[1, 3\] must be \[1, 2\]"):
        velocity_of(torch.zeros(1, 3), torch.zeros(1, 2), torch.ones(1) / 2, "epsilon")
