"""DDPO: the score function and importance sampling on DDIM's steps, statistics by prompt or batch, arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake import Bench
from loop_checks import (
    check_learns,
    check_no_spread,
    check_same_gradient,
    check_same_runs,
    check_sound,
    partly_flat,
    refuses,
    second,
)
from torch.distributions import Normal

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.ddpo import ddpo
from tempflow.core.dynamics import DDIM, FlowSDE
from tempflow.core.objective.clip import Clip, Score
from tempflow.core.plan import Cost
from tempflow.core.schedule import shifted
from tempflow.train.experience import credit
from tempflow.train.update import predictors


def toy(**changes: Any) -> Algorithm:
    return ddpo(**{"steps": 4, "group": 6, "clip": 0.02, **changes})


CHANGES: list[dict[str, Any]] = [{}, {"kind": "sf"}, {"statistics": "batch"}, {"eta": 0.6, "train_steps": 2, "kl": 0.1}]


@pytest.mark.parametrize("changes", CHANGES)
def test_first_pass_counts_and_batch_sizes(changes: dict[str, Any]) -> None:
    check_sound(toy(**changes))
    check_no_spread(toy(**changes))


@pytest.mark.parametrize("changes", CHANGES[:3])
def test_rewards_rise(changes: dict[str, Any]) -> None:
    check_learns(toy(**changes), rise=0.05)


def test_what_the_defaults_compose() -> None:
    a = ddpo()
    assert (a.name, a.steps, a.dynamics, a.plan(0, 0).cost()) == ("ddpo", 50, DDIM(1.0), Cost(800, 16, 784))
    assert a.objective.clip == Clip(1e-4, 1e-4)  # type: ignore[union-attr]
    assert isinstance(ddpo(kind="sf").objective.clip, Score) and not a.sets  # type: ignore[union-attr]
    noisy = {i for i, on in zip(a.plan(0, 0).step, a.plan(0, 0).stochastic, strict=True) if on}
    assert noisy == set(range(49))


def test_the_last_noisy_step_may_be_left_out() -> None:
    """It draws its noise as ever, and bears no gradient; of SD 3's grid it has nearly all of it."""
    plan = ddpo(6, 12, skip_last=2).plan(0, 0)
    noisy, trained = (
        {i for i, on in zip(plan.step, flags, strict=True) if on} for flags in (plan.stochastic, plan.trained)
    )
    assert noisy == {0, 1, 2, 3, 4} and trained == {0, 1, 2, 3} and plan.cost() == Cost(72, 12, 48)
    drawn = [ddpo(6, 12, train_steps=2, skip_last=2).plan(m, 0) for m in range(40)]
    seen = [frozenset(i for i, on in zip(p.step, p.trained, strict=True) if on) for p in drawn]
    assert {len(s) for s in seen} == {2} and frozenset.union(*seen) == {0, 1, 2, 3}
    check_sound(toy(skip_last=2))
    for steps, last, before in ((6, 48.0, 0.81), (50, 7.4, 1.43)):
        _, b, std = DDIM(1.0).coefficients(shifted(steps), torch.arange(steps - 1))
        assert (b.abs() / std)[-2:].tolist() == pytest.approx([before, last], rel=0.01)


def test_both_kinds_have_one_first_gradient_and_then_part() -> None:
    check_same_gradient(toy(kind="sf"), toy(kind="is"))
    a, b = second(toy(kind="sf", clip=1e-3)), second(toy(kind="is", clip=1e-3))
    assert not torch.equal(a, b)


def test_the_score_functions_gradient_by_hand() -> None:
    """∇ of −mean A·log p over the trained edges, log p from torch.distributions on the DDIM step written out."""
    bench = Bench(algorithm=toy(kind="sf"), max_grad_norm=1e9)
    experience = bench.collect()
    given = credit(bench.context, experience).advantage.value
    forest, edges = experience.forest, experience.forest.edges
    rows = edges.trained.nonzero()[:, 0]
    x, y = forest.nodes[edges.parent[rows]], forest.nodes[edges.child[rows]]
    sigmas = experience.schedule.sigmas
    s, t = (sigmas[edges.step[rows] + n].view(-1, 1, 1, 1) for n in (0, 1))
    v = predictors(bench.context, experience.prompts)["policy"](x, sigmas[edges.step[rows]], edges.prompt[rows])
    std = t * (1 - t**2 * (1 - s) ** 2 / (s**2 * (1 - t) ** 2)).sqrt()
    mean = (1 - t) * (x - s * v) + (t**2 - std**2).clamp(min=0).sqrt() * (x + (1 - s) * v)
    log_p = Normal(mean, std).log_prob(y).flatten(1).mean(1)
    parameters = list(bench.model.network.parameters())
    want = torch.autograd.grad(-(given[rows] * log_p).mean(), parameters)
    bench.update(experience)
    for parameter, gradient in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_importance_sampling_on_another_step_is_flow_grpo() -> None:
    other = flow_grpo(steps=4, group=6, clip=0.02, kl=0.0, std="group", eps=1e-6, noise_level=0.9)
    check_same_runs(replace(toy(), dynamics=FlowSDE(0.9), plan=other.plan), other)


def test_statistics_by_prompt_and_by_batch() -> None:
    bench = Bench(algorithm=toy(), reward=partly_flat)
    experience = bench.collect()
    edge, leaf = experience.whole.descent
    r = experience.scores.value[:, 0].double().numpy()
    by = r.reshape(6, 6)
    spread = np.where(by.std(1, keepdims=True) > 0, by.std(1, keepdims=True), 1)
    want = {"prompt": ((by - by.mean(1, keepdims=True)) / spread).reshape(-1), "batch": (r - r.mean()) / r.std()}
    for statistics, advantage in want.items():
        got = toy(statistics=statistics).credit(experience.scores, experience.whole).value
        np.testing.assert_allclose(got[edge], advantage[leaf], atol=1e-3)
    assert np.abs(want["batch"] - want["prompt"]).max() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2"),
        ({"skip_last": 0}, "skip_last: 0 must be in 1 … 49; nearest valid: 1"),
        ({"skip_last": 50}, "skip_last: 50 must be in 1 … 49; nearest valid: 49"),
        ({"train_steps": 49, "skip_last": 2}, "train_steps: 49 must be in 1 … 48; nearest valid: 48"),
        ({"train_steps": 50}, "train_steps: 50 must be in 1 … 49; nearest valid: 49"),
        ({"kind": "reinforce"}, "kind: 'reinforce' is not one of 'is', 'sf'; nearest valid: 'is'"),
        ({"statistics": "group"}, "statistics: 'group' is not one of 'prompt', 'batch'; nearest valid: 'prompt'"),
        ({"eta": 0.0}, "eta: 0.0 must be finite and above 0; 1.0 is usual"),
        ({"eta": 1.5}, "eta: 1.5 must be at most 1.0"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
        ({"kl": 0.1, "kl_form": "drift"}, "kl_form: 'drift' needs a diffusion rate"),
        ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0; 5.0 is usual"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    refuses(ddpo, arguments, message)
