"""MixGRPO-Flash: MixGRPO whose untrained tail takes fewer, better steps (arXiv 2507.21802 §Flash).

Claim. What comes after the window is only there to make a picture for the reward; a second-order solver on a coarser
grid makes it nearly as well for a fraction of the forwards.

    grid        the model's σ up to the one after the window; from there to 0 evenly in unshifted time
                u = σ/(shift − (shift − 1)·σ), with n = max(int((T − last)·compress), 2) points, both ends among
                them; `last` is the window's last step. So a rollout has last + n steps
    solver      DPM-Solver++(2M) on deterministic edges, which knows x̂0 of noisy steps too  (core.solver.DPMSolver2)
    all else    as MixGRPO

Flash* of the paper freezes the window at the noisiest steps: stride 0, compress 0.2.
Cost for a prompt with the window at 0 … w − 1: group·(w − 1 + n) forwards, group leaves, group·w trained edges; at the
defaults 132, 12, 48 (MixGRPO: 300 forwards). The saving shrinks as the window moves on.

Defaults: the released scripts (read in source; sure): compress 0.4, τ 20, second order, midpoint, else MixGRPO's. n
counts points with both ends, as the code's linspace; where it gives one point, which would not reach σ = 0, here are
two. `shift` is the one of the code's grid; give the model's own. Outside the window all steps are the solver's, so
those before the window are second-order too, on the uncompressed grid; whether the code does so is not checked.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tempflow.algorithms.base import Algorithm, Drawn, at_least, positive, proportion, texts_of
from tempflow.algorithms.mix_grpo import Rewards, group_credit, mix_grpo, window_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import clipped
from tempflow.core.plan import Plan
from tempflow.core.schedule import Schedule
from tempflow.core.solver import DPMSolver2
from tempflow.core.window import Order, SlidingWindow


@texts_of(mix_grpo)
def mix_grpo_flash(
    steps: int = 25,
    group: int = 12,
    window: int = 4,
    window_end: int | None = None,
    order: Order = "progressive",
    every: int = 20,
    stride: int = 1,
    roll_back: bool = True,
    compress: float = 0.4,
    shift: float = 3.0,
    second_order: bool = True,
    shared_noise: bool = True,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    rewards: Rewards = "advantages",
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """MixGRPO-Flash (arXiv 2507.21802): MixGRPO with a second-order solver on a coarser grid after the window.

    Args:
        steps: T, steps of the uncompressed grid.
        window: noisy steps; all are trained.
        window_end: the window lies in steps 0 … window_end − 1; None: T − 1.
        compress: share of the steps after the window that is left; 1 leaves all.
        shift: the time shift by which these are spread, the model's own.
        second_order: steps outside the window by DPM-Solver++(2M); else by Euler.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    positive("shift", shift, 3.0)
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    if not 0 < compress <= 1:
        raise ValueError(f"compress: {compress} must be in (0, 1]; 0.4 is usual, 1 leaves the grid as it is")
    if window >= steps:
        raise ValueError(f"window: {window} leaves no tail to compress; nearest valid: {steps - 1}")
    slide = SlidingWindow.of(steps, window, window_end, order, every, stride, roll_back)
    return Algorithm(
        name="mix_grpo_flash",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, slide, compress, shared_noise)),
        dynamics=FlowSDE(noise_level),
        credit=group_credit(group, rewards, eps, advantage_clip),
        phases=(EdgePhase(clipped(clip, clip, kl, "exact")),),
        solver=DPMSolver2() if second_order else None,
        grid=Drawn(partial(_grid, slide, compress, shift)),
    )


def _points(steps: int, last: int, compress: float) -> int:
    """σ values of the tail, both its ends counted."""
    return max(int((steps - last) * compress + 1e-9), 2)


def _plan(
    steps: int,
    group: int,
    slide: SlidingWindow,
    compress: float,
    shared_noise: bool,
    seed: int,
    iteration: int,
    slot: int,
) -> Plan:
    inside = slide.at(seed, iteration)
    return window_plan(inside[-1] + _points(steps, inside[-1], compress), group, inside, shared_noise)


def _grid(slide: SlidingWindow, compress: float, shift: float, seed: int, iteration: int, grid: Schedule) -> Schedule:
    if compress == 1:
        return grid
    last = slide.at(seed, iteration)[-1]
    if float(grid.sigmas[-1]) > 0:
        end = f"{float(grid.sigmas[-1]):.3g}"
        raise ValueError(f"compress: {compress}, but the model's grid ends at {end} and not at 0; nearest valid: 1")
    sigma = grid.sigmas.double()
    start = sigma[last + 1] / (shift - (shift - 1) * sigma[last + 1])
    u = start * torch.linspace(1, 0, _points(grid.steps, last, compress), dtype=torch.float64, device=sigma.device)
    tail = shift * u / (1 + (shift - 1) * u)
    return replace(grid, sigmas=torch.cat([sigma[: last + 2], tail[1:]]).to(grid.sigmas.dtype))
