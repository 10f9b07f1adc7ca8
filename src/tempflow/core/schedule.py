"""Noise grids σ_0 > σ_1 > … > σ_T ≥ 0 of flow-matching samplers (σ = 1 is noise, σ = 0 is data)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.state import upcast

USEFUL = 0.02
"""A step that starts at a lower σ than this changes hardly anything, and costs a forward all the same."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The σ grid that a sampler walks; step i goes from σ_i to σ_{i+1}.

    ``sigmas`` has T+1 entries, float32 or float64: strictly decreasing, the first in (0, 1], the last ≥ 0. Leaves are
    what the last step reaches; the samplers of flow models reach 0, DDIM of variance-preserving models may end above.
    ``spread`` is the standard deviation of the states at σ_0 that a sampler starts from: 1 for flow models, and
    √((1−σ_0)² + σ_0²) where data of unit variance make it so (`core.prediction`). ``gain`` is what a leaf is multiplied
    by to be a sample: 1 where leaves are samples, 1/√((1−σ_T)² + σ_T²) in those models.

    Raises ValueError when ``sigmas`` breaks one of these rules, or spread or gain is not finite and above 0.
    """

    sigmas: Tensor
    spread: float = 1.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        sigmas = self.sigmas
        if sigmas.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"sigmas: dtype {sigmas.dtype} cannot hold a grid; use torch.float32 or torch.float64")
        if sigmas.dim() != 1 or sigmas.numel() < 2:
            raise ValueError(f"sigmas: shape {tuple(sigmas.shape)} is not [T+1]; the smallest grid is (1, 0)")
        values = [float(value) for value in sigmas.cpu()]
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"sigmas: {values} has entries that are not finite; use numbers in [0, 1]")
        if values[0] > 1.0:
            raise ValueError(f"sigmas[0]: {values[0]} is above pure noise; the nearest valid value is 1.0")
        if values[-1] < 0.0:
            raise ValueError(f"sigmas[-1]: {values[-1]} is below data; the nearest valid value is 0.0")
        positive("spread", self.spread, 1.0)
        positive("gain", self.gain, 1.0)
        for i, (here, below) in enumerate(pairwise(values)):
            if not below < here:
                raise ValueError(f"sigmas[{i + 1}]: {below} is not below sigmas[{i}] = {here}; the grid must decrease")

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return self.sigmas.numel() - 1

    @property
    def useful(self) -> int:
        """How many steps start at σ ≥ `USEFUL`: T on the grids of few-step students. SD3's own grid of N steps has
        N − 1 of them, as its last one starts at σ = .0089."""
        return int((self.sigmas[:-1] >= USEFUL).sum())

    def at(self, step: Tensor) -> Tensor:
        """σ_step, in the grid's dtype, on the device of ``step``.

        ``step`` is an integer tensor (int32, int64) with values in [0, T]. Raises ValueError for another dtype and,
        where looking at the values is free (on the CPU), for a value out of range.
        """
        return self._look_up(step, 0)

    def after(self, step: Tensor) -> Tensor:
        """σ_{step+1}, for ``step`` in [0, T-1]; otherwise as :meth:`at`."""
        return self._look_up(step, 1)

    def delta(self, step: Tensor) -> Tensor:
        """Δ_step = σ_step − σ_{step+1} > 0, for ``step`` in [0, T-1]; otherwise as :meth:`at`."""
        return self.at(step) - self.after(step)

    def double(self) -> Schedule:
        """The same grid in float64."""
        return replace(self, sigmas=self.sigmas.double())

    def start(self, noise: Tensor) -> Tensor:
        """The states that a sampler starts from, of standard normals: the noise itself where the spread is 1."""
        return noise if self.spread == 1.0 else upcast(noise) * self.spread

    def samples(self, leaves: Tensor) -> Tensor:
        """The samples that leaves are: what an autoencoder decodes, and what is noised anew."""
        return leaves if self.gain == 1.0 else upcast(leaves) * self.gain

    def within(self, t: Tensor) -> Tensor:
        """Times brought into the grid's range [σ_T, σ_0]: what lies outside, a model of such a grid has not learned."""
        return t.clamp(float(self.sigmas[-1]), float(self.sigmas[0]))

    def _look_up(self, step: Tensor, offset: int) -> Tensor:
        if step.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"step: dtype {step.dtype} cannot index a grid; use torch.int64")
        if step.device.type == "cpu" and step.numel() > 0:
            last = self.steps - offset
            low, high = int(step.min()), int(step.max())
            if low < 0 or high > last:
                bad, nearest = (low, 0) if low < 0 else (high, last)
                raise ValueError(f"step: {bad} is outside [0, {last}]; the nearest valid value is {nearest}")
        return self.sigmas.to(step.device)[step + offset]


def shifted(steps: int, shift: float = 3.0, train_timesteps: int = 1000) -> Schedule:
    """The grid of SD3 / SD3.5, bit for bit that of diffusers' ``FlowMatchEulerDiscreteScheduler(shift=shift)``.

    u runs evenly from 1 down to σ_min (the smallest σ of the shifted training grid, .00299 for shift 3), is shifted
    by u -> shift·u / (1 + (shift−1)·u), and a final 0 is appended. The shift acts twice on σ_min, as it does there.
    Where rounding takes diffusers' σ_0 above 1 (by some 10⁻⁷, at shifts such as 0.2), it is 1 here.

    Raises ValueError unless steps >= 1, shift > 0 and train_timesteps >= 1.
    """
    _check_count("steps", steps)
    _check_count("train_timesteps", train_timesteps)
    positive("shift", shift, 1.0)
    # float32 here and float64 below, in diffusers' order of operations: that is what makes the bits agree
    trained = torch.tensor([train_timesteps, 1], dtype=torch.float32, device="cpu") / train_timesteps
    noisiest, cleanest = shift * trained / (1 + (shift - 1) * trained)
    u = _even(float(noisiest) * train_timesteps, float(cleanest) * train_timesteps, steps) / train_timesteps
    return _closed(shift * u / (1 + (shift - 1) * u))


