"""Flow-GRPO-Fast (with the CPS step): noise, and training, at a few consecutive steps only.

Claim. One to three noisy steps, the rest by ODE, teach as much per iteration as all steps do, at a fraction of the
training forwards (README of yifan123/flow_grpo). CPS keeps the noise level of a latent where the SDE lets it grow.

    step       CPS: S = σ'·sin(noise_level·π/2); "sde": Flow-GRPO's
    window     `window` consecutive steps of 0 … `window_end` − 1, its start drawn per iteration and prompt, so that
               the members of a group differ by their noise and never by their steps
    log_prob   "unscaled": log r = mean (y − μ_old)² − mean (y − μ)², as the official CPS code has it, 2S² times the
               density's (`flow_cps` says why it matters); "density": the step's own
    advantage, loss   as Flow-GRPO

Cost for a prompt: group·T forwards, group leaves, group·window trained edges. With `shared_prefix` (the README's
original form) one ODE prefix is paid for by the whole group: start + 1 + group·(T − 1 − start) forwards.

Defaults: config/grpo.py `*_fast*` and train_sd3_fast.py (read in source, sure): CPS 0.8 with its unscaled log-prob, and
the density's for the SDE, window 3 in 0 … T/2, its start drawn so that it ends inside, clip 1e-5, no KL, group 24, T
10.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal, get_args

from tempflow.algorithms.base import (
    EXACT_KL,
    Algorithm,
    Drawn,
    at_least,
    one_of,
    positive,
    positive_or,
    proportion,
    texts_of,
)
from tempflow.algorithms.flow_cps import LogProbForm, UnscaledRatio
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS, FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.rng import Stream


@texts_of(EXACT_KL)
def flow_grpo_fast(
    steps: int = 10,
    group: int = 24,
    window: int = 3,
    window_end: int | None = None,
    shared_prefix: bool = False,
    kind: Literal["cps", "sde"] = "cps",
    noise_level: float | None = None,
    log_prob: LogProbForm | None = None,
    clip: float = 1e-5,
    kl: float = 0.0,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flow-GRPO-Fast (code yifan123/flow_grpo): a short window of noisy steps, drawn per prompt.

    Args:
        window: noisy steps, of which the sampler's last is not trained.
        window_end: the window lies in steps 0 … window_end − 1; None: the larger of T/2 and the window. With "cps" and
            "density" keep it below T − 1: into an SD3 grid's tiny last σ the gradient is tens of times the others'.
        shared_prefix: one initial noise and ODE prefix for the group, which fans out where the window starts.
        kind: "cps", or "sde" for Flow-GRPO's step.
        noise_level: of the kind, for "cps" in (0, 1]; None: 0.8 for "cps", 0.7 for "sde".
        log_prob: "unscaled" for the official CPS code's log ratio, "density" for the true one, 1/(2S²) times it, for
            which clips are larger; None: "unscaled" for "cps", "density" for "sde".

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    at_least("window", window, 1)
    proportion("clip", clip, 1e-5)
    one_of("kind", kind, ("cps", "sde"))
    level = positive_or("noise_level", noise_level, 0.8 if kind == "cps" else 0.7)
    form = _form(kind, log_prob)
    one_of("std", std, ("global", "group"))
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    if window > steps:
        raise ValueError(f"window: {window} is longer than the rollout; nearest valid: {steps}")
    end = max(window, steps // 2) if window_end is None else window_end
    if not window <= end <= steps:
        nearest = min(max(end, window), steps)
        raise ValueError(f"window_end: {end} must be in {window} … {steps}; nearest valid: {nearest}")
    if window == 1 and end == steps:
        raise ValueError(f"window_end: {end} lets a window of 1 fall on the untrained last step; nearest: {steps - 1}")
    return Algorithm(
        name="flow_grpo_fast",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, window, end, shared_prefix)),
        dynamics=CPS(level) if kind == "cps" else FlowSDE(level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        phases=(EdgePhase(clipped(clip, clip, kl, "exact", UnscaledRatio() if form == "unscaled" else None)),),
    )


def _form(kind: str, given: LogProbForm | None) -> LogProbForm:
    """The form of the log-prob. Raises ValueError for an unknown one, or one that the kind of step has not."""
    form = given or ("unscaled" if kind == "cps" else "density")
    one_of("log_prob", form, get_args(LogProbForm))
    if form == "unscaled" and kind != "cps":
        raise ValueError(f"log_prob: 'unscaled' is of the step \"cps\", not {kind!r}; nearest valid: 'density'")
    return form


def _plan(steps: int, group: int, size: int, end: int, shared: bool, seed: int, iteration: int, slot: int) -> plan.Plan:
    start = Stream(seed, "flow_grpo_fast.window").integers((iteration, slot), end - size + 1, 1)[0]
    return _window(steps, group, start, size, shared)


@lru_cache(maxsize=256)
def _window(steps: int, group: int, start: int, size: int, shared: bool) -> plan.Plan:
    inside = range(start, start + size)
    if shared:
        return plan.tree(steps, 1, {start: group}, stochastic=inside, train=[i for i in inside if i < steps - 1])
    return plan.chain(steps, group, train=[i for i in inside if i < steps - 1], stochastic=inside)
