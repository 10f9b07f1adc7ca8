"""The policy-ratio objective over stochastic edges: a form of the ratio, a clip, and regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.corruption import check_velocity
from tempflow.core.dynamics import Dynamics
from tempflow.core.groups import dense
from tempflow.core.objective.clip import Clip, ClipRule
from tempflow.core.objective.edges import EdgeBatch, Loss, Predict, Replayed, replay
from tempflow.core.objective.regularizer import Divergence, EdgeRegularizer, KLForm
from tempflow.core.state import mean_dims, to_rows, upcast

_TOKENS = "StepRatio() and Clip()"
"""A ratio and a clip for tokens."""


class Ratio(Protocol):
    """log r of a replayed batch."""

    @property
    def unit(self) -> str: ...

    @property
    def by_stream(self) -> bool:
        """Whether it can take an advantage for each stream."""
        ...

    @property
    def keeps_mean(self) -> bool: ...

    def __call__(self, at: Replayed) -> Tensor:
        """[B], [B, K] where advantages are by stream, or dense over positions [B, *P]."""
        ...

    def advantage(self, batch: EdgeBatch, log_ratio: Tensor) -> Tensor:
        """The advantages, in the shape of the log ratio."""
        ...


class _PerEdge:
    """One ratio an edge, or one of each stream: its advantage as it is."""

    unit = "edge"
    by_stream = True
    keeps_mean = False

    def advantage(self, batch: EdgeBatch, log_ratio: Tensor) -> Tensor:
        return batch.advantage


@dataclass(frozen=True)
class StepRatio(_PerEdge):
    """log r = log p − log p_old, a mean over latent elements: r is the D-th root of the density ratio."""

    def __call__(self, at: Replayed) -> Tensor:
        return at.batch.log_prob_of(at.law) - at.batch.log_prob


@dataclass(frozen=True)
class NormRatio(_PerEdge):
    """GRPO-Guard's RatioNorm: log r̂ = S·(log r + mean Δμ²/(2S²)) = −mean(Δμ·z), Δμ = μ_old − μ, z = (y − μ_old)/S.

    Its mean over z is 0, where log r's is below 0 at every step; its size does not depend on S. (arXiv 2510.22319;
    form read in two re-implementations.) Computed in the second form, in which nothing cancels.
    """

    keeps_mean = True

    def __call__(self, at: Replayed) -> Tensor:
        old = at.batch.drawn_from()
        z = (at.batch.y.to(old) - old) / to_rows(at.policy.std, old)
        return at.batch.reduced((at.policy.mean - old) * z)


@dataclass(frozen=True)
class ChunkRatio:
    """GCPO: one ratio a chunk, the geometric mean of its steps', exp(mean over the chunk of log r) (arXiv 2510.21583).

    With one chunk a path it is GSPO's sequence ratio. `of`: the ratio whose mean is taken.
    """

    of: Ratio = field(default_factory=StepRatio)
    unit = "chunk"

    @property
    def by_stream(self) -> bool:
        return self.of.by_stream

    @property
    def keeps_mean(self) -> bool:
        return self.of.keeps_mean

    def __call__(self, at: Replayed) -> Tensor:
        log_ratio = self.of(at)
        if log_ratio.shape != at.batch.advantage.shape:
            raise ValueError("of: a chunk takes the mean of one ratio per edge; nearest valid: StepRatio()")
        unit = _unit(at.batch)
        count = _sizes(unit)
        total = log_ratio.new_zeros(len(count), *log_ratio.shape[1:]).index_add(0, unit, log_ratio)
        return (total / (count[:, None] if at.batch.by_stream else count))[unit]

    def advantage(self, batch: EdgeBatch, log_ratio: Tensor) -> Tensor:
        return batch.advantage


@dataclass(frozen=True)
class PositionRatio:
    """ViPO: a ratio at every position of the latent, log densities summed over channels; A·map there.

    Reads the column "map", [B, h, w] ≥ 0. Per-position log ratios are far larger than means over the latent, so the
    same clip blocks more of them. (arXiv 2511.18719, by its authors' lab's code.) Raises ValueError where a model holds
    elements or has several streams.
    """

    unit = "edge"
    by_stream = False
    keeps_mean = True

    def __call__(self, at: Replayed) -> Tensor:
        _whole("PositionRatio", at.batch)
        old = at.batch.drawn_from()
        y = at.batch.y.to(old)
        gap = (y - old).square() - (y - at.policy.mean).square()
        return (gap / (2 * to_rows(at.policy.std, old).square())).sum(1)

    def advantage(self, batch: EdgeBatch, log_ratio: Tensor) -> Tensor:
        where = batch.column("map").to(log_ratio)
        if where.shape != log_ratio.shape:
            raise ValueError(f"map: shape {list(where.shape)} must be {list(log_ratio.shape)}, a number per position")
        return to_rows(batch.advantage, log_ratio) * where


@dataclass(frozen=True)
class RegionRatio(_PerEdge):
    """One ratio an edge whose log densities are averaged with the column "map" [B, h, w] as weights.

    Our variant of ViPO: gradients go where the map is, clips stay those of a step's ratio, and an even map gives
    `StepRatio` exactly. A map of zeros has log ratio 0. Raises ValueError where a model holds elements or has several
    streams.
    """

    by_stream = False
    keeps_mean = True

    def __call__(self, at: Replayed) -> Tensor:
        _whole("RegionRatio", at.batch)
        old = at.batch.drawn_from()
        y, where = at.batch.y.to(old), upcast(at.batch.column("map")).to(old)
        gap = (y - old).square() - (y - at.policy.mean).square()
        weighted = gap * where[:, None].expand_as(gap)
        return mean_dims(weighted) / mean_dims(where).clamp(min=1e-12) / (2 * at.policy.std.to(old).square())


@dataclass(frozen=True)
class PolicyRatio:
    """L = mean over units of [ w_j · clip(log r_j, A_j) ] + Σ coefficient · mean term_j.

    r = exp(log p − log p_old) is a D-th root, so ranges are tiny (1e-5 … 1e-2). w stands outside the clip, so weights
    do not move a clip. A unit's loss is the mean over its edges. Where a model has several streams, log p is the mean
    of theirs; with an advantage for each, every stream has its own ratio and clip, and an edge's loss is the mean over
    streams. Edges of tokens have a log-prob too (a mean over tokens, of the whole step's law), and ratios, clips and
    regularizers that read no means serve them. An edge of numbers goes from x at σ to y ~ N(a·x + b·v, S²)::

        mean, mean_ref = a * x + b * v(x, sigma, c), a * x + b * v_ref(x, sigma, c)
        log_p = (-(((y - mean) / S) ** 2) / 2 - S.log() - math.log(2 * math.pi) / 2).mean(D, True)
        r = (log_p - log_p_old).exp()
        surrogate = torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))
        divergence = ((mean - mean_ref) ** 2 / (2 * S**2)).mean(D, True)
        loss = (w * surrogate + kl * divergence).mean()
    """

    clip: ClipRule = field(default_factory=Clip)
    ratio: Ratio = field(default_factory=StepRatio)
    regularizers: tuple[EdgeRegularizer, ...] = ()

    @property
    def unit(self) -> str:
        return self.ratio.unit

    @property
    def by_stream(self) -> bool:
        return self.ratio.by_stream

    @property
    def _regularizers(self) -> tuple[EdgeRegularizer, ...]:
        return tuple(p for p in self.regularizers if p.coefficient > 0)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("policy", *(s for p in self._regularizers for s in p.weight_sets))))

    @property
    def keeps_mean(self) -> bool:
        return self.clip.keeps_mean or self.ratio.keeps_mean or any(p.keeps_mean for p in self._regularizers)

    @property
    def keeps_peers(self) -> bool:
        return any(p.keeps_peers for p in self._regularizers)

    @property
    def tightest_clip(self) -> float:
        return self.clip.tightest

    def check(self, dynamics: Dynamics) -> None:
        """Raises ValueError where a part needs of the dynamics what they have not: a velocity, or means of steps."""
        for part in (self.ratio, self.clip, *self._regularizers):
            if part.keeps_mean:
                check_velocity(dynamics.corruption, f"{type(part).__name__}: reads means of steps", _TOKENS)
        if self.keeps_peers:
            check_velocity(dynamics.corruption, "peers: have means of steps", "no imitation")
        for regularizer in self._regularizers:
            regularizer.check(dynamics)

    def __call__(self, models: Mapping[str, Predict], batch: EdgeBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only.

        Raises ValueError for a per-edge field of another shape than [B], a step without noise, or a missing column.
        """
        at = replay(models, self.weight_sets, batch)
        log_ratio = self.ratio(at)
        columns = {**batch.columns, **_moved(at)} if self.clip.keeps_mean else batch.columns
        if batch.by_stream:
            columns = {name: column[:, None] if column.dim() == 1 else column for name, column in columns.items()}
        clipped_loss = self.clip(log_ratio, self.ratio.advantage(batch, log_ratio), columns)
        if batch.weight.dim() == 1:
            loss = batch.weight * _flat(clipped_loss.loss, batch)
        else:
            loss = _flat(batch.weight * clipped_loss.loss, batch)
        metrics = {
            "log_ratio_abs": _flat(log_ratio.detach().abs(), batch),
            "clip_fraction": _flat(clipped_loss.blocked, batch),
            "outside_clip": _flat(clipped_loss.outside, batch),
        }
        for regularizer in self._regularizers:
            term = regularizer(at)
            loss = loss + regularizer.coefficient * term
            metrics[regularizer.name] = term.detach()
        return Loss(_mean_over_units(loss, batch) if self.unit == "chunk" else loss.mean(), metrics)


