"""Diffusion-DPO on preference pairs from disk (arXiv 2311.12908).

Claim. A preference between two pictures of one prompt trains the model without a reward and without likelihoods: the
log-odds of the pair is a difference of four matching losses. Nothing is sampled while training.

    pair        each prompt's own `chosen` (w) and `rejected` (l) picture, encoded to latents          (OfflineSamples)
    loss        −mean log σ( beta/2 · [(s_w − s_w,ref) − (s_l − s_l,ref)] ), s = −mean (v − v*)², at common (t, ε)
                                                           (preference.OnlinePairs, PreferencePairs)

The loss is `online_dpo`'s: the two differ by where the pair comes from, and have one gradient for one pair. Training
prompts are a .jsonl of {"prompt": …, "chosen": "a.png", "rejected": "b.png"}, pictures beside it (data/pictures.py).
The run's rewards judge validation and test alone.

Cost for a prompt: no rollout, no decode, no reward call; two pictures at `pairs` (t, ε), 8 forwards of policy and of
reference at the defaults. Each picture is encoded anew whenever its prompt comes.

Defaults: beta 2000 is Diffusion-DPO's and Flow-Factory's (sure; 2000 … 5000), with the mean over latent elements and
the factor ½. Diffusion-DPO has the error of the noise, Flow-Factory that of the velocity, as here; they differ by the
factor (1 − t)², so at equal beta the early times weigh more here. `pairs` and the times, SD 3's pre-training density,
are ours (the paper draws t evenly).
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_nft import held_to_reference
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import AsScored
from tempflow.core.objective.preference import OnlinePairs, PreferencePairs
from tempflow.core.offline import OfflineSamples
from tempflow.core.renoise import Renoise
from tempflow.core.times import LogitNormalTimes

PAIR = OfflineSamples(("chosen", "rejected"), (1.0, 0.0))


@texts_of()
def diffusion_dpo(pairs: int = 4, beta: float = 2000.0, kl: float = 0.0) -> Algorithm:
    """Diffusion-DPO: prefer the chosen picture of a pair on disk to the rejected one.

    Args:
        pairs: (t, ε) at which the two are compared.
        beta: how strongly the policy is held to the starting model; small values let it leave.
        kl: weight of the squared velocity distance to the starting model.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    return Algorithm(
        name="diffusion_dpo",
        steps=1,  # these times ask for no grid
        plan=PAIR.plan,
        offline=PAIR,
        credit=AsScored(),
        phases=(
            LeafPhase(
                OnlinePairs(PreferencePairs(beta, regularizers=held_to_reference(kl))),
                Renoise(LogitNormalTimes(pairs), 2, 2),
            ),
        ),
    )
