"""Rejection fine-tuning: flow matching on the group's best samples (RAFT, ReST and best-of-n for flows).

Claim. The simplest use of a reward: sample many, keep the best, train on them as on data. Nothing but the choice knows
of the reward; a baseline that every other method should beat at equal cost.

    selection   the `best` samples of each prompt by reward; a prompt whose rewards are all equal is left out
                                                           (select.Extremes, groupwise.DynamicSampling)
    loss        mean (v − v*)² at `pairs` (t, ε) of each + kl·mean (v − v_ref)²          (preference.Supervised)

Unlike the signed methods it does not move at all away from what is bad, and drifts towards its own samples' mistakes:
trained on itself without a choice a model loses variety.

Cost for a prompt at the defaults: 240 forwards, 24 leaves; best·pairs = 24 trained pairs. (`Algorithm.cost` counts
all leaves, as it cannot know of a selection: at most.)

Defaults: general knowledge, no published setting for flows; the best quarter of 24, 4 pairs, SD 3's pre-training
density of t.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_nft import diffusion_nft, held_to_reference, ode_plan
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import DynamicSampling, Extremes, GroupZScore
from tempflow.core.objective.preference import Supervised
from tempflow.core.renoise import Renoise
from tempflow.core.times import LogitNormalTimes


@texts_of(diffusion_nft)
def rejection_sft(steps: int = 10, group: int = 24, best: int = 6, pairs: int = 4, kl: float = 0.0) -> Algorithm:
    """Rejection fine-tuning: flow matching on the best of each prompt's own samples.

    Args:
        group: pictures per prompt, of which the best are kept.
        best: how many are kept, fewer than `group`.
        pairs: (t, ε) of a kept picture.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    plan = ode_plan(steps, group)
    if not 1 <= best < group:
        raise ValueError(f"best: {best} must be in 1 … {group - 1}; nearest valid: {min(max(best, 1), group - 1)}")
    return Algorithm(
        name="rejection_sft",
        steps=steps,
        plan=plan,
        credit=DynamicSampling(Extremes(GroupZScore(by=("prompt",), scale="none", clip=None), best, 0)),
        phases=(LeafPhase(Supervised(regularizers=held_to_reference(kl)), Renoise(LogitNormalTimes(pairs))),),
    )
