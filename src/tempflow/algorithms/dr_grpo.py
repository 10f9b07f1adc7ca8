"""Dr. GRPO for flows: GRPO without its two biases (arXiv 2503.20783).

Claim. Dividing by a group's standard deviation gives prompts that are nearly solved or nearly hopeless, whose rewards
hardly differ, as much weight as the others; dividing by a sample's length favours long wrong answers. Do neither.

    advantage   A = R − mean of the prompt's group
    loss        Flow-GRPO's, a mean over all trained steps

All trajectories have the same number of steps, so of the two only the first changes anything here. It is RLOO's
advantage times (n−1)/n.

Cost and plan: Flow-GRPO's. Defaults: Flow-GRPO's, but no KL, as published (general knowledge of the method; no code
for flows is known).
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.core.credit import GroupZScore
from tempflow.core.objective.regularizer import KLForm


@texts_of(flow_grpo)
def dr_grpo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    clip_high: float | None = None,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    advantage_clip: float | None = None,
) -> Algorithm:
    """Dr. GRPO (arXiv 2503.20783) on Flow-GRPO's chains: rewards are centred on their group's mean, and not scaled.

    Args:
        advantage_clip: bound of |A|, in units of the reward; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 1.0)
    base = flow_grpo(steps, group, train_steps, noise_level, clip, clip_high, kl, kl_form)
    return replace(base, name="dr_grpo", credit=GroupZScore(by=("prompt", "step"), scale="none", clip=advantage_clip))
