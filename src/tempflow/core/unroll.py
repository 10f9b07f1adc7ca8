"""A few sampler steps with gradients: what few-step students and direct reward gradients are trained through.

`rollout` grows forests without gradients; this loop walks a batch of paths and keeps the graph of as many predictions
as it is asked to. Where both take the same steps of the same batch, with the same noise, states agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.objective.old import detached
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, Predict
from tempflow.core.schedule import Schedule
from tempflow.core.solver import predict_clean
from tempflow.core.state import WHOLE, StateLayout, upcast


@dataclass(frozen=True, eq=False)
class Visit:
    """One prediction of a walk, of the N rows that were walking then.

    index     LongTensor[N], which rows of the batch, on the CPU
    step      LongTensor[N], the node of each, on the CPU
    x         [N, *S], the states that were asked about
    velocity  [N, *S], what was said, 0 at held elements; without a graph where the walk kept none
    """

    index: Tensor
    step: Tensor
    x: Tensor
    velocity: Tensor

    def clean(self, schedule: Schedule) -> Tensor:
        """x̂0 = x − σ·v, [N, *S], in float32 at least."""
        return predict_clean(self.x, self.velocity, schedule, self.step)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """Where a walk of B paths stopped.

    x       [B, *S], each row's state at its stop, in the dtype of the starting states
    stop    LongTensor[B], that node, 0 … T, on the CPU
    sigma   [B], σ there, in the schedule's dtype
    clean   [B, *S], in float32 at least: x̂0 = x − σ·v at the stop, and at node T the sample itself; None where the walk
            was not asked to look
    visits  every prediction in turn. Rows stop together, so rows with a later stop set out earlier
    """

    x: Tensor
    stop: Tensor
    sigma: Tensor
    clean: Tensor | None
    visits: tuple[Visit, ...]

    def x0(self) -> Tensor:
        """`clean`. Raises ValueError where the walk did not look."""
        if self.clean is None:
            raise ValueError("clean: was not predicted at the stop; say so by look = True")
        return self.clean


def unroll(
    x: Tensor,
    schedule: Schedule,
    predict: Predict,
    rows: Tensor,
    *,
    dynamics: Dynamics | None = None,
    noise: Noise | None = None,
    ids: Sequence[tuple[int, ...]] = (),
    first: int = 0,
    stop: int | Tensor | None = None,
    look: bool = True,
    last: int | None = None,
    cuts: Collection[int] = (),
    checkpointed: bool = False,
    layout: StateLayout = WHOLE,
) -> Unrolled:
    """Walk B states from node `first` to their stops, with gradients.

    x             [B, *S], states at σ_first: at node 0 `Schedule.start` of a noise
    predict       the velocity, asked once a step for all rows on the way. Rows of different stops are at different
                  nodes, so σ differs within a call
    rows          LongTensor[B], what `predict` finds the conditions by
    dynamics      how a step goes; default ODE(). A stochastic one needs `noise` and `ids`
    ids           one for each row, (prompt slot, root): its noise at a step is that of `rollout` on a `plan.chain`
    stop          a node, or one for each row, LongTensor[B] on the CPU, first … T; default T. `stop_nodes` draws them
    look          also predict x̂0 at stops before T, one prediction more
    last          only the last so many predictions of each row bear gradients, the one at the stop among them; None:
                  all. 0, or a call without gradients: none, and `predict` is asked so, as by `rollout`. Otherwise
                  earlier predictions are made in the kernels of training and cut off (`old.detached`)
    cuts          nodes, first + 1 … T − 1, that a step leaves with a detached state: nothing behind gets a gradient
                  from what follows
    checkpointed  keep no activations of a prediction, and compute it again in the backward
    layout        of the B states: elements that are held on the whole way

    A step rounds to the dtype of x, as a rollout stores. Raises ValueError when the arguments do not fit together.
    """
    walk = _Walk(schedule, ODE() if dynamics is None else dynamics, noise, ids, layout, first, frozenset(cuts))
    stops = _stops(stop, len(x), schedule.steps)
    walk.check(x, rows, stops, last)
    counts = stops - first + (look & (stops < schedule.steps)).long()
    longest = int(counts.max()) if len(x) else 0
    graded = (longest if last is None else last) if torch.is_grad_enabled() else 0
    late = _checkpointed(predict) if checkpointed else predict
    early = detached(late) if graded else predict
    x, rows = layout.hold(x if graded else x.detach()), rows.to(x.device)
    visits = list[Visit]()
    for left in range(longest, 0, -1):
        with nullcontext() if left <= graded else torch.no_grad():
            seen = walk.ask(x, rows, counts, left, late if left <= graded else early)
            moved, after = walk.move(seen, stops)
        x = _put(_put(x, seen.index, seen.x), moved, after)
        visits.append(seen)
    clean = walk.clean(x, visits, stops) if look else None
    return Unrolled(x, stops, schedule.at(stops).to(x.device), clean, tuple(visits))


def stop_nodes(seed: int, ids: Sequence[tuple[int, ...]], steps: int, first: int = 0) -> Tensor:
    """A node for each id, LongTensor [len(ids)], uniform over first … steps − 1: where backward simulation stops.

    Equal ids get equal nodes: give the rows of a call one id for one node a call. Raises ValueError for an empty range.
    """
    if not 0 <= first < steps:
        raise ValueError(f"first: {first} of {steps} steps leaves no node; nearest valid: {max(0, steps - 1)}")
    stream = Stream(seed, "unroll.stop")
    return torch.tensor([first + stream.integers(id, steps - first, 1)[0] for id in ids], dtype=torch.long)


@dataclass(frozen=True)
class _Walk:
    """What stays the same during a walk."""

    schedule: Schedule
    dynamics: Dynamics
    noise: Noise | None
    ids: Sequence[tuple[int, ...]]
    layout: StateLayout
    first: int
    cuts: frozenset[int]

    def ask(self, x: Tensor, rows: Tensor, counts: Tensor, left: int, predict: Predict) -> Visit:
        """The prediction at those rows that have at least `left` predictions to make, each `left` before its last."""
        index = (counts >= left).nonzero()[:, 0]
        step = self.first + counts[index] - left
        at, device = (x if len(index) == len(x) else x[index.to(x.device)]), x.device
        cut = torch.isin(step, torch.tensor(sorted(self.cuts), dtype=torch.long))
        if len(step) and bool(cut.all()):
            at = at.detach()
        elif bool(cut.any()):
            at = torch.where(cut.to(device).view(-1, *[1] * (at.dim() - 1)), at.detach(), at)
        chosen = rows if len(index) == len(x) else rows[index.to(device)]
        velocity = predict(at, self.schedule.at(step).to(device), chosen)
        if velocity.shape != at.shape:
            raise ValueError(f"predict returned shape {list(velocity.shape)}; nearest valid: {list(at.shape)}, as x")
        return Visit(index, step, at, self.layout.take(index).silence(velocity))

    def move(self, seen: Visit, stops: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of the batch step on, as they are not at their stop, and their next states."""
        goes = (seen.step < stops[seen.index]).nonzero()[:, 0]
        index, step, at, velocity = seen.index, seen.step, seen.x, seen.velocity
        if len(goes) < len(index):
            index, step = index[goes], step[goes]
            at, velocity = (t[goes.to(t.device)] for t in (at, velocity))
        if not len(goes):
            return index, at
        law = self.dynamics.transition(at, velocity, self.schedule, step)
        after = law.mode
        if self.dynamics.stochastic and self.noise is not None:
            # the identities of a chain's edges: each node is its parent's only child
            names = [(*self.ids[n], *(0,) * (i + 1), i) for n, i in _pairs(index, step)]
            after = law.sample(self.noise.edge(names, at.shape[1:]).to(at.device))
        return index, self.layout.take(index).hold(after.to(at.dtype))

    def clean(self, x: Tensor, visits: Sequence[Visit], stops: Tensor) -> Tensor:
        """x̂0 at the stops, of the last visit, where all rows are; at node T the samples."""
        samples = upcast(self.schedule.samples(x))
        looks = (stops < self.schedule.steps).nonzero()[:, 0]
        if not len(looks):
            return samples
        seen = visits[-1]  # every row that looks is in it
        place = torch.searchsorted(seen.index, looks).to(x.device)
        return _put(samples, looks, seen.clean(self.schedule)[place])

    def check(self, x: Tensor, rows: Tensor, stops: Tensor, last: int | None) -> None:
        steps = self.schedule.steps
        if rows.shape != x.shape[:1]:
            raise ValueError(f"rows: shape {list(rows.shape)} must be [{len(x)}], one for each state")
        if not x.is_floating_point():
            raise ValueError(f"x: {x.dtype} cannot be walked; nearest valid: torch.float32")
        if not 0 <= self.first <= steps:
            near = min(max(self.first, 0), steps)
            raise ValueError(f"first: {self.first} is outside [0, {steps}]; nearest valid: {near}")
        bad = stops[(stops < self.first) | (stops > steps)]
        if len(bad):
            near = self.first if int(bad[0]) < self.first else steps
            raise ValueError(f"stop: {int(bad[0])} is outside [{self.first}, {steps}]; nearest valid: {near}")
        if last is not None and last < 0:
            raise ValueError(f"last: {last} is negative; nearest valid: 0")
        for cut in self.cuts:
            if not self.first < cut < steps:
                near = min(max(cut, self.first + 1), steps - 1)
                raise ValueError(f"cuts: {cut} is not between steps; nearest valid: {near}")
        if self.dynamics.stochastic and (self.noise is None or len(self.ids) != len(x)):
            raise ValueError(
                f"noise, ids: {self.dynamics} draws noise, which needs a Noise and {len(x)} ids, not {len(self.ids)}; "
                "nearest valid: ODE(), which draws none"
            )


def _put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """x with its rows `index`, which ascend, replaced."""
    return values if len(index) == len(x) else x.index_copy(0, index.to(x.device), values)


def _pairs(index: Tensor, step: Tensor) -> list[tuple[int, int]]:
    return [(int(n), int(i)) for n, i in zip(index.numpy(), step.numpy(), strict=True)]


def _stops(stop: int | Tensor | None, size: int, steps: int) -> Tensor:
    if not isinstance(stop, Tensor):
        return torch.full((size,), steps if stop is None else stop, dtype=torch.long)
    if stop.shape != (size,) or stop.dtype != torch.long:
        raise ValueError(f"stop: {stop.dtype} {list(stop.shape)} must be torch.int64 [{size}], a node for each state")
    return stop.cpu()


def _checkpointed(predict: Predict) -> Predict:
    def answer(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(predict, x, sigma, rows, use_reentrant=False))

    return answer
