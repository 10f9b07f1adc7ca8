"""The forward process of rectified flow, and likelihood proxies of a clean sample.

Noising: x_t = (1−t)·x0 + t·ε, with velocity v* = ε − x0; so x̂0 = x_t − t·v and ε̂ = x_t + (1−t)·v, and the errors are
x̂0 − x0 = −t·(v − v*) and ε̂ − ε = (1−t)·(v − v*).

A proxy stands in for log p(x0 | c): minus a weighted error of the prediction at one (t, ε). Errors are reduced by
the MEAN over latent elements, as in all official codes, so a proxy is a number of order 0.1 to 1 and the ratio of
two stays near 1; with the sum, every published clip range and KL weight would lose its meaning.

Tensors: x0, noise, velocity [B, *S]; t [B] in (0, 1]. All arithmetic is in at least float32; float64 stays. Tensors
whose shapes do not fit raise ValueError. `mean` is the reduction, of a state with held elements or several streams
`StateLayout.mean` or `StateLayout.by_stream`; of the latter there is a result for each stream, [B, K].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tempflow.core.state import Reduce, has_double, mean_dims, to_rows, upcast

FLOOR = 1e-5
"""The smallest adaptive weight: keeps the weighted error finite for a perfect prediction."""

_EDGE = 1e-10
"""AWM's offset of the error under a root, whose slope at 0 is infinite."""


def corrupt(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1−t)·x0 + t·ε, [B, *S]."""
    x0, noise = _pair(x0, noise)
    s = to_rows(t, x0)
    return (1 - s) * x0 + s * noise


def target_velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v* = ε − x0, what a flow model regresses to."""
    noise, x0 = _pair(noise, x0)
    return noise - x0


