"""How a sampler steps from σ to σ' = σ − Δ: one deterministic and five stochastic kinds, all Gaussian, and one of
tokens (`MixtureJump`).

All Gaussian kinds share one form. With x the state, v = ε − x0 the velocity and ε̂ = x + (1−σ)·v the noise that it
implies,

    x' = x − Δ·v − p·ε̂ + S·z,   z ~ N(0, I)

so a kind is only a std S and a pull p (what S·z adds, p takes out of the noise that was there), and

    mean = a·x + b·v   with   a = 1 − p,   b = −Δ − (1−σ)·p.

Euler–Maruyama kinds (Flow-GRPO, DanceGRPO, Flash-GRPO) discretise dx = [v + s²/(2σ)·ε̂] dt + s dw: S = s√Δ and
p = S²/(2σ). DDIM-like kinds (CPS, DDIM) keep the variance of the noise part at σ'²: p = σ' − sqrt(σ'² − S²).
S = 0 gives p = 0: exactly the Euler ODE step, to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.corruption import GAUSSIAN_PATH, Corruption, MixturePath, check_prediction
from tempflow.core.distribution import NO_LOG_PROB, Categorical, Gaussian, Transition, check_tokens
from tempflow.core.rng import NoiseKind
from tempflow.core.schedule import Schedule
from tempflow.core.state import double, to_rows, upcast

POLE = 1e-3
"""Above σ = 1 − POLE a grid is taken to start at pure noise; see :class:`FlowSDE`."""


class Dynamics(Protocol):
    """A kind of step. ``scale`` (a number or [B], finite, >= 0) multiplies its noise level, row by row."""

    @property
    def stochastic(self) -> bool:
        """Whether its steps carry noise at scale 1 (a step into σ = 0 may still be deterministic)."""
        ...

    @property
    def noise(self) -> NoiseKind:
        """What a step draws from, one number for each element of the state."""
        ...

    @property
    def corruption(self) -> Corruption:
        """The forward process that it undoes: what it starts from, and what a network predicts."""
        ...

    def spreads(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Whether the step's law has a log-probability, bool [B]: CPS and DDIM have none into σ = 0."""
        ...

    def coefficients(
        self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, s), [B] each: the next state is a·x + b·v + s·z. Raises ValueError for steps of tokens."""
        ...

    def transition(
        self, x: Tensor, prediction: Tensor, /, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> Transition:
        """The distribution of the next state."""
        ...


@runtime_checkable
class Diffusion(Dynamics, Protocol):
    """A kind that discretises an SDE, and so has a diffusion rate."""

    def rate(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """s of the SDE, [B]; the std of the step is s√Δ."""
        ...


class _Step:
    """What all Gaussian kinds share: everything follows from the std and the pull of a step."""

    @property
    def noise(self) -> NoiseKind:
        return "normal"

    @property
    def corruption(self) -> Corruption:
        return GAUSSIAN_PATH

    def _noise(self, schedule: Schedule, step: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """(S, p) of the module's docstring, [B] each."""
        raise NotImplementedError

    def coefficients(
        self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, s), [B] each: the next state is a·x + b·v + s·z with z ~ N(0, I).

        Args:
            schedule: the σ grid; its dtype is the dtype of the result.
            step: index i of each row, LongTensor[B] in [0, T−1]; the result lies on its device.
            scale: multiplies the noise level: a number or [B], finite and >= 0.

        Raises ValueError for a step or a scale out of range.
        """
        std, pull = self._noise(schedule, step, scale)
        return 1 - pull, -schedule.delta(step) - (1 - schedule.at(step)) * pull, std

    def spreads(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Whether the step has a std above 0, bool [B]; arguments and errors as for :meth:`coefficients`."""
        return self.coefficients(schedule, step, scale)[2] > 0

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> Gaussian:
        """The distribution of the next state, in float32 (float64 if x or velocity is) whatever the model's dtype.

        Args:
            x, velocity: [B, *S]; velocity is the model's v = ε − x0 at σ_i.
            schedule, step, scale: as for :meth:`coefficients`.

        Raises ValueError when shapes do not agree, or for a step or a scale out of range.
        """
        if x.shape != velocity.shape:
            raise ValueError(f"velocity: shape {tuple(velocity.shape)} must be that of x, {tuple(x.shape)}")
        a, b, std = self.coefficients(schedule, step, scale)
        x, velocity = upcast(x), upcast(velocity)
        wide = x if x.dtype == torch.float64 else velocity
        mean = to_rows(a, wide) * x + to_rows(b, wide) * velocity
        # looked at here only where that is free
        stochastic = bool((std > 0).all()) if std.device.type == "cpu" else None
        return Gaussian(mean, to_rows(std, wide).flatten(), stochastic)


