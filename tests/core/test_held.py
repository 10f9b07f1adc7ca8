"""Rollouts that hold elements, pack streams, start at another spread and end above 0; samples re-noised so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from tempflow.core import plan
from tempflow.core.distribution import Gaussian
from tempflow.core.dynamics import CPS, DDIM, ODE, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.forest import Forest
from tempflow.core.likelihood_proxy import Matching
from tempflow.core.objective.leaves import noised, renoise_leaves
from tempflow.core.objective.preference import Supervised
from tempflow.core.plan import Plan
from tempflow.core.renoise import Renoise
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.core.solver import DPMSolver2, Solver, UniPC2
from tempflow.core.state import WHOLE, StateLayout, streams_along
from tempflow.core.times import UniformTimes
from tempflow.latent_reward.score import guided_sample

SHAPE = (3, 2)
NOISE = Noise(seed=3)
KINDS: tuple[Dynamics, ...] = (FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0))
PLANS = (plan.chain(4, 3), plan.tree(4, roots=1, splits={0: 2, 2: 3}, train=range(3)), plan.branch_each_step(4, 2, 2))
ABOVE = Schedule(torch.tensor([0.93, 0.7, 0.4, 0.2, 0.03]), spread=0.9326)


def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    """Elementwise, so that free elements do not see the held ones."""
    s, c = sigma.view(-1, 1, 1).to(x), rows.view(-1, 1, 1).to(x)
    return (0.4 + 0.2 * s) * x + 0.05 * x * x - 0.1 * c


def broken(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    """The same, with what no network should say at the first row of a state."""
    v = velocity(x, sigma, rows)
    v[:, 0] = math.nan
    return v


def held(slots: int = 2) -> StateLayout:
    free = torch.ones(slots, *SHAPE, dtype=torch.bool)
    free[:, 0] = False
    return StateLayout(free, 10 + torch.arange(slots * 6).view(slots, *SHAPE).float())


def grow(
    plans: Sequence[Plan],
    dynamics: Dynamics,
    layout: StateLayout = WHOLE,
    schedule: Schedule | None = None,
    solver: Solver | None = None,
    max_rows: int | None = None,
    variants: int = 1,
) -> Forest:
    predict = velocity if layout.whole or layout.free is None else broken
    return rollout(
        plans, dynamics, schedule or linear(4, 3.0), predict, NOISE, shape=SHAPE, layout=layout, keep="all",
        solver=solver, max_rows=max_rows, variants=variants,
    )  # fmt: skip


@pytest.mark.parametrize("solver", [None, DPMSolver2(), UniPC2()])
@pytest.mark.parametrize("dynamics", KINDS)
@pytest.mark.parametrize("one", PLANS)
def test_held_elements_stay_clean_and_free_ones_as_they_are(
    one: Plan, dynamics: Dynamics, solver: Solver | None
) -> None:
    plain, forest = grow([one] * 2, dynamics, solver=solver), grow([one] * 2, dynamics, held(), solver=solver)
    assert torch.equal(forest.nodes[:, 1:], plain.nodes[:, 1:])
    for ends in (forest.edges.parent, forest.edges.child):
        clean = held().clean
        assert clean is not None and torch.equal(forest.nodes[ends][:, 0], clean[forest.edges.prompt][:, 0])
    noisy = forest.edges.stochastic & forest.edges.log_prob.isfinite()
    assert torch.equal(noisy, plain.edges.stochastic & plain.edges.log_prob.isfinite()) and bool(noisy.any())


def test_a_solver_that_moves_everything_moves_no_held_element() -> None:
    class Moves:
        memory = 0

        def transition(
            self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
        ) -> Gaussian:
            return Gaussian(x + 1, torch.zeros(len(x)))

    forest, clean = grow([plan.ode(4, 3)], ODE(), held(), solver=Moves()), held().clean
    ends = forest.nodes[forest.leaves.node]
    assert clean is not None and bool((ends[:, 0] == clean[0, 0]).all())
    start = forest.nodes[forest.edges.parent[forest.edges.step == 0]]
    torch.testing.assert_close(ends[:, 1:], start[:, 1:] + 4)


@pytest.mark.parametrize("dynamics", KINDS)
def test_log_probs_count_what_was_drawn(dynamics: Dynamics) -> None:
    forest = grow([plan.chain(4, 3)] * 2, dynamics, held())
    edges = forest.edges
    some = edges.log_prob.isfinite()
    x, y = forest.nodes[edges.parent[some]], forest.nodes[edges.child[some]]
    step = edges.step[some]
    grid = linear(4, 3.0)
    a, b, std = (c.view(-1, 1, 1) for c in dynamics.coefficients(grid, step))
    mean = a * x + b * velocity(x, grid.at(step), edges.prompt[some])
    expected = Normal(mean, std.expand_as(mean)).log_prob(y)[:, 1:].mean((1, 2))
    torch.testing.assert_close(edges.log_prob[some], expected, rtol=1e-4, atol=1e-5)


def test_chunks_and_slots_change_nothing() -> None:
    whole = grow([plan.chain(4, 3)] * 2, FlowSDE(0.7), held())
    parts = grow([plan.chain(4, 3)] * 2, FlowSDE(0.7), held(), max_rows=2)
    assert torch.equal(whole.nodes, parts.nodes) and torch.equal(whole.edges.log_prob, parts.edges.log_prob)
    layout = StateLayout(held().free, held().clean, first=7)
    far = rollout(
        [plan.chain(4, 3)], FlowSDE(0.7), linear(4), broken, NOISE, shape=SHAPE, slots=[8], layout=layout, keep="all"
    )
    clean = held().clean
    assert clean is not None and bool((far.nodes[:, 0] == clean[1, 0]).all())


def test_variants_of_a_condition_hold_the_same() -> None:
    several = plan.chain(4, 2)
    forest = grow([several, several], FlowSDE(0.7), held(), variants=2)
    clean = held().clean
    assert clean is not None
    assert torch.equal(forest.nodes[forest.edges.child][:, 0], clean[forest.edges.prompt][:, 0])


def test_streams_have_a_mean_each_in_a_rollouts_log_probs() -> None:
    streams = StateLayout(streams=streams_along(SHAPE, 0, {"video": 2, "sound": 1}, {"sound": 2.0}))
    plain, forest = grow([plan.chain(4, 3)], DanceSDE(0.3)), grow([plan.chain(4, 3)], DanceSDE(0.3), streams)
    assert torch.equal(forest.nodes, plain.nodes)
    e = forest.edges
    grid = linear(4, 3.0)
    law = DanceSDE(0.3).transition(
        forest.nodes[e.parent], velocity(forest.nodes[e.parent], grid.at(e.step), e.prompt), grid, e.step
    )
    density = law.log_density(forest.nodes[e.child])
    expected = (density[:, :2].mean((1, 2)) + 2 * density[:, 2].mean(1)) / 3
    torch.testing.assert_close(e.log_prob, expected)


# ---------------------------------------------------------------------------------------------- spreads and last levels
@pytest.mark.parametrize("dynamics", [ODE(), *KINDS])
def test_states_start_at_the_spread_and_leaves_are_what_the_last_step_reaches(dynamics: Dynamics) -> None:
    one = plan.ode(4, 3) if isinstance(dynamics, ODE) else plan.chain(4, 3)
    forest = grow([one], dynamics, schedule=ABOVE)
    edges = forest.edges
    first = forest.nodes[edges.parent[edges.step == 0]]
    drawn = NOISE.initial([(0, root) for root in range(3)], SHAPE)
    assert torch.equal(first, drawn * ABOVE.spread)
    x = first
    for i in range(4):
        step = torch.full((3,), i)
        law = dynamics.transition(x, velocity(x, ABOVE.at(step), torch.zeros(3).long()), ABOVE, step)
        noise = NOISE.edge([(0, root, *[0] * (i + 1), i) for root in range(3)], SHAPE)
        x = law.mean if isinstance(dynamics, ODE) else law.sample(noise)
    assert torch.equal(forest.nodes[forest.leaves.node], x)
    if not isinstance(dynamics, ODE):
        assert bool(edges.log_prob.isfinite().all())  # the last step is noisy too: it does not reach data


def test_a_linear_sde_keeps_its_floor_above_zero() -> None:
    rate = LinearSDE().rate(ABOVE, torch.arange(4))
    torch.testing.assert_close(rate, 0.03 + (0.7 - 0.03) * ABOVE.sigmas[:4])
    closed = linear(4)
    assert torch.equal(LinearSDE().rate(closed, torch.arange(4)), closed.sigmas[1] * closed.sigmas[:4])


@pytest.mark.parametrize("solver", [DPMSolver2(), UniPC2()])
def test_solvers_end_above_zero_at_the_exact_flow(solver: Solver) -> None:
    """Gaussian data: the exact path ends at the same place, which finer grids come nearer to by their order."""
    spread, mean = 0.5, 1.3

    def exact(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1)
        variance = (1 - s).square() * spread**2 + s.square()
        return x / s - (mean + (1 - s) * spread**2 / variance * (x - (1 - s) * mean)) / s

    errors: list[float] = []
    for steps in (16, 32):
        grid = Schedule(torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64), spread=0.8)
        forest = rollout(
            [plan.ode(steps, 4)], ODE(), grid, exact, NOISE, shape=SHAPE, solver=solver, keep="all",
            store_dtype=torch.float64,
        )  # fmt: skip
        x = forest.nodes[forest.edges.parent[forest.edges.step == 0]]
        deviation = [math.sqrt((1 - s) ** 2 * spread**2 + s**2) for s in (0.9, 0.1)]
        end = 0.9 * mean + deviation[1] / deviation[0] * (x - 0.1 * mean)
        errors.append(float((forest.nodes[forest.leaves.node] - end).abs().max()))
    assert errors[1] < errors[0] / 3 and errors[1] < 3e-3


@pytest.mark.parametrize("spread", [0.0, -1.0, math.inf, math.nan])
def test_bad_spreads(spread: float) -> None:
    with pytest.raises(ValueError, match=r"spread: .* must be finite and above 0"):
        Schedule(torch.tensor([1.0, 0.0]), spread)


def test_spreads_are_kept_and_one_changes_no_bit() -> None:
    assert ABOVE.double().spread == ABOVE.spread and linear(4).spread == 1.0
    noise = torch.randn(3, 2)
    assert linear(4).start(noise) is noise
    assert ABOVE.start(noise.half()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ clean samples
def test_times_of_clean_samples_stay_in_the_grids_range() -> None:
    ids = [(0, slot) for slot in range(200)]
    wide = Renoise(UniformTimes(4))
    t, _ = wide(0, ids, ABOVE, SHAPE)
    plain, _ = wide(0, ids, linear(4), SHAPE)
    assert torch.equal(t, plain.clamp(float(ABOVE.sigmas[-1]), float(ABOVE.sigmas[0])))
    assert float(t.max()) == float(ABOVE.sigmas[0]) and float(plain.max()) > float(ABOVE.sigmas[0])
    single, _ = wide.single(0, ids, [1] * 200, ABOVE, SHAPE)
    assert torch.equal(single[:, 0], t[:, 1])


def test_re_noised_samples_keep_what_is_held() -> None:
    x0 = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, ids = torch.tensor([0, 0, 1, 1]), [(0, n) for n in range(4)]
    layout = held().take(rows)
    batch = renoise_leaves(x0, torch.ones(4), rows, ids, Renoise(UniformTimes(3)), 0, linear(4), layout=layout)
    at = noised({"policy": broken}, ("policy",), batch)
    clean = held().clean
    assert clean is not None
    assert torch.equal(at.x[:, 0], clean[rows].repeat_interleave(3, 0)[:, 0].double())
    assert torch.equal(at.x0[:, 0], at.x[:, 0]) and bool((at.policy[:, 0] == 0).all())
    t = batch.t.flatten().view(-1, 1, 1)
    x = (1 - t) * x0.repeat_interleave(3, 0) + t * batch.noise.flatten(0, 1)
    torch.testing.assert_close(at.x[:, 1:], x[:, 1:])
    error = (velocity(x, batch.t.flatten(), rows.repeat_interleave(3)) - (batch.noise.flatten(0, 1) - at.x0))[:, 1:]
    loss = Supervised(Matching())({"policy": broken}, batch).value
    torch.testing.assert_close(loss, error.square().mean())
    assert torch.equal(batch.take(slice(2, 4)).layout.hold(x0[2:]), layout.hold(x0)[2:])


# ---------------------------------------------------------------------------------------------------- guided sampling
@pytest.mark.parametrize("schedule", [linear(4, 3.0), ABOVE])
def test_guided_sampling_holds_and_starts_as_a_rollout_does(schedule: Schedule) -> None:
    def score(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = -x[:, 1:].square().mean((1, 2))
        return Scores(value[:, None], torch.ones(len(x), 1, dtype=torch.bool), ("latent",))

    def looks(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        clean = held().clean
        assert clean is not None and torch.equal(x[:, 0], clean[rows][:, 0])
        return broken(x, sigma, rows)

    common = {"shape": SHAPE, "slots": [0, 1], "roots": 2, "layout": held()}
    alone = guided_sample(FlowSDE(0.7), schedule, looks, score, NOISE, candidates=1, **common)  # type: ignore[arg-type]
    forest = rollout([plan.chain(4, 2)] * 2, FlowSDE(0.7), schedule, broken, NOISE, shape=SHAPE, layout=held())
    assert torch.equal(alone.x, forest.nodes[forest.leaves.node])
    best = guided_sample(FlowSDE(0.7), schedule, looks, score, NOISE, candidates=3, **common)  # type: ignore[arg-type]
    clean = held().clean
    assert clean is not None and torch.equal(best.x[:, 0], clean[best.prompt][:, 0])
    assert bool(best.x.isfinite().all()) and not torch.equal(best.x, alone.x)
