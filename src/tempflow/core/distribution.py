"""Distributions of one sampler step, and the one place where latents are reduced to a number per row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
NO_LOG_PROB = "a deterministic (ODE) step has no log-probability"


def upcast(t: Tensor) -> Tensor:
    """``t`` in at least float32: lower precisions and integers are widened, float64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def to_rows(scalars: Tensor, like: Tensor) -> Tensor:
    """[B] scalars as [B, 1, …, 1], with the dtype and on the device of ``like`` [B, *S].

    Raises ValueError unless ``scalars`` has one value for each row of ``like``.
    """
    if scalars.dim() != 1 or scalars.shape[0] != like.shape[0]:
        raise ValueError(f"per-row values: shape {tuple(scalars.shape)} does not fit rows of {tuple(like.shape)}")
    # host to device need not wait for the device; the other way it must
    moved = scalars.to(like.device, like.dtype, non_blocking=like.device.type == "cuda")
    return moved.view(-1, *([1] * (like.dim() - 1)))


def mean_dims(t: Tensor) -> Tensor:
    """Mean over all but the first dimension: [B, *S] -> [B], in at least float32.

    Every log-probability, KL and proxy of the package is reduced here. The mean (not the sum) is what the official
    codes of the GRPO family use and what their clip ranges presume.
    """
    t = upcast(t)
    return t if t.dim() == 1 else t.mean(dim=tuple(range(1, t.dim())))


def velocity_kl(v: Tensor, v_ref: Tensor) -> Tensor:
    """mean (v − v_ref)² over non-batch dims, [B]: the velocity-space stand-in for a KL (DiffusionNFT, Flow-Factory).

    Raises ValueError when the shapes differ.
    """
    _check_shape("v_ref", v_ref, v)
    return mean_dims((upcast(v) - upcast(v_ref)).square())


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
    gap = mean_dims((policy.mean - reference.mean).square())
    return gap / (2 * to_rows(rate, gap).square())


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Independent normals with one std per row: y = mean + std·z.

    ``mean`` is [B, *S], ``std`` is [B] and >= 0. A row with std 0 is a point: it can be sampled, but it has no density,
    and asking for one raises ValueError. ``stochastic`` says whether every std is known to be above 0; None means that
    nobody looked, and then the first question about a density looks (on a GPU that waits for the device).

    Gradients flow through ``mean`` and, where it has any, through ``y``: a policy gradient detaches y before it asks.
    """

    mean: Tensor
    std: Tensor
    stochastic: bool | None = None

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

        Raises ValueError for a wrong shape, a row with std 0, a negative weight, or a row whose region is empty.
        """
        density = self.log_density(y)
        return mean_dims(density) if region is None else _weighted_mean(density, region)

    def kl(self, other: Gaussian) -> Tensor:
        """Exact KL(self ‖ other), mean over non-batch dims, [B].

        With equal stds S it is mean (Δμ)² / (2 S²). Raises ValueError for a wrong shape or a row with std 0.
        """
        self._require_noise()
        other._require_noise()
        _check_shape("other.mean", other.mean, self.mean)
        gap = mean_dims((self.mean - other.mean).square())
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


def _weighted_mean(values: Tensor, region: Tensor) -> Tensor:
    """Mean of ``values`` [B, *S] weighted by ``region``, [B]."""
    try:
        weights = region.to(values.device, values.dtype).expand(values.shape)
    except RuntimeError as error:
        raise ValueError(f"region: shape {tuple(region.shape)} does not broadcast to {tuple(values.shape)}") from error
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
