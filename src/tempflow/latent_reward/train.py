"""Training a latent reward on pairs: L = −log sigmoid(R(x_σ^win, σ) − R(x_σ^lose, σ)), one σ for both.

DRM (CVPR 2026, arXiv 2605.25661); a secondary source. Its figures: 1.4 M pairs, one epoch, batch 128, rate 1e-5, and
an accuracy that falls with noise (74.0 % clean, 65.1 % at t = 750). The law of σ is not stated: uniform here. Nor is
whether a pair shares its noise: it does not here, unless asked. Training on a sampler's own states (`Rated.sigma`), as
on the siblings that Step-GRPO will ask about, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.schedule import linear
from tempflow.core.times import LogitNormalTimes, UniformTimes
from tempflow.latent_reward.model import LatentReward, bind
from tempflow.media import Size
from tempflow.models.finite import encoded
from tempflow.models.protocol import Model
from tempflow.request import asked

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""score(x [B, *S], sigma float32[B], rows long[B]) -> [B]; `rows` index the prompts."""

Report = Callable[[int, float, float], None]
"""report(step, loss, accuracy of the step's own pairs)."""

_NO_GRID = linear(1)  # times that are not on a grid do not look at it


@dataclass(frozen=True, eq=False)
class Rated:
    """N latents of known prompts and how good each is.

    latents  float32[N, *S]
    scores   float[N], larger is better, on any one scale within a prompt; NaN = failed, in no pair
    rows     LongTensor[N], which of `prompts` each was drawn for
    prompts  the prompts
    sigma    None: the latents are clean, and training adds noise at a σ that it draws; else float[N] in (0, 1], the σ
             that each was taken from a sampler at, as it is
    group    LongTensor[N], members of one are paired; None: a prompt's are. Of one prompt and σ each

    Raises ValueError where these do not fit together.
    """

    latents: Tensor
    scores: Tensor
    rows: Tensor
    prompts: tuple[str, ...]
    sigma: Tensor | None = None
    group: Tensor | None = None

    @property
    def paired(self) -> Tensor:
        """Whose members are paired, LongTensor[N]."""
        return self.rows if self.group is None else self.group

    def __post_init__(self) -> None:
        count = len(self.latents)
        given = {"scores": self.scores, "rows": self.rows, "sigma": self.sigma, "group": self.group}
        for name, value in given.items():
            if value is not None and value.shape != (count,):
                raise ValueError(f"{name}: shape {list(value.shape)} must be [{count}], one for each latent")
        if self.rows.dtype != torch.long:
            raise ValueError(f"rows: dtype {self.rows.dtype} cannot name prompts; nearest valid: torch.int64")
        if count and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < len(self.prompts):
            raise ValueError(f"rows: {int(self.rows.max())} names no prompt; nearest valid: {len(self.prompts) - 1}")
        if self.sigma is not None and not bool(((self.sigma > 0) & (self.sigma <= 1)).all()):
            raise ValueError(f"sigma: {float(self.sigma.min())} … {float(self.sigma.max())} must lie in (0, 1]")
        if self.group is not None and self.group.dtype != torch.long:
            raise ValueError(f"group: dtype {self.group.dtype} cannot number groups; nearest valid: torch.int64")
        for name, value in (("rows", self.rows), ("sigma", self.sigma)):
            if count and value is not None and not _one_each(value, self.paired):
                raise ValueError(f"{name}: differs within a group, whose scores could not be compared; split the group")


