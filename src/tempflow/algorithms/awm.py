"""AWM, advantage weighted matching (arXiv 2509.25050; code scxue/advantage_weighted_matching).

Claim. DDPO's and Flow-GRPO's step log-probs are denoising score matching with noisy targets: the same optimum, more
variance. Take the pre-training matching loss on clean samples as the log-likelihood instead, weighted by the advantage,
and hold the policy near a slow average of itself. Up to 24 times faster than Flow-GRPO (abstract).

    advantage   A = clip((R − mean of the prompt) / (std of all scores + eps), ±5) · advantage_max / 5
    log p       −t/p·((m + 1e-10)^p − 1e-10^p), m = mean (v − v*)², p = ¼     (likelihood_proxy.GeneralHuber, "ghuber")
    loss        mean of max(−A·ρ, −A·clip(ρ, 1 ± clip)) + kl·mean (v − v_ref)² + ema_kl·mean (v − v_ema)²
    pairs       `pairs` strata of the sampler's t, one each, the same for the whole iteration; fresh ε
    ema         ema ← d·ema + (1−d)·policy after each iteration, d = min(0.3, 0.001·i), i from 1  (ema.Ramp)

On-policy ρ is exactly 1, so that clip does nothing and nothing but `ema_kl` bounds a negative A. `off_policy`: the
average samples and gives the old log p.

Cost for a prompt at the defaults: 336 forwards, 24 leaves; 144 pairs, each a forward of policy, reference and ema.

Defaults: config/dgx_awm.py, scripts/train_sd3_awm.py (read in source, sure): T 14, G 24, 6 pairs, clip 1 (inert), KL
1e-3 (GenEval; OCR 3e-3, PickScore 1e-4), ema KL 1, A within ±1. The code shares times over a micro-batch, here over the
iteration. Its rollout is SA-Solver, with noise 0.4 in the middle for GenEval and OCR, and none for PickScore (whose
times are "discrete"); ours is the ODE. Flow-Factory's port has ema KL 0.1 and warns that without both it collapses.
"""

from __future__ import annotations

from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, at_least, on_grid, one_of, proportion, texts_of
from tempflow.algorithms.diffusion_nft import diffusion_nft, held_to_reference, ode_plan, positive_value
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import GroupZScore
from tempflow.core.ema import Ramp
from tempflow.core.likelihood_proxy import ProxyName, proxy_of
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate
from tempflow.core.objective.regularizer import PredictionDistance
from tempflow.core.renoise import Renoise
from tempflow.core.solver import SolverName, solver_of
from tempflow.core.times import LogitNormalTimes, StratifiedGridTimes, Times, UniformTimes

TimeKind = Literal["discrete_wo_init", "discrete", "discrete_with_init", "uniform", "logit_normal"]


@texts_of(diffusion_nft)
def awm(
    steps: int = 14,
    group: int = 24,
    pairs: int = 6,
    times: TimeKind = "discrete_wo_init",
    likelihood: ProxyName = "ghuber",
    kl: float = 1e-3,
    ema_kl: float = 1.0,
    ema_hold: float = 0.3,
    off_policy: bool = False,
    clip: float = 1.0,
    advantage_max: float = 1.0,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    solver: SolverName = "euler",
    fraction: float = 0.9,
) -> Algorithm:
    """AWM (arXiv 2509.25050): the matching loss as log-likelihood, weighted by the advantage, held near its average.

    Args:
        pairs: (t, ε) of a picture, one t in each stratum.
        times: which t: "discrete" strata of the grid, "discrete_wo_init" without pure noise, "discrete_with_init" with
            it always; "uniform" or "logit_normal" strata, shifted by 3.
        fraction: share of the grid, from its noisy end, that discrete times are of; grids of few steps want 1.
        likelihood: the proxy of log p: "ghuber", "huber", "t", "t2", "uniform", "adaptive" or "exact".
        ema_kl: the same to the policy's average; 0 saves its forwards, and leaves a negative A without a bound.
        ema_hold: the average's decay once it has ramped up, by 0.001 an iteration.
        off_policy: the average samples, and the ratio is to it.
        clip: ratio clip below and above 1, at most 1; it acts off-policy only.
        advantage_max: bound of |A|.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("std", std, ("global", "group"))
    proportion("clip", clip, 1e-2, whole=True)
    proportion("fraction", fraction, 0.9, whole=True)
    for name, value, low in (("ema_kl", ema_kl, 0.0), ("ema_hold", ema_hold, 0.0)):
        if not low <= value < float("inf"):
            raise ValueError(f"{name}: {value} must be finite and ≥ 0; nearest valid: 0")
    if ema_hold > 1:
        raise ValueError(f"ema_hold: {ema_hold} is a decay, at most 1; nearest valid: 1")
    average = "old" if off_policy else "ema"  # off-policy the two are one set: its forwards are paid for once
    gain = positive_value("advantage_max", advantage_max, 1.0) / 5
    rules = {average: Ramp(0, 0.001, ema_hold)} if off_policy or ema_kl > 0 else {}
    return Algorithm(
        name="awm",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale=std, eps=eps, clip=advantage_max, gain=gain),
        phases=(
            LeafPhase(
                ClippedLikelihood(
                    clip,
                    clip,
                    Estimate(proxy_of(likelihood), on_policy=not off_policy),
                    regularizers=(*held_to_reference(kl), PredictionDistance(average, ema_kl)),
                ),
                Renoise(_times(times, pairs, steps, fraction), share_times=1),
            ),
        ),
        weight_sets=rules,
        sampler="old" if off_policy else "policy",
        solver=solver_of(solver),
    )


def _times(kind: str, pairs: int, steps: int, fraction: float) -> Times:
    at_least("pairs", pairs, 2 if kind == "discrete_with_init" else 1)
    one_of("times", kind, get_args(TimeKind))
    if kind == "uniform":
        return UniformTimes(pairs, 0.2, 1.0, 3.0)
    if kind == "logit_normal":
        return LogitNormalTimes(pairs, shift=3.0)
    if kind == "discrete_with_init":
        return on_grid(StratifiedGridTimes(pairs - 1, first=1, fraction=fraction, initial=True), pairs, steps)
    first = int(kind == "discrete_wo_init")
    return on_grid(StratifiedGridTimes(pairs, first=first, fraction=fraction), pairs, steps)
