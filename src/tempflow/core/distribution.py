"""Distributions of one sampler step: what is sampled from them, their log-probs and divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.state import WHOLE, StateLayout, mean_dims, to_rows, upcast

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
NO_LOG_PROB = "a deterministic (ODE) step has no log-probability"


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


@dataclass(frozen=True, eq=False)
class Gaussian:
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

    def log_prob(self, y: Tensor, region: Tensor | None = None) -> Tensor:
        """MEAN log-density over non-batch dims, [B]; a ratio of two of these is the D-th root of the true ratio.

        Args:
            y: the point, [B, *S].
            region: boolean mask or weights >= 0 that broadcast to [B, *S]; the mean is then weighted by them.

        Raises ValueError for a wrong shape, a row with std 0, a negative weight, a row whose region is empty, or a
        region of states with several streams.
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

    def kl(self, other: Gaussian) -> Tensor:
        """Exact KL(self ‖ other), mean over non-batch dims, [B].

        With equal stds S it is mean (Δμ)² / (2 S²). Raises ValueError for a wrong shape or a row with std 0.
        """
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


def _check_shape(name: str, t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape:
        raise ValueError(f"{name}: shape {tuple(t.shape)} must be {tuple(like.shape)}")
