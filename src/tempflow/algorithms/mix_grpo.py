"""MixGRPO: noise, and training, inside a window that slides from noisy to clean steps (arXiv 2507.21802).

Claim. An SDE in a few consecutive steps and an ODE elsewhere spares most of the training forwards; a window that goes
the way of denoising, early steps first, teaches better than steps at random.

    step        Flow-GRPO's SDE inside the window, ODE outside                              (FlowSDE)
    window      steps l … min(l + window, window_end) − 1 at every prompt of an iteration   (SlidingWindow)
                "progressive" stays τ = `every` iterations, then l += stride; at the end it rolls back to 0, or stays
                "decay" the same, staying int(τ·(1 − p) + max(1, τ//4)·p) of them, p = l/window_end
                "exp_decay"       staying ⌈τ·exp(−0.1·max(0, l − 13))⌉ of them
                "random" draws l anew for every iteration
    advantage   every reward's own z-score in the group (unbiased std), and their weighted mean   (PerReward)
    loss        as Flow-GRPO, no KL

Cost for a prompt: group·T forwards, group leaves, group·(window's steps) trained edges; at the defaults 300, 12, 48.

Defaults: Tencent-Hunyuan/MixGRPO (grpo_states.py and scripts read in source; sure): T 25, window 4, τ 25, stride 1,
roll back, group 12, noise 0.7, clip 1e-4, eps 1e-8, one noise per group, k 0.1, λ 13. Windows at the end of the range
shrink, as in the code; it ends the range at T − 2 and may stay there τ iterations with no step at
all: here it ends at T − 1 and no window is empty. stride = window is the code's "no overlap", 0 freezes the window.
The paper evaluates with the tuned model for the first 60 % of the steps and the base model after; here the tuned one
walks all of them.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal, get_args

from tempflow.algorithms.base import EXACT_KL, Algorithm, Drawn, at_least, one_of, positive, proportion, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import CreditRule, GroupZScore, PerReward
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.window import Order, SlidingWindow

Rewards = Literal["advantages", "gdpo", "scores"]


@texts_of(EXACT_KL)
def mix_grpo(
    steps: int = 25,
    group: int = 12,
    window: int = 4,
    window_end: int | None = None,
    order: Order = "progressive",
    every: int = 25,
    stride: int = 1,
    roll_back: bool = True,
    shared_noise: bool = True,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    rewards: Rewards = "advantages",
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """MixGRPO (arXiv 2507.21802): an SDE inside a sliding window of steps, an ODE outside.

    Args:
        window: noisy steps; all but the sampler's last are trained.
        window_end: the window lies in steps 0 … window_end − 1; None: T − 1, or T for a window of T.
        order: how the window moves: "progressive", "random", "decay" or "exp_decay".
        every: τ, iterations at a place before it moves on (not for "random").
        stride: steps it moves by; 0 leaves it at step 0.
        roll_back: after its last place it starts anew; else it stays there.
        rewards: several are joined as "advantages" of each, as these standardised again ("gdpo"), or as "scores".

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    slide = SlidingWindow.of(steps, window, window_end, order, every, stride, roll_back)
    return Algorithm(
        name="mix_grpo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, slide, shared_noise)),
        dynamics=FlowSDE(noise_level),
        credit=group_credit(group, rewards, eps, advantage_clip),
        phases=(EdgePhase(clipped(clip, clip, kl, "exact")),),
    )


def group_credit(group: int, rewards: Rewards, eps: float, clip: float | None) -> CreditRule:
    """MixGRPO's advantage. Raises ValueError naming argument, value and a valid one."""
    at_least("group", group, 2, "or there is nothing to compare with")
    one_of("rewards", rewards, get_args(Rewards))
    if clip is not None:
        positive("advantage_clip", clip, 5.0)
    if rewards == "scores":
        return GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=clip)
    each = GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=None)
    return PerReward(each, clip=clip, restandardise=rewards == "gdpo", eps=eps)


def _plan(
    steps: int, group: int, slide: SlidingWindow, shared_noise: bool, seed: int, iteration: int, slot: int
) -> plan.Plan:
    return window_plan(steps, group, slide.at(seed, iteration), shared_noise)


@lru_cache(maxsize=256)
def window_plan(steps: int, group: int, inside: range, shared_noise: bool) -> plan.Plan:
    """Chains, noisy in those steps and trained there but for the sampler's last."""
    return plan.chain(steps, group, [i for i in inside if i < steps - 1], inside, shared_noise)
