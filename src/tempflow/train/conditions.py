"""Sampling with several conditions a prompt: learned once for it, blended with its own at every σ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tempflow.core.distribution import upcast
from tempflow.core.perturb import Perturbation
from tempflow.core.rng import Stream
from tempflow.models.finite import NotFiniteError, encoded
from tempflow.models.protocol import Conditioning, Model, Predict

if TYPE_CHECKING:
    from tempflow.train.setting import Setting

KEPT_BYTES = 1 << 30
"""Of offsets that are kept for the next time; a prompt of 45 tokens takes 8 MiB at SD 3.5's width and 12 conditions."""


@dataclass(frozen=True, eq=False)
class Offsets:
    """What is added to one prompt's embeddings.

    tokens  LongTensor [n], the places of its content tokens
    delta   [K, n, d], for each of its conditions; the first is 0
    """

    tokens: Tensor
    delta: Tensor

    def to(self, device: torch.device) -> Offsets:
        return Offsets(self.tokens.to(device), self.delta.to(device))


class Learned:
    """Offsets that were learned, by prompt and by what it was encoded to. Each is a function of the run's seed and of
    these alone: the same in every iteration, slot, batch and rank, and after a resume. So they are kept, on the CPU, at
    most KEPT_BYTES."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Perturbation, int, str, bytes], Offsets] = {}

    def of(self, condition: Conditioning, perturbation: Perturbation, seed: int) -> list[Offsets]:
        """Every prompt's. Raises ValueError for a model without token embeddings."""
        embeds = condition.tensors.get("embeds")
        if embeds is None or embeds.dim() != 3:
            named = {name: list(tensor.shape) for name, tensor in condition.tensors.items()}
            raise ValueError(f"conditions: the model encodes to {named}; nearest valid: one more, 'embeds' [N, L, d]")
        content = torch.ones_like(embeds, dtype=torch.bool) if condition.content is None else condition.content
        encoded = [_digest(own, movable) for own, movable in zip(embeds, content, strict=True)]
        keys = [(perturbation, seed, *rest) for rest in zip(condition.prompts, encoded, strict=True)]
        for key, own, movable in zip(keys, embeds, content, strict=True):
            if key not in self._kept:
                self._kept[key] = _learn(perturbation, seed, key[2], own, movable)
        offsets = [self._kept[key].to(embeds.device) for key in keys]
        while len(self._kept) > 1 and sum(kept.delta.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return offsets


def _digest(*tensors: Tensor) -> bytes:
    """Of the tensors' contents."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _learn(perturbation: Perturbation, seed: int, text: str, embeds: Tensor, movable: Tensor) -> Offsets:
    """Of one prompt, [L, d]."""
    tokens = movable.any(1).nonzero()[:, 0]
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    stream = Stream(seed, "conditions.offset")
    delta = perturbation.offsets(embeds[tokens], movable[tokens], stream, (number,)).cpu()
    if not bool(delta.isfinite().all()):
        raise NotFiniteError(
            f"prompt {text[:60]!r}: the offsets of its conditions are not finite; nearest valid: float32"
        )
    return Offsets(tokens.cpu(), delta)


def sampler(setting: Setting, perturbation: Perturbation, prompts: Sequence[str], first: int) -> Predict:
    """The predictor that rolls these prompts out, of which the first has slot `first`; rows are slot·K + k."""
    condition = encoded(setting.model, prompts)
    offsets = setting.learned.of(condition, perturbation, setting.seed)
    network = setting.sets.get(setting.algorithm.sampler)
    predict = perturbed(setting.model, condition, offsets, perturbation.strength, setting.guidance, network)
    return lambda x, sigma, rows: predict(x, sigma, rows - first * perturbation.count)


def perturbed(
    model: Model,
    condition: Conditioning,
    offsets: Sequence[Offsets],
    strength: Callable[[float], float],
    guidance: float,
    network: nn.Module | None = None,
) -> Predict:
    """predict(x, sigma, rows) for states at one common σ; row n·K + k is the prompt n with its condition k.

    strength  σ -> γ

    The empty prompt, which guidance contrasts with, and tensors other than "embeds" (a pooled embedding) stay as they
    are.
    """
    held: tuple[float, Predict] | None = None

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        level = float(sigma[0])  # waits for the device, which a forward of a chunk outweighs by far
        if held is None or held[0] != level:  # a step comes in chunks of one σ: its conditions are made once
            blend = blended(condition, offsets, strength(level))
            held = (level, model.predictor(blend, guidance, network=network))
        return held[1](x, sigma, rows)

    return predict


def blended(condition: Conditioning, offsets: Sequence[Offsets], strength: float) -> Conditioning:
    """C + γ·δ of every prompt and condition, [N·K, …]: the paper's γ·C_k + (1 − γ)·C."""
    count = len(offsets[0].delta)
    tensors = {name: tensor.repeat_interleave(count, 0) for name, tensor in condition.tensors.items()}
    for n, offset in enumerate(offsets):
        own = condition.tensors["embeds"][n, offset.tokens]
        moved = upcast(own) + strength * offset.delta
        tensors["embeds"][n * count : (n + 1) * count, offset.tokens] = moved.to(own.dtype)
    prompts = tuple(prompt for prompt in condition.prompts for _ in range(count))
    return replace(condition, prompts=prompts, tensors=tensors, content=None)