def token_shifted(
    steps: int,
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Schedule:
    """The grid of FLUX.1 (and, with other constants, of its relatives): a shift that grows with the picture.

    u runs evenly from 1 to 1/T; σ = e^μ / (e^μ + 1/u − 1), with μ on the straight line through
    (base_tokens, base_shift) and (max_tokens, max_shift), read off at ``tokens`` (the length of the latent sequence,
    4096 for 1024²) and, as in diffusers, not clamped beyond its ends. Equals diffusers' ``FluxPipeline`` bit for bit.

    Raises ValueError unless steps >= 1, tokens >= 1 and max_tokens > base_tokens >= 1.
    """
    for name, value in (("steps", steps), ("tokens", tokens), ("base_tokens", base_tokens)):
        _check_count(name, value)
    if max_tokens <= base_tokens:
        raise ValueError(
            f"max_tokens: {max_tokens} is not above base_tokens = {base_tokens}; "
            f"the nearest valid value is {base_tokens + 1}"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = tokens * slope + (base_shift - slope * base_tokens)
    if not math.isfinite(mu):
        raise ValueError(f"base_shift, max_shift: {base_shift}, {max_shift} give no shift; nearest valid: 0.5, 1.15")
    u = _even(1.0, 1.0 / steps, steps).float()
    strength = torch.tensor(math.exp(mu), dtype=torch.float32, device="cpu")
    return _closed(strength / (strength + (1 / u - 1)))


def linear(steps: int, shift: float = 1.0) -> Schedule:
    """The grid of the FastVideo-derived codes (DanceGRPO, MixGRPO, BranchGRPO, GCPO, Pref-GRPO).

    u runs evenly from 1 to 0 in T steps, then σ = shift·u / (1 + (shift−1)·u); they use shift 3 for images and 5 for
    video. Its last non-zero σ is shift / (T + shift − 1), much larger than in :func:`shifted`.

    Raises ValueError unless steps >= 1 and shift > 0.
    """
    _check_count("steps", steps)
    positive("shift", shift, 1.0)
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0] = 1.0  # as it is without rounding
    return Schedule(sigmas)


def explicit(u: Sequence[float], shift: float = 1.0) -> Schedule:
    """The grid through given points, as few-step students are trained on: (1, .75, .5, .25) with shift 3 is
    σ = 1, .9, .75, .5, 0, four useful steps.

    Each u becomes σ = shift·u / (1 + (shift−1)·u), and a final 0 is appended, bit for bit as diffusers'
    ``FlowMatchEulerDiscreteScheduler(shift=shift)`` does by ``set_timesteps(sigmas=u)``. Where rounding takes its σ_0
    above 1, it is 1 here.

    Raises ValueError unless 1 ≥ u_0 > u_1 > … > 0, with one point at least, and shift > 0.
    """
    positive("shift", shift, 1.0)
    if not u:
        raise ValueError("u: () has no point; the smallest grid is (1,)")
    for i, value in enumerate(u):
        high = 1.0 if i == 0 else u[i - 1]
        if not (0 < value < high or (i == 0 and value == 1)):
            below = "at most 1" if i == 0 else f"below {high}"
            raise ValueError(f"u[{i}]: {value} must be above 0, as a final 0 is appended, and {below}")
    points = torch.tensor(list(u), dtype=torch.float32, device="cpu")
    return _closed(shift * points / (1 + (shift - 1) * points))


def refined(schedule: Schedule, parts: int, shift: float = 1.0) -> Schedule:
    """The same grid with every step cut into `parts`: node i of `schedule` is node i·parts, to the last bit.

    New nodes lie evenly between the old ones before `shift` (σ = shift·u / (1 + (shift−1)·u)). A teacher walks such a
    grid and meets its student at the student's own nodes. Raises ValueError unless parts >= 1 and shift > 0.
    """
    _check_count("parts", parts)
    positive("shift", shift, 1.0)
    sigmas = schedule.sigmas.double()
    u = sigmas / (shift - (shift - 1) * sigmas)
    share = torch.arange(parts, dtype=torch.float64, device=u.device) / parts
    fine = (u[:-1, None] + share * u.diff()[:, None]).flatten()
    whole = torch.cat([shift * fine / (1 + (shift - 1) * fine), sigmas[-1:]]).to(schedule.sigmas)
    whole[::parts] = schedule.sigmas
    return replace(schedule, sigmas=whole)


def _even(first: float, last: float, count: int) -> Tensor:
    """``count`` evenly spaced float64 values, rounded as numpy.linspace rounds them."""
    if count == 1:
        return torch.tensor([first], dtype=torch.float64, device="cpu")
    values = torch.arange(count, dtype=torch.float64, device="cpu") * ((last - first) / (count - 1)) + first
    values[-1] = last
    return values


def _closed(sigmas: Tensor) -> Schedule:
    """The float32 grid that ends with an appended 0."""
    return Schedule(torch.cat([sigmas.float().clamp(max=1), torch.zeros(1, device="cpu")]))


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {value} is too small; the nearest valid value is 1")
