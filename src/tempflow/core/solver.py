"""How deterministic edges are walked: by one step of a dynamics, or by a solver that remembers the steps before.

A solver keeps no state of its own.  What it remembers, the clean samples predicted earlier on the same path, is handed
to it; so one solver serves any number of paths at once, and a child of a stochastic edge has a history too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.distribution import Gaussian, Transition
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.schedule import Schedule
from tempflow.core.state import to_rows, upcast


@runtime_checkable
class Solver(Protocol):
    """A deterministic way from σ_i to σ_{i+1}."""

    @property
    def memory(self) -> int:
        """How many earlier predictions it wants."""
        ...

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
    ) -> Transition:
        """The next state, as the mode of a law: the mean of a Gaussian with std 0.

        x, velocity [B, *S] at σ_step, step LongTensor[B]; previous, each [B, *S]: `predict_clean` at the parent of x,
        at that one's parent, … up to `memory`, whatever kind of edge led from there; fewer near the root.
        """
        ...


def predict_clean(x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor) -> Tensor:
    """x̂0 = x − σ·v, [B, *S], in float32 at least: the clean sample that a velocity at σ_step points to."""
    x, velocity = upcast(x), upcast(velocity)
    return x - to_rows(schedule.at(step), velocity) * velocity


@dataclass(frozen=True)
class OneStep:
    """A deterministic dynamics as a solver; it looks at no history.

    Raises ValueError when the dynamics draws noise.
    """

    dynamics: Dynamics

    def __post_init__(self) -> None:
        if self.dynamics.stochastic:
            raise ValueError(f"solver = {self.dynamics}: deterministic edges draw no noise; nearest valid: ODE()")

    @property
    def memory(self) -> int:
        return 0

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
    ) -> Transition:
        """One step of the dynamics; `previous` is not looked at."""
        return self.dynamics.transition(x, velocity, schedule, step)


@dataclass(frozen=True)
class DPMSolver2:
    """DPM-Solver++(2M): data prediction, second-order multistep, midpoint form (arXiv 2211.01095, Algorithm 2).

    With λ = log((1−σ)/σ), h = λ' − λ and h_0 = λ − λ_before, the midpoint form on the flow path is the Euler step and
    a correction by the change of the prediction,

        x' = x − Δ·v + (Δ/σ) · h/(2·h_0) · (x̂0 − previous).

    There is no correction, and the step is ODE()'s to the last bit, at step 0, for a step into σ' = 0 (h = ∞), and
    for the step after σ = 1 (h_0 = ∞).  So does diffusers' DPMSolverMultistepScheduler (flow sigmas, order 2, midpoint,
    final σ of 0); only, its own grids start a little below 1, and there the step after the first is corrected.

    The error is of order Δ² where steps shrink in λ; on a grid even in σ they do not near σ = 0, and it is Δ²·log(1/Δ).

    MixGRPO-Flash (its released settings) walks the steps outside its window so, and DiffusionNFT's "dpm2" is the same
    midpoint form, its first and last step of order 1 (both read in source, sure).
    """

    @property
    def memory(self) -> int:
        return 1

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
    ) -> Gaussian:
        """The next state, in float32 (float64 if x or velocity is); see :class:`Solver` for the arguments.

        Where `previous` is empty all rows take the first-order step.  Raises ValueError when shapes do not agree, or
        for a step out of range.
        """
        euler = ODE().transition(x, velocity, schedule, step)
        if not previous:
            return euler
        _check_shapes(x, previous)
        change = predict_clean(x, velocity, schedule, step) - upcast(previous[0])
        return replace(euler, mean=euler.mean + to_rows(_second_order(schedule, step), change) * change)


@dataclass(frozen=True)
class UniPC2:
    """UniPC of order 2, B(h) = e^h − 1, data prediction (arXiv 2302.04867): DPM-Solver++(2M) and a corrector.

    The prediction x̂0_i at a state tells how far the step that led there went wrong; the state is moved by

        (Δ/σ)_{i−1} · [ρ₂·(x̂0_i − x̂0_{i−1}) − (½ − ρ₁)·q·(x̂0_{i−1} − x̂0_{i−2})],  q = h_{i−1}/h_{i−2},

    and the next step starts from there, with the same x̂0_i: no forward is added, and the order rises to 3.  ρ₁, ρ₂ are
    the paper's; at step 1, which has no x̂0_{i−2}, ρ₂ = ½ and the second term is left out.  The last state is not moved,
    and neither are the stored ones: the move is part of the step that leaves them.  So does diffusers'
    UniPCMultistepScheduler (flow sigmas, order 2, "bh2", final σ of 0).

    A noisy step's end is moved by the same rule, which does not fit it: walk plans without noise by this solver.
    """

    @property
    def memory(self) -> int:
        return 2

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
    ) -> Gaussian:
        """The next state, in float32 (float64 if x or velocity is); see :class:`Solver` for the arguments.

        Raises ValueError when shapes do not agree, or for a step out of range.
        """
        law = DPMSolver2().transition(x, velocity, schedule, step, previous[:1])
        if not previous:
            return law
        _check_shapes(x, previous)
        own, last = _corrector(schedule, step, len(previous) > 1)
        parent = upcast(previous[0])
        move = to_rows(own, parent) * (predict_clean(x, velocity, schedule, step) - parent)
        if len(previous) > 1:
            move = move - to_rows(last, parent) * (parent - upcast(previous[1]))
        keeps = schedule.after(step) / schedule.at(step)  # of x itself, the prediction being held
        return replace(law, mean=law.mean + to_rows(keeps, move) * move)


SolverName = Literal["euler", "dpm2", "unipc2"]

SOLVERS: Mapping[SolverName, Solver | None] = {"euler": None, "dpm2": DPMSolver2(), "unipc2": UniPC2()}
"""By the names that algorithms take; None is the rollout's own Euler step."""


