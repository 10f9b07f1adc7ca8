"""Sampling with several conditions a prompt: learned once for it, blended with its own at every σ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tempflow.core.perturb import Perturbation
from tempflow.core.rng import Stream
from tempflow.core.state import upcast
from tempflow.media import Size
from tempflow.models.finite import NotFiniteError, encoded
from tempflow.models.guidance import Guidance
from tempflow.models.protocol import Conditioning, EncodesInputs, Model, Predict, TextInputs
from tempflow.request import Prompt

KEPT_BYTES = 1 << 30
"""Of offsets that are kept for the next time; a prompt of 45 tokens takes 12 MiB with SD 3.5's three encoders and 12
conditions."""


@dataclass(frozen=True, eq=False)
class Offsets:
    """What is added to what enters one prompt's text encoders, by encoder.

    places  LongTensor [n], of its content tokens
    delta   [K, n, d], for each of its conditions; the first is 0
    """

    places: Mapping[str, Tensor]
    delta: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for delta in self.delta.values())


class Learned:
    """Offsets that were learned, by a prompt's text, its sources and what enters the encoders for it. Each is a
    function of the run's seed and of these alone: the same in every iteration, slot, batch and rank, and after a
    resume. So they are kept, on the CPU, at most KEPT_BYTES."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Perturbation, int, str, tuple[str, ...], bytes], Offsets] = {}

    def of(self, model: Model, prompts: Sequence[Prompt], perturbation: Perturbation, seed: int) -> list[Offsets]:
        """Every prompt's. Raises ValueError for a model that does not show what enters its text encoders."""
        shown = check_encodes(model)
        keys = [
            (perturbation, seed, prompt.text, _sources(prompt), _digest(shown.text_inputs(prompt).tokens))
            for prompt in prompts
        ]
        for key, prompt in zip(keys, prompts, strict=True):
            if key not in self._kept:
                self._kept[key] = _learn(shown, perturbation, seed, prompt)
        offsets = [self._kept[key] for key in keys]
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return offsets


def check_encodes(model: Model) -> EncodesInputs:
    """The model, if it shows what enters its text encoders. Raises ValueError."""
    if not isinstance(model, EncodesInputs):
        raise ValueError(
            f"conditions: the model {model.name!r} does not show what enters its text encoders "
            "(models.protocol.EncodesInputs); nearest valid: one that does, or an algorithm without conditions"
        )
    return model


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Of what the tensors hold."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _sources(prompt: Prompt) -> tuple[str, ...]:
    return tuple(source.digest for source in prompt.sources)


def _number(prompt: Prompt) -> int:
    """What tells its offsets' draws from another prompt's."""
    digest = hashlib.blake2b(prompt.text.encode(), digest_size=8)
    for source in _sources(prompt):
        digest.update(b"\0" + source.encode())
    return int.from_bytes(digest.digest(), "little")