def x0_of_velocity(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x̂0 = x_t − t·v."""
    x, velocity = _pair(x, velocity)
    return x - to_rows(t, x) * velocity


def noise_of_velocity(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """ε̂ = x_t + (1−t)·v."""
    x, velocity = _pair(x, velocity)
    return x + (1 - to_rows(t, x)) * velocity


def velocity_of_x0(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t − x̂0) / t, for t > 0."""
    x, x0 = _pair(x, x0)
    return (x - x0) / to_rows(t, x)


def velocity_of_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """v = (ε̂ − x_t) / (1−t), for t < 1."""
    x, noise = _pair(x, noise)
    return (noise - x) / (1 - to_rows(t, x))


def square_error(prediction: Tensor, target: Tensor, mean: Reduce = mean_dims) -> Tensor:
    """mean (prediction − target)² over non-batch dims, [B]."""
    prediction, target = _pair(prediction, target)
    return mean((prediction - target).square())


def adaptive_scale(prediction: Tensor, target: Tensor, mean: Reduce = mean_dims) -> Tensor:
    """w = max(mean |prediction − target|, 1e-5), [B], detached, computed in float64 where the device has it.

    It is a weight, not a part of the loss: a gradient through it would turn and shrink the loss's own.
    """
    prediction, target = _pair(prediction.detach(), target.detach())
    error = prediction - target
    scale = mean((error.double() if has_double(error.device) else error).abs()).clamp(min=FLOOR)
    return scale.to(prediction.dtype)


def adaptive_error(prediction: Tensor, target: Tensor, mean: Reduce = mean_dims) -> Tensor:
    """mean (prediction − target)² / w with the detached `adaptive_scale` w: a squared error of the scale of an L1, [B].

    With predictions of x0 it is t·mean (v−v*)² / mean |v−v*|, which t takes to 0 harmlessly.
    """
    return square_error(prediction, target, mean) / adaptive_scale(prediction, target, mean)


class LikelihoodProxy(Protocol):
    """log p(x0 | c) up to a constant, from what is predicted at x_t: [B], at most 0, gradients through `velocity`.

    `velocity` is the prediction: a velocity [B, *S], or logits [B, *S, V] for a proxy of tokens, which says so by
    ``reads = "logits"``. With `mean` by stream it is the log-likelihood of each, [B, K], and that of the state is their
    mean over streams. Several draws of (t, ε) are averaged by whoever drew them; old and new policies must be asked at
    the same draws.
    """

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor: ...


@dataclass(frozen=True)
class Adaptive:
    """−`adaptive_error` of the x0 prediction, or of the velocity (then without the factor t).

    x0: DiffusionNFT, V-GRPO, "Rethinking the design space" (its "adaptive"). velocity: CRD. Certain: read in code.
    Raises ValueError for another space.
    """

    space: Literal["x0", "velocity"] = "x0"

    def __post_init__(self) -> None:
        if self.space not in ("x0", "velocity"):
            raise ValueError(f"space: {self.space!r} is not one of x0, velocity; nearest valid: 'x0'")

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        if self.space == "velocity":
            return -adaptive_error(velocity, target_velocity(x0, noise), mean)
        # not t times the velocity's error: the floor is one of x0 space
        return -adaptive_error(x0_of_velocity(corrupt(x0, noise, t), velocity, t), x0, mean)


@dataclass(frozen=True)
class Matching:
    """−t^power · mean (v−v*)².

    power 0: AWM's "Uniform", "Rethinking"'s "uniform"; 1: AWM's "t"; 2: AWM's "t**2" and "Rethinking"'s "t", which is
    −mean (x̂0−x0)². Certain: read in code. Raises ValueError for a power that is negative or not finite.
    """

    power: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ValueError(f"power: {self.power} must be finite and ≥ 0; 0, 1 and 2 are usual")

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        error = square_error(velocity, target_velocity(x0, noise), mean)
        return -to_rows(t, error).pow(self.power) * error


@dataclass(frozen=True)
class Huber:
    """−t · (√(m + 1e-10) − 1e-5) with m = mean (v−v*)² (AWM's "huber"; certain: read in code)."""

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        error = square_error(velocity, target_velocity(x0, noise), mean)
        return -to_rows(t, error) * ((error + _EDGE).sqrt() - math.sqrt(_EDGE))


@dataclass(frozen=True)
class GeneralHuber:
    """−t/p · ((m + 1e-10)^p − 1e-10^p) with m = mean (v−v*)²; its gradient is −t·m^(p−1)·∇m.

    AWM's default, p = 1/4 ("ghuber"; certain: read in code). p = 1 is `Matching(1)`, p = 1/2 twice `Huber`.
    Raises ValueError unless 0 < p ≤ 1.
    """

    power: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise ValueError(f"power: {self.power} must be in (0, 1]; 0.25 is usual")

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        error = square_error(velocity, target_velocity(x0, noise), mean)
        return -to_rows(t, error) / self.power * ((error + _EDGE).pow(self.power) - _EDGE**self.power)


@dataclass(frozen=True)
class PathKL:
    """−(1−t)/(t + offset) · mean (v−v*)²: the evidence lower bound's own weight, ½·|d log SNR/dt|·(ε̂−ε)².

    Without offset and averaged over t ~ U(0, 1) it is log p(x0)/D up to a constant for a calibrated model; its weight
    blows up as t -> 0, so as a training signal it is unstable. "Rethinking"'s "exact" (certain: read in code,
    offset 1e-3). Raises ValueError for an offset that is negative or not finite.
    """

    offset: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.offset) and self.offset >= 0):
            raise ValueError(f"offset: {self.offset} must be finite and ≥ 0; 1e-3 is usual")

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        error = square_error(velocity, target_velocity(x0, noise), mean)
        s = to_rows(t, error)
        return -(1 - s) / (s + self.offset) * error


ProxyName = Literal["adaptive", "uniform", "t", "t2", "huber", "ghuber", "exact"]


def proxy_of(name: ProxyName) -> LikelihoodProxy:
    """A proxy with its published constants. Raises ValueError for an unknown name."""
    forms: dict[str, LikelihoodProxy] = {
        "adaptive": Adaptive(),
        "uniform": Matching(0),
        "t": Matching(1),
        "t2": Matching(2),
        "huber": Huber(),
        "ghuber": GeneralHuber(),
        "exact": PathKL(),
    }
    if name not in forms:
        raise ValueError(f"likelihood: {name!r} is not one of {', '.join(get_args(ProxyName))}")
    return forms[name]


def _pair(prediction: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32."""
    if prediction.shape != other.shape:  # they would broadcast without a word
        raise ValueError(f"prediction: shape {tuple(prediction.shape)} must be {tuple(other.shape)}")
    dtype = torch.promote_types(upcast(prediction).dtype, upcast(other).dtype)
    return prediction.to(dtype), other.to(dtype)
