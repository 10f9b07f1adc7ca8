"""Clean samples re-noised at drawn (t, ε), and what each weight set predicts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.corruption import GAUSSIAN_PATH, Corruption, Prediction, check_prediction, check_velocity
from tempflow.core.likelihood_proxy import LikelihoodProxy, target_velocity
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, Reduce, StateLayout, placed, upcast
from tempflow.core.times import Id


@dataclass(frozen=True, eq=False)
class LeafBatch:
    """B clean samples, each with M pairs of a time and a noise.

    x0         [B, *S], the sample: numbers, or tokens in int64
    advantage  [B], or one for each of the layout's K streams, [B, K]
    rows       LongTensor[B], what `predict` finds the condition by
    group      LongTensor[B], equal for samples that are compared with one another
    t          [B, M] in (0, 1], in at least float32
    noise      [B, M, *S], of the kind that the corruption wants
    layout     of the B samples: which elements count, and in which streams
    corruption the forward process that noises them, and so what is predicted

    Raises ValueError where shapes do not fit or, where looking is free (on the CPU), a time is not in (0, 1].
    """

    x0: Tensor
    advantage: Tensor
    rows: Tensor
    group: Tensor
    t: Tensor
    noise: Tensor
    layout: StateLayout = WHOLE
    corruption: Corruption = GAUSSIAN_PATH

    def __post_init__(self) -> None:
        size, tokens = self.x0.shape[0], self.corruption.prediction == "logits"
        if tokens == self.x0.is_floating_point():
            near = torch.int64 if tokens else torch.float32
            raise ValueError(f"x0: {self.x0.dtype} is no state of {self.corruption}; nearest valid: {near}")
        for name, given in (("advantage", self.advantage), ("rows", self.rows), ("group", self.group)):
            by_stream = name == "advantage" and given.dim() == 2 and self.layout.streams
            streams = (size, self.layout.count) if by_stream else (size,)
            if given.shape != streams:
                raise ValueError(f"{name}: shape {list(given.shape)} must be {list(streams)}, one number per sample")
        if self.t.dim() != 2 or self.t.shape[0] != size or self.t.shape[1] < 1:
            raise ValueError(f"t: shape {list(self.t.shape)} must be [{size}, M] with M ≥ 1")
        expected = (*self.t.shape, *self.x0.shape[1:])
        if self.noise.shape != expected:
            raise ValueError(f"noise: shape {list(self.noise.shape)} must be {list(expected)}")
        if self.t.device.type == "cpu" and not bool(((self.t > 0) & (self.t <= 1)).all()):
            bad = float(self.t[~((self.t > 0) & (self.t <= 1))][0])
            raise ValueError(f"t: {bad} must be in (0, 1]; 0 is data, where a prediction means nothing")

    def __len__(self) -> int:
        return self.x0.shape[0]

    @property
    def pairs(self) -> int:
        """M, the pairs of each sample."""
        return self.t.shape[1]

    @property
    def predicts(self) -> Prediction:
        """What weight sets are asked for."""
        return self.corruption.prediction

    @property
    def by_stream(self) -> bool:
        """Whether every stream has an advantage of its own."""
        return self.advantage.dim() == 2

    def merged(self, values: Tensor) -> Tensor:
        """[…, K] by stream -> […], their mean over streams; others as they are."""
        return self.layout.over_streams(values) if self.by_stream else values

    def check_joint(self, objective: str) -> None:
        """Raises ValueError where advantages are by stream, which an objective on whole samples cannot use."""
        if self.by_stream:
            raise ValueError(
                f"advantage: one for each stream, and {objective} takes whole samples; nearest valid: a joint "
                "credit, with one advantage a sample"
            )

    def take(self, samples: Tensor | slice) -> LeafBatch:
        """Some of the samples, with all their pairs."""
        return LeafBatch(
            self.x0[samples],
            self.advantage[samples],
            self.rows[samples],
            self.group[samples],
            self.t[samples],
            self.noise[samples],
            self.layout.take(samples),
            self.corruption,
        )

    def only(self, pairs: slice) -> LeafBatch:
        """All samples with some of their pairs."""
        return replace(self, t=self.t[:, pairs], noise=self.noise[:, pairs])


NEEDS_NO_VELOCITY = "one on a likelihood, such as ClippedLikelihood() with TokenLikelihood()"
"""What serves tokens."""


def check_proxy(proxy: LikelihoodProxy, corruption: Corruption) -> None:
    """Raises ValueError for a proxy that reads another kind of prediction than the corruption's networks make."""
    reads = getattr(proxy, "reads", "velocity")
    if reads != corruption.prediction:
        near = "TokenLikelihood()" if corruption.prediction == "logits" else "Adaptive()"
        raise ValueError(
            f"proxy: {proxy} reads {reads}, and of {corruption} a network predicts {corruption.prediction}; "
            f"nearest valid: {near}"
        )


