"""Flow-GRPO: online policy gradients for flow matching by turning the ODE sampler into an SDE (arXiv 2505.05470).

Claim. Every denoising step of the SDE is a Gaussian action, so PPO's clipped ratio applies to it; a group of pictures
of one prompt is scored at the end only, and that one advantage is given to every step of a picture. Few steps suffice
in training (10) although evaluation uses 40.

    step        x' = a·x + b·v + S·z with s = noise_level·sqrt(σ/(1−σ)), S = s√Δ              (FlowSDE)
    advantage   A = clip((R − mean over the prompt's group) / (std + eps), ±advantage_clip)
    loss        mean over steps of max(−A r, −A clip(r, 1−clip, 1+clip)) + kl · mean (μ − μ_ref)² / (2s²)

Trajectories: `group` chains from independent noises, stochastic at every step, trained at all but the last.
Cost for a prompt at the defaults: 240 forwards, 24 leaves, 216 trained edges.

Defaults are those of the official code for SD 3.5 (config/base.py, config/grpo.py, stat_tracking.py; read in source,
sure): 10 steps, group 24, noise 0.7, clip 1e-4, advantages clipped at 5, β 0.04 for GenEval and OCR (0.01 for
PickScore) on the KL form without Δ, mean by prompt and standard deviation of all scores of the iteration, eps 1e-4.
FLUX: 6 steps, noise 0.9, kl 0. Qwen-Image: noise 1.2, group 16. Not here: EMA and optimizer, which are the run's.
Under guidance no gradient goes through the prediction without a prompt, as in the newer official code: the adapter's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import Algorithm, Drawn, at_least, positive, proportion, some_steps, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.objective.regularizer import KLForm


@texts_of()
def flow_grpo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    clip_high: float | None = None,
    kl: float = 0.04,
    kl_form: KLForm = "drift",
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flow-GRPO (arXiv 2505.05470): noisy chains, terminal reward, clipped ratio at every step.

    Args:
        train_steps: None trains every step but the last; n trains n of these, drawn anew each iteration and the same
            for all prompts. Our own knob to save compute (DanceGRPO trains a random 60 % of steps).
        kl_form: "drift" (the official code's, without Δ), "exact", "velocity", or an estimate at the sampled state, as
            language models have it: "k1", "k2" (its gradient is the KL's on average) or "k3".

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan_of = chains_plan(steps, group, train_steps)
    if std not in ("global", "group"):
        raise ValueError(f"std: {std!r} is not one of 'global', 'group'; nearest valid: 'global'")
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    return Algorithm(
        name="flow_grpo",
        steps=steps,
        plan=plan_of,
        dynamics=FlowSDE(noise_level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(clip, clip if clip_high is None else clip_high, kl, kl_form)),),
    )


def chains_plan(
    steps: int,
    group: int,
    train_steps: int | None = None,
    *,
    shared_noise: bool = False,
    noisy_last: bool = True,
    skip_last: int = 1,
) -> Callable[[int, int], plan.Plan]:
    """(iteration, prompt slot) -> `group` chains, noisy at every step; what Flow-GRPO and its relatives share.

    train_steps   None trains every step but the last ones; n trains n of these, drawn anew each iteration: the same
                  ones for all prompts and all algorithms of this plan
    shared_noise  all chains of a prompt start from one initial noise
    noisy_last    whether the last step draws noise too, as Flow-GRPO's does; DanceGRPO's is an ODE step
    skip_last     steps at the end that are never trained, at least the last one

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    if not 1 <= skip_last < steps:
        nearest = min(max(skip_last, 1), steps - 1)
        raise ValueError(f"skip_last: {skip_last} must be in 1 … {steps - 1}; nearest valid: {nearest}")
    most = steps - skip_last
    if train_steps is not None and not 1 <= train_steps <= most:
        nearest = min(max(train_steps, 1), most)
        raise ValueError(f"train_steps: {train_steps} must be in 1 … {most}; nearest valid: {nearest}")
    if train_steps is None or train_steps == most:
        return partial(_every, steps, group, tuple(range(most)), shared_noise, noisy_last)
    return Drawn(partial(_some, steps, group, train_steps, most, shared_noise, noisy_last))


def _every(
    steps: int, group: int, train: tuple[int, ...], shared: bool, noisy_last: bool, iteration: int, slot: int
) -> plan.Plan:
    return _chains(steps, group, train, shared, noisy_last)


def _some(
    steps: int, group: int, count: int, most: int, shared: bool, noisy_last: bool, seed: int, iteration: int, slot: int
) -> plan.Plan:
    return _chains(steps, group, some_steps("flow_grpo", seed, iteration, count, most), shared, noisy_last)


@lru_cache(maxsize=256)
def _chains(steps: int, group: int, train: tuple[int, ...], shared: bool, noisy_last: bool) -> plan.Plan:
    noisy = range(steps if noisy_last else steps - 1)
    return plan.chain(steps, group, train=train, stochastic=noisy, shared_noise=shared)
