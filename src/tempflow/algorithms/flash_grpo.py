"""Flash-GRPO: one trained step a prompt (arXiv 2605.15980, ICML 2026).

Claim. A single noisy step is enough, if its group shares it (members at different steps would be compared for their
steps, not for their actions) and if its gradient is rectified: its size goes with |b|/S, which grows with the steps.

    step        x' = a·x + b·v + S·z at one step, s = σ_1·σ; ODE elsewhere                     (LinearSDE)
    which step  uniform over the noisier half, drawn for every iteration and prompt, shared by the prompt's group
    weight      w = S/|b|, with mean 1
    advantage, loss   as Flow-GRPO

Cost for a prompt: group·T forwards, group leaves, group trained edges.

Defaults: config/dgx.py `wan2_1_flash` (read in source, sure): T 20, steps from the first 10, clip 1e-3, standard
deviation of all scores, no KL, advantages clipped at 5. Group 8 is our reading of an ambiguous comment. The weight is
computed, not tabulated, and has mean 1 over the distinct steps trained; the code's mean runs over samples, which is the
same where the iteration's prompts spread evenly over steps.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import EXACT_KL, Algorithm, Drawn, at_least, one_of, positive, proportion, texts_of
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan, weight
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import LinearSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.rng import Stream


@texts_of(EXACT_KL)
def flash_grpo(
    steps: int = 20,
    group: int = 8,
    first_steps: int | None = None,
    clip: float = 1e-3,
    kl: float = 0.0,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flash-GRPO (arXiv 2605.15980): one noisy step per prompt, shared by its group, with a rectified gradient.

    Args:
        first_steps: the step is drawn from 0 … first_steps − 1; None: the first half.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    proportion("clip", clip, 1e-3)
    one_of("std", std, ("global", "group"))
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    among = steps // 2 if first_steps is None else first_steps
    if not 1 <= among < steps:
        raise ValueError(
            f"first_steps: {among} must be in 1 … {steps - 1}; nearest valid: {min(max(among, 1), steps - 1)}"
        )
    return Algorithm(
        name="flash_grpo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, among)),
        dynamics=LinearSDE(),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(clip, clip, kl, "exact"), weight.rectified),),
    )


def _plan(steps: int, group: int, among: int, seed: int, iteration: int, slot: int) -> plan.Plan:
    return _one_step(steps, group, Stream(seed, "flash_grpo.step").integers((iteration, slot), among, 1)[0])


@lru_cache(maxsize=256)
def _one_step(steps: int, group: int, at: int) -> plan.Plan:
    return plan.one_step(steps, group, at)
