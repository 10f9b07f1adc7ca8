"""TempFlow-GRPO: when in the trajectory matters (arXiv 2508.04324, ICLR 2026).

Claim. A picture's reward, copied to all its steps, says little about any of them, and plain GRPO weighs steps the wrong
way round: noise early on decides most of the picture, the gradient is largest late. Three parts mend this.

1. Trajectory branching. Each initial noise gets a deterministic trunk x̄. At every step i but the last, `branches`
   children x' = a·x̄ + b·v(x̄) + S·z leave it, by the same velocity as the trunk's own step, and are finished by ODE.
   All randomness of such a picture comes from its one noisy step, so its reward is that step's reward.
2. Noise-aware weights w_i = S_i / mean S over the trained steps (Eq. 7-8).
3. Seed groups: only branches of one prompt, one initial noise and one step are compared.

    advantage   A = clip((R − mean of the group) / (std of the group + eps), ±advantage_clip)
    loss        mean of w_i · max(−A r, −A clip(r, 1−clip, 1+clip)) + kl · mean (μ − μ_ref)² / (2S²)

Cost for a prompt at the defaults: seeds·(T−1) + seeds·branches·T(T−1)/2 = 1116 forwards, 216 leaves, 216 trained edges.

Defaults are those of the official code for SD 3.5 (config/dgx.py, train_sd3_pr.py; read in source, sure): 10 steps,
4 seeds of 6 branches, noise 0.7 (0.9 FLUX, 1.2 Qwen-Image), exact KL with β 0.004 for GenEval (0.001 PickScore, 0.004
FLUX with HPSv3, 0 Qwen-Image), population std, eps 1e-4, seed groups (the paper also shows prompt and batch groups).
Clip 1e-4 and the advantages' bound 5 are in no line of theirs: they are flow_grpo's config/base.py, on which theirs is
built and whose copy there we have not seen (likely). `branch_steps` is ours. Under guidance that code's gradient also
goes through the prediction without a prompt; here, as in Flow-GRPO's newer code, it does not.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import EXACT_KL, Algorithm, Drawn, at_least, positive, proportion, some_steps, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.weight import noise_aware, rectified, uniform

StdGroup = Literal["seed", "prompt", "batch"]

WEIGHTS = {"noise_aware": noise_aware, "uniform": uniform, "rectified": rectified}


@texts_of(EXACT_KL)
def tempflow_grpo(
    steps: int = 10,
    seeds: int = 4,
    branches: int = 6,
    branch_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    clip_high: float | None = None,
    kl: float = 0.004,
    std_group: StdGroup = "seed",
    weight: Literal["noise_aware", "uniform", "rectified"] = "noise_aware",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """TempFlow-GRPO (arXiv 2508.04324): a trunk that branches at every step, so each step has its own reward.

    Args:
        seeds: initial noises (trunks) per prompt.
        branches: K, noisy children at every branched step.
        branch_steps: None branches at every step but the last; n at n of these, drawn anew each iteration and the same
            for all prompts. Our own knob to save compute, not the paper's.
        std_group: what is compared: branches of one "seed", of all the "prompt"'s seeds, or the latter with the
            standard deviation of the whole "batch"; always at one step.
        weight: loss weight of a step: "noise_aware", "uniform", or "rectified" (Flash-GRPO's; not the paper's): noise-
            aware gradients grow with a step's length Δ, which on a shifted grid is longest late; rectified ones do not.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not branched")
    at_least("seeds", seeds, 1)
    at_least("branches", branches, 1)
    if branch_steps is not None and not 1 <= branch_steps < steps:
        nearest = min(max(branch_steps, 1), steps - 1)
        raise ValueError(f"branch_steps: {branch_steps} must be in 1 … {steps - 1}; nearest valid: {nearest}")
    if weight not in WEIGHTS:
        raise ValueError(f"weight: {weight!r} is not one of {', '.join(WEIGHTS)}; nearest valid: 'noise_aware'")
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    return Algorithm(
        name="tempflow_grpo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, seeds, branches, branch_steps)),
        dynamics=FlowSDE(noise_level),
        credit=_credit(std_group, seeds, branches, eps, advantage_clip),
        phases=(EdgePhase(clipped(clip, clip if clip_high is None else clip_high, kl, "exact"), WEIGHTS[weight]),),
    )


def _credit(std_group: StdGroup, seeds: int, branches: int, eps: float, clip: float | None) -> GroupZScore:
    if std_group == "seed":
        at_least("branches", branches, 2, "or a seed's group has nothing to compare with")
        return GroupZScore(by=("prompt", "root", "step"), scale="group", eps=eps, clip=clip)
    if std_group not in ("prompt", "batch"):
        raise ValueError(f"std_group: {std_group!r} is not one of 'seed', 'prompt', 'batch'; nearest valid: 'seed'")
    if seeds * branches < 2:
        raise ValueError(f"branches: {branches} with {seeds} seed leaves nothing to compare with; nearest valid: 2")
    return GroupZScore(by=("prompt", "step"), scale="batch" if std_group == "batch" else "group", eps=eps, clip=clip)


def _plan(steps: int, seeds: int, branches: int, count: int | None, seed: int, iteration: int, slot: int) -> plan.Plan:
    if count is None or count == steps - 1:
        return _forest(steps, seeds, branches, None)
    return _forest(steps, seeds, branches, some_steps("tempflow_grpo", seed, iteration, count, steps - 1))


@lru_cache(maxsize=256)
def _forest(steps: int, seeds: int, branches: int, at: tuple[int, ...] | None) -> plan.Plan:
    return plan.branch_each_step(steps, seeds, branches, at)
