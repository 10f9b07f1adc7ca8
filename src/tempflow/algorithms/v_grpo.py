"""V-GRPO: GRPO on a variational bound of the likelihood, with the noise of its estimate taken out.

Claim. A picture is one action; minus its pre-training loss, at a few (t, ε), stands in for its log-likelihood. Three
things make that steady enough to beat step-wise methods: all pictures of a prompt share their (t, ε), the t are
stratified, and the x0 error is divided by its own size.

    log p       −mean over pairs of ℓ, ℓ = mean (x̂0 − x0)² / sg mean |x̂0 − x0|             (likelihood_proxy.Adaptive)
    ratio       ρ = exp(log p − log p_old): the pairs are averaged first, so a picture has one ratio
    advantage   A = (R − mean) / (std + eps); `soft_clip` η: η·tanh(A/η)
    loss        mean of max(−A·ρ, −A·clip(ρ, 1 ± clip)) + kl·mean (x̂0 − x̂0_old)²
    pairs       one t from each of `pairs` chunks of the sampler's grid, one ε each, common to a prompt's group

Which control: one update an iteration needs `soft_clip` alone (ρ is exactly 1: clip and kl would do nothing, and
without both "old" is not even asked); several updates, `clip` alone; to keep earlier skills, `kl` alone; 16-step
FLUX, clip and soft clip. A soft clip flattens rewards of 0 or 1.

Cost for a prompt at the defaults: 960 forwards, 24 leaves; 96 pairs, each a forward of policy alone (and of old with
`clip` or `kl`). A micro-batch never splits a picture's pairs.

Defaults: SD 3.5-M's first stage (arXiv 2604.23380; second-hand, with equations, confirmed by a port; the official code
tang-bd/v-grpo was not read): T 40, G 24, 4 pairs, η 3, neither clip (6e-3 … 1e-2 where used) nor KL. Whether the
standard deviation is the group's or the batch's is not known; ours is the group's.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, on_grid, one_of, positive, proportion, texts_of
from tempflow.algorithms.diffusion_nft import diffusion_nft, ode_plan
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import GroupZScore
from tempflow.core.ema import Copy
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate
from tempflow.core.objective.regularizer import PredictionDistance
from tempflow.core.renoise import Renoise
from tempflow.core.solver import SolverName, solver_of
from tempflow.core.times import StratifiedGridTimes


@texts_of(diffusion_nft)
def v_grpo(
    steps: int = 40,
    group: int = 24,
    pairs: int = 4,
    clip: float | None = None,
    soft_clip: float | None = 3.0,
    kl: float = 0.0,
    share_pairs: bool = True,
    std: Literal["global", "group"] = "group",
    eps: float = 1e-4,
    advantage_clip: float | None = None,
    solver: SolverName = "euler",
) -> Algorithm:
    """V-GRPO: clipped ratios of a shared-noise likelihood bound, one for each picture.

    Args:
        pairs: (t, ε) of a picture, one t in each chunk of the grid.
        clip: ratio clip below and above 1, at most 1, for several updates an iteration; None: no ratio (it is 1).
        soft_clip: η of η·tanh(A/η); None for none.
        kl: weight of the squared x0 distance to the policy before the iteration's updates.
        share_pairs: the pictures of a prompt share their (t, ε).
        advantage_clip: hard bound of |A|; None for none.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("std", std, ("global", "group"))
    at_least("pairs", pairs, 1)
    if clip is not None:
        proportion("clip", clip, 1e-2, whole=True)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    if not 0 <= kl < float("inf"):
        raise ValueError(f"kl: {kl} must be finite and ≥ 0; 0 turns it off")
    width, share = 1.0 if clip is None else clip, 2 if share_pairs else None
    return Algorithm(
        name="v_grpo",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale=std, eps=eps, clip=advantage_clip),
        phases=(
            LeafPhase(
                ClippedLikelihood(
                    width,
                    width,
                    Estimate(pooled=True, on_policy=clip is None),
                    soft_clip,
                    regularizers=(PredictionDistance("old", kl, "x0"),),
                ),
                Renoise(on_grid(StratifiedGridTimes(pairs), pairs, steps), share, share),
            ),
        ),
        weight_sets={} if clip is None and kl == 0 else {"old": Copy()},
        solver=solver_of(solver),
    )
