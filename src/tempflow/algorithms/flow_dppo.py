"""Flow-DPPO: a bound on the divergence of a step's law in place of a clip of its ratio (arXiv 2606.11025; UniRL).

Claim. A clip looks at the ratio of one sample, which is a noisy estimate of how far the policy has moved: it holds some
steps too tightly and others not at all. A flow's step is a Gaussian before and after, so their KL is exact and costs
nothing. Leave out an edge only where that is large and the step goes on to move away.

    divergence  κ = mean (μ − μ_old)² / (2S²), a mean over latent elements; `scaled` False: S = 1
    loss        mean over edges of −A·r, with 0 for an edge of κ ≥ threshold and A·(r − 1) > 0       (DivergenceMask)
                + kl · mean (μ − μ_ref)² / (2S²)
    steps       noise, and training, at `noisy_steps` of the first `first_steps` steps, drawn for every iteration; the
                others by ODE
    advantage   as Flow-GRPO

On a first update r is 1 and κ is 0, so its gradient is Flow-GRPO's; with a threshold that is never reached it is the
plain ratio's, −A·r. The rollout keeps μ_old: one more latent per noisy edge.

Cost for a prompt: group·T forwards, group leaves, group·noisy_steps trained edges; at the defaults 160, 16, 48.

Defaults: FlowDPPO/config.yaml and unirl/algorithms/flowdppo.py of Tencent-Hunyuan/UniRL (read in source, sure): T 10,
group 16, noise 0.7, 3 of the first half's steps, threshold 1e-5 on the scaled divergence, mean of the prompt and std of
all scores, no KL (the exact form, with Δ, where there is one), no guidance, 2 updates an iteration, which are the
run's. eps and the advantage's bound are Flow-GRPO's.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import Algorithm, Drawn, at_least, one_of, positive, some_steps, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.clip import DivergenceMask
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, KLForm


@texts_of()
def flow_dppo(
    steps: int = 10,
    group: int = 16,
    noisy_steps: int = 3,
    first_steps: int | None = None,
    noise_level: float = 0.7,
    threshold: float = 1e-5,
    scaled: bool = True,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flow-DPPO (arXiv 2606.11025): an exact divergence bounds the policy in place of a clipped ratio.

    Args:
        noisy_steps: steps with noise, all trained, drawn anew each iteration and the same for all prompts.
        first_steps: these are drawn from 0 … first_steps − 1; None: the first half, or as many as noisy_steps.
        threshold: δ, the divergence from which an edge that moves further away is left out.
        scaled: the divergence is that of the step's law, over 2S²; False: over 2.
        kl_form: "exact", "drift", "velocity", "k1", "k2" or "k3".

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    if not 1 <= noisy_steps < steps:
        nearest = min(max(noisy_steps, 1), steps - 1)
        raise ValueError(f"noisy_steps: {noisy_steps} must be in 1 … {steps - 1}; nearest valid: {nearest}")
    among = max(noisy_steps, steps // 2) if first_steps is None else first_steps
    if not noisy_steps <= among < steps:
        nearest = min(max(among, noisy_steps), steps - 1)
        raise ValueError(f"first_steps: {among} must be in {noisy_steps} … {steps - 1}; nearest valid: {nearest}")
    one_of("std", std, ("global", "group"))
    positive("noise_level", noise_level, 0.7)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    return Algorithm(
        name="flow_dppo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, noisy_steps, among)),
        dynamics=FlowSDE(noise_level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(PolicyRatio(DivergenceMask(threshold, scaled), regularizers=(Divergence(kl, kl_form),))),),
    )


def _plan(steps: int, group: int, count: int, among: int, seed: int, iteration: int, slot: int) -> plan.Plan:
    return _noisy(steps, group, some_steps("flow_dppo", seed, iteration, count, among))


@lru_cache(maxsize=256)
def _noisy(steps: int, group: int, at: tuple[int, ...]) -> plan.Plan:
    return plan.chain(steps, group, train=at, stochastic=at)
