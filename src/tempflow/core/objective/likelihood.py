"""Policy-gradient objectives on a likelihood proxy of clean samples: EPG, PEPG, PAR and the clipped ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.corruption import Corruption
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
        """log p_θ, [B, 1] pooled or [B, M], by stream [B, …, K]; gradients through the policy."""
        return self._of("policy", at)

    def old(self, at: Noised) -> Tensor:
        """log p_old of the same shape, without gradients."""
        return self._of("policy" if self.on_policy else "old", at).detach()

    def _of(self, name: str, at: Noised) -> Tensor:
        values = at.by_sample(at.likelihood(self.proxy, name))
        return values.mean(1, keepdim=True) if self.pooled else values


class _OnEstimate:
    """What the objectives on an estimate share."""

    estimate: Estimate
    regularizers: tuple[LeafRegularizer, ...]
    by_stream = True

    @property
    def unit(self) -> str:
        return self.estimate.unit

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return regularizer.named(self.estimate.weight_sets, self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy, or a regularizer, of another kind of prediction."""
        regularizer.check(corruption, self.regularizers, self.estimate.proxy)

    def _compared(self, models: Mapping[str, Predict], batch: LeafBatch) -> tuple[Noised, Tensor, Tensor, Tensor]:
        """The re-noised batch; log p_θ, log p_θ − log p_old and A, of shapes that broadcast."""
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        policy, old = self.estimate.policy(at), self.estimate.old(at)
        return at, policy, policy - old, batch.advantage.to(policy)[:, None]

    def _loss(self, loss: Tensor, at: Noised, log_ratio: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
        """The mean of `loss` ([B, 1] or [B, M], by stream [B, …, K]) with the regularizers' own mean over all pairs."""
        per_pair = at.merged(loss).expand(-1, at.batch.pairs).flatten()
        per_pair, more = regularizer.add(per_pair, self.regularizers, at)
        moved = at.merged(log_ratio.detach().abs()).mean(1)
        return Loss(per_pair.mean(), {"log_ratio_abs": moved, **metrics, **more})


@dataclass(frozen=True)
class PolicyGradient(_OnEstimate):
    """The three plain objectives of "Rethinking the design space" on e = log p_θ, with δ = e − e_old, ρ = sg exp δ.

    epg   L = −mean ρ·A·e                (REINFORCE with an importance weight)
    pepg  L = −mean ρ·(A − sg δ)·e       (proximal: the advantage is used up as the policy moves)
    par   L = ½ mean ρ·(A − δ)²          (regression of the log-ratio on the advantage; the same gradient as pepg)

    plus regularizers. `ratio` False sets ρ to 1. The proximal forms need A on the scale of δ (1e-2 … 1e-1): released
    scripts give them 0.1·(R − mean), without a standard deviation. epg has no lower bound where A < 0: it needs a
    penalty or few updates. Published: adaptive proxy, each pair by itself, velocity penalty 1e-4 to the reference.
    Certain: read in code. Raises ValueError for an unknown kind.

    With `kl` · mean (v − v_ref)² as the regularizer::

        x = (1 - t) * x0 + t * noise
        gaps = [x - t * velocity(x, t, c) - x0 for velocity in (v, v_old)]
        log_p, log_p_old = (-(g**2).mean(D, True) / g.abs().mean(D, True).clamp(min=1e-5).detach() for g in gaps)
        delta = log_p - log_p_old
        rho = delta.detach().exp() if ratio else 1
        epg, pepg = -rho * A * log_p, -rho * (A - delta.detach()) * log_p
        par = rho * (A - delta) ** 2 / 2
        loss = {"epg": epg, "pepg": pepg, "par": par}[kind].mean()
        loss = loss + kl * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean()
    """

    kind: Kind = "epg"
    estimate: Estimate = Estimate()
    ratio: bool = True
    regularizers: tuple[LeafRegularizer, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(get_args(Kind))}")

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        at, policy, delta, advantage = self._compared(models, batch)
        rho = delta.detach().exp() if self.ratio else torch.ones_like(delta)
        if self.kind == "par":
            loss = rho * (advantage - delta).square() / 2
        elif self.kind == "pepg":
            loss = -rho * (advantage - delta.detach()) * policy
        else:
            loss = -rho * advantage * policy
        return self._loss(loss, at, delta, {})


@dataclass(frozen=True)
class ClippedLikelihood(_OnEstimate):
    """L = mean max(−A·ρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)) + regularizers, ρ = exp(log p_θ − sg log p_old).

    V-GRPO: adaptive proxy, `pooled`, clip 6e-3 … 1e-2, or with a single update on-policy and `soft_clip` η = 3,
    A -> η·tanh(A/η) (second-hand, with equations). AWM: `GeneralHuber`, each pair by itself, on-policy with clip 1
    (inert), held to reference (1e-4 … 3e-3) and ema (1), which is all that bounds A < 0 (certain: read in code).

    The pairs (t, ε) are the same for policy and old by construction. On-policy value −A, gradient −A·∇log p.
    Raises ValueError for a clip that is not finite and positive, clip_low above 1, or a soft clip that is not positive.

    With `kl` · mean (v − v_ref)² as the regularizer::

        x = (1 - t) * x0 + t * noise
        gaps = [x - t * velocity(x, t, c) - x0 for velocity in (v, v_old)]
        log_p, log_p_old = (-(g**2).mean(D, True) / g.abs().mean(D, True).clamp(min=1e-5).detach() for g in gaps)
        r = (log_p - log_p_old).exp()
        A = A if soft_clip is None else soft_clip * (A / soft_clip).tanh()
        loss = torch.maximum(-A * r, -A * r.clamp(1 - clip_low, 1 + clip_high)).mean()
        loss = loss + kl * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean()
    """

    clip_low: float = 1e-2
    clip_high: float = 1e-2
    estimate: Estimate = Estimate()
    soft_clip: float | None = None
    regularizers: tuple[LeafRegularizer, ...] = ()

    def __post_init__(self) -> None:
        positive("clip_low", self.clip_low, "1e-2")
        positive("clip_high", self.clip_high, "1e-2")
        if self.clip_low > 1:
            raise ValueError(f"clip_low: {self.clip_low} must be at most 1; 1e-2 is usual")
        if self.soft_clip is not None:
            positive("soft_clip", self.soft_clip, "3, or None for none,")

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        at, _, log_ratio, advantage = self._compared(models, batch)
        ratio = log_ratio.exp()
        if self.soft_clip is not None:
            advantage = soft_clip(advantage, self.soft_clip)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        with torch.no_grad():
            metrics = {
                "clip_fraction": at.merged((loss > -advantage * ratio).float()).mean(1),
                "outside_clip": at.merged((ratio != clipped).float()).mean(1),
            }
        return self._loss(loss, at, log_ratio, metrics)


def soft_clip(advantage: Tensor, bound: float) -> Tensor:
    """η·tanh(A/η): within ±η, slope 1 at 0 (V-GRPO, Eq. 17). It flattens coarse rewards such as 0 or 1."""
    return bound * (advantage / bound).tanh()
