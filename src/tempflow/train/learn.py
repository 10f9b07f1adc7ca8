"""Learning from one iteration's experience: order, batches, accumulation, the optimizer's steps."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tempflow.core.objective.old import Old
from tempflow.train import guards
from tempflow.train.dist import World
from tempflow.train.lessons import Lessons, lessons, loss_of, one_of, recorded
from tempflow.train.setting import Clock, Counter, Setting
from tempflow.train.step import Credit, Experience
from tempflow.train.watcher import Watcher
from tempflow.train.weightsets import Trainable, WeightSet, holds_policy


def update(
    setting: Setting,
    experience: Experience,
    given: Credit,
    trainable: Trainable,
    average: WeightSet | None,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    counter: Counter,
    clock: Clock,
    watcher: Watcher,
    skip: Collection[int] = (),
) -> dict[str, float]:
    """Trains on one iteration's lessons; returns its metrics.

    An update's loss is a mean over its share of all valid units (`lessons` says of which). The old log-probs of edges
    come from forwards in the batches that train them: for the first update from the training forward itself, for later
    ones from a forward before any weight moves. Raises GuardError before the weights move when no reward is valid, or
    when `watcher` does.
    """
    algorithm = setting.algorithm
    number = iteration + 1  # as metrics.jsonl counts
    scores = experience.credited[0]
    valid = scores.total(experience.rule(algorithm.credit).reward_weights)[1]
    guards.check_rewards(int(valid.sum()), len(scores), number)
    started = time.perf_counter()
    taught = lessons(setting, experience, given, iteration, skip)
    norms, sums = list[float](), list[Sums]()
    computed, parts = 0, list(taught.parts(setting.updates))
    drawn_by = _drawn_by(setting, trainable)
    old: list[list[Old] | None] = [None] * len(parts)
    if algorithm.draws is None and drawn_by == "policy":
        old[1:] = [_recorded(setting, experience, given, part) for part in parts[1:]]
        counter.old += sum(part.forwards for part in parts[1:])
    for part, before in zip(parts, old, strict=True):
        trainable.zero_grad()
        share = setting.updates / taught.valid
        seen = accumulate(setting, experience, given, part, share, trainable, not norms, before, drawn_by)
        computed += part.forwards
        norm = _checked(setting, trainable, seen, number, watcher)
        if norm is None:
            continue
        if "rollout_gap" in seen.largest:
            watcher.first_ratio(number, seen.largest["rollout_gap"], (setting.rollout_rows, setting.train_rows))
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
    if algorithm.draws is None and drawn_by not in ("policy", *others):
        counter.old += computed
    names, rows = (sums[0].metrics, sum(s.rows for s in sums)) if sums else ((), 1)
    asked = LARGEST if algorithm.draws is None else {"log_ratio_abs": LARGEST["log_ratio_abs"]}
    largest = {kept: max((s.largest.get(name, 0.0) for s in sums), default=0.0) for name, kept in asked.items()}
    return {
        **{name: sum(s.metrics[name] for s in sums) / rows for name in names},
        "trained_edges": taught.forwards,
        "updates": len(norms),
        "loss": sum(s.loss for s in sums) / max(1, len(sums)),
        "grad_norm": max(norms, default=0.0),
        **largest,
    }


def _drawn_by(setting: Setting, trainable: Trainable) -> str:
    """The weight set whose forward gives old log-probs: the one that rolled out, or the policy where the two are one
    before the first update."""
    name = setting.algorithm.sampler
    return "policy" if name == "policy" or holds_policy(setting.sets[name], trainable) else name


def _recorded(setting: Setting, experience: Experience, given: Credit, part: Lessons) -> list[Old]:
    """Old log-probs of this rank's items of a later update, in the batches in which it will train them."""
    own, seen = part.of(experience.first, len(experience.forest.edges)), list[Old]()
    for batch in own.batches(setting.train_rows) if len(own.row) else ():
        setting.pause()
        seen.append(recorded(setting, experience, given, batch))
    return seen


