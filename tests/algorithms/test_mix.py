"""MixGRPO and its Flash form: the window's way, the compressed grid, what they reduce to, and one iteration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake
from hypothesis import given
from hypothesis import strategies as st
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
    two_rewards,
)

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.mix_grpo import mix_grpo
from tempflow.algorithms.mix_grpo_flash import mix_grpo_flash
from tempflow.core.dynamics import DanceSDE
from tempflow.core.plan import Cost, Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear, shifted
from tempflow.core.solver import predict_clean
from tempflow.core.window import SlidingWindow
from tempflow.train.experience import Experience, credit


def mix(**options: object) -> Algorithm:
    return mix_grpo(**{"steps": 6, "group": 6, "window": 2, "every": 1, "clip": 0.02, **options})  # pyright: ignore


def flash(**options: object) -> Algorithm:
    standard = {"steps": 6, "group": 6, "window": 2, "every": 1, "clip": 0.02, "shift": 2.0}  # the toy's shift
    return mix_grpo_flash(**{**standard, **options})  # pyright: ignore


def noisy(plan: Plan) -> list[int]:
    return sorted({i for i, stochastic in zip(plan.step, plan.stochastic, strict=True) if stochastic})


def released(order: str, iterations: int, size: int, end: int, tau: int, stride: int, roll_back: bool) -> list[range]:
    """The released state machine, which counts iterations, with its last empty window taken away."""
    start = stayed = 0
    seen: list[range] = []
    for _ in range(iterations):
        seen.append(range(start, min(start + size, end)))
        stayed += 1
        stay: float = tau
        if order == "decay":
            least, past = max(1, tau // 4), start / end
            stay = max(least, int(tau * (1 - past) + least * past))
        if order == "exp_decay":
            stay = math.ceil(tau * math.exp(-0.1 * max(0, start - 13)))
        if stayed >= stay:
            following = start + stride
            if following < end:
                start, stayed = following, 0
            elif roll_back:
                start = stayed = 0
    return seen


@given(
    st.sampled_from(["progressive", "decay", "exp_decay"]),
    st.integers(1, 5),
    st.integers(5, 24),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_window_goes_the_released_way(
    order: str, size: int, end: int, tau: int, stride: int, roll_back: bool
) -> None:
    slide = SlidingWindow(size, end, order, tau, stride, roll_back)  # pyright: ignore
    assert [slide.at(0, m) for m in range(300)] == released(order, 300, size, end, tau, stride, roll_back)


def test_a_cycle_covers_every_step_and_overflow_rolls_back_or_stays() -> None:
    algorithm = mix_grpo()
    starts = [noisy(algorithm.plan(m, 0))[0] for m in range(0, 25 * 24, 25)]
    assert starts == list(range(24))
    assert {i for m in range(0, 600, 25) for i in noisy(algorithm.plan(m, 0))} == set(range(24))
    assert noisy(algorithm.plan(24, 0)) == [0, 1, 2, 3] and noisy(algorithm.plan(25, 7)) == [1, 2, 3, 4]
    assert noisy(algorithm.plan(599, 0)) == [23] and noisy(algorithm.plan(600, 0)) == [0, 1, 2, 3]
    assert noisy(mix_grpo(roll_back=False).plan(10_000, 0)) == [23]
    assert noisy(mix_grpo(stride=0).plan(10_000, 0)) == [0, 1, 2, 3]
    assert noisy(mix_grpo(stride=4).plan(25, 0)) == [4, 5, 6, 7]


def test_decays_stay_shorter_near_the_clean_end() -> None:
    slow, fast = SlidingWindow(4, 24, "decay", 20), SlidingWindow(4, 24, "exp_decay", 20)
    assert [slow.stay(start) for start in (0, 12, 23)] == [20, 12, 5]
    assert [fast.stay(start) for start in (0, 13, 14, 23)] == [20, 20, 19, 8]


def test_random_windows_are_whole_the_same_for_all_prompts_and_everywhere() -> None:
    algorithm = mix_grpo(order="random")
    seen = [noisy(algorithm.plan(m, 0)) for m in range(200)]
    assert {s[0] for s in seen} == set(range(21)) and all(len(s) == 4 for s in seen)
    assert all(algorithm.plan(m, 0) is algorithm.plan(m, 5) for m in range(20))
    assert len({tuple(s) for s in seen[:5]}) > 1


def test_costs() -> None:
    assert mix_grpo().cost(0, 1) == Cost(300, 12, 48)
    assert mix_grpo_flash().cost(0, 1) == Cost(132, 12, 48)
    assert mix_grpo_flash(stride=0, compress=0.2).cost(9, 1) == Cost(12 * (3 + 4), 12, 48)


def test_a_window_of_all_steps_is_flow_grpo() -> None:
    ours = mix(window=6, shared_noise=False, rewards="scores")
    other = flow_grpo(steps=6, group=6, clip=0.02, kl=0.0, std="group", kl_form="exact")
    assert ours.plan(3, 1) == other.plan(3, 1)
    assert (ours.dynamics, ours.objective, ours.first) == (other.dynamics, other.objective, other.first)
    torch.testing.assert_close(gradient(replace(ours, credit=other.credit)), gradient(other), rtol=0, atol=0)


def test_only_the_windows_transitions_have_a_log_prob() -> None:
    plan = mix_grpo(steps=8, group=3, window=2, every=1).plan(3, 0)
    forest = rollout(
        [plan], mix_grpo().dynamics, linear(8, 3.0), lambda x, s, r: 0.5 * x, Noise(1), shape=(3,), keep="all"
    )  # pyright: ignore
    inside = (forest.edges.step == 3) | (forest.edges.step == 4)
    assert torch.equal(forest.edges.log_prob.isfinite(), inside)
    assert torch.equal(forest.edges.trained, inside) and torch.equal(forest.edges.stochastic, inside)


def two(bench: Bench) -> Experience:
    bench.context = replace(bench.context, rewards=two_rewards())
    return bench.collect()


def test_rewards_are_joined_as_advantages_or_as_scores() -> None:
    bench = Bench(algorithm=mix())
    experience = two(bench)

    def advantage(algorithm: Algorithm) -> torch.Tensor:
        return credit(replace(bench.context, algorithm=algorithm), experience).advantage.value

    joined, scores, gdpo = (advantage(mix(rewards=kind)) for kind in ("advantages", "scores", "gdpo"))
    plain = mix(rewards="scores")
    each = [advantage(replace(plain, credit=plain.credit.weighted({n: 1.0}))) for n in experience.scores.names]
    torch.testing.assert_close(joined, (each[0] + each[1]) / 2, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(joined, scores, atol=0.05)
    assert float(gdpo.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("make", [mix, flash])
def test_one_iteration_of_the_loop(make: type) -> None:
    check_counts(make(kl=0.1, stride=0))
    check_first_ratio(make())
    check_no_spread(make())
    check_learns(make(stride=0))


# Flash


def test_flash_without_compression_walks_the_models_grid() -> None:
    for shift in (1.0, 2.0, 3.0):
        algorithm = mix_grpo_flash(compress=1.0, shift=shift, every=1)
        for m in range(24):
            for grid in (linear(25, shift), shifted(25, shift)):  # SD 3's jumps at its end
                assert torch.equal(algorithm.schedule(m, grid).sigmas, grid.sigmas)
            assert algorithm.plan(m, 0) == mix_grpo(every=1).plan(m, 0)


def test_flash_by_euler_without_compression_is_mix_grpo() -> None:
    ours, other = gradient(flash(compress=1.0, second_order=False)), gradient(mix())
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradient(flash(compress=1.0)), other, rtol=1e-3)


@given(st.integers(0, 200), st.floats(0.05, 0.99), st.sampled_from([1.0, 3.0]))
def test_the_compressed_grid(iteration: int, compress: float, shift: float) -> None:
    algorithm = mix_grpo_flash(compress=compress, shift=shift, every=3)
    for grid in (linear(25, shift), shifted(25, shift)):
        walked, plan = algorithm.schedule(iteration, grid), algorithm.plan(iteration, 0)
        last = noisy(plan)[-1]
        points = max(int((25 - last) * compress + 1e-9), 2)
        assert walked.steps == plan.steps == last + points
        assert torch.equal(walked.sigmas[: last + 2], grid.sigmas[: last + 2])
        u = walked.sigmas.double() / (shift - (shift - 1) * walked.sigmas.double())
        gaps = u[last + 1 : -1] - u[last + 2 :]
        torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-4, atol=1e-6)


def test_flash_is_more_exact_than_euler_on_its_own_grid() -> None:
    """Of Gaussian data of deviation ½ the ODE is known: x_σ = x_1·sqrt((1−σ)²/4 + σ²)."""

    def velocity(x: torch.Tensor, sigma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        s = sigma.to(x).view(-1, 1)
        return (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2) * x

    def errors(second_order: bool) -> list[float]:
        algorithm = mix_grpo_flash(stride=0, second_order=second_order)
        plan = algorithm.plan(0, 0)
        calm = replace(plan, stochastic=(False,) * len(plan.parent), trained=(False,) * len(plan.parent))
        grid, noise = algorithm.schedule(0, linear(25, 3.0)), Noise(2)
        forest = rollout([calm], DanceSDE(0.3), grid, velocity, noise, shape=(8,), solver=algorithm.solver, keep="all")
        start, seen = noise.initial([(0, 0)], (8,)), list[float]()
        for step, s in enumerate(grid.sigmas.tolist()[1:]):
            x = forest.nodes[forest.edges.child[forest.edges.step == step][:1]]
            seen.append(float((x - start * math.sqrt((1 - s) ** 2 / 4 + s**2)).abs().max()))
        return seen

    second, first = errors(True), errors(False)
    assert second[-2] < first[-2] / 3 and second[-1] < first[-1]  # the step into σ = 0 is of first order in both


def test_flash_remembers_noisy_steps_too() -> None:
    """The first step after the window is second-order: Euler's, and the change of x̂0 over the noisy step before."""
    algorithm = mix_grpo_flash(steps=8, group=2, window=2, compress=1.0, shift=1.0)
    grid = algorithm.schedule(0, linear(8))
    predict = lambda x, sigma, rows: 0.4 * x.square() - 0.3 * x  # noqa: E731
    forest = rollout(
        [algorithm.plan(0, 0)],
        algorithm.dynamics,
        grid,
        predict,
        Noise(4),
        shape=(3,),
        solver=algorithm.solver,
        keep="all",
    )  # pyright: ignore
    edges = forest.edges
    before, here = edges.step == 1, edges.step == 2
    x0, x, y = (forest.nodes[i] for i in (edges.parent[before], edges.parent[here], edges.child[here]))
    assert torch.equal(edges.child[before], edges.parent[here])
    step = lambda i: torch.full((2,), i)  # noqa: E731
    clean = [predict_clean(z, predict(z, None, None), grid, step(i)) for i, z in ((1, x0), (2, x))]
    s = [float(v) for v in grid.sigmas]
    lam = [math.log((1 - v) / v) for v in s[1:4]]
    euler = x - (s[2] - s[3]) * predict(x, None, None)
    change = (s[2] - s[3]) / s[2] * (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (clean[1] - clean[0])
    torch.testing.assert_close(y, euler + change)
    assert float(change.abs().max()) > 1e-3


def test_the_saving_shrinks_as_the_window_moves_on() -> None:
    forwards = [mix_grpo_flash(every=1).cost(m, 1).forwards for m in range(21)]
    assert forwards == sorted(forwards) and forwards[0] == 132 and forwards[-1] > 2 * 132
    bench = Bench(algorithm=flash(compress=0.5))
    for m in range(4):
        bench.iterate(m)
    assert bench.counter.rollout == sum(flash(compress=0.5).cost(m, len(PROMPTS)).forwards for m in range(4))
    assert bench.context.schedule.steps == 6 == Fake().schedule(6, SIZE).steps


def test_bad_arguments() -> None:
    common = [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2"),
        ({"window": 0}, "window: 0 must be at least 1; nearest valid: 1"),
        ({"window_end": 3}, "window_end: 3 must be in 4 … 24; nearest valid: 4"),
        ({"window_end": 25}, "window_end: 25 must be in 4 … 24; nearest valid: 24"),
        ({"order": "slow"}, "order: 'slow' is not one of progressive, random, decay, exp_decay"),
        ({"every": 0}, "every: 0 must be at least 1"),
        ({"stride": -1}, "stride: -1 must be at least 0"),
        ({"rewards": "mean"}, "rewards: 'mean' is not one of 'advantages', 'gdpo', 'scores'"),
        ({"noise_level": -0.1}, "noise_level: -0.1 must be finite and above 0"),
        ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0"),
    ]
    check_errors(mix_grpo, [*common, ({"window": 26}, "window: 26 is longer than the rollout; nearest valid: 25")])
    flashes = [
        ({"compress": 0.0}, "compress: 0.0 must be in (0, 1]"),
        ({"compress": 1.5}, "compress: 1.5 must be in (0, 1]"),
        ({"shift": 0.0}, "shift: 0.0 must be finite and above 0"),
        ({"window": 25}, "window: 25 leaves no tail to compress; nearest valid: 24"),
    ]
    check_errors(mix_grpo_flash, [*common, *flashes])
