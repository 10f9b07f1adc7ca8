"""Several conditions of one prompt: offsets of its token embeddings that differ from each other and keep its sense.

E²PO's first stage and its blend (arXiv 2605.15803, papers/trajectory §9, second-hand notes).  The flow is not asked:
offsets are learned on the embeddings alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tempflow.core.distribution import upcast
from tempflow.core.rng import Stream


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
    scale.  The loss and the blend are the notes'; f_φ (the mean over the content tokens), the unit, the optimizer and
    every constant are ours.  Raises ValueError for a value out of range.
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

    def strength(self, sigma: float) -> float:
        """γ(σ) = clip((σ − (1 − ρ))/ρ, 0, 1), written so that γ(1) is exactly 1; 0 everywhere at ρ = 0."""
        return 0.0 if self.fade == 0 else min(1.0, max(0.0, 1 - (1 - sigma) / self.fade))

    def offsets(self, tokens: Tensor, movable: Tensor, stream: Stream, id: tuple[int, ...]) -> Tensor:
        """δ, [K, n, d] in float32 or better; the first is 0, and so is what is not movable.

        tokens   [n, d], a prompt's content tokens; n may be 0
        movable  bool [n, d], what of them may be moved
        id       with `stream` and a condition's number it fixes the noise that its offset starts from

        One prompt at a time, without randomness but the stream's: a function of the arguments alone.
        """
        tokens = upcast(tokens.detach())
        learned = self.count - 1
        if learned == 0 or not bool(movable.any()):
            return tokens.new_zeros(self.count, *tokens.shape)
        unit = ((tokens * movable).square().sum(1) / movable.sum(1).clamp(min=1)).sqrt()[:, None] * movable
        drawn = stream.normal([(*id, k) for k in range(1, self.count)], tokens.shape)
        moved = unit * self._learned(tokens, unit, drawn.to(tokens) * self.init)
        return torch.cat([torch.zeros_like(moved[:1]), moved])

    def _learned(self, tokens: Tensor, unit: Tensor, start: Tensor) -> Tensor:
        """Offsets in units, [K − 1, n, d], after all steps. A step has one length whatever the slope, so that the
        number of conditions and the weights of the loss do not change how far it goes."""
        free, anchor = start, tokens.mean(0)
        for step in range(self.embed_steps):
            with torch.enable_grad():
                free = free.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.loss((tokens + unit * free).mean(1), anchor), [free])
            size = slope.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(slope.dtype).tiny)
            free = free.detach() - self.embed_rate * (1 - step / self.embed_steps) * slope / size
        return free

    def loss(self, embeddings: Tensor, anchor: Tensor) -> Tensor:
        """λ_div·mean_{k<l} cos(e_k, e_l) + Σ_k max(|cos(e_k, e_anchor) − μ| − ε, 0); e [M, d], e_anchor [d]."""
        off = (cosine_similarity(embeddings, anchor[None], dim=1) - self.target).abs() - self.band
        held = off.clamp(min=0).sum()
        k, other = torch.triu_indices(len(embeddings), len(embeddings), 1)
        if len(k) == 0:  # a single one differs from no other
            return held
        return held + self.spread * cosine_similarity(embeddings[k], embeddings[other], dim=1).mean()


def _between(field: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        nearest = low if not value > low else high if math.isfinite(high) else low
        bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{field}: {value} must be {bound}; nearest valid: {nearest:g}")
