"""Rewards by a network: weights are loaded once, when they are first needed, and pictures are scored in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from threading import Lock
from typing import Annotated, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.devices import resolved_device
from tempflow.media import Media
from tempflow.rewards.protocol import Differentiable, check_media

Batch = Annotated[int, Field(ge=1)]
"""Pictures at once. Scores do not depend on it, but for rounding."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of the network; what is made of its features is float64."""

Network = TypeVar("Network")


class Scorer(Generic[Network]):
    """Pictures and prompts to one column, named `name`.

    load    makes the network; called once, by `prepare` or by the first `score`
    rate    (network, pictures uint8 [n, H, W, 3], n prompts) → n scores
    batch   at most so many rows reach `rate` at once
    device  where the network runs; `rate` brings scores back to the CPU
    pixels  (network, pixels float32 [n, 3, H, W] in 0 … 1 on the device, n prompts) → the same scores with gradients to
            the pixels, on any device; None where there are none

    A score that is not finite is failed. Raises ValueError for a batch below 1, or a device that is not here.
    """

    groupwise = False

    def __init__(
        self,
        name: str,
        load: Callable[[str], Network],
        rate: Callable[[Network, Tensor, Sequence[str]], Tensor],
        *,
        batch: int,
        device: str,
        pixels: Callable[[Network, Tensor, Sequence[str]], Tensor] | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: {batch} is too small; nearest valid: 1")
        self.name, self.batch, self.device = name, batch, resolved_device(device)
        self._load, self._rate, self._pixels = load, rate, pixels
        self._network: Network | None = None
        self._loading = Lock()

    def prepare(self) -> None:
        """Loads the weights, unless they are there. Raises what the loading does, in one line."""
        self._there()

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column. Raises ValueError for media that are none, or not as many prompts, and what `prepare` does."""
        pictures = check_media(media, prompts, metadata).pictures()
        network, parts = self._there(), [torch.empty(0)]
        kind = torch.device(self.device).type
        with torch.inference_mode(), torch.autocast(kind, enabled=False):
            for start in range(0, len(pictures), self.batch):
                rows = slice(start, start + self.batch)
                parts.append(self._rate(network, pictures[rows], list(prompts[rows])).cpu().float())
        value = torch.cat(parts).clone()[:, None]  # a tensor that autograd may hold
        return Scores(value, value.isfinite(), (self.name,))

    @property
    def differentiable(self) -> Differentiable | None:
        """See `protocol.Differentiable`."""
        return None if self._pixels is None else partial(self._through, self._pixels)

    def _through(
        self,
        rate: Callable[[Network, Tensor, Sequence[str]], Tensor],
        pixels: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        network, pictures = self._there(), pixels[:, pixels.shape[1] // 2].to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            parts = [
                rate(network, part, list(prompts[start : start + self.batch]))
                for start, part in zip(range(0, len(pixels), self.batch), pictures.split(self.batch), strict=True)
            ]
        return torch.cat(parts)

    def _there(self) -> Network:
        with self._loading:
            if self._network is None:
                self._network = self._load(self.device)
            return self._network


def require(extra: str, *modules: str) -> None:
    """Raises ImportError, naming the command to run, unless all modules are installed. Imports none of them."""
    for name in modules:
        if find_spec(name) is None:
            raise ImportError(f"this reward needs {name}: pip install 'tempflow[{extra}]'", name=name)
