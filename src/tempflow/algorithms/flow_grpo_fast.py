"""Flow-GRPO-Fast (with the CPS step): noise, and training, at a few consecutive steps only.

Claim. One to three noisy steps, the rest by ODE, teach as much per iteration as all steps do, at a fraction of the
training forwards (README of yifan123/flow_grpo). CPS keeps the noise level of a latent where the SDE lets it grow.

    step       CPS: S = σ'·sin(noise_level·π/2); "sde": Flow-GRPO's
    window     `window` consecutive steps of 0 … `window_end` − 1, its start drawn per iteration and prompt, so that
               the members of a group differ by their noise and never by their steps; runs of other seeds have the
               same starts
    advantage, loss   as Flow-GRPO

Cost for a prompt: group·T forwards, group leaves, group·window trained edges. With `shared_prefix` (the README's
original form) one ODE prefix is paid for by the whole group: start + 1 + group·(T − 1 − start) forwards.

Defaults: config/grpo.py `*_fast*` and train_sd3_fast.py (read in source, sure): CPS 0.8, window 3 in 0 … T/2, clip
1e-5, no KL, group 24, T 10. Whether the start is drawn so that the window ends inside the range: our reading. The
official CPS code drops 1/(2S²) from the log-density; here it is the true one, so clips are not comparable.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, one_of, positive, positive_or
from tempflow.core import plan, weight
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS, FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.rng import Stream


def flow_grpo_fast(
    steps: int = 10,
    group: int = 24,
    window: int = 3,
    window_end: int | None = None,
    shared_prefix: bool = False,
    kind: Literal["cps", "sde"] = "cps",
    noise_level: float | None = None,
    clip: float = 1e-5,
    kl: float = 0.0,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Flow-GRPO-Fast (code yifan123/flow_grpo): a short window of noisy steps, drawn per prompt.

    Args:
        steps: T, sampler steps of a rollout.
        group: pictures per prompt, compared with each other.
        window: noisy steps; all but the sampler's last are trained.
        window_end: (keep it below T − 1 with "cps": into an SD3 grid's tiny last σ its density's gradient is tens of
            times the other steps') the window lies in steps 0 … window_end − 1; None: the larger of T/2 and the window.
        shared_prefix: one initial noise and ODE prefix for the group, which fans out where the window starts.
        kind: "cps", or "sde" for Flow-GRPO's step.
        noise_level: of the kind, for "cps" in (0, 1]; None: 0.8 for "cps", 0.7 for "sde".
        clip: ratio clip below and above 1.
        kl: β, weight of the exact KL to the starting model; 0 saves its forwards.
        std: "global": standard deviation of all the iteration's scores; "group": of the prompt's own.
        eps: added to the standard deviation.
        advantage_clip: bound of |A|; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    at_least("window", window, 1)
    positive("clip", clip, 1e-5)
    one_of("kind", kind, ("cps", "sde"))
    level = positive_or("noise_level", noise_level, 0.8 if kind == "cps" else 0.7)
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
        plan=partial(_plan, steps, group, window, end, shared_prefix),
        dynamics=CPS(level) if kind == "cps" else FlowSDE(level),
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
        weight=weight.uniform,
        objective=clipped(clip, clip, kl, "exact"),
    )


def _plan(steps: int, group: int, size: int, end: int, shared: bool, iteration: int, slot: int) -> plan.Plan:
    start = Stream(0, "flow_grpo_fast.window").integers((iteration, slot), end - size + 1, 1)[0]
    return _window(steps, group, start, size, shared)


@lru_cache(maxsize=256)
def _window(steps: int, group: int, start: int, size: int, shared: bool) -> plan.Plan:
    inside = range(start, start + size)
    if shared:
        return plan.tree(steps, 1, {start: group}, stochastic=inside, train=[i for i in inside if i < steps - 1])
    return plan.chain(steps, group, train=[i for i in inside if i < steps - 1], stochastic=inside)
