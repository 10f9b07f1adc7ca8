"""Objectives on comparisons of samples: pairs (Diffusion-DPO), groups (DGPO, CRD), and none (supervised)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from tempflow.core.checks import not_negative, positive
from tempflow.core.corruption import GAUSSIAN_PATH, Corruption
from tempflow.core.likelihood_proxy import Adaptive, LikelihoodProxy, Matching
from tempflow.core.objective import regularizer
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.leaves import LeafBatch, Noised, group_mean, noised
from tempflow.core.objective.matching import optimality
from tempflow.core.objective.regularizer import LeafRegularizer, PredictionDistance
from tempflow.core.state import WHOLE, StateLayout

Regression = Literal["mse", "bce"]


@dataclass(frozen=True)
class Supervised:
    """Flow matching on given samples: L = −mean of a proxy, by default mean (v − v*)². Advantages are not read.

    With the rollout's best samples it is rejection fine-tuning. Standard (certain). A choice is one of whole samples,
    so one stream's reward would move the others: advantages by stream are refused.

    With `kl` · mean (v − v_ref)² as the regularizer::

        x = (1 - t) * x0 + t * noise
        loss = ((v(x, t, c) - (noise - x0)) ** 2).mean() + kl * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean()
    """

    proxy: LikelihoodProxy = field(default_factory=Matching)
    regularizers: tuple[LeafRegularizer, ...] = ()
    unit = "pair"
    by_stream = False

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return regularizer.named(("policy",), self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy, or a regularizer, of another kind of prediction."""
        regularizer.check(corruption, self.regularizers, self.proxy)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only.

        Raises ValueError for advantages by stream.
        """
        batch.check_joint("Supervised")
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        loss = -at.likelihood(self.proxy, "policy")
        metrics = {"error": at.by_sample(loss.detach()).mean(1)}
        loss, more = regularizer.add(loss, self.regularizers, at)
        return Loss(loss.mean(), metrics | more)


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs of a chosen and a rejected sample of one prompt, each pair with M common (t, ε).

    chosen, rejected  [B, *S]
    rows              LongTensor[B]
    t, noise          [B, M] in (0, 1] and [B, M, *S]; common to a pair, so that the two differ by the sample alone
    layout            of the B pairs: which elements count, and in which streams
    corruption        the forward process that noises both

    Raises ValueError as `LeafBatch` does, and when the two samples' shapes differ.
    """

    chosen: Tensor
    rejected: Tensor
    rows: Tensor
    t: Tensor
    noise: Tensor
    layout: StateLayout = WHOLE
    corruption: Corruption = GAUSSIAN_PATH

    def __post_init__(self) -> None:
        if self.rejected.shape != self.chosen.shape:
            raise ValueError(f"rejected: shape {list(self.rejected.shape)} must be {list(self.chosen.shape)}")
        self.leaves()

    def __len__(self) -> int:
        return self.chosen.shape[0]

    def leaves(self) -> LeafBatch:
        """All 2·B samples, the chosen ones first, a pair being a group; advantage 1 and −1."""
        one = torch.ones(len(self), dtype=self.t.dtype, device=self.chosen.device)
        pair = torch.arange(len(self), device=self.chosen.device)
        return LeafBatch(
            torch.cat([self.chosen, self.rejected]),
            torch.cat([one, -one]),
            self.rows.repeat(2),
            pair.repeat(2),
            self.t.repeat(2, 1),
            self.noise.repeat(2, *[1] * (self.noise.dim() - 1)),
            self.layout.take(pair.repeat(2)),
            self.corruption,
        )


@dataclass(frozen=True)
class PreferencePairs:
    """Diffusion-DPO: L = −mean log σ( β/2 · [(s_w − s_w,ref) − (s_l − s_l,ref)] ), s = −mean (v−v*)².

    Published: β 2000 … 5000 with this reduction (the mean over latent elements and the factor ½). Diffusion-DPO has the
    error of the noise for s; Flow-Factory that of the velocity, as here (certain: read in code, but its online trainer
    compares the velocity with ε instead of ε − x0, which is not followed).
    Raises ValueError for a β that is not finite and positive.

    With `kl` · mean (v − v_ref)² as the regularizer::

        x0 = torch.stack([chosen, rejected])
        x = (1 - t) * x0 + t * noise
        error, error_ref = (((u(x, t, c) - (noise - x0)) ** 2).mean(D, True) for u in (v, v_ref))
        chosen, rejected = beta / 2 * (error_ref - error)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss = loss + kl * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean()
    """

    beta: float = 2000.0
    proxy: LikelihoodProxy = field(default_factory=Matching)
    regularizers: tuple[LeafRegularizer, ...] = ()
    unit = "pair"
    by_stream = False

    def __post_init__(self) -> None:
        positive("beta", self.beta, 2000.0)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return regularizer.named(("policy", "reference"), self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy, or a regularizer, of another kind of prediction."""
        regularizer.check(corruption, self.regularizers, self.proxy)

    def __call__(self, models: Mapping[str, Predict], batch: PairBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only. Metrics are [B], by pair."""
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch.leaves())
        reward = self.beta / 2 * _log_ratio(self.proxy, at, "reference")
        chosen, rejected = at.by_sample(reward).chunk(2)
        loss = -logsigmoid(chosen - rejected)
        held, divergences = regularizer.add(torch.zeros_like(reward), self.regularizers, at)
        metrics = {
            "accuracy": (chosen > rejected).float().mean(1),
            "margin": (chosen - rejected).detach().mean(1),
            "chosen_reward": chosen.detach().mean(1),
        }
        paired = {name: (d[: len(batch)] + d[len(batch) :]) / 2 for name, d in divergences.items()}
        return Loss(loss.mean() + held.mean(), metrics | paired)


