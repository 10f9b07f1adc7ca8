"""How deterministic edges are walked: by one step of a dynamics, or by a solver that remembers the step before.

A solver keeps no state of its own.  What it remembers, the clean sample predicted one step earlier on the same path, is
handed to it; so one solver serves any number of paths at once, and a child of a stochastic edge has a history too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.distribution import Gaussian, to_rows, upcast
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.schedule import Schedule


@runtime_checkable
class Solver(Protocol):
    """A deterministic way from σ_i to σ_{i+1}."""

    @property
    def order(self) -> int:
        """Order of convergence; above 1 it wants `previous`."""
        ...

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Tensor | None
    ) -> Gaussian:
        """The next state, as the mean of a Gaussian with std 0.

        x, velocity [B, *S] at σ_step, step LongTensor[B]; previous [B, *S] is `predict_clean` at the parent of x,
        whatever kind of edge led from there to x, or None where there is no parent (step 0).
        """
        ...


def predict_clean(x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor) -> Tensor:
    """x̂0 = x − σ·v, [B, *S], in float32 at least: the clean sample that a velocity at σ_step points to."""
    x, velocity = upcast(x), upcast(velocity)
    return x - to_rows(schedule.at(step), velocity) * velocity


@dataclass(frozen=True)
class OneStep:
    """A deterministic dynamics as a solver of order 1; it looks at no history.

    Raises ValueError when the dynamics draws noise.
    """

    dynamics: Dynamics

    def __post_init__(self) -> None:
        if self.dynamics.stochastic:
            raise ValueError(f"solver = {self.dynamics}: deterministic edges draw no noise; nearest valid: ODE()")

    @property
    def order(self) -> int:
        return 1

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Tensor | None
    ) -> Gaussian:
        """One step of the dynamics; `previous` is not looked at."""
        return self.dynamics.transition(x, velocity, schedule, step)


@dataclass(frozen=True)
class DPMSolver2:
    """DPM-Solver++(2M): data prediction, second-order multistep, midpoint form (arXiv 2211.01095, Algorithm 2).

    With λ = log((1−σ)/σ), h = λ' − λ and h_0 = λ − λ_before, the midpoint form on the flow path is the Euler step and
    a correction by the change of the prediction,

        x' = x − Δ·v + (Δ/σ) · h/(2·h_0) · (x̂0 − previous).

    There is no correction, and the step is ODE()'s to the last bit, at step 0, for the step into σ' = 0 (h = ∞), and
    for the step after σ = 1 (h_0 = ∞).  So does diffusers' DPMSolverMultistepScheduler (flow sigmas, order 2, midpoint,
    final σ of 0); only, its own grids start a little below 1, and there the step after the first is corrected.

    The error is of order Δ² where steps shrink in λ; on a grid even in σ they do not near σ = 0, and it is Δ²·log(1/Δ).

    MixGRPO-Flash (its released settings) walks the steps outside its window so.  DiffusionNFT's "dpm2" is of this kind:
    second-order multistep in λ, first and last step of order 1; whether it is the midpoint form is not checked.
    """

    @property
    def order(self) -> int:
        return 2

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Tensor | None
    ) -> Gaussian:
        """The next state, in float32 (float64 if x or velocity is); see :class:`Solver` for the arguments.

        Where `previous` is None all rows take the first-order step.  Raises ValueError when shapes do not agree, or for
        a step out of range.
        """
        euler = ODE().transition(x, velocity, schedule, step)
        if previous is None:
            return euler
        if previous.shape != x.shape:
            raise ValueError(f"previous: shape {tuple(previous.shape)} must be that of x, {tuple(x.shape)}")
        change = predict_clean(x, velocity, schedule, step) - upcast(previous)
        return replace(euler, mean=euler.mean + to_rows(_correction(schedule, step), change) * change)


def _correction(schedule: Schedule, step: Tensor) -> Tensor:
    """(Δ/σ)·h/(2·h_0) of each row, [B]; 0 where there is no second order."""
    before, sigma, below = schedule.at((step - 1).clamp(min=0)), schedule.at(step), schedule.after(step)
    # λ(low) − λ(high) = log(1 + (high − low)/(low·(1−high))): no difference of two large logarithms
    h = ((sigma - below) / (below * (1 - sigma))).log1p()
    h_before = ((before - sigma) / (sigma * (1 - before))).log1p()
    second = (step > 0) & (below > 0)
    return torch.where(second, (sigma - below) / sigma * h / (2 * h_before), torch.zeros_like(sigma))
