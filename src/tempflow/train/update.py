"""The updates of one iteration: what is trained, in which order and minibatches, and the optimizer's steps."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tempflow.algorithms.base import Algorithm
from tempflow.core.groups import dense
from tempflow.core.objective.edges import EdgeBatch, Loss, Peers, Predict
from tempflow.core.objective.leaves import LeafBatch, renoise_leaves
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.old import Old, detached, old_of, told
from tempflow.core.rng import Stream
from tempflow.core.state import upcast
from tempflow.core.times import Id
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Advantages, Experience, bound
from tempflow.train.guards import Guards, NonFiniteError, check_finite_loss, check_rewards, clip_gradients
from tempflow.train.parallel import World
from tempflow.train.weights import Trainable, WeightSet, holds_policy

Models = Mapping[str, Predict]
"""Predictors of prompt slots, by weight set."""


def predictors(context: Context, experience: Experience) -> dict[str, Predict]:
    """Of the policy and of every other weight set, for this rank's prompt slots of the experience's iteration."""
    prompts = experience.prompts
    predictor = bound(context, prompts, context.world.block(len(prompts)))
    return {"policy": predictor(None)} | {name: predictor(network) for name, network in context.sets.items()}


def update(
    context: Context,
    experience: Experience,
    advantages: Advantages,
    trainable: Trainable,
    average: WeightSet | None,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    counter: Counter,
    clock: Clock,
    guards: Guards,
    skip: Collection[int] = (),
) -> dict[str, float]:
    """Trains on one iteration's experience; returns its metrics.

    An update's loss is a mean over its share of all valid units (`training_batch` says of which). The old log-probs of
    edges come from forwards in the batches that train them: for the first update from the training forward itself, for
    later ones from a forward before any weight moves. Raises GuardError before the weights move when no reward is
    valid, or when `guards` does.
    """
    algorithm = context.algorithm
    number = iteration + 1  # as metrics.jsonl counts
    scores = experience.credited[0]
    valid = scores.total(experience.rule(algorithm.credit).reward_weights)[1]
    check_rewards(int(valid.sum()), len(scores), number)
    started = time.perf_counter()
    models, batch = predictors(context, experience), training_batch(context, experience, advantages, iteration, skip)
    norms, sums = list[float](), list[Sums]()
    computed, parts = 0, list(batch.updates(context.updates))
    drawn_by = _drawn_by(context, trainable)
    old: list[list[Old] | None] = [None] * len(parts)
    if algorithm.renoise is None and drawn_by == "policy":
        old[1:] = _recorded(context, models, experience, advantages, parts[1:])
        counter.old += sum(part.forwards for part in parts[1:])
    for part, before in zip(parts, old, strict=True):
        trainable.zero_grad()
        share = context.updates / batch.valid
        seen = accumulate(context, models, experience, advantages, part, share, trainable, not norms, before, drawn_by)
        computed += part.forwards
        norm = _checked(context, trainable, seen, number, guards)
        if norm is None:
            continue
        if "rollout_gap" in seen.largest:
            guards.first_ratio(number, seen.largest["rollout_gap"], (context.rollout_rows, context.train_rows))
        optimizer.step()
        trainable.publish()
        if average is not None:
            average.update()
        norms.append(norm)
        sums.append(seen)
    clock.add("train", started)
    others = [name for name in algorithm.objective.weight_sets if name != "policy"]
    counter.train += computed
    counter.reference += computed * len(others)
    if algorithm.renoise is None and drawn_by not in ("policy", *others):
        counter.old += computed
    names, rows = (sums[0].metrics, sum(s.rows for s in sums)) if sums else ((), 1)
    asked = LARGEST if algorithm.renoise is None else {"log_ratio_abs": LARGEST["log_ratio_abs"]}
    largest = {kept: max((s.largest.get(name, 0.0) for s in sums), default=0.0) for name, kept in asked.items()}
    return {
        **{name: sum(s.metrics[name] for s in sums) / rows for name in names},
        "trained_edges": batch.forwards,
        "updates": len(norms),
        "loss": sum(s.loss for s in sums) / max(1, len(sums)),
        "grad_norm": max(norms, default=0.0),
        **largest,
    }


def _drawn_by(context: Context, trainable: Trainable) -> str:
    """The weight set whose forward gives old log-probs: the one that rolled out, or the policy where the two are one
    before the first update. The same on all ranks, each of which may hold another part of the weights."""
    name = context.algorithm.sampler
    if name == "policy" or not context.world.any(not holds_policy(context.sets[name], trainable)):
        return "policy"
    return name


def _recorded(
    context: Context, models: Models, experience: Experience, advantages: Advantages, parts: Sequence[Batch]
) -> list[list[Old] | None]:
    """Old log-probs of this rank's items of the later updates, in the batches in which it will train them."""
    owned = [part.of_rank(experience.first, len(experience.forest.edges)) for part in parts]
    seen = list[list[Old] | None]()
    with context.in_step():
        for own in owned:
            found = list[Old]()
            for batch in own.minibatches(context.train_rows) if len(own.row) else ():
                context.pause()
                found.append(recorded(context, models, experience, advantages, batch))
            seen.append(found)
    return seen