@dataclass(frozen=True)
class RewardTraining:
    """How a reward is trained.

    steps, pairs   updates (≥ 0), and pairs in each (≥ 1); pairs are drawn evenly, with replacement
    lr             AdamW's rate, finite and above 0; the paper's 1e-5 is for a 2.5 B model
    weight_decay   AdamW's, ≥ 0
    max_grad_norm  gradients are clipped to it, above 0
    margin         two latents make a pair where their scores differ by more than this, ≥ 0
    share_noise    both of a pair get the same ε
    times          the law of σ, one stratum; not asked where the latents come with theirs
    seed           of every draw

    Raises ValueError for a field out of range.
    """

    steps: int = 1000
    pairs: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    margin: float = 0.0
    share_noise: bool = False
    times: UniformTimes | LogitNormalTimes = field(default_factory=UniformTimes)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count, low in (("steps", self.steps, 0), ("pairs", self.pairs, 1)):
            if count < low:
                raise ValueError(f"{name}: {count} is too small; nearest valid: {low}")
        for name, value, usual in (("lr", self.lr, 1e-5), ("max_grad_norm", self.max_grad_norm, 1.0)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value} must be finite and above 0; {usual} is usual")
        for name, value in (("weight_decay", self.weight_decay), ("margin", self.margin)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value} must be finite and >= 0; nearest valid: 0")
        if self.times.strata != 1:
            raise ValueError(f"times.strata: {self.times.strata}, but a pair has one σ; nearest valid: 1")


@dataclass(frozen=True)
class Bucket:
    """Pairs put in the right order (a tie counts half) at noise levels in (low, high], of `pairs`."""

    low: float
    high: float
    accuracy: float
    pairs: int


def bradley_terry(win: Tensor, lose: Tensor, sigma_win: Tensor, sigma_lose: Tensor) -> Tensor:
    """−log sigmoid(win − lose) of each pair, [P]; log 2 at equal scores.

    Raises ValueError where the two of a pair were scored at different σ: such scores cannot be compared.
    """
    for name, value in (("lose", lose), ("sigma_win", sigma_win), ("sigma_lose", sigma_lose)):
        if value.shape != win.shape or win.dim() != 1:
            raise ValueError(f"{name}: shape {list(value.shape)} beside {list(win.shape)}; all must be [P]")
    if not torch.equal(sigma_win, sigma_lose):
        at = int((sigma_win != sigma_lose).int().argmax())
        raise ValueError(
            f"sigma: pair {at} was scored at {float(sigma_win[at]):.6g} and {float(sigma_lose[at]):.6g}; "
            f"scores compare at one σ only; nearest valid: {float(sigma_win[at]):.6g} for both"
        )
    return softplus(lose - win)