@dataclass(frozen=True)
class ODE(_Step):
    """The Euler step x' = x − Δ·v; no noise, so its transitions have no log-probability."""

    @property
    def stochastic(self) -> bool:
        return False

    def _noise(self, schedule: Schedule, step: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        _level(1.0, scale, schedule.at(step), None)
        nothing = torch.zeros_like(schedule.at(step))
        return nothing, nothing


class _EulerMaruyama(_Step):
    """The kinds that differ only in the diffusion rate s(σ)."""

    def rate(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Diffusion rate s of each row, [B], in the grid's dtype; arguments and errors as for ``coefficients``."""
        raise NotImplementedError

    def _noise(self, schedule: Schedule, step: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        std = self.rate(schedule, step, scale) * schedule.delta(step).sqrt()
        return std, std.square() / (2 * schedule.at(step))


@dataclass(frozen=True)
class FlowSDE(_EulerMaruyama):
    """Flow-GRPO's SDE (arXiv 2505.05470), s = noise_level·sqrt(σ/(1−σ)); also TempFlow-, Mix- and Pref-GRPO's.

    At σ = 1 the rate has a pole. As in the official code, only the 1−σ of the rate is then replaced, by 1−σ_1; the
    rest of the step keeps σ = 1, so b = −Δ there and S_0 = noise_level on any grid. The code tests σ == 1, which grids
    that start a hair below (UniPC: .9997) slip past, with a rate some 55 times the noise level. Here the rule holds for
    σ > 1 − 10⁻³, and there takes the larger of 1−σ and 1−σ_1, so that on a fine grid the later steps that close to 1
    keep the SDE's own rate. For σ_0 = 1 the result is the papers'.

    ``noise_level`` is a, finite and >= 0: 0.7 for SD3.5, 0.9 for FLUX, 1.2 for Qwen-Image. ValueError otherwise.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        _check("noise_level", self.noise_level, None)

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def rate(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Diffusion rate s = noise_level·scale·sqrt(σ/(1−σ)) with the rule at σ = 1, [B]."""
        sigma = schedule.at(step)
        remaining = 1 - sigma
        at_first = 1 - schedule.sigmas[1].to(sigma.device)
        remaining = torch.where(remaining < POLE, torch.maximum(remaining, at_first), remaining)
        return _level(self.noise_level, scale, sigma, None) * (sigma / remaining).sqrt()


@dataclass(frozen=True)
class DanceSDE(_EulerMaruyama):
    """DanceGRPO's SDE (arXiv 2505.07818), s = eta at every σ.

    Do not pair it with a grid whose last non-zero σ is tiny: the last step multiplies deviations by about
    −eta²/(2σ_{T−1}), which is −5 on SD3.5's grid and −.27 on DanceGRPO's own.

    ``eta`` is finite and >= 0: 0.3 for FLUX, 0.25 for HunyuanVideo. ValueError otherwise.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        _check("eta", self.eta, None)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def rate(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Diffusion rate s = eta·scale, [B]."""
        return _level(self.eta, scale, schedule.at(step), None)


@dataclass(frozen=True)
class LinearSDE(_EulerMaruyama):
    """Flash-GRPO's SDE (arXiv 2605.15980), s = σ_T + (σ_1 − σ_T)·σ, where σ_1 is the grid's second entry and σ_T its
    last: σ_1·σ on a grid that ends at 0."""

    @property
    def stochastic(self) -> bool:
        return True

    def rate(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Diffusion rate s = scale·(σ_T + (σ_1 − σ_T)·σ), [B]."""
        sigma = schedule.at(step)
        level, last = _level(1.0, scale, sigma, None), schedule.sigmas[-1].to(sigma.device)
        return level * (schedule.sigmas[1].to(sigma.device) - last) * sigma + level * last


@dataclass(frozen=True)
class CPS(_Step):
    """Coefficient-preserving sampling (Flow-GRPO's CPS option), S = σ'·sin(noise_level·π/2).

    The coefficients of x̂0 and of the noise stay 1−σ' and σ', so a single point of data is sampled exactly; for
    spread-out data the noise it adds at every step changes the law of the samples, however fine the grid.
    The step into σ' = 0 is deterministic.

    ``noise_level`` lies in [0, 1] (1 replaces all the noise), and so must noise_level·scale. ValueError otherwise.
    """

    noise_level: float = 0.8

    def __post_init__(self) -> None:
        _check("noise_level", self.noise_level, 1.0)

    @property
    def stochastic(self) -> bool:
        return self.noise_level > 0

    def _noise(self, schedule: Schedule, step: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        below = schedule.after(step)
        angle = _level(self.noise_level, scale, below, 1.0) * (math.pi / 2)
        # σ' − sqrt(σ'² − S²) = σ'(1 − cos), written so that a small angle loses no digits
        return below * angle.sin(), 2 * below * (angle / 2).sin().square()


@dataclass(frozen=True)
class DDIM(_Step):
    """The DDIM family on the flow path, S = eta·σ'·sqrt(1 − σ'²(1−σ)²/(σ²(1−σ')²)).

    eta = 1 is the posterior of the Markov chain whose marginals are the path (DDPM); eta = 0 is the ODE step.
    The step into σ' = 0 is deterministic.

    ``eta`` lies in [0, 1], and so must eta·scale. ValueError otherwise.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _check("eta", self.eta, 1.0)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def _noise(self, schedule: Schedule, step: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        sigma, below = schedule.at(step), schedule.after(step)
        # 1 − r² = (1 − r)(1 + r) with r = old/new, and new − old is Δ itself: no cancellation
        new, old = sigma * (1 - below), below * (1 - sigma)
        fresh = (schedule.delta(step) * (new + old) / new.square()).clamp(max=1.0)
        share = _level(self.eta, scale, sigma, 1.0).square() * fresh
        return below * share.sqrt(), below * share / (1 + (1 - share).clamp(min=0.0).sqrt())


class TokenJump:
    """What jumps of tokens share: they draw, from uniforms, and have neither a mean nor a noise level."""

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def noise(self) -> NoiseKind:
        return "uniform"

    def spreads(self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """True, [B]: every step has a log-probability."""
        no_scale(scale)
        return torch.ones_like(schedule.after(step), dtype=torch.bool)

    def coefficients(
        self, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raises ValueError: tokens have no mean and no std."""
        raise ValueError(f"dynamics: {self} moves tokens, which have no mean and no std; nearest valid: FlowSDE()")


@dataclass(frozen=True)
class MixtureJump(TokenJump):
    """Jumps of tokens on the mixture path (`MixturePath`): with p = softmax(logits), what a network says of x0 at x,

        x' ~ (1−λ)·δ_x + λ·p,   λ = (σ−σ')/σ,   for every token by itself.

    Given x0, a token of this path jumps to it at rate 1/σ as σ falls. So it has not jumped by σ' with probability
    exp(−∫ dσ/σ) = σ'/σ = 1−λ, and the step solves Kolmogorov's equation for a fixed x0 exactly, however long it is. The
    Euler step of that rate has the same λ. (1−λ)·σ = σ' shows that it takes the path's law at σ to that at σ'.

    With the true posterior p(x0 | x) the law of each token stays that of the path, exactly, as long as the joint law of
    x is. Tokens jump by themselves, by the posterior of each and not by that of all: of several tokens that depend on
    each other the joint law is off by what a step's length makes of it, as with every sampler of this kind, and goes to
    the data's with shorter steps. The last step, into σ' = 0, has λ = 1 and draws all tokens from p.

    The law is a `Categorical` of the whole kernel, staying included; a token that stays has its log-prob too. Steps
    have no noise level, so every scale must be 1.

    vocabulary  V: tokens are 0 … V−1

    Raises ValueError for V below 2.
    """

    vocabulary: int

    def __post_init__(self) -> None:
        MixturePath(self.vocabulary)

    @property
    def corruption(self) -> MixturePath:
        return MixturePath(self.vocabulary)

    def transition(
        self, x: Tensor, logits: Tensor, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> Categorical:
        """The law of the next tokens, in float32 (float64 if the logits are).

        Args:
            x: LongTensor [B, *S]; logits: [B, *S, V], of the clean tokens at σ_i.
            schedule, step: as for the other kinds. scale: 1.

        Raises ValueError when shapes do not agree, for tokens outside the vocabulary (where looking is free, on the
        CPU), a step out of range or another scale.
        """
        no_scale(scale)
        check_tokens("x", x, tuple(x.shape), self.vocabulary)
        check_prediction(logits, x, self.corruption, "logits")
        logits = upcast(logits)
        sigma, below = double(schedule.at(step)), double(schedule.after(step))
        # Only the logit of x itself moves, from l to log(e^l + Z·(1−λ)/λ). Into σ' = 0 it stays as it is.
        own = logits.gather(-1, x[..., None])[..., 0]
        odds = to_rows((below / (sigma - below)).log(), own)
        kept = torch.where(odds == -math.inf, own, _log_sum(own, logits.logsumexp(-1) + odds))
        return Categorical(logits.scatter(-1, x[..., None], kept[..., None]))


@dataclass(frozen=True)
class ModelJump(TokenJump):
    """The jumps of whatever model is drawn from, which moves tokens: they stand in an algorithm for these until the
    model is there. Only the kind of its states is known, so a step raises ValueError."""

    @property
    def corruption(self) -> MixturePath:
        """A path of tokens; which one, and of how many codes, the model says."""
        return MixturePath(2)

    def transition(
        self, x: Tensor, logits: Tensor, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0
    ) -> Categorical:
        """Raises ValueError: there is no model yet."""
        raise ValueError("dynamics: no model has said how its tokens jump; nearest valid: MixtureJump(vocabulary)")


def no_scale(scale: float | Tensor) -> None:
    """Raises ValueError for a scale other than 1, which jumps of tokens have not."""
    if isinstance(scale, Tensor):
        if scale.device.type != "cpu" or bool((scale == 1).all()):
            return
        scale = float(scale[scale != 1][0])
    if scale != 1:
        raise ValueError(f"scale: {scale}, but jumps of tokens have no noise level; nearest valid: 1")


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b). Where a is −∞ it is b, and the gradient by a is 0."""
    never = a == -math.inf
    return torch.where(never, b, torch.logaddexp(a.masked_fill(never, 0.0), b))


def gradient_scale(dynamics: Dynamics, schedule: Schedule, step: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """|b|/s of each row, [B]: the size of ∂log p/∂v per unit of noise (log p summed over elements).

    It is the λ(t) of Flash-GRPO; for FlowSDE it is (1 + a²/2)/a · sqrt(Δ(1−σ)/σ) at σ < 1, TempFlow-GRPO's theorem.

    Raises ValueError when a row's step is deterministic, and whatever ``coefficients`` raises.
    """
    _, b, std = dynamics.coefficients(schedule, step, scale)
    if not bool((std > 0).all()):
        raise ValueError(f"step: {int(step[std.argmin()])} has no noise here; {NO_LOG_PROB}")
    return b.abs() / std


def _level(base: float, scale: float | Tensor, like: Tensor, top: float | None) -> Tensor:
    """base·scale of each row, [B], checked to lie in [0, top]."""
    rows = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if rows.dim() > 1 or (rows.dim() == 1 and rows.shape != like.shape):
        raise ValueError(f"scale: shape {tuple(rows.shape)} must be () or {tuple(like.shape)}")
    level = base * rows
    if not bool((torch.isfinite(rows) & (rows >= 0)).all()):
        raise ValueError(f"scale: {scale} must be finite and >= 0; the nearest valid value is 0")
    if top is not None and not bool((level <= top).all()):
        raise ValueError(
            f"scale: {float(rows.max())} times {base} exceeds {top}; the nearest valid value is {top / base}"
        )
    return level.expand(like.shape)


def _check(name: str, value: float, top: float | None) -> None:
    """Raise unless value lies in [0, top]."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: {value} must be finite and >= 0; the nearest valid value is 0")
    if top is not None and value > top:
        raise ValueError(f"{name}: {value} must be at most {top}; the nearest valid value is {top}")
