"""What an iteration teaches: edges, or clean samples with their (t, ε); in which order, and in which batches; and what
a batch is compared with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.core.distribution import upcast
from tempflow.core.groups import dense
from tempflow.core.objective.edges import EdgeBatch, Loss, Peers, Predict
from tempflow.core.objective.leaves import LeafBatch, draw_leaves
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.old import Old, detached, old_of, told
from tempflow.core.rng import Stream
from tempflow.core.times import Id

if TYPE_CHECKING:
    from tempflow.train.setting import Setting
    from tempflow.train.step import Credit, Experience

ALL = -1
"""In `Lessons.draw`: all the pairs of that sample."""


@dataclass(frozen=True, eq=False)
class Lessons:
    """Items in the order in which they are taken; those of a unit are neighbours.

    row    LongTensor[I], the whole's edge (or leaf)
    draw   LongTensor[I], which of a leaf's pairs, or ALL; 0 for edges
    unit   LongTensor[I], 0 … units − 1, ascending
    units  how many units there are
    valid  how many units the loss's mean counts, with those that are not computed
    pairs  forwards of an item: 1, or all of a leaf's pairs
    """

    row: Tensor
    draw: Tensor
    unit: Tensor
    units: int
    valid: int
    pairs: int

    def parts(self, updates: int) -> Iterator[Lessons]:
        """An even share of the units for each of the updates; empty ones are left out."""
        for share in torch.tensor_split(torch.arange(self.units), updates):
            if len(share):
                yield self._between(int(share[0]), int(share[-1]) + 1)

    def batches(self, rows: int) -> list[Lessons]:
        """Batches of at most that many forwards, of even size where every item is its own unit. No unit is split: one
        that is larger makes a batch by itself."""
        if self.units == len(self.row):
            count = -(-len(self.row) // max(1, rows // self.pairs))
            cuts = [int(part[0]) for part in torch.tensor_split(torch.arange(self.units), count) if len(part)]
        else:
            cuts, held = [0], 0
            for unit, size in enumerate(torch.bincount(self.unit, minlength=self.units).tolist()):
                if held and (held + size) * self.pairs > rows:
                    cuts, held = [*cuts, unit], 0
                held += size
        return [self._between(a, b) for a, b in zip(cuts, [*cuts[1:], self.units], strict=True)]

    def of(self, first: int, count: int) -> Lessons:
        """Those of the rows first … first + count − 1: one rank's own, whole units."""
        here = (self.row >= first) & (self.row < first + count)
        return self._take(here)

    @property
    def forwards(self) -> int:
        """Rows given to the policy."""
        return len(self.row) * self.pairs

    def _between(self, first: int, last: int) -> Lessons:
        return self._take((self.unit >= first) & (self.unit < last))

    def _take(self, mask: Tensor) -> Lessons:
        unit = dense(self.unit[mask])
        units = int(unit.max()) + 1 if len(unit) else 0
        return Lessons(self.row[mask], self.draw[mask], unit, units, self.valid, self.pairs)


def lessons(setting: Setting, experience: Experience, given: Credit, iteration: int, skip: Collection[int]) -> Lessons:
    """The iteration's items. Prompt slots in `skip` are left out altogether.

    Of edges, units without an edge that is live are not computed (so they bear no KL either, as in the official codes,
    which drop them) but count in the mean. Of leaves, all with a valid score are taken: without an advantage they
    still hold the policy where it is. Order is that of the whole forest, whatever the number of ranks.
    """
    algorithm, edges = setting.algorithm, experience.whole.edges
    skipped = torch.isin(edges.prompt, torch.tensor(list(skip), dtype=torch.long))
    allowed = edges.trained & given.advantage.ok & ~skipped
    number = _units(algorithm, experience, allowed, iteration)
    counted = allowed & (number >= 0)
    taught = counted if algorithm.draws is not None else counted & _any_live(given.advantage.live & counted, number)
    row = taught.nonzero()[:, 0]
    pairs = 1
    draw = torch.zeros_like(row)
    unit = number[row]
    valid = len(torch.unique(number[counted]))
    if algorithm.draws is not None:
        pairs = algorithm.draws.times.count(experience.schedule.steps)
        if algorithm.objective.unit in ("draw", "group"):
            # a group is compared pair by pair: its unit is all its samples at one pair, not at all of them
            draw = torch.arange(pairs).repeat(len(row))
            row, unit = row.repeat_interleave(pairs), unit.repeat_interleave(pairs) * pairs + draw
            valid, pairs = valid * pairs, 1
        else:
            draw = torch.full_like(row, ALL)
    unit = dense(unit)
    units = int(unit.max()) + 1 if len(unit) else 0
    place = torch.empty(units, dtype=torch.long)
    order = Stream(setting.seed, "train.order").permutation((iteration,), units)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(units)
    position, order_of_items = torch.sort(place[unit], stable=True)
    return Lessons(row[order_of_items], draw[order_of_items], position, units, valid, pairs)


def _units(algorithm: Algorithm, experience: Experience, allowed: Tensor, iteration: int) -> Tensor:
    """Unit number of every edge (or leaf) of the whole; −1: left out."""
    edges = experience.whole.edges
    if algorithm.objective.unit == "chunk" and algorithm.units is not None:
        return algorithm.units(experience.whole, iteration)
    if algorithm.objective.unit == "group":
        return edges.prompt
    return torch.arange(len(edges))