def _checked(setting: Setting, trainable: Trainable, seen: Sums, iteration: int, watcher: Watcher) -> float | None:
    """The gradients' norm before they were clipped; None when the step is to be dropped, as something is not finite."""
    try:
        guards.check_finite_loss(torch.tensor(seen.loss), iteration)
        norm = guards.clip_gradients(trainable.masters, setting.max_grad_norm, iteration)
    except guards.NonFiniteError as fault:
        watcher.drops(iteration, fault)
        trainable.zero_grad()
        return None
    watcher.drops(iteration, None)
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
    setting: Setting,
    experience: Experience,
    given: Credit,
    part: Lessons,
    share: float,
    trainable: Trainable,
    may_pause: bool,
    old: Sequence[Old] | None = None,
    drawn_by: str = "policy",
) -> Sums:
    """Adds the gradient of `share` · Σ loss over the units of `part` to the masters, all ranks' together.

    old: of each of this rank's batches of edges; None: `drawn_by` is asked in it, as for `loss_of`.
    """
    sharded = setting.shards is not None
    own = part.of(experience.first, len(experience.forest.edges))
    if not len(own.row):
        if may_pause:
            setting.pause()
        return _summed(setting.world, trainable, _idle(setting, experience, given, part, trainable), sharded)
    batches = own.batches(setting.train_rows)
    sums, largest = dict[str, float](), dict[str, float]()
    total, rows = 0.0, 0
    for number, batch in enumerate(batches):
        if may_pause:
            setting.pause()
        if setting.shards is not None:
            setting.shards.before_backward(last=number + 1 == len(batches))
        loss = loss_of(setting, experience, given, batch, None if old is None else old[number], drawn_by)
        value = loss.value * (batch.units * share)
        value.backward()
        trainable.collect()
        total += value.item()
        rows += len(batch.row)
        for name, column in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + column.sum().item()
            if name in LARGEST:
                largest[name] = _larger(largest.get(name, 0.0), column.max().item())
    return _summed(setting.world, trainable, Sums(total, sums, rows, largest), sharded)


def _idle(setting: Setting, experience: Experience, given: Credit, part: Lessons, trainable: Trainable) -> Sums:
    """What a rank does that owns no item of a part: a backward that adds 0, as all ranks take part in every exchange.

    It starts from zeros: a rank may own nothing because its latents broke, and 0 times what is not finite is not 0.
    """
    edges, schedule = experience.forest.edges, experience.schedule
    some = one_of(part, experience.first + int(edges.trained.nonzero()[0, 0]))
    with torch.no_grad():  # only the metrics' names are wanted, as ranks exchange metrics by place
        names = loss_of(setting, experience, given, some).metrics
    if setting.shards is not None:
        setting.shards.before_backward(last=True)
    x, sigma = torch.zeros_like(experience.forest.nodes[:1]), schedule.at(torch.zeros_like(edges.step[:1]))
    velocity = experience.models["policy"](x, sigma, edges.prompt[:1])
    (velocity.sum() * 0.0).backward()
    trainable.collect()
    return Sums(0.0, dict.fromkeys(names, 0.0), 0, {name: 0.0 for name in names if name in LARGEST})


def _summed(world: World, trainable: Trainable, own: Sums, sharded: bool) -> Sums:
    """All ranks' sums, and their gradients in the masters; a sharded network's gradients are summed already."""
    if world.size == 1:
        return own
    largest = [value if rank == world.rank else 0.0 for value in own.largest.values() for rank in range(world.size)]
    given = [] if sharded else [float(m.grad is not None) for m in trainable.masters]
    figures = torch.tensor([own.loss, own.rows, *own.metrics.values(), *largest, *given], device=world.device)
    world.sum_([figures])
    loss, rows, *rest = figures.tolist()
    metrics, rest = dict(zip(own.metrics, rest, strict=False)), rest[len(own.metrics) :]
    # Ranks may have used different parameters. All exchange those that any of them used; what none used keeps no
    # gradient, so that the optimizer passes over it as in one process.
    used = [m for m, ranks in zip(trainable.masters, rest[len(largest) :], strict=False) if ranks]
    for master in used:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    world.sum_([master.grad for master in used if master.grad is not None])
    by_rank = torch.tensor(rest[: len(largest)]).view(-1, world.size)
    return Sums(loss, metrics, rows, dict(zip(own.largest, by_rank.amax(1).tolist(), strict=True)))


def _larger(a: float, b: float) -> float:
    return b if b > a or math.isnan(b) else a