def pairs_of(rated: Rated, margin: float = 0.0) -> Tensor:
    """All (winner, loser) of one group whose scores differ by more than `margin`: LongTensor[P, 2], group by group.

    Raises ValueError for a margin that is not finite and ≥ 0.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin: {margin} must be finite and >= 0; nearest valid: 0")
    found = [torch.empty(0, 2, dtype=torch.long)]
    group, scores = rated.paired.cpu(), rated.scores.cpu()
    order = group.argsort(stable=True)
    for members in order.split(torch.unique_consecutive(group[order], return_counts=True)[1].tolist()):
        value = scores[members]
        gap = value[:, None] - value[None, :]  # NaN beside a failed score, and NaN is above nothing
        found.append(members[(gap > margin).nonzero()])
    return torch.cat(found)


def train_latent_reward(
    model: Model,
    rated: Rated,
    config: RewardTraining,
    size: Size,
    *,
    reward: LatentReward | None = None,
    report: Report | None = None,
) -> LatentReward:
    """Trains `reward` (None: a fresh one from the model's transformer) in place on the pairs of `rated`; returns it.
    `size`: of the media whose latents these are.

    All of its weights are trained, in float32. Two runs with equal arguments give equal weights on a CPU.

    Raises ValueError where no pair differs by more than the margin or the loss stops being finite, and what
    `LatentReward.from_transformer` raises.
    """
    pairs = pairs_of(rated, config.margin)
    made = reward
    if made is None:
        made = LatentReward.from_transformer(model.network, seed=config.seed, licence=model.licence)
    fit(made, bind(model, made, encoded(model, asked(rated.prompts), size)), rated, pairs, config, report)
    return made


def fit(
    module: nn.Module, score: Score, rated: Rated, pairs: Tensor, config: RewardTraining, report: Report | None = None
) -> None:
    """Trains `module`, whose scores `score` computes, on `pairs` [P, 2] of `rated`, in place.

    Any scorer will do. Afterwards the module is in eval mode, its parameters without gradients and frozen.
    Raises ValueError without a pair, or where the loss stops being finite.
    """
    if not len(pairs):
        raise ValueError(f"pairs: no two latents of a prompt differ by more than {config.margin}; lower the margin")
    module.requires_grad_(True)
    weights = list(module.parameters())
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    renoise = _renoise(config.times, config.share_noise)
    for step in range(config.steps):
        picked = Stream(config.seed, "latent_reward.pairs").integers((step,), len(pairs), config.pairs)
        couples = pairs[picked]
        win, lose, sigma = _scored(
            score, rated, couples, renoise, config.seed, [(step, j) for j in range(len(couples))]
        )
        loss = bradley_terry(win[:, 0], lose[:, 0], sigma[0::2, 0], sigma[1::2, 0]).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"loss: {value} at step {step}; lower lr = {config.lr}, or look for bad latents")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(weights, config.max_grad_norm))
        if not math.isfinite(norm):
            raise ValueError(f"gradient norm: {norm} at step {step}; lower lr = {config.lr}, or look for bad latents")
        optimizer.step()
        if report is not None:
            report(step, value, float(_right(win, lose).mean()))
    optimizer.zero_grad(set_to_none=True)
    module.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(
    score: Score, rated: Rated, pairs: Tensor, *, buckets: int = 4, seed: int = 0, share_noise: bool = False
) -> tuple[Bucket, ...]:
    """How often the winner of a pair [P, 2] scores higher, by noise: (0, 1] cut into `buckets` equal parts.

    Each pair is looked at once in each bucket, at a σ drawn evenly from it. A score that is not finite is wrong.
    Raises ValueError without a pair, for fewer than one bucket, or where the latents come with their σ.
    """
    if not len(pairs):
        raise ValueError("pairs: none to measure on; nearest valid: one")
    if rated.sigma is not None:
        raise ValueError("sigma: is given, and buckets draw their own; nearest valid: clean latents")
    renoise = _renoise(UniformTimes(strata=buckets), share_noise)
    right: list[Tensor] = []
    for start in range(0, len(pairs), _AT_ONCE):
        couples = pairs[start : start + _AT_ONCE]
        ids = [(start + j, 0) for j in range(len(couples))]
        win, lose, _ = _scored(score, rated, couples, renoise, seed, ids)
        right.append(_right(win, lose))
    share = torch.cat(right).mean(0).tolist()
    return tuple(Bucket(k / buckets, (k + 1) / buckets, share[k], len(pairs)) for k in range(buckets))


_AT_ONCE = 128
"""Pairs measured at once."""


def _renoise(times: UniformTimes | LogitNormalTimes, share_noise: bool) -> Renoise:
    """The two of a pair agree in two leading parts of their ids; σ is always shared."""
    return Renoise(times, share_times=2, share_noise=2 if share_noise else None)


def _scored(
    score: Score, rated: Rated, couples: Tensor, renoise: Renoise, seed: int, ids: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of winners and losers, [P, M] each, and the σ of all, [2P, M]: winner, loser, winner …"""
    who = couples.flatten()
    sides = [(*pair, side) for pair in ids for side in (0, 1)]
    device = rated.latents.device
    x0, rows = rated.latents[who.to(device)].float(), rated.rows.to(device)[who.to(device)]
    if rated.sigma is not None:
        given = rated.sigma.float().to(device)[who.to(device)]
        scores = score(x0, given, rows).float()[:, None]
        return scores[0::2], scores[1::2], given[:, None]
    t, noise = renoise(seed, sides, _NO_GRID, rated.latents.shape[1:])
    sigma, columns = t.float().to(device), list[Tensor]()
    for m in range(sigma.shape[1]):
        level = sigma[:, m].view(-1, *[1] * (x0.dim() - 1))
        columns.append(score((1 - level) * x0 + level * noise[:, m].to(device), sigma[:, m], rows).float())
    scores = torch.stack(columns, dim=1)
    return scores[0::2], scores[1::2], sigma


def _one_each(value: Tensor, group: Tensor) -> bool:
    """Whether all members of a group have one value."""
    order = group.argsort(stable=True)
    same = group[order][1:] == group[order][:-1]
    return bool((value[order][1:][same] == value[order][:-1][same]).all())


def _right(win: Tensor, lose: Tensor) -> Tensor:
    return (win > lose).float() + 0.5 * (win == lose).float()
