"""OTCA: credit by step (TCD) and by objective (MOCA) for one scalar advantage each (arXiv 2604.19234).

Claim. A step matters as it moves the latent toward what it becomes; and fixed reward weights let one objective win at
another's cost, so objectives are mixed per sample, by the point of least norm.

    TCD     d_t = max(cos(x_{t+1}, x_T) − cos(x_t, x_T), 0) + floor,  w_t = n·d_t / Σ d over the path     (StepCredit)
    MOCA    A = (1 − explore)·m + explore·Σ u_k A_k, m the point nearest 0 of the hull of the A_k          (MinNorm)
            A_k = clip((R_k − mean of the prompt's group) / (its std + eps), ±advantage_clip), a z-score by reward
    loss    mean over steps of max(−w A r, −w A clip(r, 1−clip, 1+clip))

All objectives push a sample along one direction ∇log π, so the min-norm mix is one of numbers: of one sign, the
smallest A_k; of two signs 0, and only `explore` lets such a sample teach. u is the run's reward weights, normalised.
With a single reward MOCA does nothing.

Trajectories: `group` chains, trained at every step but the last. kind "dance": DanceGRPO's step from one shared noise,
its last step by ODE; "flow": Flow-GRPO's, from own noises.
Cost for a prompt at the defaults: 240 forwards, 12 leaves, 228 trained edges (fewer where objectives cancel).

Known only from the abstract and one second-hand review of v1; no code was found. The formulas are canonical readings of
these: whether weights have mean 1 or sum 1, the ε (`floor`), the ρ (`explore`) and u are not known and are ours. Steps
(20, FLUX 512²) second-hand; group, η 0.3, clip, eps are DanceGRPO's, its base.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import EXACT_KL, Algorithm, one_of, positive, positive_or, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import CreditRule, GroupZScore, MinNorm, Progress, StepCredit
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.objective.ratio import clipped


@texts_of(EXACT_KL)
def otca(
    steps: int = 20,
    group: int = 12,
    kind: Literal["dance", "flow"] = "dance",
    noise_level: float | None = None,
    tcd: bool = True,
    moca: bool = True,
    floor: float = 0.01,
    explore: float = 0.2,
    clip: float = 1e-4,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """OTCA (arXiv 2604.19234): advantages by step and by objective; formulas second-hand.

    Args:
        kind: the step and the start: "dance" (DanceGRPO's, shared noise) or "flow" (Flow-GRPO's).
        noise_level: η of the dance step, a of the flow step; None: 0.3 for "dance", 0.7 for "flow".
        tcd: weigh steps by their progress toward the final latent.
        moca: mix rewards by the min-norm point; otherwise by their weights, before the z-score.
        floor: added to each step's progress; a large one makes all steps alike.
        explore: share of the plain average in the mix, in [0, 1].
        advantage_clip: bound of |A_k|; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, None, shared_noise=kind == "dance", noisy_last=kind == "flow")
    one_of("kind", kind, ("dance", "flow"))
    level = positive_or("noise_level", noise_level, 0.3 if kind == "dance" else 0.7)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    credit: CreditRule = GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip)
    if moca:
        credit = MinNorm(credit, explore)
    if tcd:
        credit = StepCredit(credit, "progress", floor)
    return Algorithm(
        name="otca",
        steps=steps,
        plan=plan,
        dynamics=DanceSDE(level) if kind == "dance" else FlowSDE(level),
        credit=credit,
        phases=(EdgePhase(clipped(clip, clip, kl, "exact")),),
        observe=(Progress(),) if tcd else (),
    )