class LeafObjective(Protocol):
    """The loss of a micro-batch of clean samples."""

    @property
    def unit(self) -> str:
        """What a micro-batch never splits: "pair" (a sample's pair), "leaf" (all its pairs) or
        "group" (a prompt's samples at one pair)."""
        ...

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """The weight sets that `__call__` asks of `models`."""
        ...

    @property
    def by_stream(self) -> bool:
        """Whether it can take an advantage for each stream."""
        ...

    def check(self, corruption: Corruption) -> None:
        """Raises ValueError where the loss needs of what is predicted what the corruption has not."""
        ...

    def __call__(self, models: Mapping[str, Predict], batch: LeafBatch) -> Loss: ...


def renoise_leaves(
    x0: Tensor,
    advantage: Tensor,
    rows: Tensor,
    ids: Sequence[Id],
    renoise: Renoise,
    seed: int,
    schedule: Schedule,
    group: Tensor | None = None,
    only: range | None = None,
    layout: StateLayout = WHOLE,
    corruption: Corruption = GAUSSIAN_PATH,
) -> LeafBatch:
    """A `LeafBatch` with pairs drawn for `ids` (see `Renoise`), on the device of `x0`; of the M pairs those of `only`.

    `group` defaults to `rows`: samples of one prompt slot are compared. Numbers get the dtype of `x0`, but at least
    float32; that of tokens is float32, and their noise stays as it was drawn.
    """
    t, noise = renoise(seed, ids, schedule, x0.shape[1:], only, corruption.noise)
    group = rows if group is None else group
    return leaf_batch(x0, advantage, rows, group, t, noise, layout, corruption)


def leaf_batch(
    x0: Tensor,
    advantage: Tensor,
    rows: Tensor,
    group: Tensor,
    t: Tensor,
    noise: Tensor,
    layout: StateLayout = WHOLE,
    corruption: Corruption = GAUSSIAN_PATH,
) -> LeafBatch:
    """A `LeafBatch` of pairs that were drawn already, in the dtypes and on the device that `renoise_leaves` says."""
    if x0.is_floating_point():
        x0 = upcast(x0)
        return LeafBatch(x0, advantage.to(x0), rows, group, t.to(x0), noise.to(x0), layout, corruption)
    numbers = [n.to(x0.device, torch.float32) for n in (advantage, t)]
    return LeafBatch(x0, numbers[0], rows, group, numbers[1], placed(noise, x0.device), layout, corruption)