def _learn(model: EncodesInputs, perturbation: Perturbation, seed: int, prompt: Prompt) -> Offsets:
    inputs, text = model.text_inputs(prompt), prompt.text
    places = {name: content.nonzero()[:, 0] for name, content in inputs.content.items()}

    def encode(words: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return model.encode_inputs(prompt, _with_words(inputs, places, words)).vectors

    words = {name: inputs.tokens[name][place] for name, place in places.items()}
    delta = perturbation.offsets(words, encode, Stream(seed, "conditions.offset"), (_number(prompt),))
    _check_finite(text, "what was learned as its offsets", delta)
    return Offsets({n: p.cpu() for n, p in places.items()}, {n: d.cpu() for n, d in delta.items()})


def _with_words(inputs: TextInputs, places: Mapping[str, Tensor], words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompt's tokens with others at the places of its words, [M, L, d] by encoder."""
    return {
        name: upcast(own).expand(len(words[name]), *own.shape).index_copy(1, places[name], words[name])
        for name, own in inputs.tokens.items()
    }


def perturbed_predictor(
    model: Model,
    learned: Learned,
    perturbation: Perturbation,
    prompts: Sequence[Prompt],
    size: Size,
    first: int,
    seed: int,
    guidance: Guidance,
    network: nn.Module | None,
) -> Predict:
    """The predictor that rolls these prompts out, of which the first has slot `first`; rows are slot·K + k.

    network: the weight set that rolls out; None: the policy.
    """
    condition = encoded(model, prompts, size)
    moved = moved_conditions(model, condition, learned.of(model, prompts, perturbation, seed))
    predict = perturbed(model, condition, moved, perturbation.strength, guidance, network)
    return lambda x, sigma, rows: predict(x, sigma, rows - first * perturbation.count)


@torch.no_grad()
def moved_conditions(model: Model, condition: Conditioning, offsets: Sequence[Offsets]) -> Conditioning:
    """What the text encoders say with every prompt's offsets, [N·K, …]; the first of K, and all of a prompt without
    words, is the prompt's own."""
    rows: dict[str, list[Tensor]] = {name: [] for name in condition.tensors}
    for n, (prompt, offset) in enumerate(zip(condition.prompts, offsets, strict=True)):
        own = {name: tensor[n : n + 1] for name, tensor in condition.tensors.items()}
        count = len(next(iter(offset.delta.values())))
        said = _said(model, prompt, offset) if any(bool(d.any()) for d in offset.delta.values()) else None
        for name, tensor in own.items():
            others = tensor.expand(count - 1, *tensor.shape[1:]) if said is None else said[name]
            rows[name] += [tensor, others.to(tensor)]
    count = len(next(iter(offsets[0].delta.values())))
    return replace(condition.repeated(count), tensors={name: torch.cat(parts) for name, parts in rows.items()})


def _said(model: Model, prompt: Prompt, offset: Offsets) -> Mapping[str, Tensor]:
    """The conditions but the first, [K − 1, …]."""
    assert isinstance(model, EncodesInputs)
    inputs, words = model.text_inputs(prompt), dict[str, Tensor]()
    places = {name: place.to(inputs.tokens[name].device) for name, place in offset.places.items()}
    for name, delta in offset.delta.items():
        own = upcast(inputs.tokens[name][places[name]])
        words[name] = own + delta[1:].to(own)
    said = model.encode_inputs(prompt, _with_words(inputs, places, words)).tensors
    _check_finite(prompt.text, "what the text encoders say with offsets", said)
    return said


def _check_finite(prompt: str, what: str, tensors: Mapping[str, Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise NotFiniteError(f"prompt {prompt[:60]!r}: {what} is not finite; nearest valid: float32")


def perturbed(
    model: Model,
    condition: Conditioning,
    moved: Conditioning,
    strength: Callable[[float], float],
    guidance: Guidance | float,
    network: nn.Module | None = None,
) -> Predict:
    """predict(x, sigma, rows) for states at one common σ; row n·K + k is the prompt n with its condition k.

    moved     all N·K conditions, at full strength
    strength  σ -> γ

    The negative prompts, which guidance leads away from, stay as they are.
    """
    held: tuple[float, Predict] | None = None

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        nonlocal held
        level = float(sigma[0])  # waits for the device, which a forward of a chunk outweighs by far
        if held is None or held[0] != level:  # a step comes in chunks of one σ: its conditions are made once
            blend = blended(condition, moved, strength(level))
            held = (level, model.predictor(blend, guidance, network=network))
        return held[1](x, sigma, rows)

    return predict


def blended(condition: Conditioning, moved: Conditioning, strength: float) -> Conditioning:
    """γ·C_k + (1 − γ)·C of every prompt and condition, [N·K, …], exactly C at 0 and C_k at 1."""
    count = len(moved) // len(condition)

    def mixed(name: str, own: Tensor) -> Tensor:
        return torch.lerp(upcast(own).repeat_interleave(count, 0), upcast(moved.tensors[name]), strength).to(own.dtype)

    return replace(moved, tensors={name: mixed(name, own) for name, own in condition.tensors.items()})
