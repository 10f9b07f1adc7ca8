"""Stochastic edges as a loss sees them: what was sampled, and how the policy sees it now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.corruption import Prediction, check_prediction, check_velocity
from tempflow.core.distribution import Gaussian, Transition, gaussian
from tempflow.core.dynamics import Dynamics
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, StateLayout, to_rows

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Peers:
    """For every edge of a batch another one of its prompt and step: its parent state and the mean it was drawn from."""

    x: Tensor
    mean: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class EdgeBatch:
    """Some edges of a forest, ready to be replayed. x, y: parent and child states [B, *S] as stored; the rest [B].

    log_prob  of y by the policy that drew it: what the ratio compares with
    mean      [B, *S], the mean of that policy's step; None unless the objective reads it
    unit      LongTensor[B], equal for edges that share a chunk; None: every edge is its own
    columns   what credit says of each edge beside its advantage, [B, …] by name
    peers     other edges that credit points to; None: it points to none
    layout    of the B states: which elements count, and in which streams

    Where `advantage` is by stream, [B, K], so is log_prob, each stream has a ratio of its own and the loss is their
    weighted mean; `weight` may then be [B, K] too.
    """

    x: Tensor
    y: Tensor
    step: Tensor
    scale: Tensor
    rows: Tensor
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    schedule: Schedule
    dynamics: Dynamics
    mean: Tensor | None = None
    unit: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    peers: Peers | None = None
    layout: StateLayout = WHOLE

    def transition(self, prediction: Tensor) -> Transition:
        """The distribution of y by that velocity at x, [B, *S] (of tokens: logits [B, *S, V]); what it says of held
        elements is not read."""
        heard = self.layout.silence(prediction)
        law = self.dynamics.transition(self.x, heard, self.schedule, self.step, self.scale)
        return law.counted_by(self.layout)

    @property
    def predicts(self) -> Prediction:
        """What weight sets are asked for."""
        return self.dynamics.corruption.prediction

    @property
    def by_stream(self) -> bool:
        """Whether every stream has an advantage of its own."""
        return self.advantage.dim() == 2

    def reduced(self, t: Tensor) -> Tensor:
        """[B, *S] -> [B], or [B, K] by stream."""
        return self.layout.by_stream(t) if self.by_stream else self.layout.mean(t)

    def log_prob_of(self, law: Transition) -> Tensor:
        """log p(y), [B], or [B, K] by stream."""
        return law.log_probs(self.y) if self.by_stream else law.log_prob(self.y)

    def y_of(self, law: Transition) -> Tensor:
        """y in the dtype of the law's own ends; tokens as they are."""
        return self.y.to(law.mean) if isinstance(law, Gaussian) else self.y

    def merged(self, values: Tensor) -> Tensor:
        """[B, K] by stream -> [B], their mean over streams; others as they are."""
        return self.layout.over_streams(values) if self.by_stream else values

    def column(self, name: str) -> Tensor:
        """Raises ValueError where credit gave no such column."""
        if name not in self.columns:
            raise ValueError(f"columns: {name!r} is missing, which the objective reads; give it by the credit")
        return self.columns[name]

    def drawn_from(self) -> Tensor:
        """`mean`. Raises ValueError where it was not kept."""
        if self.mean is None:
            raise ValueError("mean: was not kept, and this objective needs it; say so by keeps_mean = True")
        return self.mean


