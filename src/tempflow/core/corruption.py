"""Forward processes: what a sampler starts from, and how clean samples are noised anew.

A corruption takes x0 at t = 0 to noise at t = 1. It says what kind of noise it wants, what a network predicts of its
states, and so whether states are real numbers or tokens. Everything that moves a state asks it or a dynamics, and does
no arithmetic on states of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tempflow.core import likelihood_proxy
from tempflow.core.distribution import Categorical, check_tokens
from tempflow.core.rng import NoiseKind
from tempflow.core.schedule import Schedule
from tempflow.core.state import Reduce, double, mean_dims, to_rows

Prediction = Literal["velocity", "logits"]
"""What a network says of a state [B, *S]: a velocity [B, *S], or the clean token's logits [B, *S, V]."""


class Corruption(Protocol):
    """A forward process."""

    @property
    def noise(self) -> NoiseKind:
        """What `start` and `corrupt` draw from, one number for each element of the state."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What a network predicts. With "logits" states are tokens, int64, and are stored so."""
        ...

    def predicted(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the prediction for states of that shape, [B, *S]."""
        ...

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """The states that a sampler starts from, [B, *S], of noise of that shape on the CPU."""
        ...

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, [B, *S]; x0 and noise [B, *S], t [B] in (0, 1]. Raises ValueError where these do not fit."""
        ...


@dataclass(frozen=True)
class GaussianPath:
    """x_t = (1−t)·x0 + t·ε with ε ~ N(0, I), the linear path of rectified flow; a network predicts v = ε − x0."""

    @property
    def noise(self) -> NoiseKind:
        return "normal"

    @property
    def prediction(self) -> Prediction:
        return "velocity"

    def predicted(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of the states."""
        return tuple(shape)

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """The noise at the schedule's spread."""
        return schedule.start(noise)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(1−t)·x0 + t·ε, in at least float32."""
        return likelihood_proxy.corrupt(x0, noise, t)


@dataclass(frozen=True)
class MixturePath:
    """Uniform discrete diffusion: every token of x0 stays with probability 1−t, else it is drawn from all V alike.

    The mixture path of discrete flow matching (arXiv 2407.15595) with a uniform source; D3PM's uniform kernel with
    ᾱ = 1−t. A token that is drawn anew may come out as it was. Networks predict logits [B, *S, V] of x0's tokens.

    vocabulary  V, at least 2: tokens are 0 … V−1

    Raises ValueError for another.
    """

    vocabulary: int

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary: {self.vocabulary} is too small; nearest valid: 2")

    @property
    def noise(self) -> NoiseKind:
        return "uniform"

    @property
    def prediction(self) -> Prediction:
        return "logits"

    def predicted(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[B, *S, V]."""
        return (*shape, self.vocabulary)

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """Uniform tokens, LongTensor [B, *S], of uniforms in (0, 1)."""
        return self._spread(double(noise)).to(noise.device)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, LongTensor [B, *S]. One uniform u a token tells both: it is drawn anew where u < t, and then u/t is
        uniform. So with one noise, what is drawn anew at some t is so at all larger ones.

        Raises ValueError where shapes do not fit, or for what are no tokens of the vocabulary.
        """
        check_tokens("x0", x0, tuple(noise.shape), self.vocabulary)
        u = double(noise)
        s = to_rows(t, u)
        return torch.where((u < s) | (s >= 1), self._spread(u / s), x0.to(u.device)).to(x0.device)

    def _spread(self, u: Tensor) -> Tensor:
        """Tokens of uniforms; those beyond 1 give the last."""
        return (u * self.vocabulary).long().clamp(max=self.vocabulary - 1)


@dataclass(frozen=True)
class TokenLikelihood:
    """Mean over tokens of log softmax(logits)[x0], in at least float32: minus the cross-entropy of the clean tokens.

    Averaged over t it is the discrete twin of the evidence lower bound. UDM-GRPO's log-prob of the clean response
    (certain: read in code): the mean is over all tokens that the layout counts, whether the corruption drew them anew
    or not, which a model of uniform corruption is not told. Raises ValueError where x0 are no tokens of the logits.
    """

    reads = "logits"

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        return mean(Categorical(velocity).log_density(x0))


GAUSSIAN_PATH = GaussianPath()


def check_velocity(corruption: Corruption, asked_by: str, nearest: str) -> None:
    """Raises ValueError, naming who asks and what serves tokens, unless networks predict velocities."""
    if corruption.prediction != "velocity":
        raise ValueError(
            f"{asked_by}: needs a velocity, and of {corruption} a network predicts {corruption.prediction}; "
            f"nearest valid: {nearest}"
        )


def check_prediction(prediction: Tensor, x: Tensor, corruption: Corruption, said_by: str) -> None:
    """Raises ValueError, naming who said it, where a prediction has not the shape that states x [B, *S] have it of."""
    wanted = corruption.predicted(x.shape)
    if prediction.shape != wanted:
        raise ValueError(
            f"{said_by}: predicts {corruption.prediction} {list(prediction.shape)} where the states are "
            f"{list(x.shape)}; nearest valid: {list(wanted)}"
        )
