"""Several conditions of one prompt: offsets of the token embeddings that enter its text encoders, which make these say
things that differ from each other and keep the prompt's sense.

E²PO's first stage and its blend (arXiv 2605.15803, papers/trajectory §9, second-hand notes).  The flow is not asked:
offsets are learned through the frozen text encoders alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tempflow.core.rng import Stream
from tempflow.core.state import upcast

Encode = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Content tokens [M, n, d] by encoder -> what each encoder makes of the prompt, [M, g]."""

T = TypeVar("T")


@dataclass(frozen=True)
class OwnCondition:
    """A prompt's own condition, and no other."""

    count: int = 1

    def sampler(self, own: Callable[[], T], perturbed: Callable[[Perturbation], T]) -> T:
        """What samples with it: `own`()."""
        return own()


@dataclass(frozen=True)
class Perturbation:
    """`count` conditions of a prompt, of which the first is its own and the others are learned.

    count   K ≥ 1, conditions of a prompt with its own
    fade    ρ in [0, 1]: they differ from it at σ > 1 − ρ only, fully at σ = 1; 0: nowhere
    spread  λ_div ≥ 0, weight of the mean cosine between the learned ones
    target  μ in [−1, 1], the cosine with the prompt's own that each is held to …
    band    ε ≥ 0, … give or take this much, at no cost
    init    σ_init ≥ 0, standard deviation of the offsets before they are learned
    embed_steps, embed_rate
            how many steps ≥ 0 down the loss's slope, and how long (> 0) the first is: the root mean square of an
            offset's change, which falls to 0 on a straight line. With init 0 there can be no step, as equal conditions
            have no direction to part in

    `init` and `embed_rate` are in units of each token's root mean square, so that one number fits encoders of any
    scale.  The loss, the blend and what is perturbed are the notes'; the unit, the optimizer and every constant are
    ours, and so is that several encoders have offsets and a loss each.  Raises ValueError for a value out of range.
    """

    count: int
    fade: float
    spread: float
    target: float
    band: float
    init: float
    embed_steps: int
    embed_rate: float

    def __post_init__(self) -> None:
        _between("count", self.count, 1, math.inf)
        _between("fade", self.fade, 0, 1)
        _between("spread", self.spread, 0, math.inf)
        _between("target", self.target, -1, 1)
        _between("band", self.band, 0, math.inf)
        _between("init", self.init, 0, math.inf)
        _between("embed_steps", self.embed_steps, 0, math.inf)
        if self.init == 0 and self.embed_steps > 0:
            raise ValueError(
                "init: 0 leaves equal conditions no direction to part in; nearest valid: 0.1, or embed_steps 0"
            )
        if not (math.isfinite(self.embed_rate) and self.embed_rate > 0):
            raise ValueError(f"embed_rate: {self.embed_rate} must be finite and above 0; 0.03 is usual")

    def sampler(self, own: Callable[[], T], perturbed: Callable[[Perturbation], T]) -> T:
        """What samples with these conditions: `perturbed`(these)."""
        return perturbed(self)

    def strength(self, sigma: float) -> float:
        """γ(σ) = clip((σ − (1 − ρ))/ρ, 0, 1), written so that γ(1) is exactly 1; 0 everywhere at ρ = 0."""
        return 0.0 if self.fade == 0 else min(1.0, max(0.0, 1 - (1 - sigma) / self.fade))

    def offsets(
        self, tokens: Mapping[str, Tensor], encode: Encode, stream: Stream, id: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """δ by encoder, [K, n, d] in float32 or better; the first is 0.

        tokens  [n, d] by encoder: a prompt's content tokens as they enter it; n may be 0
        encode  tokens [M, n, d] by encoder -> f_φ of them, [M, g] by encoder, with gradients
        id      with `stream`, the encoder's place and a condition's number it fixes the noise that an offset starts
        from

        One prompt at a time, without randomness but the stream's: a function of the arguments alone.
        """
        tokens = {name: upcast(given.detach()) for name, given in tokens.items()}
        none = {name: given.new_zeros(self.count, *given.shape) for name, given in tokens.items()}
        if self.count == 1 or not any(len(given) for given in tokens.values()):
            return none
        unit = {name: given.square().mean(1, keepdim=True).sqrt() for name, given in tokens.items()}
        start = dict[str, Tensor]()
        for place, (name, given) in enumerate(tokens.items()):
            drawn = stream.normal([(*id, place, k) for k in range(1, self.count)], given.shape)
            start[name] = drawn.to(given) * self.init
        free = self._learned(tokens, unit, start, encode)
        return {name: torch.cat([none[name][:1], unit[name] * free[name]]) for name in tokens}

    def _learned(
        self, tokens: Mapping[str, Tensor], unit: Mapping[str, Tensor], start: dict[str, Tensor], encode: Encode
    ) -> dict[str, Tensor]:
        """Offsets in units, [K − 1, n, d], after all steps. A step has one length whatever the slope, so that neither
        the number of conditions nor the weights of the loss change how far it goes."""
        if self.embed_steps == 0:
            return start
        with torch.no_grad():
            anchor = {name: upcast(e[0]) for name, e in encode({n: given[None] for n, given in tokens.items()}).items()}
        free = start
        for step in range(self.embed_steps):
            with torch.enable_grad():
                free = {name: value.detach().requires_grad_() for name, value in free.items()}
                found = encode({name: tokens[name] + unit[name] * free[name] for name in tokens})
                loss = torch.stack([self.loss(upcast(e), anchor[name]) for name, e in found.items()]).sum()
                slopes = torch.autograd.grad(loss, list(free.values()), materialize_grads=True)
            rate = self.embed_rate * (1 - step / self.embed_steps)
            free = {n: value.detach() - rate * _even(s) for (n, value), s in zip(free.items(), slopes, strict=True)}
        return free

    def loss(self, embeddings: Tensor, anchor: Tensor) -> Tensor:
        """λ_div·mean_{k<l} cos(e_k, e_l) + Σ_k max(|cos(e_k, e_anchor) − μ| − ε, 0); e [M, d], e_anchor [d]."""
        off = (cosine_similarity(embeddings, anchor[None], dim=1) - self.target).abs() - self.band
        held = off.clamp(min=0).sum()
        k, other = torch.triu_indices(len(embeddings), len(embeddings), 1)
        if len(k) == 0:  # a single one differs from no other
            return held
        return held + self.spread * cosine_similarity(embeddings[k], embeddings[other], dim=1).mean()


def _even(slope: Tensor) -> Tensor:
    """The direction of each condition's slope, of root mean square 1."""
    size = slope.square().mean((1, 2), keepdim=True).sqrt()
    return slope / size.clamp(min=torch.finfo(slope.dtype).tiny)


def _between(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        nearest = low if not value > low else high if math.isfinite(high) else low
        bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{field}: {value} must be {bound}; nearest valid: {nearest:g}")
