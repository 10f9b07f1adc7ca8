"""One-dimensional Gaussians with analytic velocities: students, teachers and starting noises in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule, explicit

GRID = explicit((1, 0.75, 0.5, 0.25), 3.0).double()
SHAPE = (2, 3)


def noises(
    size: int = 6, update: int = 0, shape: tuple[int, ...] = SHAPE, grid: Schedule = GRID, **other: Any
) -> NoiseBatch:
    ids = tuple((0, update, n % 2, n) for n in range(size))
    x = Stream(5, "start").normal(ids, shape).double()
    return NoiseBatch(x, torch.arange(size) % 2, ids, 5, grid, **other)


def law(x: Tensor, sigma: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """E[ε − x0 | x_σ] of N(mean, std²), element by element."""
    t = sigma.to(x).view(-1, *[1] * (x.dim() - 1))
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return (x - mean - gain * (x - (1 - t) * mean)) / t


class Affine(nn.Module):
    """The velocity of N(mean, std²) with a mean and a deviation that learn. `seen`: what it was asked, and whether with
    gradients."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.seen.append((x.detach(), sigma, torch.is_grad_enabled()))
        return law(x, sigma, self.mean, self.std)


class Steps(nn.Module):
    """a·x + b with weights of its own at each node of the grid: what it can represent, any few-step student can."""

    def __init__(self, grid: Schedule = GRID) -> None:
        super().__init__()
        self.sigmas = grid.sigmas
        self.a, self.b = (nn.Parameter(torch.zeros(grid.steps, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        step = (self.sigmas[None, :-1] - sigma[:, None].to(self.sigmas)).abs().argmin(1)
        a, b = (p[step].view(-1, *[1] * (x.dim() - 1)) for p in (self.a, self.b))
        return a * x + b


def walked(predict: Any, x: Tensor, grid: Schedule = GRID) -> Tensor:
    """By hand: all Euler steps."""
    rows = torch.arange(len(x)) % 2
    for i in range(grid.steps):
        sigma = grid.sigmas[i].expand(len(x))
        x = x - (grid.sigmas[i] - grid.sigmas[i + 1]) * predict(x, sigma, rows)
    return x


def bearing(models: Mapping[str, nn.Module], value: Tensor) -> set[str]:
    """Whom a backward gives a gradient."""
    value.backward()
    return {
        name
        for name, model in models.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    }


def rows_asked(models: Mapping[str, Affine]) -> dict[str, tuple[int, int]]:
    """Rows without and with gradient, of each."""
    return {
        name: (sum(len(x) for x, _, on in m.seen if not on), sum(len(x) for x, _, on in m.seen if on))
        for name, m in models.items()
    }


def forget(models: Mapping[str, Affine]) -> None:
    for model in models.values():
        model.seen.clear()
