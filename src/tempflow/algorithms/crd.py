"""CRD, centred reward distillation: regress the implicit reward on the given one (arXiv 2603.14128).

Claim. The optimum of KL-regularised reward maximisation has log p_θ/p_old = R/β up to a constant of the prompt. Centre
both sides over the prompt's group and that constant is gone: what is left is a plain regression, without a sampler's
noise or a policy gradient.

    advantage   A = clip((R − mean of the prompt) / (std of all scores + eps), ±advantage_max)
    given       a = A/(2·advantage_max) + ½
    implicit    r = log p_θ − log p_old, log p = −mean (v − v*)² / sg mean |v − v*|  (Adaptive("velocity"))
    loss        advantage_max/beta · mean (beta·(r − sg mean r) − (a − mean a))², means over the group at one t; with a
                `temperature` the means are weighted, twice                            (preference.CentredReward)
                + kl · mean (c + (1−c)·a)·mean (v − v_ref)², c = min(1, 1e-4/kl): what scores well is held most
    sets        "old" for the implicit reward, "sampling" for the rollouts; both lag       (ema.Ramp)

Cost for a prompt at the defaults: 240 forwards, 24 leaves; 216 pairs, each a forward of policy, old and reference. A
micro-batch never splits a group at one pair: 24 forwards.

Defaults: its authors' contribution to Flow-Factory, trainers/crd.py and its arguments (read, sure): beta 1, M 5,
uniform means, kl 0.1, old's decay 0.25 + 0.005·i up to 0.999, sampling's "75-0-0.0075-0.999", the noisiest int(0.99·T)
t. T 10, G 24 ours. Differences: the code centres over the gathered batch, the paper and we over the prompt; the code's
reference has guidance 4.5, ours that of the run; per-reward advantages (GDPO) are a credit to be put around this one.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, one_of, texts_of
from tempflow.algorithms.dgpo import first_times
from tempflow.algorithms.diffusion_nft import diffusion_nft, ode_plan, positive_value
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import GroupZScore
from tempflow.core.ema import Ramp
from tempflow.core.objective.preference import CentredReward, Regression
from tempflow.core.renoise import Renoise

OLD, SAMPLING = Ramp(-50, 0.005, 0.999), Ramp(75, 0.0075, 0.999)


@texts_of(diffusion_nft)
def crd(
    steps: int = 10,
    group: int = 24,
    beta: float = 1.0,
    advantage_max: float = 5.0,
    temperature: float | None = None,
    form: Regression = "mse",
    fraction: float = 0.99,
    kl: float = 0.1,
    adaptive_kl: bool = True,
    lagged_sampler: bool = True,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
) -> Algorithm:
    """CRD (arXiv 2603.14128): the group-centred implicit reward is regressed on the group-centred given one.

    Args:
        beta: β, how small a change of likelihood a reward asks for.
        advantage_max: M, where |A| is clipped and a reaches 0 or 1.
        temperature: None: plain means; τ: softmax weights towards the best and towards the worst; 0: the best's half
            and the worst's half.
        form: "mse", or "bce" for the cross-entropy of the two sides' sigmoids.
        fraction: share of the sampler's grid that is trained, the noisiest part of it.
        adaptive_kl: hold the samples that score well more than the others.
        lagged_sampler: a lagged copy samples; False: the policy itself.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("std", std, ("global", "group"))
    clip = positive_value("advantage_max", advantage_max)
    return Algorithm(
        name="crd",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale=std, eps=eps, clip=clip),
        phases=(
            LeafPhase(
                CentredReward(beta, advantage_max, temperature, kl, adaptive_kl, form=form),
                Renoise(first_times(steps, fraction), share_times=2),
            ),
        ),
        weight_sets={"old": OLD} | ({"sampling": SAMPLING} if lagged_sampler else {}),
        sampler="sampling" if lagged_sampler else "policy",
    )