@dataclass(frozen=True)
class OnlinePairs:
    """`pairs` on a rollout's own samples: in each group that of the highest advantage against that of the lowest.

    Samples of a group must share their (t, ε) (`Renoise(times, 2, 2)`). Others than these two cost their forwards and
    teach nothing, so a credit should leave them out. A group whose advantages are all equal has no pair: it counts in
    the mean, with a loss of 0. Metrics are [B], each sample bearing its pair's (0 for the rest).

    With the fields of `pairs`, and `group` the number of every sample's group::

        members = [(group == number).nonzero()[:, 0] for number in group.unique()]
        best, worst = (torch.stack([i[pick(A[i].flatten())] for i in members]) for pick in (torch.argmax, torch.argmin))
        chosen, rejected, t, noise, c = x0[best], x0[worst], t[best], noise[best], c[best]
        x0 = torch.stack([chosen, rejected])
        x = (1 - t) * x0 + t * noise
        error, error_ref = (((u(x, t, c) - (noise - x0)) ** 2).mean(D, True) for u in (v, v_ref))
        chosen, rejected = beta / 2 * (error_ref - error)
        loss = -((A[best] > A[worst]) * torch.nn.functional.logsigmoid(chosen - rejected)).mean()
    """

    pairs: PreferencePairs = field(default_factory=PreferencePairs)
    unit = "group"
    by_stream = False

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return self.pairs.weight_sets

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError as the pairs' objective does."""
        self.pairs.check(corruption)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch of whole groups; gradients flow through `models["policy"]` only.

        Raises ValueError where a pair's samples have different times or noises, and for advantages by stream.
        """
        batch.check_joint("OnlinePairs")
        best, worst, groups = extremes(batch.advantage, batch.group)
        some = len(best) > 0
        if not some:  # one sample against itself, times 0: whatever a batch holds, it gives the same metrics
            best = worst = torch.zeros(1, dtype=torch.long, device=batch.x0.device)
        if not (batch.t[best].equal(batch.t[worst]) and batch.noise[best].equal(batch.noise[worst])):
            raise ValueError("renoise: a pair's samples differ in (t, ε); nearest valid: Renoise(times, 2, 2)")
        layout = batch.layout.take(best)
        drawn = (batch.rows[best], batch.t[best], batch.noise[best], layout, batch.corruption)
        couples = PairBatch(batch.x0[best], batch.x0[worst], *drawn)
        found = self.pairs(models, couples)
        metrics: dict[str, Tensor] = {}
        for name, column in found.metrics.items():
            spread = torch.zeros(len(batch), dtype=column.dtype, device=column.device)
            metrics[name] = spread.index_copy(0, torch.cat([best, worst]), column.repeat(2)) if some else spread
        return Loss(found.value * (len(best) / groups if some else 0.0), metrics)


def extremes(advantage: Tensor, group: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows of the highest and of the lowest advantage of each group that has two different ones, LongTensor each, and
    how many groups there are. Of equal advantages the first counts."""
    members: dict[int, list[int]] = {}
    for row, number in enumerate(int(g) for g in group):
        members.setdefault(number, []).append(row)
    value = [float(a) for a in advantage]
    ends = [(max(rows, key=value.__getitem__), min(rows, key=value.__getitem__)) for rows in members.values()]
    pairs = [(high, low) for high, low in ends if value[high] > value[low]]
    place = torch.tensor(pairs, dtype=torch.long, device=group.device).view(-1, 2)
    return place[:, 0], place[:, 1], len(members)