def clipped(
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    ratio: Ratio | None = None,
) -> PolicyRatio:
    """GRPO's own: PPO's clip, one ratio a step (or another form of it), and β = `kl` times the KL to the reference.

    Raises ValueError for a clip or kl that is negative or not finite, and for an unknown form.
    """
    return PolicyRatio(Clip(clip_low, clip_high), ratio or StepRatio(), (Divergence(kl, kl_form),))


def _moved(at: Replayed) -> dict[str, Tensor]:
    """How far an edge's mean is from the one it was drawn from, squared, and its std, [B]: a clip's columns."""
    gap = (at.policy.mean.detach() - at.batch.drawn_from()).square()
    return {"mean_gap": at.batch.reduced(gap), "std": at.policy.std}


def _flat(values: Tensor, batch: EdgeBatch) -> Tensor:
    """[B], the mean over streams or positions."""
    if batch.by_stream:
        return batch.merged(values)
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _whole(ratio: str, batch: EdgeBatch) -> None:
    """Raises ValueError unless all elements of the batch's states are free and of one stream."""
    if not batch.layout.whole or batch.by_stream:
        raise ValueError(
            f"ratio: {ratio} weighs positions of a state that is all free and of one stream, which this model's is "
            "not; nearest valid: StepRatio()"
        )


def _unit(batch: EdgeBatch) -> Tensor:
    """Dense unit numbers of the batch."""
    if batch.unit is None:
        raise ValueError("unit: is missing; a chunk ratio needs to know which edges share a chunk")
    return dense(batch.unit)


def _sizes(unit: Tensor) -> Tensor:
    return torch.bincount(unit)


def _mean_over_units(loss: Tensor, batch: EdgeBatch) -> Tensor:
    unit = _unit(batch)
    size = _sizes(unit)
    return (loss / size[unit]).sum() / len(size)
