"""Flow-CPS: Flow-GRPO with a step that keeps a latent's noise level (arXiv 2509.05952).

Claim. The SDE step leaves more noise in a latent than its σ says, so rewards judge noisy pictures. A DDIM-like step
that keeps the coefficients of picture and noise at 1 − σ' and σ' does not.

    step        x' = (1 − σ')·x̂0 + sqrt(σ'² − S²)·ε̂ + S·z, S = σ'·sin(noise_level·π/2)                    (CPS)
    advantage, loss   as Flow-GRPO; the last step, into σ' = 0, has no noise and is not trained
    log_prob    "unscaled": log r = mean (y − μ_old)² − mean (y − μ)², as the official code has it: 2S² times the
                density's, so clips are not comparable with Flow-GRPO's
                "density": log r of the step's own density, as everywhere else here

Why 2S² matters: S falls with σ', and so to nearly 0 at the last trained step of a grid that ends just above 0 (SD 3's:
σ' = .0089). The density's gradient, |b|/S a unit of noise, is there 29 times that of the step before (T 10; 62 times at
T 6); times 2S² it is 2S|b| and fades out instead. With "density", prefer a window of early steps; with a KL, its
"velocity" form, as the exact one has 1/(2S²) whatever the ratio has.

Trajectories: `group` chains, noisy and trained at every step but the last.
Cost for a prompt at the defaults: 240 forwards, 24 leaves, 216 trained edges.

Defaults: level 0.8 (the official code's; "works without tuning"; read in source, sure), no KL and clip 1e-5 with the
unscaled log-prob, of its FLUX and SD 3 fast configurations (sure). That they serve at all steps at once, and 1e-4
(Flow-GRPO's) the density's ratio, is our choice. T, group, eps and advantage clip are Flow-GRPO's. `flow_grpo_fast` is
the same step in a short window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from tempflow.algorithms.base import Algorithm, one_of, positive, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS
from tempflow.core.objective.edges import Replayed
from tempflow.core.objective.ratio import StepRatio, clipped
from tempflow.core.objective.regularizer import KLForm

LogProbForm = Literal["unscaled", "density"]


@dataclass(frozen=True)
class UnscaledRatio(StepRatio):
    """2S²·log r = mean (y − μ_old)² − mean (y − μ)²: the official CPS code's log-prob without its constants."""

    def __call__(self, at: Replayed) -> Tensor:
        return super().__call__(at) * 2 * at.policy.std.square()


@texts_of()
def flow_cps(
    steps: int = 10,
    group: int = 24,
    noise_level: float = 0.8,
    log_prob: LogProbForm = "unscaled",
    clip: float | None = None,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flow-CPS (arXiv 2509.05952): Flow-GRPO with coefficient-preserving steps.

    Args:
        noise_level: of the CPS step, in (0, 1].
        log_prob: "unscaled" for the official code's log ratio, or "density" for the true one, 1/(2S²) times it.
        clip: ratio clip below and above 1; None: 1e-5 for "unscaled", 1e-4 for "density".
        kl_form: "exact", "velocity", "k1", "k2" or "k3"; the exact one is all last step on such a grid (above).

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, None, noisy_last=False)
    one_of("std", std, ("global", "group"))
    one_of("log_prob", log_prob, get_args(LogProbForm))
    positive("noise_level", noise_level, 0.8)
    unscaled = log_prob == "unscaled"
    bound = proportion("clip", clip, 1e-5 if unscaled else 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    return Algorithm(
        name="flow_cps",
        steps=steps,
        plan=plan,
        dynamics=CPS(noise_level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(bound, bound, kl, kl_form, UnscaledRatio() if unscaled else None)),),
    )
