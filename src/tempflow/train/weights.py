"""The policy's trainable parameters, their float32 masters, the average (EMA) and the frozen reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Trainable:
    """The parameters of `network` that require gradients, with float32 masters that the optimizer moves.

    In float32 the masters are the parameters themselves. In bfloat16 the network computes with rounded copies:
    gradients are added up in float32 (`collect`) and the moved masters are rounded back (`publish`).
    Raises ValueError when nothing is trainable.
    """

    def __init__(self, network: nn.Module) -> None:
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: no parameter requires gradients; choose full training or add a LoRA")
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.split = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters: list[nn.Parameter] = (
            [nn.Parameter(p.detach().float().clone()) for p in self.parameters] if self.split else self.parameters
        )

    def collect(self) -> None:
        """Adds the network's fresh gradients to the masters'. To be called after each backward."""
        if not self.split:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is None:
                continue
            fresh = parameter.grad.float()
            master.grad = fresh if master.grad is None else master.grad.add_(fresh)
            parameter.grad = None

    def zero_grad(self) -> None:
        for p in (*self.parameters, *self.masters):
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the network."""
        if self.split:
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                parameter.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by parameter name."""
        return {n: m.detach().clone() for n, m in zip(self.names, self.masters, strict=True)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(state[name])
        self.publish()


class Average:
    """Exponential moving average of the masters: avg ← decay·avg + (1−decay)·master, decay warmed up as (1+n)/(10+n).

    With decay 0 the average is the policy itself and costs nothing.
    """

    def __init__(self, trainable: Trainable, decay: float) -> None:
        self.trainable, self.decay, self.updates = trainable, decay, 0
        self.values = [m.detach().clone() for m in trainable.masters] if decay > 0 else []

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the masters as they are after an optimizer step."""
        if self.decay > 0:
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            for value, master in zip(self.values, self.trainable.masters, strict=True):
                value.lerp_(master, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network computes with the average."""
        if self.decay <= 0:
            yield
            return
        kept = self.trainable.state()
        self.trainable.load(dict(zip(self.trainable.names, self.values, strict=True)))
        try:
            yield
        finally:
            self.trainable.load(kept)


def frozen_copy(network: nn.Module) -> nn.Module:
    """The network as it stands now, never to be trained: the reference `start`."""
    return copy.deepcopy(network).requires_grad_(False).eval()
