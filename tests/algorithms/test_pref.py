"""Pref-GRPO: win rates in the real loop, what it reduces to, and its arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake import Bench, brightness
from loop_checks import (
    Images,
    check_learns,
    check_no_spread,
    check_same_gradient,
    check_same_runs,
    check_sound,
    refuses,
    second,
)
from scipy import stats

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.pref_grpo import pref_grpo
from tempflow.core import weight
from tempflow.core.credit import GroupZScore, WinRate
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import NormRatio, clipped
from tempflow.core.plan import Cost
from tempflow.rewards import from_function
from tempflow.train.experience import credit


def toy(**changes: Any) -> Algorithm:
    return pref_grpo(**{"steps": 4, "group": 6, "train_steps": None, "clip": 0.02, **changes})


@pytest.mark.parametrize("changes", [{}, {"ratio": "step"}, {"win_rate": False}, {"train_steps": 2, "kl": 0.1}])
def test_first_pass_counts_and_batch_sizes(changes: dict[str, Any]) -> None:
    check_sound(toy(**changes))
    check_no_spread(toy(**changes))


def test_rewards_rise() -> None:
    check_learns(toy(), rise=0.05)


def test_what_the_defaults_compose() -> None:
    a = pref_grpo()
    assert (a.name, a.steps, a.dynamics, a.first.weight) == ("pref_grpo", 25, FlowSDE(0.7), weight.inverse_step)
    assert a.credit == WinRate(GroupZScore(by=("prompt", "step"), unbiased=True, eps=1e-8, clip=5.0), 3)
    assert a.objective == clipped(1e-4, 1e-4, 0.0, "exact", NormRatio())
    part = a.plan(0, 0)
    assert part.cost() == Cost(200, 8, 112) and set(part.start) == {0}
    assert {i for i, noisy in zip(part.step, part.stochastic, strict=True) if noisy} == set(range(24))
    assert a.plan(1, 0) is a.plan(1, 9) and a.plan(0, 0) is not a.plan(1, 0)


def test_advantages_are_those_of_ranks_whatever_the_scores() -> None:
    """Win rates are (rank − 1)/(n − 1), with the mean rank for ties."""
    bench = Bench(algorithm=toy(rounding=None))
    experience = bench.collect()
    edge, leaf = experience.whole.descent
    given = credit(bench.context, experience).advantage.value
    rank = stats.rankdata(experience.scores.value[:, 0].view(6, 6).numpy(), axis=1)
    want = stats.zscore((rank - 1) / 5, axis=1, ddof=1).reshape(-1)
    np.testing.assert_allclose(given[edge], want[leaf], rtol=1e-5, atol=1e-6)


def test_a_monotone_change_of_the_judge_changes_nothing() -> None:
    def cubed(images: Images, prompts: list[str]) -> list[float | None]:
        return [100 * (r or 0.0) ** 3 - 7 for r in brightness(images, prompts)]

    a, b = second(toy()), second(toy(), reward=cubed)
    assert torch.equal(a, b)
    c = second(toy(win_rate=False))
    assert not torch.equal(a, c)


def test_without_win_rates_and_with_step_ratios_it_is_flow_grpo() -> None:
    mine = toy(win_rate=False, ratio="step", shared_noise=False, eps=1e-4)
    mine = replace(mine, credit=replace(mine.credit, unbiased=False))  # type: ignore[type-var]
    other = flow_grpo(steps=4, group=6, clip=0.02, kl=0.0, std="group")
    # the plans differ in the last step's noise alone
    check_same_runs(replace(mine, plan=other.plan), other)


def test_a_groupwise_reward_may_give_win_rates_itself() -> None:
    """Scores that are win rates already, exactly representable ones: `win_rate` off then gives the same run as on."""

    def judged(images: Images, prompts: list[str]) -> list[float | None]:
        score = brightness(images, prompts)
        rates: list[float | None] = []
        for prompt, mine in zip(prompts, score, strict=True):
            rivals = [r for p, r in zip(prompts, score, strict=True) if p == prompt]
            wins = sum((mine > r) + 0.5 * (mine == r) for r in rivals) - 0.5  # type: ignore[operator]
            rates.append(wins / (len(rivals) - 1))
        return rates

    reward = from_function(judged)
    check_same_runs(toy(win_rate=False, rounding=None), toy(rounding=None), reward=reward)


def test_the_normalised_ratios_gradient_is_the_steps_noise_times_the_plain_one() -> None:
    """One trained step: Guard's log r̂ = S·(log r + …), so its first gradient is S times the step ratio's; the
    weights have mean 1."""
    norm, step = toy(train_steps=1), toy(train_steps=1, ratio="step")
    bench = Bench(algorithm=norm)
    (at,) = {int(i) for i in bench.collect().whole.edges.step[bench.collect().whole.edges.trained]}
    s = float(FlowSDE(0.7).coefficients(bench.context.schedule, torch.tensor([at]))[2])
    check_same_gradient(norm, step, factor=s)


def test_step_weights_go_with_one_over_delta() -> None:
    bench = Bench(algorithm=toy())
    experience = bench.collect()
    given = credit(bench.context, experience).weight
    step = experience.whole.edges.step
    product = (given * experience.schedule.delta(step))[experience.whole.edges.trained]
    torch.testing.assert_close(product, product[0].expand_as(product))
    flat = Bench(algorithm=toy(ratio="step"))
    assert bool((credit(flat.context, flat.collect()).weight == 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1, "train_steps": None}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2"),
        ({"train_steps": 25}, "train_steps: 25 must be in 1 … 24; nearest valid: 24"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.7 is usual"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
        ({"rounding": -1}, "rounding: -1 must be at least 0, or None for no rounding; nearest valid: 0"),
        ({"ratio": "guard"}, "ratio: 'guard' is not one of 'norm', 'step'; nearest valid: 'norm'"),
        ({"kl": -1.0}, "kl: -1.0 must be"),
        ({"eps": -1.0}, "eps: -1.0 must be"),
        ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0; 5.0 is usual"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    refuses(pref_grpo, arguments, message)