def solver_of(name: SolverName) -> Solver | None:
    """The solver of that name. Raises ValueError for another."""
    if name not in SOLVERS:
        raise ValueError(f"solver: {name!r} is not one of {', '.join(SOLVERS)}; nearest valid: 'euler'")
    return SOLVERS[name]


def _check_shapes(x: Tensor, previous: Sequence[Tensor]) -> None:
    for place, earlier in enumerate(previous):
        if earlier.shape != x.shape:
            raise ValueError(f"previous[{place}]: shape {tuple(earlier.shape)} must be that of x, {tuple(x.shape)}")


def _log_ratio(high: Tensor, low: Tensor) -> Tensor:
    """λ(low) − λ(high) with λ = log((1−σ)/σ); ∞ where high is 1 or low is 0."""
    return ((high - low) / (low * (1 - high))).log1p()  # no difference of two large logarithms


def _second_order(schedule: Schedule, step: Tensor) -> Tensor:
    """(Δ/σ)·h/(2·h_0) of each row, [B]; 0 where there is no second order."""
    before, sigma, below = schedule.at((step - 1).clamp(min=0)), schedule.at(step), schedule.after(step)
    h, h_before = _log_ratio(sigma, below), _log_ratio(before, sigma)
    second = (step > 0) & (below > 0)
    return torch.where(second, (sigma - below) / sigma * h / (2 * h_before), torch.zeros_like(sigma))


def _corrector(schedule: Schedule, step: Tensor, second: bool) -> tuple[Tensor, Tensor]:
    """UniPC2's factors of x̂0_i − x̂0_{i−1} and of x̂0_{i−1} − x̂0_{i−2}, [B] each, for the step i that leaves x.

    second: whether x̂0_{i−2} is there. Rows of step 0 get zeros.
    """
    # in float64, as φ₂ is what is left of a difference of nearly equal numbers
    at = [schedule.at((step - n).clamp(min=0)).double() for n in range(3)]
    share = torch.where(step > 0, (at[1] - at[0]) / at[1], torch.zeros_like(at[0]))
    if not second:
        return (share / 2).to(schedule.at(step)), torch.zeros_like(schedule.at(step))
    h, h_before = _log_ratio(at[1], at[0]), _log_ratio(at[2], at[1])
    q = h / h_before
    grown = torch.expm1(-h)
    phi1 = -grown / h - 1
    b1, b2 = phi1 / grown, 2 * (-phi1 / h - 0.5) / grown
    rho1 = (b1 - b2) * q / (1 + q)
    deep = step > 1
    own = torch.where(deep, b1 - rho1, torch.full_like(b1, 0.5))
    last = torch.where(deep, (0.5 - rho1) * q, torch.zeros_like(q))
    return (share * own).to(schedule.at(step)), (share * last).to(schedule.at(step))
