"""A batch of clean samples and table models for the forward objectives, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.leaves import LeafBatch

SHAPE = (2, 3)


def batch(samples: int = 6, draws: int = 3, advantage: Tensor | None = None, seed: int = 0) -> LeafBatch:
    """Groups of three samples; advantages within ±0.9 that sum to 0 in each group."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(samples, *SHAPE, generator=g).double()
    group = torch.arange(samples) // 3
    if advantage is None:
        advantage = torch.tensor([0.9, -0.5, -0.4] * (samples // 3), dtype=torch.float64)
    t = 0.1 + 0.8 * torch.rand(samples, draws, generator=g).double()
    noise = torch.randn(samples, draws, *SHAPE, generator=g).double()
    return LeafBatch(x0, advantage, torch.arange(samples), group, t, noise)


class Field(nn.Module):
    """v = a·x + b·t + c·(row + 1) with a parameter of its own for each latent element."""

    def __init__(self, a: float = 0.4, b: float = -0.2, c: float = 0.05) -> None:
        super().__init__()
        self.theta = nn.Parameter(
            torch.tensor([a, b, c], dtype=torch.float64).repeat(6, 1).T.reshape(3, *SHAPE).clone()
        )

    def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        s, c = t.view(-1, 1, 1), (rows + 1).to(x).view(-1, 1, 1)
        return self.theta[0] * x + self.theta[1] * s + self.theta[2] * c


def models(policy: nn.Module | None = None) -> dict[str, nn.Module]:
    """Four different weight sets, unless `policy` is to be given by the caller."""
    return {
        "policy": Field() if policy is None else policy,
        "old": Field(0.43, -0.15, 0.04),
        "reference": Field(0.3, -0.3, 0.07),
        "ema": Field(0.41, -0.1, 0.02),
    }


def on_policy() -> dict[str, nn.Module]:
    """Old equals the policy; the others differ."""
    return models() | {"old": Field()}


def gradient(
    objective: Callable[[Mapping[str, Predict], LeafBatch], Loss], sets: dict[str, nn.Module], b: LeafBatch
) -> Tensor:
    """∇ of the loss by the policy's parameters; fails where another set gets any."""
    for net in sets.values():
        net.zero_grad()
    objective(sets, b).value.backward()
    policy = sets["policy"].get_parameter("theta")
    for name, net in sets.items():
        assert name == "policy" or net.get_parameter("theta").grad is None, f"{name} received a gradient"
    assert policy.grad is not None
    return policy.grad.clone()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
