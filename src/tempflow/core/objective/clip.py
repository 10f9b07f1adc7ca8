"""What becomes of a policy ratio r and an advantage A: clipped, truncated, gated softly, or left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.checks import positive


@dataclass(frozen=True, eq=False)
class Clipped:
    """`loss`, gradients through the log ratio; `blocked`: where it has none; `outside`: where r is beyond its range."""

    loss: Tensor
    blocked: Tensor
    outside: Tensor


class ClipRule(Protocol):
    """log r and A, of one shape [B, …], to a loss of that shape."""

    @property
    def tightest(self) -> float:
        """The narrowest side of the range in which a ratio is free."""
        ...

    @property
    def keeps_mean(self) -> bool:
        """Whether it reads the columns "mean_gap", mean (μ − μ_old)² of an edge's step, and "std", S; [B] each."""
        ...

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped: ...


@dataclass(frozen=True)
class Clip:
    """PPO: max(−A·r, −A·clip(r, 1−low, 1+high)). `high` above `low` is DAPO's clip-higher.

    `sensitivity` η bends the range by an edge's standing u in [−1, 1], the column "standing": low·(1 − η·u) and
    high·(1 + η·u), so that good paths have more room upward and less downward (Dynamic-TreeRPO's idea; this form is
    our reading; where u has the advantage's sign, the side that binds is always the wider one). log r is never clamped
    before it. Raises ValueError for a bound that is not finite and positive, low not below 1, or η outside [0, 1).
    """

    low: float = 1e-4
    high: float = 1e-4
    sensitivity: float = 0.0
    keeps_mean = False

    def __post_init__(self) -> None:
        positive("clip_low", self.low, "1e-4, or 1e-2 for tiny latents,")
        positive("clip_high", self.high, "1e-4, or 1e-2 for tiny latents,")
        if self.low >= 1:
            raise ValueError(f"clip_low: {self.low} must be below 1; 1e-4 is usual")
        if not 0 <= self.sensitivity < 1:
            raise ValueError(f"sensitivity: {self.sensitivity} must be in [0, 1); 0 is a fixed clip")

    @property
    def tightest(self) -> float:
        return min(self.low, self.high) * (1 - self.sensitivity)

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped:
        ratio = log_ratio.exp()
        low, high = torch.full_like(ratio, self.low), torch.full_like(ratio, self.high)
        if self.sensitivity > 0:
            if "standing" not in columns:
                raise ValueError("columns: 'standing' is missing, which sensitivity > 0 reads; give it by the credit")
            bend = self.sensitivity * columns["standing"].to(ratio)
            low, high = low * (1 - bend), high * (1 + bend)
        clipped = torch.minimum(torch.maximum(ratio, 1 - low), 1 + high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        with torch.no_grad():
            return Clipped(loss, (loss > -advantage * ratio).float(), (ratio != clipped).float())


@dataclass(frozen=True)
class Truncate:
    """CISPO (MiniMax-M1, arXiv 2506.13585): −sg[clip(r, 1−low, 1+high)]·A·log r.

    The importance weight is truncated instead of the gradient, so no edge ever drops out. Here r is the D-th root of
    the density ratio, so bounds are of the size of PPO's. low 1 leaves the weight unbounded below, as published.
    Raises ValueError for a bound that is not finite and positive, or low above 1.
    """

    low: float = 1.0
    high: float = 1e-4
    keeps_mean = False

    def __post_init__(self) -> None:
        positive("clip_low", self.low, "1e-4")
        positive("clip_high", self.high, "1e-4")
        if self.low > 1:
            raise ValueError(f"clip_low: {self.low} must be at most 1, which is no bound")

    @property
    def tightest(self) -> float:
        return min(self.low, self.high)

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped:
        with torch.no_grad():
            ratio = log_ratio.exp()
            weight = ratio.clamp(1 - self.low, 1 + self.high)
        loss = -weight * advantage * log_ratio
        return Clipped(loss, torch.zeros_like(weight), (ratio != weight).float())


@dataclass(frozen=True)
class SoftGate:
    """SAPO (arXiv 2511.20347): −A·f(r), f(r) = 4/τ · sigmoid(τ·(r − 1)), τ = `positive` where A > 0, else `negative`.

    f'(1) = 1, as for a plain ratio, and falls off smoothly: the soft counterpart of a clip of about 1/τ. Published τ
    are 1 and 1.05 for tokens; r here is the D-th root of the ratio, so τ is larger by the same factor as clips are
    smaller (1/clip). Second-hand. Raises ValueError for a τ that is not finite and positive.
    """

    positive: float = 1e4
    negative: float = 1.05e4
    keeps_mean = False

    def __post_init__(self) -> None:
        positive("positive", self.positive, "1 / the clip")
        positive("negative", self.negative, "1 / the clip")

    @property
    def tightest(self) -> float:
        return 1 / max(self.positive, self.negative)

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped:
        excess = log_ratio.expm1()
        tau = torch.where(advantage > 0, advantage.new_tensor(self.positive), advantage.new_tensor(self.negative))
        loss = -advantage * 4 / tau * torch.sigmoid(tau * excess)
        nothing = torch.zeros_like(loss, requires_grad=False)
        return Clipped(loss, nothing, (excess.detach().abs() * tau > 1).float())


@dataclass(frozen=True)
class Score:
    """The plain score function, −A·log r: REINFORCE, and DDPO's one-update form. Nothing bounds the step.

    Its value is 0 where the policy has not moved; its gradient is −A·∇log p.
    """

    tightest = 1e-2
    keeps_mean = False

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped:
        nothing = torch.zeros_like(log_ratio, requires_grad=False)
        return Clipped(-advantage * log_ratio, nothing, nothing)


@dataclass(frozen=True)
class DivergenceMask:
    """Flow-DPPO (arXiv 2606.11025): −A·r, but 0 for an edge that is far and goes on: κ ≥ `threshold`, A·(r − 1) > 0.

    κ = mean (μ − μ_old)²/(2S²) is the KL of the step's two Gaussians, a mean over latent elements, with S = 1 unless
    `scaled`. An edge that comes back, whose ratio is on the other side of 1, always has its gradient, however far it
    is. Read in UniRL's FlowDPPO, sure: δ 1e-5, scaled. Raises ValueError for a threshold that is not finite and
    positive.
    """

    threshold: float = 1e-5
    scaled: bool = True
    keeps_mean = True

    def __post_init__(self) -> None:
        positive("threshold", self.threshold, "1e-5")

    @property
    def tightest(self) -> float:
        return self.threshold

    def __call__(self, log_ratio: Tensor, advantage: Tensor, columns: Mapping[str, Tensor]) -> Clipped:
        loss = -advantage * log_ratio.exp()
        with torch.no_grad():
            divergence = columns["mean_gap"].to(log_ratio) / 2
            if self.scaled:
                divergence = divergence / columns["std"].to(log_ratio).square()
            far = divergence >= self.threshold
            blocked = far & (advantage * log_ratio > 0)  # log r has the sign of r − 1
        return Clipped(torch.where(blocked, 0.0, loss), blocked.float(), far.float())
