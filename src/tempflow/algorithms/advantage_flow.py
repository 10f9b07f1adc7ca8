"""AdvantageFlow: least squares by a signed advantage, made convex by an anchor at the old policy (arXiv 2605.26013).

Claim. Weight the plain x0-prediction loss by a signed advantage. For A < 0 that is unbounded, so add a quadratic anchor
to the policy that sampled, and a small one to the starting model: every sample's loss is convex again, its gradient
varies less, and its minimum is the exact velocity of q ∝ (γ + A)·π_old.

    advantage   A = clip((R − mean of the prompt) / Z, ±1), Z the root mean square of R − mean over the iteration
    loss        mean of A·|x̂0 − x0|² + γ·|x̂0 − x̂0_old|² + λ·|x̂0 − x̂0_ref|²          (matching.SignedLeastSquares)
    γ           "constant": gamma; "balanced": gamma − A, the same curvature for every sample (gamma 1: DiffusionNFT
                with β 1, but for its weights)
    old         a lagged copy of the policy, which samples

Several rewards are summed as they are, and the sum is centred and divided by Z.

κ = A + γ + λ must be positive for all |A| ≤ 1, which is checked: gamma > 1 − λ with a constant anchor. The paper's
sweep goes below it (γ 0.2 and 0.5 were unstable, 1.1 best, 5 slow), so `concave` lets it pass.

The paper's OCR run has β 0.1: β·A on the data, and γ = 0.01 − 0.1·A or 0.01. Divided by β, which only a gradient's
bound sees: gamma 0.1, reference 0.01 with anchor "balanced", or "constant" and `concave`.

Cost for a prompt at the defaults: 40 forwards, 4 leaves; 4 pairs, each a forward of policy, old and reference.

Defaults: the paper (read but for an appendix's end, sure): T 10 (40 in evaluation), group 4 of 32 prompts (16 in its
large run), γ 1.1 or 1 − A, λ 1e-3, A in [−1, 1], one fresh (t, ε) of a picture by Algorithm 1, t in [0, 1], no
guidance, no division by the mean error (`adaptive` is DiffusionNFT's), old ← ρ·old + (1 − ρ)·policy once an iteration.
ρ is not given: `lag` is our reading, as are the steps' solver and the bounds of t. No code was found.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_nft import Lag, diffusion_nft, lagged, ode_plan
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import GroupZScore
from tempflow.core.objective.matching import Anchor, SignedLeastSquares
from tempflow.core.renoise import Renoise
from tempflow.core.times import UniformTimes


@texts_of(diffusion_nft)
def advantage_flow(
    steps: int = 10,
    group: int = 4,
    pairs: int = 1,
    gamma: float = 1.1,
    anchor: Anchor = "constant",
    reference: float = 1e-3,
    concave: bool = False,
    adaptive: bool = False,
    t_min: float = 0.0,
    t_max: float = 1.0,
    lag: Lag = "type1",
    eps: float = 1e-8,
) -> Algorithm:
    """AdvantageFlow (arXiv 2605.26013): x0 regression with signed weights and an anchor at the old policy.

    Args:
        pairs: (t, ε) of a picture, t uniform in each of that many parts of t_min … t_max.
        gamma: γ, the anchor at the old policy; above 1 − reference where the anchor is constant, or `concave`.
        anchor: "constant", or "balanced" for gamma − A.
        reference: λ, the anchor at the starting model; 0 saves its forwards.
        concave: allow a gamma at which samples of the worst advantages have no minimum.
        adaptive: divide a sample's loss by its detached mean error.
        t_min: smallest t.
        t_max: largest t, at most 1.
        eps: added to Z.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min: {t_min} must be in [0, 1); nearest valid: 0")
    if not t_min < t_max <= 1:
        raise ValueError(f"t_max: {t_max} must be above t_min, {t_min}, and at most 1; nearest valid: 1")
    return Algorithm(
        name="advantage_flow",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale="pooled", eps=eps, clip=1.0),
        phases=(
            LeafPhase(
                SignedLeastSquares(gamma, anchor, reference, concave=concave, adaptive=adaptive),
                Renoise(UniformTimes(pairs, t_min, t_max)),
            ),
        ),
        weight_sets={"old": lagged(lag)},
        sampler="old",
    )