def _checked(context: Context, trainable: Trainable, seen: Sums, iteration: int, guards: Guards) -> float | None:
    """The gradients' norm before they were clipped; None when the step is to be dropped, as something is not finite."""
    try:
        check_finite_loss(torch.tensor(seen.loss), iteration)
        norm = clip_gradients(trainable.masters, context.max_grad_norm, iteration)
    except NonFiniteError as fault:
        if math.isfinite(seen.loss) and trainable.rescale(finite=False):
            guards.say(f"iteration {iteration}: no step; the loss's scale is halved to {trainable.loss_scale:g}")
        else:
            guards.drops(iteration, fault)
        trainable.zero_grad()
        return None
    trainable.rescale(finite=True)
    guards.drops(iteration, None)
    return norm


LARGEST = {"log_ratio_abs": "log_ratio_max", "rollout_gap": "rollout_gap_max"}
"""Metrics whose largest value is kept beside their mean, and what it is called."""


@dataclass(frozen=True)
class Sums:
    """Over all ranks' items of an update: its loss, sums of the metrics over `rows` rows, and the largest value of
    those that LARGEST names and that are there; NaN where one of them is."""

    loss: float
    metrics: Mapping[str, float]
    rows: float
    largest: Mapping[str, float]


def accumulate(
    context: Context,
    models: Models,
    experience: Experience,
    advantages: Advantages,
    part: Batch,
    share: float,
    trainable: Trainable,
    may_pause: bool,
    old: Sequence[Old] | None = None,
    drawn_by: str = "policy",
) -> Sums:
    """Adds the gradient of `share` · Σ loss over the units of `part` to the masters, all ranks' together.

    old: of each of this rank's batches of edges; None: `drawn_by` is asked in it, as for `loss_of`.
    """
    own = part.of_rank(experience.first, len(experience.forest.edges))
    batches = own.minibatches(context.train_rows) if len(own.row) else []
    # a sharded network's ranks compute together, minibatch for minibatch; others meet once, behind the last
    count = len(batches) if context.shards is None else context.world.most(len(batches))
    sums, largest = dict[str, float](), dict[str, float]()
    total, rows = 0.0, 0
    for number in range(max(1, count)):
        if may_pause:
            context.pause()
        if number >= len(batches):
            names = _idle(context, models, experience, advantages, part, trainable, drawn_by)
            if not batches:
                sums, largest = dict.fromkeys(names, 0.0), {name: 0.0 for name in names if name in LARGEST}
            continue
        batch = batches[number]
        loss = loss_of(context, models, experience, advantages, batch, None if old is None else old[number], drawn_by)
        value = loss.value * (batch.units * share)
        (value * trainable.loss_scale).backward()
        trainable.collect()
        total += value.item()
        rows += len(batch.row)
        for name, column in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + column.sum().item()
            if name in LARGEST:
                largest[name] = _larger(largest.get(name, 0.0), column.max().item())
    return _summed(context.world, trainable, Sums(total, sums, rows, largest))


