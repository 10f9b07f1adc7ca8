"""RLOO for flows: REINFORCE with a leave-one-out baseline (Kool et al. 2019; for language models arXiv 2402.14740).

Claim. A sample's own reward must not be in its baseline: the mean of the group's other rewards leaves the gradient
unbiased and still cancels what a prompt has in common. No division by a standard deviation, so prompts whose pictures
hardly differ count for little.

    advantage   A_k = R_k − mean of the group's others = n/(n−1) · (R_k − mean of the group)
    loss        Flow-GRPO's; without `clip` the plain −A·log r, as published (one update an iteration)

Cost and plan: Flow-GRPO's. Defaults: Flow-GRPO's but for the advantage (general knowledge of the method; no code for
flows is known). The published form puts the KL into the reward; here it is Flow-GRPO's loss term.
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore
from tempflow.core.objective.clip import Score
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, KLForm


@texts_of(flow_grpo)
def rloo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float | None = 1e-4,
    kl: float = 0.04,
    kl_form: KLForm = "drift",
    advantage_clip: float | None = None,
) -> Algorithm:
    """RLOO (arXiv 2402.14740) on Flow-GRPO's chains: the others' mean is the baseline, and nothing is scaled.

    Args:
        clip: ratio clip below and above 1; None: the plain score function, which nothing bounds.
        advantage_clip: bound of |A|, which has the reward's unit; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 1.0)
    base = flow_grpo(steps, group, train_steps, noise_level, 1e-4 if clip is None else clip, kl=kl, kl_form=kl_form)
    credit = GroupZScore(by=("prompt", "step"), center="others", scale="none", clip=advantage_clip)
    score = EdgePhase(PolicyRatio(Score(), regularizers=(Divergence(kl, kl_form),)))
    return replace(base, name="rloo", credit=credit, phases=(score,) if clip is None else base.phases)
