"""SAPO for flows: a soft gate in place of a clip (arXiv 2511.20347).

Claim. A hard clip gives all of a step's gradient or none of it. A sigmoid of the ratio fades it: full at r = 1, less
the further r has gone either way; faster where the advantage is negative, as such steps are the less stable.

    loss        −A · f(r),  f(r) = 4/τ · sigmoid(τ (r − 1)),  τ = temperature where A > 0, else temperature_negative

f'(1) = 1, so on a first update its gradient is Flow-GRPO's. τ → 0 is the plain ratio; a τ of 1/clip is the soft
counterpart of that clip.

Cost and plan: Flow-GRPO's. Defaults: Flow-GRPO's, but std of the group and no KL. Published τ are 1 and 1.05, for token
ratios; r is a mean over latent elements here, so the τ are larger by as much as clips are smaller: 1/1e-4, same
proportion (second-hand; no code for flows is known).
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.objective.clip import SoftGate
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, KLForm


@texts_of(flow_grpo)
def sapo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    temperature: float = 1e4,
    temperature_negative: float = 1.05e4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """SAPO (arXiv 2511.20347) on Flow-GRPO's chains: the ratio's gradient fades softly instead of being clipped.

    Args:
        temperature: τ where the advantage is positive; about 1 / the clip it stands for.
        temperature_negative: τ where it is negative.

    Raises ValueError naming the argument, its value and a valid one.
    """
    positive("temperature", temperature, 1e4)
    positive("temperature_negative", temperature_negative, 1.05e4)
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
    objective = PolicyRatio(SoftGate(temperature, temperature_negative), regularizers=(Divergence(kl, kl_form),))
    return replace(base, name="sapo", phases=(EdgePhase(objective),))
