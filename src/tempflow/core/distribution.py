"""Distributions of one sampler step: what is sampled from them, their log-probs and divergences.

States of real numbers move by a `Gaussian`, tokens by a `Categorical`. Both are a `Transition`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from tempflow.core.rng import NoiseKind
from tempflow.core.state import WHOLE, StateLayout, double, mean_dims, to_rows, upcast

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
NO_LOG_PROB = "a deterministic (ODE) step has no log-probability"

_PARTS = 1 << 53
"""Into so many parts of probability a draw of a token divides 1."""

AT_ONCE = 1 << 24
"""Probabilities of tokens that are held in float32 or better at a time: 64 or 128 MiB."""


def velocity_kl(v: Tensor, v_ref: Tensor, layout: StateLayout = WHOLE) -> Tensor:
    """mean (v − v_ref)² over non-batch dims, [B]: the velocity-space stand-in for a KL (DiffusionNFT, Flow-Factory).

    ``layout`` says what the mean counts. Raises ValueError when the shapes differ.
    """
    _check_shape("v_ref", v_ref, v)
    return layout.mean((upcast(v) - upcast(v_ref)).square())


def drift_kl(policy: Gaussian, reference: Gaussian, rate: Tensor) -> Tensor:
    """Flow-GRPO's KL penalty, mean (μ − μ_ref)² / (2 s²), [B], with the diffusion rate s in place of the std S = s√Δ.

    It is Δ times the exact KL of two steps with the same std, so its β is not comparable with the exact one.

    Args:
        rate: s of each row, [B], > 0 (from ``rate`` of an SDE dynamics).

    Raises ValueError when shapes differ or a rate is not positive.
    """
    _check_shape("reference.mean", reference.mean, policy.mean)
    if not bool((rate > 0).all()):
        raise ValueError(f"rate: {float(rate.min())} is not above 0; {NO_LOG_PROB}")
    gap = policy.layout.mean((policy.mean - reference.mean).square())
    return gap / (2 * to_rows(rate, gap).square())


class Transition(Protocol):
    """The law of a sampler step's end, [B, *S]: independent elements, counted by a layout."""

    @property
    def noise(self) -> NoiseKind:
        """What `sample` draws from, one number for each element of the state."""
        ...

    @property
    def mode(self) -> Tensor:
        """The likeliest end, [B, *S]: what a step without noise reaches."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """An end, [B, *S], as a function of its own noise [B, *S] alone. Raises ValueError for another shape."""
        ...

    def log_density(self, y: Tensor) -> Tensor:
        """Of each element, [B, *S]. Raises ValueError for an end that has none."""
        ...

    def log_prob(self, y: Tensor, region: Tensor | None = None) -> Tensor:
        """Its MEAN over the elements that count, [B]."""
        ...

    def log_probs(self, y: Tensor) -> Tensor:
        """The same of each stream, [B, K]."""
        ...

    def kl(self, other: Self) -> Tensor:
        """Exact KL(self ‖ other), a mean over the elements that count, [B]. Raises ValueError for another kind."""
        ...

    def counted_by(self, layout: StateLayout) -> Self:
        """The same law; log-probs and KLs are means by that layout."""
        ...


class Counted:
    """Numbers per row of what is known of each element, by a layout."""

    layout: StateLayout

    def log_density(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, y: Tensor, region: Tensor | None = None) -> Tensor:
        """MEAN log-density over non-batch dims, [B]; a ratio of two of these is the D-th root of the true ratio.

        Args:
            y: the end, [B, *S].
            region: boolean mask or weights >= 0 that broadcast to [B, *S]; the mean is then weighted by them.

        Raises ValueError as `log_density` does, for a negative weight, a row whose region is empty, or a region of
        states with several streams.
        """
        density = self.log_density(y)
        if region is None:
            return self.layout.mean(density)
        if self.layout.count > 1:
            raise ValueError(f"region: {self.layout.names} have a mean each; nearest valid: None, or log_probs")
        return _weighted_mean(density, region, self.layout)

    def log_probs(self, y: Tensor) -> Tensor:
        """MEAN log-density of each stream, [B, K]; their mean over streams is `log_prob`. Raises as that does."""
        return self.layout.by_stream(self.log_density(y))


@dataclass(frozen=True, eq=False)
class Gaussian(Counted):
    """Independent normals with one std per row: y = mean + std·z.

    ``mean`` is [B, *S], ``std`` is [B] and >= 0. A row with std 0 is a point: it can be sampled, but it has no density,
    and asking for one raises ValueError. ``stochastic`` says whether every std is known to be above 0; None means that
    nobody looked, and then the first question about a density looks (on a GPU that waits for the device). ``layout``
    says which elements count in a log-prob or a KL, and in which means: what is held at given values was not drawn.

    Gradients flow through ``mean`` and, where it has any, through ``y``: a policy gradient detaches y before it asks.
    """

    mean: Tensor
    std: Tensor
    stochastic: bool | None = None
    layout: StateLayout = WHOLE

    @property
    def noise(self) -> NoiseKind:
        return "normal"

    @property
    def mode(self) -> Tensor:
        """The mean, [B, *S]."""
        return self.mean

    def counted_by(self, layout: StateLayout) -> Gaussian:
        """The same law; log-probs and KLs are means by that layout."""
        return replace(self, layout=layout)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std·noise, [B, *S], for standard normal ``noise`` of that shape."""
        _check_shape("noise", noise, self.mean)
        return self.mean + to_rows(self.std, self.mean) * noise

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density of each element, [B, *S]. Raises ValueError for a wrong shape or a row with std 0."""
        self._require_noise()
        _check_shape("y", y, self.mean)
        std = to_rows(self.std, self.mean)
        return -((y - self.mean) / std).square() / 2 - std.log() - _HALF_LOG_TWO_PI

    def kl(self, other: Gaussian) -> Tensor:
        """Exact KL(self ‖ other), mean over non-batch dims, [B].

        With equal stds S it is mean (Δμ)² / (2 S²). Raises ValueError for a wrong shape, a row with std 0 or a law of
        another kind.
        """
        check_kind(other, Gaussian)
        self._require_noise()
        other._require_noise()
        _check_shape("other.mean", other.mean, self.mean)
        gap = self.layout.mean((self.mean - other.mean).square())
        std, other_std = to_rows(self.std, gap), to_rows(other.std, gap)
        # apart from the means' part, so that a small gap is not lost beside terms of order 1
        excess = (std - other_std) * (std + other_std) / other_std.square()
        return gap / (2 * other_std.square()) + (excess - excess.log1p()) / 2

    def _require_noise(self) -> None:
        known = self.stochastic
        if known is None:
            known = bool((self.std > 0).all())
        if not known:
            raise ValueError(f"std: {float(self.std.min())} is not above 0; {NO_LOG_PROB}")


@dataclass(frozen=True, eq=False)
class Categorical(Counted):
    """Independent tokens y in 0 … V−1 with p(y = k) = softmax(logits)_k; all in float32, or float64 where logits are.

    ``logits`` is [B, *S, V] and need not be normalised; −∞ is a token that cannot be. A log-prob of such a token is −∞
    (its gradient is finite), a KL to a law that has it at −∞ is ∞, and one from such a law counts 0 for it. Where all
    logits of an element are −∞, or one is NaN or ∞, there is no law: its log-probs and KLs are NaN, and `sample` and
    `mode` raise ValueError, as a token cannot say that it is none. ``layout`` is as for `Gaussian`.

    It draws from uniforms, one for each token, by the inverse of the cumulated probabilities. The Gumbel-max trick
    would draw V numbers a token: for 1024 tokens of a codebook of 10⁵ that is 10⁸ a picture and step.
    """

    logits: Tensor
    layout: StateLayout = WHOLE

    def __post_init__(self) -> None:
        if self.logits.dim() < 2 or not self.logits.is_floating_point() or self.logits.shape[-1] < 1:
            given = f"{self.logits.dtype} {list(self.logits.shape)}"
            raise ValueError(f"logits: {given} must be float [B, *S, V] with V ≥ 1; nearest valid: [B, *S, 1]")

    @property
    def noise(self) -> NoiseKind:
        return "uniform"

    @property
    def mode(self) -> Tensor:
        """The likeliest tokens, LongTensor [B, *S], the first of equals. Raises ValueError where there is no law."""
        self.check_law()
        return self.logits.argmax(-1)

    def counted_by(self, layout: StateLayout) -> Categorical:
        """The same law; log-probs and KLs are means by that layout."""
        return replace(self, layout=layout)

    def sample(self, noise: Tensor) -> Tensor:
        """The first tokens whose cumulated probability exceeds ``noise``, LongTensor [B, *S].

        noise: uniforms in (0, 1), [B, *S]. Probabilities are cumulated as whole numbers of 2⁻⁵³, so a sum's order does
        not matter and a token of less than half of that is never drawn. It waits for the device, to look for broken
        logits. Raises ValueError for another shape, or where there is no law.
        """
        if noise.shape != self.logits.shape[:-1]:
            raise ValueError(f"noise: shape {tuple(noise.shape)} must be {tuple(self.logits.shape[:-1])}")
        self.check_law()
        size = self.logits.shape[-1]
        rows, u = self.logits.detach().reshape(-1, size), double(noise).reshape(-1, 1)
        tokens = torch.empty(len(rows), dtype=torch.long, device=self.logits.device)
        at_once = max(1, AT_ONCE // size)
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            wide = double(rows[some])
            tokens[some] = inverse(wide, u[some].to(wide.device))[0].to(tokens.device)
        return tokens.view(noise.shape)

    def log_density(self, y: Tensor) -> Tensor:
        """Log-probability of each token, [B, *S], at most 0.

        Raises ValueError for another shape or dtype than int64 and, where looking is free (on the CPU), for a token
        outside 0 … V−1.
        """
        check_tokens("y", y, self.logits.shape[:-1], self.logits.shape[-1])
        if self.logits.numel() > AT_ONCE:
            size = self.logits.shape[-1]
            in_parts: Any = _LogProb
            return in_parts.apply(self.logits.reshape(-1, size), y.reshape(-1)).view(y.shape)
        logits = upcast(self.logits)
        return logits.gather(-1, y[..., None])[..., 0] - logits.logsumexp(-1)

    def kl(self, other: Categorical) -> Tensor:
        """Exact KL(self ‖ other) = Σ_k p_k·(log p_k − log q_k), mean over tokens, [B].

        Raises ValueError for another shape or a law of another kind.
        """
        check_kind(other, Categorical)
        _check_shape("other.logits", other.logits, self.logits)
        log_p, log_q = upcast(self.logits).log_softmax(-1), upcast(other.logits).log_softmax(-1)
        never = log_p == -math.inf  # 0·log 0 is 0, and no gradient may come of the NaN that it would be
        gap = log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0)
        return self.layout.mean((log_p.exp() * gap).sum(-1))

    def check_law(self) -> None:
        """Raises ValueError where there is no law. It waits for the device."""
        largest = self.logits.amax(-1)
        fine = largest.isfinite()
        if not bool(fine.all()):
            row = int((~fine.view(len(fine), -1).all(1)).int().argmax())
            bad = float(largest[~fine][0])
            raise ValueError(f"logits: row {row} has a token whose largest logit is {bad}; nearest valid: a finite one")


def gaussian(law: Transition) -> Gaussian:
    """The law itself. Raises ValueError for one of tokens, which has neither mean nor std."""
    check_kind(law, Gaussian)
    assert isinstance(law, Gaussian)
    return law


def check_tokens(name: str, tokens: Tensor, shape: tuple[int, ...], vocabulary: int) -> None:
    """Raises ValueError unless ``tokens`` are int64 of that shape and, where looking is free (on the CPU), within
    0 … vocabulary − 1."""
    if tokens.shape != shape or tokens.dtype != torch.int64:
        given = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"{name}: {given} must be tokens, torch.int64 {list(shape)}")
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocabulary:
            bad, near = (low, 0) if low < 0 else (high, vocabulary - 1)
            raise ValueError(f"{name}: token {bad} is outside 0 … {vocabulary - 1}, the vocabulary; nearest: {near}")


def inverse(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First indices whose cumulated share exceeds u, LongTensor [N], and where in their share u lies, [N] in (0, 1).

    logits float64 [N, V], u float64 [N, 1]. The second is uniform where u is, as finely as the share divides 2⁵³.
    """
    parts = (logits.softmax(-1) * _PARTS).round().long()
    summed = parts.cumsum(-1)
    total = summed[:, -1:]
    # u is below 1, but not always once it is rounded
    place = (u * total).long().minimum(total - 1)
    index = torch.searchsorted(summed, place, right=True)
    own = parts.gather(-1, index)
    rest = (place - summed.gather(-1, index) + own).double() + 0.5
    return index[:, 0], (rest / own)[:, 0]


