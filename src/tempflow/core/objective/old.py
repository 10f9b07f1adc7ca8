"""Old log-probs: how the policy that drew some edges sees them, by a forward in the very batch that trains them.

A rollout batches its rows otherwise than training does, and half precision rounds by the batch. So the rollout's own
log-prob is off by more than a published clip, before any weight has moved. It is not used as the old one; it is only
compared with it (`roundings`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.distribution import Gaussian, Transition, gaussian
from tempflow.core.objective.edges import EdgeBatch, Predict
from tempflow.core.state import StateLayout, upcast

SIGMAS = 4.0
"""How many standard deviations a healthy difference may lie out: of 10⁴ edges one does."""

SUMS = 2.0**-19
"""What sums of some thousand terms lose in float32, in which all dtypes are added up: 32 of its unit roundoffs."""


@dataclass(frozen=True, eq=False)
class Old:
    """The edges of one batch as the policy that drew them has them.

    log_prob  [B], of the children; [B, K] where advantages are by stream
    mean      [B, *S], what they were drawn from; None where the objective does not read it
    gap       [B], how far the rollout's log-prob is from this one (`roundings`)
    """

    log_prob: Tensor
    mean: Tensor | None
    gap: Tensor


@torch.no_grad()
def old_of(batch: EdgeBatch, velocity: Tensor, rounding: float, keeps_mean: bool) -> Old:
    """velocity [B, *S] (of tokens: logits [B, *S, V]), of that policy at the batch's parent states; `batch.log_prob` is
    the rollout's.

    rounding: the relative rounding error of a velocity, as for `roundings`.
    """
    velocity = velocity.detach()
    law = batch.transition(velocity)
    log_prob = law.log_prob(batch.y)
    gap = roundings(batch, velocity, law, log_prob, rounding)
    mean = gaussian(law).mean if keeps_mean else None
    return Old(batch.log_prob_of(law) if batch.by_stream else log_prob, mean, gap)


def roundings(batch: EdgeBatch, velocity: Tensor, law: Transition, log_prob: Tensor, rounding: float) -> Tensor:
    """The least error of the predictions, in units of `rounding` times their root mean square, by which the batch's
    log-prob may differ from `log_prob` so much, [B]; of velocities by `_of_velocities`, of logits by `_of_logits`."""
    if batch.dynamics.corruption.prediction == "logits":
        return _of_logits(batch, velocity, log_prob, rounding)
    return _of_velocities(batch, velocity, gaussian(law), log_prob, rounding)


def _of_velocities(batch: EdgeBatch, velocity: Tensor, law: Gaussian, log_prob: Tensor, rounding: float) -> Tensor:
    """`roundings` of a Gaussian step.

    An error e of the mean, in stds, changes the mean log-density of D elements by −mean(e·z) − mean(e²)/2. z is
    independent of e, so the first part has standard deviation rms(e)/√D. With κ the answer and d = |b|·rms(v)·rounding
    / S the error of one rounding, κ is the root of |Δ| = SIGMAS·κd/√D + (κd)²/2. d also counts the rounding of the
    arithmetic itself, and |Δ| is what is left beyond that of the sum.
    """
    arithmetic = torch.finfo(law.mean.dtype).eps / 2
    _, b, std = (c.to(law.mean) for c in batch.dynamics.coefficients(batch.schedule, batch.step, batch.scale))
    velocities, states = (_rms(t, batch.layout) for t in (velocity, batch.y))
    error = (rounding * b.abs() * velocities + arithmetic * states) / std
    excess = (log_prob - batch.log_prob.to(log_prob)).abs() - 4 * arithmetic * (1 + log_prob.abs())
    excess = torch.where(excess <= 0, 0.0, excess)  # a NaN stays one
    size = batch.layout.effective(velocity)
    spread = SIGMAS / (size.sqrt() if isinstance(size, Tensor) else math.sqrt(size))
    return 2 * excess / (error * (spread + (spread**2 + 2 * excess).sqrt()))


def _of_logits(batch: EdgeBatch, logits: Tensor, log_prob: Tensor, rounding: float) -> Tensor:
    """`roundings` of a step of tokens.

    With g the gradient of the log-prob by the logits, errors e of them change it by g·e − Var_p(e)/2, a mean over
    tokens. As y was drawn, g has mean 0 whatever e is, so the first part has standard deviation rms(e)·|g|, and the
    second is at most rms(e)²/2. With κ the answer and d = rms(logits)·rounding the error of one rounding, κ is the root
    of |Δ| = SIGMAS·κd·|g| + (κd)²/2. Tokens that cannot be (logits of −∞) have no error. d also counts the arithmetic's
    own rounding, which is of logits and of log-probs near 1, and |Δ| is what is left beyond that of the sum.
    """
    with torch.enable_grad():
        asked = upcast(logits).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(batch.transition(asked).log_prob(batch.y).sum(), asked)
    arithmetic = torch.finfo(asked.dtype).eps / 2
    heard = batch.layout.silence(asked.detach())
    size = _rms(heard.masked_fill(heard == -math.inf, 0.0).square().mean(-1).sqrt(), batch.layout)
    error = rounding * size + arithmetic * (1 + size)
    before = batch.log_prob.to(log_prob)
    finite = torch.minimum(log_prob.abs(), before.abs())  # one of them is ∞ where what was drawn cannot be now
    excess = (log_prob - before).abs() - 4 * arithmetic * (1 + size + finite)
    excess = torch.where(excess <= 0, 0.0, excess)
    spread = SIGMAS * gradient.flatten(1).square().sum(1).sqrt()
    gap = 2 * excess / (error * (spread + (spread**2 + 2 * excess).sqrt()))
    return torch.where((excess > 0) & (excess < math.inf), gap, excess)  # 0, ∞ and NaN stay what they are


def rounding_of(eps: float, guidance: float) -> float:
    """The relative rounding error of a velocity that is computed in numbers `eps` apart at 1: their unit roundoff and
    that of float32 sums, which guidance g takes g and g − 1 times from two predictions."""
    return (eps / 2 + SUMS) * math.hypot(guidance, guidance - 1)


def told(velocity: Tensor, at: Tensor, predict: Predict) -> Predict:
    """`predict` that need not compute again what it said at the states `at`."""

    def answer(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return velocity if x is at else predict(x, sigma, rows)

    return answer


def detached(predict: Predict) -> Predict:
    """`predict` without gradients to anything, on the path that training takes.

    Adapters and torch choose kernels and batches by whether gradients are recorded, and these round differently. So it
    is asked as the policy is, and what it says is cut off.
    """

    def answer(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            return predict(x, sigma, rows).detach()

    return answer


def _rms(t: Tensor, layout: StateLayout) -> Tensor:
    return layout.mean(upcast(t).square()).sqrt()
