"""AdvantageFlow: least squares weighted by a signed advantage, made convex by an anchor at the old policy.

Claim. Weight the plain x0-prediction loss by a signed advantage. For A < 0 that is unbounded, so add a quadratic anchor
to the policy that sampled, and a small one to the starting model: every sample's loss is convex again, its gradient
varies less, and its minimum is the exact velocity of q ∝ (γ + A)·π_old.

    advantage   A = clip((R − mean of the prompt) / Z, ±1), Z the root mean square of R − mean over the iteration
    loss        mean of A·|x̂0 − x0|² + γ·|x̂0 − x̂0_old|² + λ·|x̂0 − x̂0_ref|²          (matching.SignedLeastSquares)
    γ           "constant": gamma; "balanced": gamma − A, the same curvature for every sample (gamma 1: DiffusionNFT
                with β 1, but for its weights)
    old         a lagged copy of the policy, which samples

κ = A + γ + λ must be positive for all |A| ≤ 1, which is checked: gamma > 1 − λ with a constant anchor. Needed, not
enough: a run on the boundary is reported to have diverged.

Cost for a prompt at the defaults: 240 forwards, 24 leaves; 96 pairs, each a forward of policy, old and reference.

Defaults. The paper's own are not known to us. γ 1.1 or 1 − A, λ 1e-3, A in [−1, 1], G 24, no guidance:
MeanFlowAdvantage quotes the loss (eq. 2) and trains SD 3.5-M with them (second-hand); t uniform, old an average of the
policy. T, `pairs`, `lag` and the bounds of t are our reading, and whether the paper divides a sample's loss by its mean
|error| (`adaptive`, as DiffusionNFT does) is not known: this is not an exact reproduction.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.diffusion_nft import Lag, lagged, ode_plan
from tempflow.core.credit import GroupZScore
from tempflow.core.draws import Draws
from tempflow.core.objective.matching import Anchor, SignedLeastSquares
from tempflow.core.times import UniformTimes


def advantage_flow(
    steps: int = 10,
    group: int = 24,
    pairs: int = 4,
    gamma: float = 1.1,
    anchor: Anchor = "constant",
    reference: float = 1e-3,
    adaptive: bool = False,
    t_min: float = 0.0,
    t_max: float = 1.0,
    lag: Lag = "type1",
    eps: float = 1e-8,
) -> Algorithm:
    """AdvantageFlow: x0 regression with signed weights and an anchor at the old policy.

    Args:
        steps: T, sampler steps of a rollout.
        group: pictures per prompt, compared with each other.
        pairs: (t, ε) of a picture, t uniform in each of that many parts of t_min … t_max.
        gamma: γ, the anchor at the old policy; above 1 − reference where the anchor is constant.
        anchor: "constant", or "balanced" for gamma − A.
        reference: λ, the anchor at the starting model; 0 saves its forwards.
        adaptive: divide a sample's loss by its detached mean error.
        t_min: smallest t.
        t_max: largest t, at most 1.
        lag: how the old policy, which also samples, follows: "type0" at once, "type1", "type2" or "type3" behind.
        eps: added to Z.

    Raises ValueError naming the argument, its value and a valid one.
    """
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"t_min, t_max: {t_min}, {t_max} must keep 0 ≤ t_min < t_max ≤ 1; nearest valid: 0, 1")
    return Algorithm(
        name="advantage_flow",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale="pooled", eps=eps, clip=1.0),
        objective=SignedLeastSquares(gamma, anchor, reference, adaptive=adaptive),
        draws=Draws(UniformTimes(pairs, t_min, t_max)),
        weight_sets={"old": lagged(lag)},
        sampler="old",
    )