class _LogProb(torch.autograd.Function):
    """log softmax(logits)[y] of rows [N, V] in parts of `AT_ONCE`, [N], in float32 or better, without a copy of all
    logits in it: of a codebook of 10⁵ that would be twice the logits themselves, and their softmax as much again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        rows = max(1, AT_ONCE // logits.shape[-1])
        parts = [logits[first : first + rows] for first in range(0, len(logits), rows)]
        total = torch.cat([upcast(part).logsumexp(-1) for part in parts])
        ctx.save_for_backward(logits, y, total)
        ctx.rows = rows
        return upcast(logits.gather(-1, y[:, None])[:, 0]) - total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, y, total = ctx.saved_tensors
        out, (grad,) = torch.empty_like(logits), grads
        for first in range(0, len(y), ctx.rows):
            some = slice(first, first + ctx.rows)
            part = -grad[some, None] * (upcast(logits[some]) - total[some, None]).exp()
            out[some] = part.scatter_add(-1, y[some, None], grad[some, None]).to(out.dtype)
        return out, None


def _weighted_mean(values: Tensor, region: Tensor, layout: StateLayout) -> Tensor:
    """Mean of ``values`` [B, *S] weighted by ``region``, [B]; held elements have weight 0."""
    try:
        weights = region.to(values.device, values.dtype).expand(values.shape)
    except RuntimeError as error:
        raise ValueError(f"region: shape {tuple(region.shape)} does not broadcast to {tuple(values.shape)}") from error
    weights = layout.silence(weights)
    if not bool((weights >= 0).all()):
        raise ValueError(f"region: weight {float(weights.min())} is not >= 0; the nearest valid value is 0")
    total = mean_dims(weights)
    if not bool((total > 0).all()):
        row = int((total > 0).int().argmin())
        raise ValueError(f"region: row {row} has weight {float(total[row])}; give each row at least one element")
    # an element outside the region must not reach the mean even where its density is not finite
    inside = torch.where(weights > 0, weights * values, torch.zeros_like(values))
    return mean_dims(inside) / total


def check_kind(law: object, kind: type) -> None:
    if not isinstance(law, kind):
        raise ValueError(f"law: a {type(law).__name__} is of another kind of state; nearest valid: a {kind.__name__}")


def _check_shape(name: str, t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape:
        raise ValueError(f"{name}: shape {tuple(t.shape)} must be {tuple(like.shape)}")
