"""DanceGRPO: its costs, draws and selection, what it reduces to, and one iteration of the real loop."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from fake import PROMPTS, Bench, brightness
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
)
from torch import Tensor

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.dance_grpo import dance_grpo
from tempflow.core.dynamics import ODE, DanceSDE
from tempflow.core.plan import Cost, Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear, shifted
from tempflow.core.units import leaf_of
from tempflow.train.experience import credit


def dance(**options: object) -> Algorithm:
    return dance_grpo(**{"steps": 6, "group": 6, "clip": 0.02, **options})  # pyright: ignore


def trained(plan: Plan) -> list[list[int]]:
    steps: list[list[int]] = [[] for _ in range(plan.roots)]
    for e, use in enumerate(plan.trained):
        if use:
            steps[plan.node_root[plan.roots + e]].append(plan.step[e])
    return steps


def test_cost_at_the_papers_defaults() -> None:
    assert dance_grpo().cost(0, 1) == Cost(192, 12, 12 * 9)
    assert dance_grpo(fraction=1.0).cost(0, 1) == Cost(192, 12, 12 * 15)
    assert dance_grpo(steps=51, fraction=0.58).cost(0, 1).trained_edges == 12 * 29  # 0.58·50 is 28.999… in floats


def test_every_chain_draws_its_own_steps_and_none_is_favoured() -> None:
    algorithm = dance_grpo(group=8)
    plans = [algorithm.plan(i, s) for i in range(10) for s in range(4)]
    rows = [row for plan in plans for row in trained(plan)]
    assert all(len(set(row)) == 9 and max(row) < 15 for row in rows)
    assert len(set(map(tuple, rows))) > 300 and trained(plans[0]) != trained(plans[1]) != trained(plans[4])
    seen = Counter(itertools.chain(*rows))
    share = [seen[i] / len(rows) for i in range(15)]
    assert set(seen) == set(range(15)) and max(abs(s - 0.6) for s in share) < 0.12  # five deviations of a fair draw
    assert algorithm.plan(3, 1) is algorithm.plan(3, 1)
    full = dance_grpo(fraction=1.0)
    assert full.plan(0, 0) is full.plan(5, 3)


def test_last_step_is_the_clean_prediction_and_without_noise_all_is_the_ode() -> None:
    plan = dance_grpo(steps=6, group=4).plan(0, 0)
    grid = shifted(6)
    predict = lambda x, sigma, rows: 0.7 * x - 0.2  # noqa: E731
    calm = rollout([plan], DanceSDE(0.0), grid, predict, Noise(1), shape=(5,), keep="all")
    want = rollout([plan], ODE(), grid, predict, Noise(1), shape=(5,), keep="all")
    assert torch.equal(calm.nodes, want.nodes)  # one shared noise: four equal paths
    leaves = calm.nodes[calm.leaves.node]
    assert torch.equal(leaves, leaves[:1].expand_as(leaves))
    noisy = rollout([plan], DanceSDE(0.3), grid, predict, Noise(1), shape=(5,), keep="all")
    last = noisy.edges.step == 5
    x, end = noisy.nodes[noisy.edges.parent[last]], noisy.nodes[noisy.edges.child[last]]
    torch.testing.assert_close(end, x - grid.sigmas[5] * (0.7 * x - 0.2))
    assert not noisy.edges.stochastic[last].any()
    assert len(torch.unique(noisy.nodes[noisy.leaves.node], dim=0)) == 4


def test_a_noisy_last_step_would_magnify_an_error_by_eta_squared_over_two_sigma() -> None:
    for grid, gain in ((shifted(10).double(), -5.0), (linear(16, 3.0).double(), -0.27)):
        step = torch.tensor([grid.steps - 1])
        sigma = float(grid.sigmas[-2])
        a, b, _ = DanceSDE(0.3).coefficients(grid, step)
        # data at one point: v = (x − m)/σ, so a deviation δ from the path becomes (a + b/σ)·δ
        assert float(a + b / sigma) == pytest.approx(-0.09 / (2 * sigma)) == pytest.approx(gain, rel=0.02)
        a, b, _ = ODE().coefficients(grid, step)
        assert float(a + b / sigma) == pytest.approx(0, abs=1e-12)


def test_with_all_steps_independent_noise_and_the_others_step_and_statistics_it_is_flow_grpo() -> None:
    other = flow_grpo(steps=6, group=6, clip=0.02, kl=0.0, std="group", kl_form="exact")
    ours = dance(fraction=1.0, shared_noise=False)
    assert ours.plan(0, 0).trained == other.plan(0, 0).trained and ours.objective == other.objective
    same_parts = replace(ours, dynamics=other.dynamics, credit=other.credit)
    # the one difference left: our last step is calm, so the leaves (and their scores) differ
    noisy_end = replace(same_parts, plan=lambda i, s: replace(ours.plan(i, s), stochastic=other.plan(i, s).stochastic))
    torch.testing.assert_close(gradient(noisy_end), gradient(other), rtol=0, atol=0)


def test_only_the_best_and_the_worst_are_trained_with_the_full_groups_statistics() -> None:
    bench = Bench(algorithm=dance(fraction=1.0, keep=2))
    experience = bench.collect()
    apart = torch.arange(len(experience.scores)).roll(7)[:, None] / 100  # pictures of few grey levels tie
    experience = replace(experience, scores=replace(experience.scores, value=experience.scores.value + apart))
    few = credit(bench.context, experience).advantage
    full = credit(replace(bench.context, algorithm=dance(fraction=1.0)), experience).advantage
    for slot in range(len(PROMPTS)):
        for step in range(5):
            here = (experience.whole.edges.prompt == slot) & (experience.whole.edges.step == step)
            value = full.value[here]
            live = few.live[here]  # pictures of few grey levels may tie
            assert int(live.sum()) == 2 and set(value[live].tolist()) == {value.max().item(), value.min().item()}
            assert torch.equal(few.value[here][live], value[live])
    check_counts(dance(fraction=1.0, keep=2), share=2 / 6)


def test_one_iteration_of_the_loop() -> None:
    check_counts(dance())
    check_counts(dance(kl=0.1))
    check_first_ratio(dance())
    check_first_ratio(dance(keep=4))
    check_no_spread(dance())
    check_no_spread(dance(keep=2))
    check_learns(dance(noise_level=0.6))


def test_a_failed_reward_takes_no_part() -> None:
    def broken(images: list[object], prompts: list[str]) -> list[float | None]:
        return [None if n % 6 == 2 else r for n, r in enumerate(brightness(images, prompts))]  # pyright: ignore

    bench = Bench(algorithm=dance(fraction=1.0), reward=broken)
    assert bench.iterate()["trained_edges"] == len(PROMPTS) * 5 * 5


def test_the_best_and_worst_are_those_by_reward_where_advantages_are_bounded() -> None:
    """Bounded at ½ most advantages tie; without an order among them the first would be kept."""
    bench = Bench(algorithm=dance(fraction=1.0, keep=2, advantage_clip=0.5))
    experience = bench.collect()
    ok = credit(bench.context, experience).advantage.ok
    leaf, score = leaf_of(experience.whole), experience.scores.value[:, 0]
    for prompt in experience.whole.leaves.prompt.unique():
        mine = (experience.whole.leaves.prompt == prompt).nonzero()[:, 0]
        want = {int(mine[score[mine].argmax()]), int(mine[score[mine].argmin()])}
        assert set(leaf[ok & (experience.whole.edges.prompt == prompt)].tolist()) == want


def test_bad_arguments() -> None:
    cases = [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2"),
        ({"fraction": 0.0}, "fraction: 0.0 of 15 steps must be 1 … 15 of them; nearest valid: 0.067"),
        ({"fraction": 0.05}, "fraction: 0.05 of 15 steps"),
        ({"fraction": 1.5}, "nearest valid: 1.0"),
        ({"keep": 3}, "keep: 3 must be even and in 2 … 12; nearest valid: 2"),
        ({"keep": 14}, "keep: 14 must be even and in 2 … 12; nearest valid: 12"),
        ({"keep": 0}, "keep: 0 must be even and in 2 … 12; nearest valid: 2"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.3 is usual"),
        ({"clip": -1.0}, "clip: -1.0 must be finite and above 0"),
        ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be"),
    ]
    check_errors(dance_grpo, cases)
    dance_grpo(fraction=0.067)


def test_shared_noise_is_one_start_per_prompt() -> None:
    def starts(algorithm: Algorithm) -> Tensor:
        forest = Bench(algorithm=algorithm).collect().forest
        first = forest.edges.step == 0
        return torch.unique(forest.nodes[forest.edges.parent[first]].flatten(1), dim=0)

    assert len(starts(dance())) == len(PROMPTS)
    assert len(starts(dance(shared_noise=False))) == 6 * len(PROMPTS)
