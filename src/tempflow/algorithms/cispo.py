"""CISPO for flows: truncate the importance weight, never the gradient (MiniMax-M1, arXiv 2506.13585).

Claim. PPO's clip takes the gradient from every step whose ratio has left the range, which are often the ones that
matter. Bound the weight instead and let all steps teach.

    loss        −sg[clip(r, 1 − clip_low, 1 + clip)] · A · log r

On a first update its gradient is Flow-GRPO's. With no bound at all it is that of the plain ratio, −A·r.

Cost and plan: Flow-GRPO's. Defaults: Flow-GRPO's, but std of the group, no KL, and no bound below, as published; the
bound above is of the size of Flow-GRPO's clip, as r is a mean over latent elements here (general knowledge of the
method; no code for flows is known).
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.objective.clip import Truncate
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, KLForm


@texts_of(flow_grpo)
def cispo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    clip_low: float = 1.0,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """CISPO (arXiv 2506.13585) on Flow-GRPO's chains: the importance weight is truncated, every step keeps a gradient.

    Args:
        clip: the weight is at most 1 + clip.
        clip_low: the weight is at least 1 − clip_low; 1 is no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    positive("clip", clip, 1e-4)
    positive("clip_low", clip_low, 1.0)
    base = flow_grpo(
        steps,
        group,
        train_steps,
        noise_level,
        kl=kl,
        kl_form=kl_form,
        std="group",
        eps=eps,
        advantage_clip=advantage_clip,
    )
    objective = PolicyRatio(Truncate(clip_low, clip), regularizers=(Divergence(kl, kl_form),))
    return replace(base, name="cispo", phases=(EdgePhase(objective),))
