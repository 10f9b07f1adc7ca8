"""Sampling with several conditions a prompt: learned once for it, blended with its own at every σ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tempflow.core.distribution import upcast
from tempflow.core.perturb import Perturbation
from tempflow.core.rng import Stream
from tempflow.models.protocol import Conditioning, Model, Predict

if TYPE_CHECKING:
    from tempflow.train.step import Setting


@dataclass(frozen=True, eq=False)
class Offsets:
    """What is added to one prompt's embeddings.

    tokens  LongTensor [n], the places of its content tokens
    delta   [K, n, d], for each of its conditions; the first is 0
    """

    tokens: Tensor
    delta: Tensor


def sampler(setting: Setting, perturbation: Perturbation, prompts: Sequence[str], first: int) -> Predict:
    """The predictor that rolls these prompts out, of which the first has slot `first`; rows are slot·K + k."""
    condition = setting.model.encode(prompts)
    network = setting.sets.get(setting.algorithm.sampler)
    predict = perturbed(setting.model, condition, perturbation, setting.seed, setting.guidance, network)
    return lambda x, sigma, rows: predict(x, sigma, rows - first * perturbation.count)


def perturbed(
    model: Model,
    condition: Conditioning,
    perturbation: Perturbation,
    seed: int,
    guidance: float,
    network: nn.Module | None = None,
) -> Predict:
    """predict(x, sigma, rows) for states at one common σ; row n·K + k is the prompt n with its condition k.

    The empty prompt, which guidance contrasts with, and tensors other than "embeds" (a pooled embedding) stay as they
    are. Raises ValueError for a model without token embeddings.
    """
    offsets = learned(condition, perturbation, seed)
    held: tuple[float, Predict] | None = None

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        level = float(sigma[0])
        if held is None or held[0] != level:  # a step comes in chunks of one σ: its conditions are made once
            blend = blended(condition, offsets, perturbation.strength(level))
            held = (level, model.predictor(blend, guidance, network=network))
        return held[1](x, sigma, rows)

    return predict


def learned(condition: Conditioning, perturbation: Perturbation, seed: int) -> list[Offsets]:
    """Every prompt's offsets, each a function of the run's seed and the prompt alone: the same in every iteration,
    slot, batch and rank, and after a resume."""
    embeds = condition.tensors.get("embeds")
    if embeds is None or embeds.dim() != 3:
        named = {name: list(tensor.shape) for name, tensor in condition.tensors.items()}
        raise ValueError(f"conditions: the model encodes to {named}; nearest valid: one more, 'embeds' [N, L, d]")
    content = torch.ones_like(embeds, dtype=torch.bool) if condition.content is None else condition.content
    stream, offsets = Stream(seed, "conditions.offset"), list[Offsets]()
    for text, own, movable in zip(condition.prompts, embeds, content, strict=True):
        tokens = movable.any(1).nonzero()[:, 0]
        delta = perturbation.offsets(own[tokens], movable[tokens], stream, (_number(text),))
        offsets.append(Offsets(tokens, delta))
    return offsets


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


def _number(text: str) -> int:
    """A text as an identity for the random numbers."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
