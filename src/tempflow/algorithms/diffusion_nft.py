"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv 2509.16117; code NVlabs/DiffusionNFT).

Claim. Reinforcement needs no likelihoods, no trajectories and no noisy sampler: draw samples with any ODE solver,
re-noise them, and regress the velocity so that a blend of policy and old policy fits the good ones, and its reflection
about the old policy fits the bad ones. Up to 25 times fewer training steps than Flow-GRPO (abstract).

    sampler     a lagged copy of the policy ("old"), `group` ODE samples a prompt by DPM-Solver++(2M), no guidance
    advantage   A = clip((R − mean of the prompt) / (std of all scores + eps), ±advantage_max)
    optimality  r = A/(2·advantage_max) + ½ in [0, 1]; `mode` may look at one sign only
    pairs       x_t = (1−t)·x0 + t·ε at int(0.99·T) of the sampler's own t in random order, fresh ε
    loss        mean of advantage_max·(r·ℓ⁺ + (1−r)·ℓ⁻)/mix_beta + kl·mean (v − v_ref)², with ℓ± the x0 errors of
                v± = v_old ± mix_beta·(v − v_old), each over its own detached mean |error|   (matching.NegativeAware)
    old         old ← η·old + (1−η)·policy after each iteration, η of update i ≥ 1 by `lag`  (ema.Ramp)

Cost for a prompt at the defaults: 240 forwards, 24 leaves; 216 pairs, each a forward of policy, old and reference.

Defaults: config/base.py, config/nft.py, scripts/train_nft_sd3.py (read in source, sure): T 10, solver "dpm2", G 24, β 1
(OCR and many rewards 0.1), M 5, KL 1e-4 (named train.beta there), lag "type1" (OCR "type2"), global std, eps 1e-4. Its
η counts optimizer steps, ours counts iterations (it does one of the former in the latter). Not here: evaluation EMA and
optimizer, which are the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, at_least, one_of, positive, texts_of
from tempflow.algorithms.phase import LeafPhase
from tempflow.core import plan
from tempflow.core.checks import not_negative
from tempflow.core.credit import GroupZScore
from tempflow.core.ema import Ramp
from tempflow.core.objective.matching import Mode, NegativeAware
from tempflow.core.objective.regularizer import LeafRegularizer, PredictionDistance
from tempflow.core.renoise import Renoise
from tempflow.core.solver import SolverName, solver_of
from tempflow.core.times import GridTimes

Lag = Literal["type0", "type1", "type2", "type3"]

LAGS = {
    "type0": Ramp(0, 0.0, 0.0),
    "type1": Ramp(0, 0.001, 0.5),
    "type2": Ramp(75, 0.0075, 0.999),
    "type3": Ramp(10, 0.01, 0.5),
}
"""How the old policy follows, by the names of DiffusionNFT's code, and "type3" of "Rethinking the design space":
"type0" is the policy as it is, "type2" nearly stands still late."""


@texts_of()
def diffusion_nft(
    steps: int = 10,
    group: int = 24,
    mix_beta: float = 1.0,
    advantage_max: float = 5.0,
    mode: Mode = "all",
    lag: Lag = "type1",
    fraction: float = 0.99,
    kl: float = 1e-4,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    solver: SolverName = "dpm2",
) -> Algorithm:
    """DiffusionNFT (arXiv 2509.16117): fit good samples, and bad ones by reflection about the old policy.

    Args:
        mix_beta: β, how far the implicit models are from old; the first update does not depend on it.
        advantage_max: M, where |A| is clipped and the optimality reaches 0 or 1.
        mode: "all", "positive_only", "negative_only", "one_only" or "binary": what of A is looked at.
        lag: how the old policy, which also samples, follows: "type0" at once, "type1", "type2" or "type3" behind.
        fraction: share of the sampler's t that are trained, int(T·fraction) of them.
        kl: weight of the squared velocity distance to the starting model; 0 saves its forwards.
        solver: walks the rollout: the second-order "dpm2" (DPM-Solver++) or "unipc2" (UniPC), or "euler".

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("std", std, ("global", "group"))
    return Algorithm(
        name="diffusion_nft",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale=std, eps=eps, clip=positive_value("advantage_max", advantage_max)),
        phases=(
            LeafPhase(
                NegativeAware(mix_beta, advantage_max, mode, regularizers=held_to_reference(kl)),
                Renoise(GridTimes(fraction)),
            ),
        ),
        weight_sets={"old": lagged(lag)},
        sampler="old",
        solver=solver_of(solver),
    )


def ode_plan(steps: int, group: int, smallest: int = 2) -> Callable[[int, int], plan.Plan]:
    """(iteration, prompt slot) -> `group` ODE chains; what the forward-process family shares."""
    at_least("steps", steps, 1)
    at_least("group", group, smallest, "or there is nothing to compare with")
    return partial(_plan, steps, group)


def lagged(lag: str) -> Ramp:
    """The old policy's rule of that name. Raises ValueError for an unknown one."""
    one_of("lag", lag, get_args(Lag))
    return LAGS[lag]


def held_to_reference(kl: float) -> tuple[LeafRegularizer, ...]:
    """The family's KL, a squared velocity distance. Raises ValueError unless kl is finite and ≥ 0."""
    not_negative("kl", kl)
    return (PredictionDistance("reference", kl),)


def positive_value(field: str, value: float, usual: float = 5.0) -> float:
    """The value itself, if it is finite and positive."""
    positive(field, value, usual)
    return value


def _plan(steps: int, group: int, iteration: int, slot: int) -> plan.Plan:
    return _chains(steps, group)


@lru_cache(maxsize=256)
def _chains(steps: int, group: int) -> plan.Plan:
    return plan.ode(steps, group)
