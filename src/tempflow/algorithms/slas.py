"""SLAS: super-linear advantage shaping (arXiv 2605.10937).

Claim. Dividing by each prompt's standard deviation miscalibrates prompts against each other; leaving it out gives a
step that is linear in the advantage and still mixes signal with noise. Measure distance between policies by a metric
that makes it cheap to move along large advantages, and the best step goes with a power of the advantage above 1.

    advantage   d = R − mean of the prompt's group;  s = sign(d)·|d|^(1+γ)
                A = clip(s / (root mean square of s over the iteration + eps), ±advantage_clip)
    loss        the base's clipped ratio

γ = 0 is REINFORCE++ with the group's mean as baseline. The s of a group do not sum to 0 unless its rewards lie
symmetrically; the bound comes after the shaping, as s has heavy tails. A large γ leaves little but the best and worst.

Cost for a prompt at the defaults: 192 forwards, 12 leaves, 108 trained edges.

Sources: the abstract and one second-hand formula; no code. γ is not known: 0.5 is ours. That the scale comes after the
power is our reading (before it, only eps and the bound would act differently); it is a root mean square, which for
γ = 0 is the standard deviation. The base is DanceGRPO, with its settings (code): constant η 0.3, shared initial noise,
last step by ODE, a random 60 % of T 16 steps trained (drawn per iteration here), group 12, clip 1e-4, no KL.
"""

from __future__ import annotations

import math
from typing import Literal

from tempflow.algorithms.base import Algorithm, one_of, positive, positive_or, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan, flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.objective.regularizer import KLForm


@texts_of(flow_grpo)
def slas(
    steps: int = 16,
    group: int = 12,
    train_steps: int | None = 9,
    gamma: float = 0.5,
    dynamics: Literal["dance", "flow"] = "dance",
    noise_level: float | None = None,
    shared_noise: bool = True,
    clip: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 0.0,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """SLAS (arXiv 2605.10937): advantages are a power above 1 of the centred reward, with one scale for the batch.

    Args:
        gamma: γ, at least 0; 0 is linear. The paper's is not known.
        dynamics: "dance": a constant diffusion rate; "flow": Flow-GRPO's SDE.
        noise_level: η of "dance", a of "flow"; None: 0.3 for "dance", 0.7 for "flow".
        eps: added to the batch's scale, in the unit of the reward to the power 1 + γ; 0 is safe.
        advantage_clip: bound of |A|, after the shaping; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, train_steps, shared_noise=shared_noise, noisy_last=False)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: {gamma} must be finite and at least 0; nearest valid: 0, which is linear")
    one_of("dynamics", dynamics, ("dance", "flow"))
    level = positive_or("noise_level", noise_level, 0.3 if dynamics == "dance" else 0.7)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    return Algorithm(
        name="slas",
        steps=steps,
        plan=plan,
        dynamics=DanceSDE(level) if dynamics == "dance" else FlowSDE(level),
        credit=GroupZScore(by=("prompt", "step"), scale="pooled", power=1 + gamma, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(clip, clip, kl, kl_form)),),
    )