@dataclass(frozen=True)
class GroupPreference:
    """DGPO: L = mean_j softplus(S_g(j)) / β, S_g = β · mean over the group of A·(m − m_cmp), m = mean (v−v*)².

    Its gradient is mean_j σ(S_g)·A_j·∇m_j: an advantage-weighted matching loss whose weight falls to 0 as the group's
    order is learned. Advantages that sum to 0 over a group cancel the normaliser of the likelihood. `compare_to`: the
    weight set of m_cmp. `clip` ε: a sample leaves the gradient once exp(m_old − m) is above 1 + ε with A > 0, or below
    1 − ε with A < 0; "old" is then a fast average of the policy (None: no clip).

    Published: β 100 against the reference, 2000 against old; clip 1e-3 … 5e-2; shared noise in a group, times shared
    by all; A a group z-score. Certain: read in code, where the group's size is the configured one.
    Raises ValueError for a β or clip that is not finite and positive, or an unknown `compare_to`.

    For groups of one size (of several, each group counts alike), `group` the number of every sample's::

        x = (1 - t) * x0 + t * noise
        m, m_old, m_ref = (((u(x, t, c) - (noise - x0)) ** 2).mean(D, True) for u in (v, v_old, v_ref))
        gain = (m_ref if compare_to == "reference" else m_old) - m
        r = (m_old - m).exp()
        left = torch.where(A > 0, r > 1 + clip, r < 1 - clip)
        gain = torch.where(left, gain.detach(), gain)
        same = (group[:, None] == group).to(A)
        order = torch.tensordot(same / same.sum(1), -beta * A * gain, dims=1)
        loss = (torch.nn.functional.softplus(order) / beta).mean() + kl * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean()
    """

    beta: float = 100.0
    clip: float | None = 1e-2
    compare_to: str = "reference"
    proxy: LikelihoodProxy = field(default_factory=Matching)
    regularizers: tuple[LeafRegularizer, ...] = ()
    unit = "group"
    by_stream = False

    def __post_init__(self) -> None:
        positive("beta", self.beta, 100.0)
        if self.clip is not None:
            positive("clip", self.clip, 1e-2)
        if self.compare_to not in ("reference", "old"):
            raise ValueError(f"compare_to: {self.compare_to!r} is not one of reference, old")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        required = ("policy", self.compare_to) if self.clip is None else ("policy", self.compare_to, "old")
        return regularizer.named(required, self.regularizers)

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy, or a regularizer, of another kind of prediction."""
        regularizer.check(corruption, self.regularizers, self.proxy)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch of whole groups; gradients flow through `models["policy"]` only.

        Raises ValueError for advantages by stream.
        """
        batch.check_joint("GroupPreference")
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        advantage = at.by_pair(batch.advantage)
        gain = _log_ratio(self.proxy, at, self.compare_to)
        metrics: dict[str, Tensor] = {}
        if self.clip is not None:
            with torch.no_grad():
                ratio = _log_ratio(self.proxy, at, "old").exp()
                out = torch.where(advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
            gain = torch.where(out, gain.detach(), gain)
            metrics["clip_fraction"] = at.by_sample(out.float()).mean(1)
        order = self.beta * group_mean(at.by_sample(-advantage * gain), batch.group)
        metrics |= {"group_weight": order.detach().sigmoid().mean(1), "log_ratio": at.by_sample(gain.detach()).mean(1)}
        loss, more = regularizer.add(softplus(order).flatten() / self.beta, self.regularizers, at)
        return Loss(over_groups(at.by_sample(loss), batch.group), metrics | more)


@dataclass(frozen=True)
class CentredReward:
    """CRD: L = M/β · mean (β·r̃ − ã)² + KL, the implicit reward regressed to the given one, both centred in the group.

    r = s_θ − s_old, the proxy's log-ratio; a = `optimality` of A with M = `advantage_max`; ã = a − Σ p·a and
    r̃ = r − sg Σ p·r over the group, which cancels the unknown normaliser. `temperature` None: p uniform; τ: the mean of
    two such losses, with p = softmax(a/τ) and with p = softmax(−a/τ); 0, hard selection: p ∝ e^a on the samples with
    a > ½, and on those with a < ½ (uniform where there are none). The code compares a with 0, so that its second pool
    is empty; ours is what it says it does. `form` "bce": the cross-entropy of σ(β·r̃) with σ(ã) in the square's place.

    KL: `kl` · mean ((c + (1−c)·a) · mean (v−v_ref)²) with c = min(1, 1e-4/kl) where `adaptive_kl`, so that what scores
    well is held near the reference, and the rest hardly; else the plain mean.

    Published (SD 3.5-M): β 1, M 5, uniform p, velocity-space adaptive proxy, kl 0.1 to a reference with guidance
    4.5. Certain: read in code (its authors' contribution to Flow-Factory), which centres over the gathered batch; the
    paper centres within the prompt, as here.
    Raises ValueError for a number that is not finite and positive (kl may be 0).

    For groups of one size (of several, each group counts alike), `group` the number of every sample's::

        x = (1 - t) * x0 + t * noise
        gaps = [u(x, t, c) - (noise - x0) for u in (v, v_old)]
        log_p, log_p_old = (-(g**2).mean(D, True) / g.abs().mean(D, True).clamp(min=1e-5).detach() for g in gaps)
        a, r = (A / (2 * advantage_max) + 0.5).clamp(0, 1), log_p - log_p_old
        same = (group[:, None] == group).to(A)
        mean_a, mean_r = (torch.tensordot(same / same.sum(1), z, dims=1) for z in (a, r.detach()))
        residual = beta * (r - mean_r) - (a - mean_a)
        share = min(1, 1e-4 / kl) if adaptive_kl else 1
        held = (share + (1 - share) * a) * ((v(x, t, c) - v_ref(x, t, c)) ** 2).mean(D, True)
        loss = (advantage_max / beta * residual**2 + kl * held).mean()
    """

    beta: float = 1.0
    advantage_max: float = 5.0
    temperature: float | None = None
    kl: float = 0.1
    adaptive_kl: bool = True
    proxy: LikelihoodProxy = field(default_factory=lambda: Adaptive("velocity"))
    form: Regression = "mse"
    unit = "group"
    by_stream = False

    def __post_init__(self) -> None:
        positive("beta", self.beta, 1.0)
        positive("advantage_max", self.advantage_max, 5.0)
        if self.temperature is not None:
            not_negative("temperature", self.temperature, "1 is usual, None is uniform")
        if self.form not in get_args(Regression):
            raise ValueError(f"form: {self.form!r} is not one of {', '.join(get_args(Regression))}")
        not_negative("kl", self.kl)

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy", "old", "reference") if self.kl > 0 else ("policy", "old")

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError for a proxy of another kind of prediction, or tokens with kl above 0."""
        held = (PredictionDistance("reference", self.kl),) if self.kl > 0 else ()
        regularizer.check(corruption, held, self.proxy)

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss:
        """The loss of one micro-batch of whole groups; gradients flow through `models["policy"]` only.

        Raises ValueError for advantages by stream.
        """
        batch.check_joint("CentredReward")
        self.check(batch.corruption)
        at = noised(models, self.weight_sets, batch)
        given = optimality(batch.advantage.to(at.x.device, at.dtype), self.advantage_max)[:, None].expand(
            -1, batch.pairs
        )
        implicit = at.by_sample(_log_ratio(self.proxy, at, "old"))
        weights = self._weights(given, batch.group)
        centred = [
            (self.beta * (implicit - group_mean(implicit.detach(), batch.group, p)),
             given - group_mean(given, batch.group, p))
            for p in weights
        ]  # fmt: skip
        loss = torch.stack([self._regression(r, a) for r, a in centred]).mean(0) * self.advantage_max / self.beta
        residuals = torch.stack([r.detach() - a for r, a in centred])
        metrics = {"implicit_reward": implicit.detach().mean(1), "residual": residuals.abs().mean((0, 2))}
        if self.kl > 0:
            divergence = at.by_sample(PredictionDistance("reference", self.kl)(at))
            floor = min(1.0, 1e-4 / self.kl)
            share = floor + (1 - floor) * given if self.adaptive_kl else torch.ones_like(given)
            loss = loss + self.kl * share * divergence
            metrics["kl_reference"] = divergence.detach().mean(1)
        return Loss(over_groups(loss, batch.group), metrics)

    def _weights(self, given: Tensor, group: Tensor) -> list[Tensor]:
        """p of each centring, up to a factor per group, which `group_mean` divides out; `given` is within [0, 1]."""
        if self.temperature is None:
            return [torch.ones_like(given)]
        if self.temperature > 0:
            return [(sign * (given - 0.5) / self.temperature).exp() for sign in (1, -1)]
        pools = [given > 0.5, given < 0.5]
        none = [group_mean(pool.to(given), group) == 0 for pool in pools]
        return [torch.where(e, 1.0, pool * given.exp()) for pool, e in zip(pools, none, strict=True)]

    def _regression(self, implicit: Tensor, given: Tensor) -> Tensor:
        if self.form == "bce":
            return binary_cross_entropy_with_logits(implicit, given.sigmoid(), reduction="none")
        return (implicit - given).square()


def over_groups(values: Tensor, group: Tensor) -> Tensor:
    """The mean over groups of each one's mean, for `values` [B, M]: the same however groups are batched, of whatever
    sizes they are."""
    share = 1 / (group[:, None] == group[None, :]).sum(1).to(values)
    return (values.mean(1) * share).sum() / share.sum()


def _log_ratio(proxy: LikelihoodProxy, at: Noised, other: str) -> Tensor:
    """log p_θ − log p_other at every pair, [B·M], gradients through the policy."""
    policy, fixed = (at.likelihood(proxy, name) for name in ("policy", other))
    return policy - fixed
