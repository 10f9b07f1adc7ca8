"""GRPO-Guard: a ratio centred at 1, and gradients of one size at all steps (arXiv 2510.22319, CVPR 2026).

Claim. log r of a Gaussian step is below 0 on average (by mean Δμ²/(2S²)), and its spread shrinks with S, so clips bind
at a few steps and on one side only: the policy is over-optimised. Normalise the ratio, and weigh steps evenly.

    ratio       log r̂ = S·(log r + mean Δμ²/(2S²)) = −mean(Δμ·z),  Δμ = μ_old − μ,  z = (x' − μ_old)/S     (NormRatio)
    weight      "published" ∝ 1/Δ for "flow", ∝ (1 + η²(1−σ)/(2σ))/Δ for "dance";
                "equalised" ∝ 1/|b| = 1/(Δ(1 + s²(1−σ)/(2σ))): the gradient of r̂ has size |b|, so this makes it equal at
                all steps, which the published one does for "flow" at σ < 1 only
    advantage, loss   as Flow-GRPO

The rollout keeps μ_old: one more latent per noisy edge. Weights have mean 1 over the trained steps, where the codes'
have mean 1/Δ: it is the learning rate that differs (and the balance with `kl`), no clip.

Scale. r̂ is S times as far from 1 as Flow-GRPO's r, so a clip c of that is about c·S here (S differs by step, which is
the point). On `shapes` (6 steps, noise 0.9: S from 1.0 down to .5) 1e-2 becomes 7e-3.

Cost for a prompt: as Flow-GRPO; at the defaults 240 forwards, 24 leaves, 216 trained edges.

Defaults: config/grpo_guard.py and scripts/train_sd3_GRPO_Guard.py of a fork of flow_grpo (read in source, sure): T 10,
G 24, clip 2e-6 (OCR, GenEval; 4e-6 for PickScore), standard deviation of the group, no KL, loss over Δ; learning rate
1e-4, which is the run's. Noise 0.7, eps and the advantage's bound are Flow-GRPO's. "dance", with DanceGRPO's noise 0.3,
is in TeleBoost and Pref-GRPO (re-implementations, good); its last step is by ODE here.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tempflow.algorithms.base import EXACT_KL, Algorithm, one_of, positive, positive_or, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import DanceSDE, Dynamics, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.ratio import NormRatio, clipped
from tempflow.core.schedule import Schedule
from tempflow.core.weight import Weight, equalised, inverse_step, mean_one


@texts_of(EXACT_KL)
def grpo_guard(
    steps: int = 10,
    group: int = 24,
    kind: Literal["flow", "dance"] = "flow",
    noise_level: float | None = None,
    weight: Literal["published", "equalised"] = "published",
    clip: float = 2e-6,
    clip_high: float | None = None,
    kl: float = 0.0,
    std: Literal["global", "group"] = "group",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a normalised ratio and gradients balanced over steps.

    Args:
        kind: the step, "flow" (Flow-GRPO's) or "dance" (DanceGRPO's).
        noise_level: a of the flow step, η of the dance step; None: 0.7 for "flow", 0.3 for "dance".
        weight: loss weight of a step: "published", or "equalised" for exactly equal gradients.
        clip: clip of the normalised ratio below and above 1; about S times that of a step's ratio.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, None, noisy_last=kind == "flow")
    one_of("kind", kind, ("flow", "dance"))
    one_of("weight", weight, ("published", "equalised"))
    one_of("std", std, ("global", "group"))
    level = positive_or("noise_level", noise_level, 0.7 if kind == "flow" else 0.3)
    proportion("clip", clip, 2e-6)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    published: Weight = inverse_step if kind == "flow" else dance_published
    return Algorithm(
        name="grpo_guard",
        steps=steps,
        plan=plan,
        dynamics=FlowSDE(level) if kind == "flow" else DanceSDE(level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(
            EdgePhase(
                clipped(clip, clip if clip_high is None else clip_high, kl, "exact", NormRatio()),
                published if weight == "published" else equalised,
            ),
        ),
    )


def dance_published(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """w_i ∝ (1 + η²(1−σ)/(2σ))/Δ = |b|/Δ², the codes' factor for DanceGRPO's step, with mean 1 over trained steps.

    It multiplies the gradient's imbalance where dividing would take it out; kept because it is what was run.
    """
    edges = forest.edges
    b = dynamics.coefficients(schedule, edges.step, edges.scale)[1]
    return mean_one(forest, b.abs() / schedule.delta(edges.step).square())
