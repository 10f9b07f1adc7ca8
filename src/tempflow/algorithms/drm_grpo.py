"""Step-GRPO with a noise-conditional latent reward (DRM, CVPR 2026, arXiv 2605.25661).

Claim. A preference model made from a diffusion transformer's own early blocks scores noisy latents at any σ. Then every
step has a reward of its own, at once: candidates drawn from one state are compared with each other, nothing is
decoded, and the forwards of a step are shared by all its candidates.

    candidates  x'_j = a·x + b·v + S·z_j, j = 1 … k, from one velocity                              (FlowSDE)
    advantage   A_j = (R(x'_j, σ') − mean over the k) / (std over the k + eps): compared at equal σ only
    loss        clipped ratio of that single transition
    goes on     by the ODE step of the same velocity, so that candidates hang off a chain of ODE steps; `carry`
                "candidate": from one of the candidates, an SDE chain                              (plan.candidates)

Cost for a prompt: chains·T forwards, chains·candidates·(T − 1) trained edges and latent scores; the chains' ends are
decoded and scored by the run's rewards, to be looked at, and do not train.

The SDE step leaves more noise in x' than σ' says, most in a last step down to nearly 0, and down an SDE chain it adds
up; a reward that learned from (1 − σ)x0 + σε then judges what it never saw. An ODE chain leaves the one step's excess.
`dynamics="cps"` has none, and takes that step's ratio unscaled (`flow_cps`), which fades out at the end.

Defaults. The paper's text (read whole, sure): 6 candidates, 24 samples in all as 4 chains, clip 1e-4, and with it
learning rate 1e-4 and LoRA of rank 32 and alpha 64, which are the run's. Its figure 4 draws the chain of ODE steps; the
text says only "from the current state" (likely). Noise level, T and KL are not given; 0.7 and 10 are Flow-GRPO's. A
step's reward is a value, not a gain: right in 74.0 % of pairs at t = 0, 73.0 at 500, 65.1 at 750. No code was found.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, at_least, one_of, positive, positive_or, proportion, texts_of
from tempflow.algorithms.flow_cps import UnscaledRatio
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS, FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.objective.regularizer import KLForm


@texts_of()
def drm_grpo(
    reward: str = "runs/latent-reward",
    steps: int = 10,
    chains: int = 4,
    candidates: int = 6,
    carry: plan.Carry = "ode",
    dynamics: Literal["flow", "cps"] = "flow",
    noise_level: float | None = None,
    clip: float | None = None,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """DRM's Step-GRPO (arXiv 2605.25661): at every step, candidates compared by a reward on noisy latents.

    Args:
        reward: folder of the latent reward (scripts/train_latent_reward.py makes one); "shapes" comes with the package.
        chains: independent chains per prompt.
        candidates: k, successors drawn at every step but the last, compared with each other.
        carry: how a chain goes on: "ode" by the step without noise, or "candidate" from one of them.
        dynamics: "flow" for Flow-GRPO's SDE step, "cps" for the step that keeps the noise level the reward is told.
        noise_level: of the step; None: 0.7 for "flow", 0.8 for "cps".
        clip: ratio clip below and above 1; None: 1e-4 for "flow", 1e-5 for "cps".
        kl_form: "exact", "velocity", or an estimate at the sampled state: "k1", "k2" or "k3".

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("chains", chains, 1)
    at_least("candidates", candidates, 2, "or there is nothing to compare with")
    one_of("carry", carry, get_args(plan.Carry))
    one_of("dynamics", dynamics, ("flow", "cps"))
    level = positive_or("noise_level", noise_level, 0.7 if dynamics == "flow" else 0.8)
    bound = proportion("clip", clip, 1e-4 if dynamics == "flow" else 1e-5)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    if not reward:
        raise ValueError("reward: is empty; nearest valid: 'runs/latent-reward', a latent reward's folder")
    grown = _candidates(steps, chains, candidates, carry)
    return Algorithm(
        name="drm_grpo",
        steps=steps,
        plan=lambda iteration, slot: grown,
        dynamics=FlowSDE(level) if dynamics == "flow" else CPS(level),
        credit=GroupZScore(by=("prompt", "parent"), eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(bound, bound, kl, kl_form, None if dynamics == "flow" else UnscaledRatio())),),
        latent_reward=reward,
    )


@lru_cache(maxsize=64)
def _candidates(steps: int, chains: int, count: int, carry: plan.Carry) -> plan.Plan:
    return plan.candidates(steps, chains, count, carry)