def _any_live(live: Tensor, number: Tensor) -> Tensor:
    """Whether an edge's unit has a live one."""
    seen = torch.zeros(int(number.max()) + 2 if len(number) else 1, dtype=torch.bool)
    seen[number[live]] = True
    seen[-1] = False  # where −1 points
    return seen[number]


def one_of(lessons: Lessons, first: int) -> Lessons:
    """A single item of a rank that owns none of a part: it computes it, and it counts 0."""
    zero = torch.zeros(1, dtype=torch.long)
    draw = torch.full_like(zero, ALL) if lessons.pairs > 1 else zero
    return Lessons(zero + first, draw, zero, 1, lessons.valid, lessons.pairs)


def loss_of(
    setting: Setting,
    experience: Experience,
    given: Credit,
    batch: Lessons,
    old: Old | None = None,
    drawn_by: str = "policy",
) -> Loss:
    """The objective's loss of a batch, all of it this rank's own.

    old       of edges, from before the iteration's first update (`recorded`); None: the weight set `drawn_by` is asked
              now, in this batch. Of the policy that is the forward that is trained, detached

    Edges' metrics have "rollout_gap" (`core.objective.old.roundings`).
    """
    algorithm = setting.algorithm
    models = {n: p if n == "policy" else detached(p) for n, p in experience.models.items()}
    if algorithm.draws is None:
        edges, objective = edge_batch(setting, experience, given, batch), algorithm.edge_objective
        names = ("policy",) if old is not None else tuple(dict.fromkeys(("policy", drawn_by)))
        said = {name: _velocity(models[name], edges) for name in names}
        if old is None:
            old = old_of(edges, said[drawn_by], setting.rounding, objective.keeps_mean)
        edges = replace(edges, log_prob=old.log_prob, mean=old.mean)
        models |= {name: told(velocity, edges.x, models[name]) for name, velocity in said.items()}
        if setting.norms:
            loss = with_velocity_norm(objective, models, edges, len(batch.row))
        else:
            loss = objective(models, edges)
        return Loss(loss.value, {**loss.metrics, "rollout_gap": old.gap})
    leaves = leaf_batch(setting, experience, given, batch)
    if setting.norms:
        return with_velocity_norm(algorithm.leaf_objective, models, leaves, len(batch.row))
    return algorithm.leaf_objective(models, leaves)


def recorded(setting: Setting, experience: Experience, given: Credit, batch: Lessons) -> Old:
    """The batch's edges by the policy as it stands, which has not moved since the rollout.

    Gradients are on, though none is taken: kernels are chosen by that, and these are compared with a training forward.
    """
    edges = edge_batch(setting, experience, given, batch)
    with torch.enable_grad():
        velocity = _velocity(experience.models["policy"], edges)
    return old_of(edges, velocity, setting.rounding, setting.algorithm.edge_objective.keeps_mean)


def _velocity(predict: Predict, edges: EdgeBatch) -> Tensor:
    return predict(edges.x, edges.schedule.at(edges.step), edges.rows)


def edge_batch(setting: Setting, experience: Experience, given: Credit, batch: Lessons) -> EdgeBatch:
    """The batch's edges; their log-probs (and means, where these were kept) are the rollout's."""
    forest, device, rows = experience.forest, experience.forest.nodes.device, batch.row
    edges, own = forest.edges, (rows - experience.first).to(device)
    advantage, dynamics = given.advantage, setting.algorithm.dynamics
    assert dynamics is not None
    peers = None
    if advantage.peer is not None and edges.mean is not None:
        peer = (advantage.peer[rows] - experience.first).to(device)
        peers = Peers(forest.nodes[edges.parent[peer]], edges.mean[peer], edges.scale[peer])
    return EdgeBatch(
        x=forest.nodes[edges.parent[own]],
        y=forest.nodes[edges.child[own]],
        step=edges.step[own],
        scale=edges.scale[own],
        rows=edges.prompt[own],
        log_prob=edges.log_prob[own],
        advantage=advantage.value[rows].to(device),
        weight=given.weight[rows].to(device),
        schedule=experience.schedule,
        dynamics=dynamics,
        mean=None if edges.mean is None else edges.mean[own],
        unit=batch.unit.to(device),
        columns={name: column[rows].to(device) for name, column in advantage.columns.items()},
        peers=peers,
    )


def leaf_batch(setting: Setting, experience: Experience, given: Credit, batch: Lessons) -> LeafBatch:
    """The batch's clean samples with their pairs, ready for an objective."""
    draws = setting.algorithm.draws
    assert draws is not None
    forest, rows = experience.forest, batch.row
    own = (rows - experience.first).to(forest.nodes.device)
    x0 = upcast(forest.nodes[forest.edges.child[own]])
    slots, unit = experience.whole.edges.prompt[rows], setting.algorithm.objective.unit
    ids: list[Id] = [
        (experience.iteration, slot, number)
        for slot, number in zip(slots.tolist(), experience.numbers[rows].tolist(), strict=True)
    ]
    advantage, prompt = given.advantage.value[rows].to(x0), slots.to(x0.device)
    if unit not in ("draw", "group"):
        return draw_leaves(x0, advantage, prompt, ids, draws, setting.seed, experience.schedule)
    t, noise = draws.single(setting.seed, ids, batch.draw.tolist(), experience.schedule, x0.shape[1:])
    group = batch.unit.to(x0.device) if unit == "group" else prompt
    return LeafBatch(x0, advantage, prompt, group, t.to(x0), noise.to(x0))