@dataclass(frozen=True, eq=False)
class Noised:
    """A batch's B·M re-noised states, sample by sample, and what is predicted there: velocities, each [B·M, *S], or
    logits of tokens, [B·M, *S, V].

    `prediction["policy"]` bears gradients; no other set's does. `layout` is that of the B·M states; their held elements
    are clean, and predictions there 0.
    """

    batch: LeafBatch
    x: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    prediction: Mapping[str, Tensor]
    layout: StateLayout = WHOLE

    @property
    def velocity(self) -> Mapping[str, Tensor]:
        """The predictions. Raises ValueError where they are none: of tokens."""
        check_velocity(self.batch.corruption, "objective", NEEDS_NO_VELOCITY)
        return self.prediction

    @property
    def policy(self) -> Tensor:
        return self.velocity["policy"]

    @property
    def dtype(self) -> torch.dtype:
        """Of numbers by row: that of the states; of tokens that of the times."""
        return self.x.dtype if self.x.is_floating_point() else self.t.dtype

    @property
    def target(self) -> Tensor:
        """v* = ε − x0. Raises ValueError for tokens."""
        check_velocity(self.batch.corruption, "target", NEEDS_NO_VELOCITY)
        return target_velocity(self.x0, self.noise)

    def by_sample(self, values: Tensor) -> Tensor:
        """[B·M] as [B, M], or by stream [B·M, K] as [B, M, K]."""
        return values.view(len(self.batch), self.batch.pairs, *values.shape[1:])

    def by_pair(self, values: Tensor) -> Tensor:
        """[B] or [B, K] repeated for each pair, [B·M] or [B·M, K], in the dtype of the states."""
        return values.to(self.x.device, self.dtype).repeat_interleave(self.batch.pairs, dim=0)

    def measured(self, measure: Callable[[Reduce], Tensor]) -> Tensor:
        """What `measure` makes of a mean over elements, [B·M], or [B·M, K] where advantages are by stream."""
        return self.layout.measured(measure, self.batch.by_stream)

    def merged(self, values: Tensor) -> Tensor:
        """[…, K] by stream -> […], their mean over streams; others as they are."""
        return self.batch.merged(values)

    def likelihood(self, proxy: LikelihoodProxy, name: str) -> Tensor:
        """The proxy by that weight set's prediction, [B·M], or [B·M, K] where advantages are by stream.

        Raises ValueError for a proxy of another kind of prediction.
        """
        check_proxy(proxy, self.batch.corruption)
        if self.layout.whole and not self.batch.by_stream:
            return proxy(self.prediction[name], self.x0, self.noise, self.t)
        return self.measured(lambda mean: proxy(self.prediction[name], self.x0, self.noise, self.t, mean))


def noised(models: Mapping[str, Predict], names: Sequence[str], batch: LeafBatch) -> Noised:
    """Re-noises the batch and asks each named weight set at the very same states, "policy" alone with gradients.

    Raises ValueError for a weight set that `models` lacks, or a prediction of another shape than the states.
    """
    missing = [name for name in names if name not in models]
    if missing:
        raise ValueError(f"models: {missing[0]!r} is missing; the objective asks for {', '.join(names)}")
    noise, t = batch.noise.flatten(0, 1), batch.t.flatten()
    x0, rows = (field.repeat_interleave(batch.pairs, dim=0) for field in (batch.x0, batch.rows))
    layout = batch.layout.take(torch.arange(len(batch), device=x0.device).repeat_interleave(batch.pairs))
    x0 = layout.hold(x0)
    x = layout.hold(batch.corruption.corrupt(x0, noise, t))
    predictions: dict[str, Tensor] = {}
    for name in names:
        with torch.set_grad_enabled(name == "policy" and torch.is_grad_enabled()):
            prediction = models[name](x, t, rows)
            if batch.predicts == "velocity":  # logits are many: their laws widen them in parts
                prediction = upcast(prediction)
            check_prediction(prediction, x, batch.corruption, name)
        predictions[name] = layout.silence(prediction)
    return Noised(batch, x, x0, noise, t, predictions, layout)


def group_mean(values: Tensor, group: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over each row's group, [B, M], for `values` [B, M] and LongTensor `group` [B]; differentiable.

    weight  ≥ 0, of the shape of `values`, with a positive sum in every group; None: all alike
    """
    weight = torch.ones_like(values) if weight is None else weight
    # a batch is small, so its square too; index_add would sum in no fixed order on a GPU
    fellow = (group[:, None] == group[None, :])[:, :, None]
    return (fellow * weight * values).sum(1) / (fellow * weight).sum(1)
