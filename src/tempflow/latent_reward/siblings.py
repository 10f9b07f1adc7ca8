"""What Step-GRPO asks of a latent reward: candidates of one state, and how good each would end. Ours, not DRM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tempflow.core import plan
from tempflow.core.corruption import check_velocity
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.latent_reward.train import Rated
from tempflow.models.protocol import Predict

Grade = Callable[[Tensor, Sequence[str]], Tensor]
"""grade(clean latents [B, *S], prompts) -> [B], larger is better; NaN = failed."""


@torch.no_grad()
def siblings(
    prompts: Sequence[str],
    predict: Predict,
    schedule: Schedule,
    dynamics: Dynamics,
    grade: Grade,
    noise: Noise,
    *,
    shape: Sequence[int],
    chains: int = 1,
    candidates: int = 6,
    rows: int = 512,
) -> Rated:
    """The candidates that `drm_grpo` would compare, each at its σ and graded by its end, reached by ODE steps.

    predict     velocity of [B, *S] states, its rows being places in `prompts`
    chains      of each prompt, ≥ 1; at every step but the last each draws `candidates` ≥ 2 and goes on by an ODE step
    rows        states at once

    A group of the result is what is drawn from one state. Cost for a prompt of chains·T steps: chains·T forwards and
    chains·candidates·T(T − 1)/2 to finish, chains·candidates·(T − 1) grades.
    """
    check_velocity(dynamics.corruption, "candidates of one state, finished by ODE steps", "FlowSDE()")
    steps = schedule.steps
    forest = rollout(
        [plan.candidates(steps, chains, candidates)] * len(prompts),
        dynamics,
        schedule,
        predict,
        noise,
        shape=shape,
        max_rows=rows,
    )
    edges = forest.edges
    keep = (edges.step < steps - 1).nonzero().squeeze(1)
    keep = keep[edges.step[keep].argsort(stable=True)]
    x, who, step = forest.nodes[edges.child[keep]], edges.prompt[keep], edges.step[keep]
    ends = x.clone()
    for i in range(1, steps):
        started = int((step < i).sum())  # the earliest come first
        ends[:started] = _ode_step(predict, schedule, ends[:started], i, who[:started], rows)
    grades = [
        grade(part, [prompts[int(r)] for r in mine])
        for part, mine in zip(ends.split(rows), who.split(rows), strict=True)
    ]
    return Rated(x, torch.cat(grades), who, tuple(prompts), schedule.after(step), edges.parent[keep])


def _ode_step(predict: Predict, schedule: Schedule, x: Tensor, i: int, who: Tensor, rows: int) -> Tensor:
    def moved(part: Tensor, mine: Tensor) -> Tensor:
        at = torch.full((len(part),), i)
        return ODE().transition(part, predict(part, schedule.at(at), mine), schedule, at).mean

    return torch.cat([moved(part, mine) for part, mine in zip(x.split(rows), who.split(rows), strict=True)])