def _idle(
    context: Context,
    models: Models,
    experience: Experience,
    advantages: Advantages,
    part: Batch,
    trainable: Trainable,
    drawn_by: str,
) -> list[str]:
    """What a rank computes where others have a minibatch and it has none: a row that counts 0, by the same forwards,
    and a backward that adds exactly 0. Returns the names of the metrics, which ranks exchange by place.

    It starts from zeros, and from what the policy says of them, not from the loss: a rank may own nothing because its
    latents broke, and 0 times what is not finite is not 0.
    """
    forest = experience.forest
    some = one_of(part, experience.first + int(forest.edges.trained.nonzero()[0, 0]))
    blank = replace(forest, nodes=torch.zeros_like(forest.nodes[:1]).expand_as(forest.nodes))
    said = list[Tensor]()

    def policy(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        said.append(models["policy"](x, sigma, rows))
        return said[-1]

    loss = loss_of(
        context, {**models, "policy": policy}, replace(experience, forest=blank), advantages, some, drawn_by=drawn_by
    )
    torch.stack([velocity.sum() * 0.0 for velocity in said]).sum().backward()
    trainable.collect()
    return list(loss.metrics)


def _summed(world: World, trainable: Trainable, own: Sums) -> Sums:
    """All ranks' sums, and their gradients in the masters; those of sharded ones are summed already."""
    if world.size == 1:
        return own
    masters = [master for master in trainable.masters if not isinstance(master, DTensor)]
    largest = [value if rank == world.rank else 0.0 for value in own.largest.values() for rank in range(world.size)]
    has_gradient = [float(master.grad is not None) for master in masters]
    figures = torch.tensor([own.loss, own.rows, *own.metrics.values(), *largest, *has_gradient], device=world.device)
    world.sum_([figures])
    loss, rows, *rest = figures.tolist()
    metrics, rest = dict(zip(own.metrics, rest, strict=False)), rest[len(own.metrics) :]
    # Ranks may have used different parameters. All exchange those that any of them used; what none used keeps no
    # gradient, so that the optimizer passes over it as in one process.
    used = [master for master, ranks in zip(masters, rest[len(largest) :], strict=True) if ranks]
    for master in used:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    world.sum_([master.grad for master in used if master.grad is not None])
    by_rank = torch.tensor(rest[: len(largest)]).view(-1, world.size)
    return Sums(loss, metrics, rows, dict(zip(own.largest, by_rank.amax(1).tolist(), strict=True)))


def _larger(a: float, b: float) -> float:
    return b if b > a or math.isnan(b) else a


ALL = -1
"""In `Batch.pair`: all the pairs of that sample."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Items in the order in which they are taken; those of a unit are neighbours.

    row    LongTensor[I], the whole's edge (or leaf)
    pair   LongTensor[I], which of a leaf's pairs, or ALL; 0 for edges
    unit   LongTensor[I], 0 … units − 1, ascending
    units  how many units there are
    valid  how many units the loss's mean counts, with those that are not computed
    pairs  forwards of an item: 1, or all of a leaf's pairs
    """

    row: Tensor
    pair: Tensor
    unit: Tensor
    units: int
    valid: int
    pairs: int

    def updates(self, count: int) -> Iterator[Batch]:
        """An even share of the units for each of the updates; empty ones are left out."""
        for share in torch.tensor_split(torch.arange(self.units), count):
            if len(share):
                yield self._between(int(share[0]), int(share[-1]) + 1)

    def minibatches(self, rows: int) -> list[Batch]:
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

    def of_rank(self, first: int, count: int) -> Batch:
        """Those of the rows first … first + count − 1: one rank's own, whole units."""
        here = (self.row >= first) & (self.row < first + count)
        return self._take(here)

    @property
    def forwards(self) -> int:
        """Rows given to the policy."""
        return len(self.row) * self.pairs

    def _between(self, first: int, last: int) -> Batch:
        return self._take((self.unit >= first) & (self.unit < last))

    def _take(self, mask: Tensor) -> Batch:
        unit = dense(self.unit[mask])
        units = int(unit.max()) + 1 if len(unit) else 0
        return Batch(self.row[mask], self.pair[mask], unit, units, self.valid, self.pairs)


def training_batch(
    context: Context, experience: Experience, advantages: Advantages, iteration: int, skip: Collection[int]
) -> Batch:
    """The iteration's items. Prompt slots in `skip` are left out altogether.

    Of edges, units without an edge that is live are not computed (so they bear no KL either, as in the official codes,
    which drop them) but count in the mean. Of leaves, all with a valid score are taken: without an advantage they
    still hold the policy where it is. Order is that of the whole forest, whatever the number of ranks.
    """
    algorithm, edges = context.algorithm, experience.whole.edges
    skipped = torch.isin(edges.prompt, torch.tensor(list(skip), dtype=torch.long))
    allowed = edges.trained & advantages.advantage.ok & ~skipped
    number = _units(algorithm, experience, allowed, iteration)
    counted = allowed & (number >= 0)
    trained = (
        counted if algorithm.renoise is not None else counted & _any_live(advantages.advantage.live & counted, number)
    )
    row = trained.nonzero()[:, 0]
    pairs = 1
    pair = torch.zeros_like(row)
    unit = number[row]
    valid = len(torch.unique(number[counted]))
    if algorithm.renoise is not None:
        pairs = algorithm.renoise.times.count(experience.schedule.steps)
        if algorithm.objective.unit in ("pair", "group"):
            # a group is compared pair by pair: its unit is all its samples at one pair, not at all of them
            pair = torch.arange(pairs).repeat(len(row))
            row, unit = row.repeat_interleave(pairs), unit.repeat_interleave(pairs) * pairs + pair
            valid, pairs = valid * pairs, 1
        else:
            pair = torch.full_like(row, ALL)
    unit = dense(unit)
    units = int(unit.max()) + 1 if len(unit) else 0
    place = torch.empty(units, dtype=torch.long)
    order = Stream(context.seed, "train.order").permutation((iteration,), units)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(units)
    position, order_of_items = torch.sort(place[unit], stable=True)
    return Batch(row[order_of_items], pair[order_of_items], position, units, valid, pairs)


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


def one_of(batch: Batch, first: int) -> Batch:
    """A single item of a rank that owns none of a part: it computes it, and it counts 0."""
    zero = torch.zeros(1, dtype=torch.long)
    pair = torch.full_like(zero, ALL) if batch.pairs > 1 else zero
    return Batch(zero + first, pair, zero, 1, batch.valid, batch.pairs)


def loss_of(
    context: Context,
    models: Models,
    experience: Experience,
    advantages: Advantages,
    batch: Batch,
    old: Old | None = None,
    drawn_by: str = "policy",
) -> Loss:
    """The objective's loss of a batch, all of it this rank's own.

    models    `predictors`, of all weight sets that the objective asks for
    old       of edges, from before the iteration's first update (`recorded`); None: the weight set `drawn_by` is asked
              now, in this batch. Of the policy that is the forward that is trained, detached

    Edges' metrics have "rollout_gap" (`core.objective.old.roundings`).
    """
    algorithm = context.algorithm
    sets = {n: p if n == "policy" else detached(p) for n, p in models.items()}
    if algorithm.renoise is None:
        edges, objective = edge_batch(context, experience, advantages, batch), algorithm.edge_objective
        names = ("policy",) if old is not None else tuple(dict.fromkeys(("policy", drawn_by)))
        said = {name: _velocity(sets[name], edges) for name in names}
        if old is None:
            old = old_of(edges, said[drawn_by], context.rounding, objective.keeps_mean)
        edges = replace(edges, log_prob=old.log_prob, mean=old.mean)
        sets |= {name: told(velocity, edges.x, sets[name]) for name, velocity in said.items()}
        rows = len(batch.row)
        loss = with_velocity_norm(objective, sets, edges, rows) if context.norms else objective(sets, edges)
        return Loss(loss.value, {**loss.metrics, "rollout_gap": old.gap})
    leaves = leaf_batch(context, experience, advantages, batch)
    if context.norms:
        return with_velocity_norm(algorithm.leaf_objective, sets, leaves, len(batch.row))
    return algorithm.leaf_objective(sets, leaves)


def recorded(context: Context, models: Models, experience: Experience, advantages: Advantages, batch: Batch) -> Old:
    """The batch's edges by the policy as it stands, which has not moved since the rollout.

    Gradients are on, though none is taken: kernels are chosen by that, and these are compared with a training forward.
    """
    edges = edge_batch(context, experience, advantages, batch)
    with torch.enable_grad():
        velocity = _velocity(models["policy"], edges)
    return old_of(edges, velocity, context.rounding, context.algorithm.edge_objective.keeps_mean)


def _velocity(predict: Predict, edges: EdgeBatch) -> Tensor:
    return predict(edges.x, edges.schedule.at(edges.step), edges.rows)


def edge_batch(context: Context, experience: Experience, advantages: Advantages, batch: Batch) -> EdgeBatch:
    """The batch's edges; their log-probs (and means, where these were kept) are the rollout's."""
    forest, device, rows = experience.forest, experience.forest.nodes.device, batch.row
    edges, own = forest.edges, (rows - experience.first).to(device)
    advantage, dynamics = advantages.advantage, context.algorithm.dynamics
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
        weight=advantages.weight[rows].to(device),
        schedule=experience.schedule,
        dynamics=dynamics,
        mean=None if edges.mean is None else edges.mean[own],
        unit=batch.unit.to(device),
        columns={name: column[rows].to(device) for name, column in advantage.columns.items()},
        peers=peers,
        layout=experience.layout.take(edges.prompt[own]),
    )


def leaf_batch(context: Context, experience: Experience, advantages: Advantages, batch: Batch) -> LeafBatch:
    """The batch's clean samples with their pairs, ready for an objective."""
    renoise = context.algorithm.renoise
    assert renoise is not None
    forest, rows = experience.forest, batch.row
    own = (rows - experience.first).to(forest.nodes.device)
    x0 = upcast(forest.nodes[forest.edges.child[own]])
    slots, unit = experience.whole.edges.prompt[rows], context.algorithm.objective.unit
    ids: list[Id] = [
        (experience.iteration, slot, number)
        for slot, number in zip(slots.tolist(), experience.numbers[rows].tolist(), strict=True)
    ]
    advantage, prompt = advantages.advantage.value[rows].to(x0), slots.to(x0.device)
    layout = experience.layout.take(prompt)
    if unit not in ("pair", "group"):
        return renoise_leaves(x0, advantage, prompt, ids, renoise, context.seed, experience.schedule, layout=layout)
    t, noise = renoise.single(context.seed, ids, batch.pair.tolist(), experience.schedule, x0.shape[1:])
    group = batch.unit.to(x0.device) if unit == "group" else prompt
    return LeafBatch(x0, advantage, prompt, group, t.to(x0), noise.to(x0), layout)
