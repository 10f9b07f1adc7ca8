"""SLAS: the power of the advantage in the real loop, its reduction at γ = 0, and its arguments."""

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
    refuses,
    second,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.dr_grpo import dr_grpo
from tempflow.algorithms.reinforce_pp import reinforce_pp
from tempflow.algorithms.slas import slas
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.plan import Cost
from tempflow.train.experience import credit


def toy(**changes: Any) -> Algorithm:
    return slas(**{"steps": 4, "group": 6, "train_steps": None, "clip": 0.02, **changes})


FLOW: dict[str, Any] = {"dynamics": "flow", "noise_level": 0.7, "shared_noise": False}


@pytest.mark.parametrize("changes", [{}, FLOW, {"train_steps": 2, "kl": 0.1}, {"gamma": 0.0}])
def test_first_pass_counts_and_batch_sizes(changes: dict[str, Any]) -> None:
    check_sound(toy(**changes))
    check_no_spread(toy(**changes))


@pytest.mark.parametrize("changes", [{"noise_level": 0.7}, FLOW])
def test_rewards_rise(changes: dict[str, Any]) -> None:
    check_learns(toy(**changes), rise=0.05)


def test_what_the_defaults_compose() -> None:
    a = slas()
    assert (a.name, a.steps, a.dynamics) == ("slas", 16, DanceSDE(0.3))
    assert a.credit == GroupZScore(by=("prompt", "step"), scale="pooled", power=1.5, eps=0.0, clip=5.0)
    assert a.objective == clipped(1e-4, 1e-4) and a.plan(0, 0).cost() == Cost(192, 12, 108)
    assert set(a.plan(0, 0).start) == {0} and a.plan(0, 0) is not a.plan(1, 0)
    noisy = {i for i, on in zip(a.plan(0, 0).step, a.plan(0, 0).stochastic, strict=True) if on}
    assert noisy == set(range(15))  # DanceGRPO's last step is an ODE step
    assert slas(dynamics="flow", noise_level=0.9).dynamics == FlowSDE(0.9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
def test_advantages_against_numpy(gamma: float) -> None:
    bench = Bench(algorithm=toy(gamma=gamma, advantage_clip=2.0))
    experience = bench.collect()
    edge, leaf = experience.whole.descent
    r = experience.scores.value[:, 0].double().numpy().reshape(6, 6)
    d = r - r.mean(1, keepdims=True)
    s = np.sign(d) * np.abs(d) ** (1 + gamma)
    want = np.clip(s / np.sqrt((s**2).mean()), -2, 2).reshape(-1)
    got = credit(bench.context, experience).advantage.value
    np.testing.assert_allclose(got[edge], want[leaf], rtol=1e-4, atol=1e-5)
    assert (np.abs(want) == 2).any()  # the bound comes after the shaping


def test_without_a_power_it_is_reinforce_pp_with_the_groups_baseline() -> None:
    other = reinforce_pp(steps=4, group=6, clip=0.02, kl=0.0, baseline="group")
    mine = toy(gamma=0.0, eps=1e-8, **FLOW)
    check_same_runs(replace(mine, plan=other.plan), other)
    shaped = second(replace(toy(gamma=1.0, **FLOW), plan=other.plan))
    assert not torch.equal(shaped, second(other))


def test_without_a_power_its_gradient_is_a_multiple_of_dr_grpos() -> None:
    """Linear in the advantage, with one scale for the batch."""
    mine, other = toy(gamma=0.0, advantage_clip=None, **FLOW), dr_grpo(steps=4, group=6, clip=0.02)
    mine = replace(mine, plan=other.plan)
    bench = Bench(algorithm=other)
    r = bench.collect().scores.value[:, 0].double().view(6, 6)
    scale = float((r - r.mean(1, keepdim=True)).square().mean().sqrt())
    check_same_gradient(mine, other, factor=1 / scale)


def test_a_larger_gamma_leaves_less_to_the_middle() -> None:
    share: list[float] = []
    for gamma in (0.0, 1.0, 3.0):
        bench = Bench(algorithm=toy(gamma=gamma, advantage_clip=None))
        experience = bench.collect()
        size = credit(bench.context, experience).advantage.value.abs()[experience.whole.edges.step == 0].view(6, 6)
        share.append(float((size.sort(1).values[:, -2:].sum(1) / size.sum(1)).mean()))
    assert share[0] < share[1] < share[2] and share[2] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1, "train_steps": None}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2"),
        ({"train_steps": 0}, "train_steps: 0 must be in 1 … 15; nearest valid: 1"),
        ({"gamma": -0.1}, "gamma: -0.1 must be finite and at least 0; nearest valid: 0, which is linear"),
        ({"gamma": float("inf")}, "gamma: inf must be finite"),
        ({"dynamics": "ode"}, "dynamics: 'ode' is not one of 'dance', 'flow'; nearest valid: 'dance'"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.3 is usual"),
        ({"noise_level": 0.0, "dynamics": "flow"}, "noise_level: 0.0 must be finite and above 0; 0.7 is usual"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
        ({"eps": -1.0}, "eps: -1.0 must be"),
        ({"advantage_clip": -1.0}, "advantage_clip: -1.0 must be finite and above 0; 5.0 is usual"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    refuses(slas, arguments, message)
