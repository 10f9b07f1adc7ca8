"""DanceGRPO: one recipe for diffusion and flow, pictures and video (arXiv 2505.07818).

Claim. With a noise of constant strength, one initial noise for the whole group and a random part of the steps, GRPO
teaches any of these generators stably; of large groups it is enough to train the best and the worst.

    step        x' = x + drift + η·√Δ·z, the same η at every σ                              (DanceSDE)
    noise       all chains of a prompt start from one noise, so that their rewards differ by their steps alone
    last step   deterministic: the code decodes x̂0 = x − σ·v, which is the ODE step into σ = 0. A noisy one would
                magnify errors by −η²/(2σ_last), and its noise would never be seen
    trained     int((T − 1)·fraction) of the steps before it, drawn for every chain by itself
    advantage   A = clip((R − mean of the prompt) / (std of the prompt + eps), ±advantage_clip), unbiased std; with
                `keep`, then only the keep/2 best and keep/2 worst are trained                (core.credit.Extremes)
    loss        mean of max(−A r, −A clip(r, 1−clip, 1+clip))

Cost for a prompt: group·T forwards, group leaves, (keep or group)·int((T − 1)·fraction) trained edges; the plan counts
the full group's, as selection comes after the rewards. At the defaults 192, 12, 108.

Defaults: XueZeyue/DanceGRPO, scripts/finetune/finetune_flux_grpo.sh (read in source, sure): T 16, η 0.3, group 12,
fraction 0.6, clip 1e-4, advantages clipped at 5, eps 1e-8, no KL, shift 3. HunyuanVideo: η 0.25, group 24, keep 8,
shift 5. The code shares one noise per rank; here it is one per prompt.
"""

from __future__ import annotations

from functools import lru_cache, partial

from tempflow.algorithms.base import EXACT_KL, Algorithm, Drawn, at_least, positive, proportion, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import CreditRule, Extremes, GroupZScore
from tempflow.core.dynamics import DanceSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.rng import Stream


@texts_of(EXACT_KL)
def dance_grpo(
    steps: int = 16,
    group: int = 12,
    fraction: float = 0.6,
    keep: int | None = None,
    shared_noise: bool = True,
    noise_level: float = 0.3,
    clip: float = 1e-4,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """DanceGRPO (arXiv 2505.07818): constant noise from one shared start, a random part of the steps per picture.

    Args:
        steps: T, sampler steps of a rollout; the last is deterministic.
        fraction: share of the T − 1 noisy steps that is trained, drawn for every picture anew; 1 trains all.
        keep: how many pictures of a group are trained, half of them the best and half the worst; None: all.
        noise_level: η of the SDE, the same at all σ.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one draws no noise")
    at_least("group", group, 2, "or there is nothing to compare with")
    positive("noise_level", noise_level, 0.3)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    count = trained_steps(fraction, steps - 1)
    credit: CreditRule = GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip)
    if keep is not None:
        if keep % 2 or not 2 <= keep <= group:
            nearest = min(max(keep - keep % 2, 2), group - group % 2)
            raise ValueError(f"keep: {keep} must be even and in 2 … {group}; nearest valid: {nearest}")
        credit = Extremes(credit, keep // 2, keep // 2, by="reward")  # advantages are bounded, and may tie
    return Algorithm(
        name="dance_grpo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, count, shared_noise)),
        dynamics=DanceSDE(noise_level),
        credit=credit,
        phases=(EdgePhase(clipped(clip, clip, kl, "exact")),),
    )


def trained_steps(fraction: float, among: int) -> int:
    """int(among·fraction), not one less by rounding. Raises ValueError unless that is 1 … among."""
    count = int(among * fraction + 1e-9) if 0 < fraction <= 1 else 0
    if count < 1:
        nearest = 1.0 if fraction > 1 else round(1 / among + 5e-4, 3)
        raise ValueError(f"fraction: {fraction} of {among} steps must be 1 … {among} of them; nearest valid: {nearest}")
    return count


def _plan(steps: int, group: int, count: int, shared_noise: bool, seed: int, iteration: int, slot: int) -> plan.Plan:
    if count == steps - 1:  # every chain trains all of them: one plan for all
        return _chains(steps, group, count, shared_noise, 0, 0, 0)
    return _chains(steps, group, count, shared_noise, seed, iteration, slot)


@lru_cache(maxsize=512)
def _chains(steps: int, group: int, count: int, shared_noise: bool, seed: int, iteration: int, slot: int) -> plan.Plan:
    draws = Stream(seed, "dance_grpo.steps")
    own = [draws.permutation((iteration, slot, chain), steps - 1)[:count] for chain in range(group)]
    return plan.chains(steps, own, stochastic=range(steps - 1), shared_noise=shared_noise)
