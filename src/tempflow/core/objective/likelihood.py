"""Policy-gradient objectives on a likelihood proxy of clean samples: EPG, PEPG, PAR and the clipped ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.likelihood_proxy import Adaptive, LikelihoodProxy
from tempflow.core.objective import regularizer
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.leaves import LeafBatch, Noised, noised
from tempflow.core.objective.regularizer import LeafRegularizer

Kind = Literal["epg", "pepg", "par"]


@dataclass(frozen=True)
class Estimate:
    """How log p(x0) is estimated and what it is compared with.

    proxy      the log-likelihood at one (t, ε)
    pooled     average a sample's pairs first, so that it has one ratio (V-GRPO); else each pair has its own (AWM,
               "Rethinking the design space"). The two differ only where the policy is not old.
    on_policy  compare with the policy itself, detached: the ratio is exactly 1 and "old" is not needed, but a clip or
               a penalty to old then does nothing
    """

    proxy: LikelihoodProxy = field(default_factory=Adaptive)
    pooled: bool = False
    on_policy: bool = False

    @property
    def unit(self) -> str:
        """Micro-batches never split a unit: a pair, or a sample with all its pairs."""
        return "leaf" if self.pooled else "pair"

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy",) if self.on_policy else ("policy", "old")

    def policy(self, at: Noised) -> Tensor:
        """log p_θ, [B, 1] pooled or [B, M]; gradients through the policy."""
        return self._of("policy", at)

    def old(self, at: Noised) -> Tensor:
        """log p_old of the same shape, without gradients."""
        return self._of("policy" if self.on_policy else "old", at).detach()

    def _of(self, name: str, at: Noised) -> Tensor:
        values = at.by_sample(self.proxy(at.velocity[name], at.x0, at.noise, at.t))
        return values.mean(1, keepdim=True) if self.pooled else values


@dataclass(frozen=True)
class PolicyGradient:
    """The three plain objectives of "Rethinking the design space" on e = log p_θ, with δ = e − e_old, ρ = sg exp δ.

    epg   L = −mean ρ·A·e                (REINFORCE with an importance weight)
    pepg  L = −mean ρ·(A − sg δ)·e       (proximal: the advantage is used up as the policy moves)
    par   L = ½ mean ρ·(A − δ)²          (regression of the log-ratio on the advantage; the same gradient as pepg)

    plus regularizers. `ratio` False sets ρ to 1. The proximal forms need A on the scale of δ (1e-2 … 1e-1): released
    scripts give them 0.1·(R − mean), without a standard deviation. epg has no lower bound where A < 0: it needs a
    penalty or few updates. Published: adaptive proxy, each pair by itself, velocity penalty 1e-4 to the reference.
    Certain: read in code. Raises ValueError for an unknown kind.
    """

    kind: Kind = "epg"
    estimate: Estimate = Estimate()
    ratio: bool = True
    regularizers: tuple[LeafRegularizer, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(get_args(Kind))}")

    @property
    def unit(self) -> str:
        """Micro-batches never split a unit."""
        return self.estimate.unit

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The weight sets that `__call__` asks of `models`."""
        return regularizer.named(self.estimate.weight_sets, self.regularizers)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        at = noised(models, self.weight_sets, batch)
        policy, old = self.estimate.policy(at), self.estimate.old(at)
        delta = policy - old
        advantage = batch.advantage.to(policy)[:, None]
        rho = delta.detach().exp() if self.ratio else torch.ones_like(delta)
        if self.kind == "par":
            loss = rho * (advantage - delta).square() / 2
        elif self.kind == "pepg":
            loss = -rho * (advantage - delta.detach()) * policy
        else:
            loss = -rho * advantage * policy
        return _with_regularizers(loss, self.regularizers, at, _shift(delta))


@dataclass(frozen=True)
class ClippedLikelihood:
    """L = mean max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)) + regularizers, ρ = exp(log p_θ − sg log p_old).

    V-GRPO: adaptive proxy, `pooled`, clip 6e-3 … 1e-2, or with a single update on-policy and `soft_clip` η = 3,
    A -> η·tanh(A/η) (second-hand, with equations). AWM: `GeneralHuber`, each pair by itself, on-policy with clip 1
    (inert), held to reference (1e-4 … 3e-3) and ema (1), which is all that bounds A < 0 (certain: read in code).

    The pairs (t, ε) are the same for policy and old by construction. On-policy value −A, gradient −A·∇log p.
    Raises ValueError for a clip that is not finite and positive, clip_low above 1, or a soft clip that is not positive.
    """

    clip_low: float = 1e-2
    clip_high: float = 1e-2
    estimate: Estimate = Estimate()
    soft_clip: float | None = None
    regularizers: tuple[LeafRegularizer, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value} must be finite and > 0; 1e-2 is usual")
        if self.clip_low > 1:
            raise ValueError(f"clip_low: {self.clip_low} must be at most 1; 1e-2 is usual")
        if self.soft_clip is not None and not (math.isfinite(self.soft_clip) and self.soft_clip > 0):
            raise ValueError(f"soft_clip: {self.soft_clip} must be finite and > 0, or None for none; 3 is usual")

    @property
    def unit(self) -> str:
        """Micro-batches never split a unit."""
        return self.estimate.unit

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The weight sets that `__call__` asks of `models`."""
        return regularizer.named(self.estimate.weight_sets, self.regularizers)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        at = noised(models, self.weight_sets, batch)
        log_ratio = self.estimate.policy(at) - self.estimate.old(at)
        ratio = log_ratio.exp()
        advantage = batch.advantage.to(ratio)[:, None]
        if self.soft_clip is not None:
            advantage = soft_clip(advantage, self.soft_clip)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        with torch.no_grad():
            metrics = _shift(log_ratio) | {
                "clip_fraction": (loss > -advantage * ratio).float().mean(1),
                "outside_clip": (ratio != clipped).float().mean(1),
            }
        return _with_regularizers(loss, self.regularizers, at, metrics)


def soft_clip(advantage: Tensor, bound: float) -> Tensor:
    """η·tanh(A/η): within ±η, slope 1 at 0 (V-GRPO, Eq. 17). It flattens coarse rewards such as 0 or 1."""
    return bound * (advantage / bound).tanh()


def _shift(log_ratio: Tensor) -> dict[str, Tensor]:
    return {"log_ratio_abs": log_ratio.detach().abs().mean(1)}


def _with_regularizers(
    loss: Tensor, regularizers: tuple[LeafRegularizer, ...], at: Noised, metrics: dict[str, Tensor]
) -> Loss:
    """The mean of `loss` ([B, 1] or [B, M]) with the regularizers' own mean over all pairs."""
    per_pair = loss.expand(-1, at.batch.pairs).flatten()
    per_pair, more = regularizer.add(per_pair, regularizers, at)
    return Loss(per_pair.mean(), metrics | more)
