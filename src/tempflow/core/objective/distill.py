"""Two losses from starting noises that make a few-step student: a score of its own samples, and matching by it.

Both walk the student themselves (`core.unroll`) by backward simulation (DMD2, arXiv 2405.14867): from noise along the
student's own states to a node drawn for each row, where x = x̂0 is the sample. Who learns bears gradients, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.cost import Cost, rows_of
from tempflow.core.distill import matching_gradient, surrogate, velocity_error
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.likelihood_proxy import corrupt, target_velocity, x0_of_velocity
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise
from tempflow.core.state import WHOLE, StateLayout, upcast
from tempflow.core.times import Times, UniformTimes
from tempflow.core.unroll import Unrolled, stop_nodes, unroll

Anchor = Literal["clean", "noisy", "none"]

NONE: Mapping[str, float] = MappingProxyType({})
"""No network has a guidance of its own."""


@dataclass(frozen=True)
class OwnSamples:
    """How a student is walked to a sample.

    stop          "random": to a node of 0 … T − 1 drawn for each row, and x̂0 there; "end": to the last σ
    dynamics      how it steps. A stochastic one draws a noise for each row and step
    checkpointed  keep no activations of a prediction that bears gradients, and compute it again in the backward

    Raises ValueError for an unknown stop.
    """

    stop: Literal["random", "end"] = "random"
    dynamics: Dynamics = field(default_factory=ODE)
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if self.stop not in ("random", "end"):
            raise ValueError(f"stop: {self.stop!r} is not one of random, end; nearest valid: 'random'")

    def __call__(self, predict: Predict, batch: NoiseBatch, last: int | None) -> Tensor:
        """x, [B, *S], in at least float32, with gradients through the last so many predictions (None: all)."""
        return self.walk(predict, batch, last).x0()

    def walk(self, predict: Predict, batch: NoiseBatch, last: int | None) -> Unrolled:
        """The same with the states on the way. The last visit is all rows', each where its x̂0 is the sample."""
        stop = stop_nodes(batch.seed, batch.ids, batch.schedule.steps) if self.stop == "random" else None
        return unroll(
            batch.x,
            batch.schedule,
            predict,
            batch.rows,
            dynamics=self.dynamics,
            noise=Noise(batch.seed),
            ids=batch.ids,
            stop=stop,
            last=last,
            checkpointed=self.checkpointed,
            layout=batch.layout,
        )


@dataclass(frozen=True)
class FlowMatching:
    """mean (v_fake(x_t) − (ε − sg x))² on the student's own samples x: how the fake score follows it.

    times    of which the first is taken, of each row
    learner  the role that learns, by its name among the models
    student  whose samples they are

    RTDMD draws logit-normal times here; DMD2 and DP-DMD those of `DistributionMatching`.
    """

    times: Times = field(default_factory=UniformTimes)
    samples: OwnSamples = OwnSamples()
    learner: str = "fake"
    student: str = "policy"

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return (self.student, self.learner)

    guidance = NONE

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most."""
        return Cost(steps, 0, 1)

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through the learner only."""
        check_models(models, self.weight_sets)
        x = self.samples(models[self.student], batch, last=0)
        at, noise, t = noised(x, batch, self.times, "fake")
        velocity = asked(models, self.learner, at, t, batch.rows, batch.layout)
        error = velocity_error(velocity, target_velocity(x, noise), batch.layout)
        return Loss(error.mean(), {"error": error.detach()})


@dataclass(frozen=True)
class DistributionMatching:
    """½·mean (x − sg[x − g])² with g of `core.distill.matching_gradient`: DMD's step for the student.

    times    of which the first is taken, of each row; U[.02, .98] in DMD2 and RTDMD
    anchor   what the normaliser measures x̂_real from: "clean" the student's x (DMD, DMD2), "noisy" x_t (DP-DMD's code)
    last     through how many of the student's last predictions gradients flow; 1 in DMD2, None: all
    teacher  the model of the data; `fake` the model of the student's samples
    strength the teacher's guidance; None: the run's
    weight   what the loss is multiplied by, where other phases of the policy share its optimizer

    Raises ValueError for an unknown anchor or `last` below 1.
    """

    times: Times = field(default_factory=lambda: UniformTimes(low=0.02, high=0.98))
    samples: OwnSamples = OwnSamples()
    anchor: Anchor = "clean"
    last: int | None = 1
    teacher: str = "reference"
    fake: str = "fake"
    strength: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("weight", self.weight, 1.0)
        if self.anchor not in get_args(Anchor):
            raise ValueError(f"anchor: {self.anchor!r} is not one of {', '.join(get_args(Anchor))}")
        if self.last is not None and self.last < 1:
            raise ValueError(f"last: {self.last} predictions teach nothing; nearest valid: 1")

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return ("policy", self.teacher, self.fake)

    @property
    def guidance(self) -> Mapping[str, float]:
        return NONE if self.strength is None else {self.teacher: self.strength}

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most."""
        through = steps if self.last is None else min(self.last, steps)
        asked, alone = (1, 0) if self.strength is None else (0, rows_of(self.strength))
        return Cost(steps - through + 1 + asked, 0, through, alone)

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        check_models(models, self.weight_sets)
        matched, metrics = self.matched(models, self.samples(models["policy"], batch, self.last), batch)
        return Loss(matched.mean(), metrics)

    def matched(self, models: Mapping[str, Predict], x: Tensor, batch: NoiseBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of samples x [B, *S] that the batch's noises were walked to, [B], and its metrics."""
        with torch.no_grad():
            at, _, t = noised(x, batch, self.times, "matching")
            real, fake = (
                x0_of_velocity(at, asked(models, name, at, t, batch.rows, batch.layout), t)
                for name in (self.teacher, self.fake)
            )
            anchor = {"clean": x, "noisy": at, "none": None}[self.anchor]
            gradient = matching_gradient(fake, real, anchor, batch.layout)
            metrics = {
                "gradient": batch.layout.mean(gradient.square()).sqrt(),
                "gap": batch.layout.mean((fake - real).square()).sqrt(),
            }
        return self.weight * surrogate(x, gradient, batch.layout), metrics


def noised(x: Tensor, batch: NoiseBatch, times: Times, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x_t with its noise [B, *S] and time [B], both functions of the rows' ids; held elements are clean."""
    x = x.detach()
    drawn = times(Stream(batch.seed, f"{name}.times"), batch.ids, batch.schedule)[:, 0]
    t = batch.schedule.within(drawn).to(x)
    noise = Stream(batch.seed, f"{name}.noise").normal(batch.ids, x.shape[1:]).to(x)
    return batch.layout.hold(corrupt(x, noise, t)), noise, t


def asked(
    models: Mapping[str, Predict], name: str, x: Tensor, t: Tensor, rows: Tensor, layout: StateLayout = WHOLE
) -> Tensor:
    """That network's velocity at the states x at times t, in at least float32, 0 at held elements. Raises ValueError
    where it has another shape than x."""
    velocity = upcast(models[name](x, t, rows))
    if velocity.shape != x.shape:
        raise ValueError(f"{name}: predicts {list(velocity.shape)} where the states are {list(x.shape)}")
    return layout.silence(velocity)


def check_models(models: Mapping[str, Predict], names: tuple[str, ...]) -> None:
    """Raises ValueError, naming the first that is missing."""
    missing = [name for name in names if name not in models]
    if missing:
        raise ValueError(f"models: {missing[0]!r} is missing; the objective asks for {', '.join(names)}")
