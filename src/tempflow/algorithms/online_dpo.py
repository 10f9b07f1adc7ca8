"""Online Diffusion-DPO: the group's best sample against its worst (Diffusion-DPO, arXiv 2311.12908).

Claim. A preference between two pictures of one prompt trains the model without a reward model's scale and without
likelihoods: the log-odds of the pair is a difference of four matching losses. Online, the pair is the policy's own.

    pair        of `group` ODE samples the one of highest reward (w) and of lowest (l); a prompt whose rewards are all
                equal is left out                          (select.Extremes, groupwise.DynamicSampling)
    loss        −mean log σ( beta/2 · [(s_w − s_w,ref) − (s_l − s_l,ref)] ), s = −mean (v − v*)², at common (t, ε)
                                                           (preference.OnlinePairs, PreferencePairs)

Cost for a prompt at the defaults: 80 forwards, 8 leaves; of these two are trained at 4 pairs, 8 forwards of policy and
of reference. (`Algorithm.cost` counts all leaves, as it cannot know of a selection: at most.)

Defaults: beta 2000 is Diffusion-DPO's and Flow-Factory's (sure; 2000 … 5000), with the mean over latent elements and
the factor ½. Diffusion-DPO has the error of the noise, Flow-Factory that of the velocity, as here. T, G, `pairs` and
the times, SD 3's pre-training density, are ours.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_dpo import diffusion_dpo
from tempflow.algorithms.diffusion_nft import held_to_reference, ode_plan
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import DynamicSampling, Extremes, GroupZScore
from tempflow.core.objective.preference import OnlinePairs, PreferencePairs
from tempflow.core.renoise import Renoise
from tempflow.core.times import LogitNormalTimes


@texts_of(diffusion_dpo)
def online_dpo(steps: int = 10, group: int = 8, pairs: int = 4, beta: float = 2000.0, kl: float = 0.0) -> Algorithm:
    """Online Diffusion-DPO: prefer the group's best picture to its worst.

    Args:
        group: pictures per prompt, of which the best and the worst make a pair.
        beta: how strongly the policy may leave the starting model.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    return Algorithm(
        name="online_dpo",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=DynamicSampling(Extremes(GroupZScore(by=("prompt",), scale="none", clip=None), 1, 1)),
        phases=(
            LeafPhase(
                OnlinePairs(PreferencePairs(beta, regularizers=held_to_reference(kl))),
                Renoise(LogitNormalTimes(pairs), 2, 2),
            ),
        ),
    )