@dataclass(frozen=True, eq=False)
class Loss:
    """`value`: scalar, the mean over the batch's units. `metrics`: detached, each [B]; the loop takes means over all
    batches' rows. `counts`: of metrics that not every row has, [B]: of how many samples a row's is the mean; a row of 0
    is left out."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    counts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def sums(self) -> dict[str, tuple[float, float]]:
        """Of each metric: the sum over its samples, and how many there are."""
        found = dict[str, tuple[float, float]]()
        for name, column in self.metrics.items():
            if name not in self.counts:
                found[name] = (column.sum().item(), float(column.numel()))
                continue
            count = self.counts[name].to(column)
            found[name] = (torch.where(count > 0, count * column, 0.0).sum().item(), count.sum().item())
        return found


class Objective(Protocol):
    """The loss of a micro-batch of edges."""

    @property
    def unit(self) -> str:
        """What a micro-batch never splits: "edge" or "chunk"."""
        ...

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The weight sets that `__call__` asks of `models`."""
        ...

    @property
    def by_stream(self) -> bool:
        """Whether it can take an advantage for each stream."""
        ...

    @property
    def keeps_mean(self) -> bool:
        """Whether it reads the batch's `mean`."""
        ...

    @property
    def keeps_peers(self) -> bool:
        """Whether it reads the batch's `peers`: then the rollout must keep the means that edges were drawn from."""
        ...

    @property
    def tightest_clip(self) -> float:
        """The narrowest side of the range in which a ratio is free."""
        ...

    def check(self, dynamics: Dynamics) -> None:
        """Raises ValueError where the loss needs of the dynamics what they have not."""
        ...

    def __call__(self, models: Mapping[str, Predict], batch: EdgeBatch) -> Loss: ...


@dataclass(frozen=True, eq=False)
class Replayed:
    """A batch with every weight set's prediction at its parent states, [B, *S], or of tokens [B, *S, V], and the law of
    its ends by the policy, which alone bears gradients."""

    batch: EdgeBatch
    prediction: Mapping[str, Tensor]
    law: Transition

    @property
    def velocity(self) -> Mapping[str, Tensor]:
        """The predictions. Raises ValueError where they are none: of tokens."""
        check_velocity(self.batch.dynamics.corruption, "objective", "one on log-probs alone, such as StepRatio()")
        return self.prediction

    @property
    def policy(self) -> Gaussian:
        """The law, with its mean and std. Raises ValueError for tokens, which have none."""
        return gaussian(self.law)

    def transition(self, name: str) -> Transition:
        """The transition as that weight set has it."""
        return self.batch.transition(self.prediction[name])


def replay(models: Mapping[str, Predict], names: Sequence[str], batch: EdgeBatch) -> Replayed:
    """Asks the named weight sets, of which "policy" is one, at the batch's parent states.

    Raises ValueError for a weight set that `models` lacks, a prediction of another shape than the states have it of, or
    a per-edge field of another shape than [B] or, where it may be by stream, [B, K].
    """
    _check_shapes(batch)
    missing = [name for name in names if name not in models]
    if missing:
        raise ValueError(f"models: {missing[0]!r} is missing; the objective asks for {', '.join(names)}")
    sigma = batch.schedule.at(batch.step)
    predictions: dict[str, Tensor] = {}
    for name in names:
        with torch.set_grad_enabled(name == "policy" and torch.is_grad_enabled()):
            said = models[name](batch.x, sigma, batch.rows)
            check_prediction(said, batch.x, batch.dynamics.corruption, name)
            predictions[name] = batch.layout.silence(said)
    return Replayed(batch, predictions, batch.transition(predictions["policy"]))


def velocity_of(mean: Tensor, x: Tensor, batch: EdgeBatch, scale: Tensor) -> Tensor:
    """The velocity v that gives `mean` = a·x + b·v at the batch's steps, [B, *S]."""
    a, b, _ = batch.dynamics.coefficients(batch.schedule, batch.step, scale)
    return (mean - to_rows(a, mean) * x.to(mean)) / to_rows(b, mean)


def _check_shapes(batch: EdgeBatch) -> None:
    """A per-edge factor of another shape would broadcast into a [B, B] loss without a word."""
    size = (batch.x.shape[0],)
    streams = (*size, batch.layout.count) if batch.by_stream and batch.layout.streams else size
    fields = {"step": batch.step, "scale": batch.scale, "rows": batch.rows}
    if batch.unit is not None:
        fields["unit"] = batch.unit
    for name, given in fields.items():
        if given.shape != size:
            raise ValueError(f"{name}: shape {list(given.shape)} must be {list(size)}, one number per edge")
    for name, given in {"log_prob": batch.log_prob, "advantage": batch.advantage, "weight": batch.weight}.items():
        if given.shape != streams and (name != "weight" or given.shape != size):
            what = "one number per edge" + (" and stream" if batch.by_stream else "")
            raise ValueError(f"{name}: shape {list(given.shape)} must be {list(streams)}, {what}")
