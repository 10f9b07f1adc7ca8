"""Learning from one iteration's experience: order, batches, accumulation, the optimizer's steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from tempflow.train import guards
from tempflow.train.dist import World
from tempflow.train.lessons import Lessons, lessons, loss_of, one_of
from tempflow.train.setting import Clock, Counter, Setting
from tempflow.train.step import Credit, Experience
from tempflow.train.watcher import Watcher
from tempflow.train.weightsets import Trainable, WeightSet


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

    An update's loss is a mean over its share of all valid units (`lessons` says of which). Raises GuardError before the
    weights move when no reward is valid, or when `watcher` does.
    """
    algorithm = setting.algorithm
    number = iteration + 1  # as metrics.jsonl counts
    scores = experience.credited[0]
    valid = scores.total(experience.rule(algorithm.credit).reward_weights)[1]
    guards.check_rewards(int(valid.sum()), len(scores), number)
    started = time.perf_counter()
    taught = lessons(setting, experience, given, iteration, skip)
    norms, sums = list[float](), list[Sums]()
    computed = 0
    for part in taught.parts(setting.updates):
        trainable.zero_grad()
        share = setting.updates / taught.valid
        seen = accumulate(setting, experience, given, part, share, trainable, may_pause=not norms)
        computed += part.forwards
        norm = _checked(setting, trainable, seen, number, watcher)
        if norm is None:
            continue
        if algorithm.draws is None and not optimizer.state:
            # nothing has moved yet; an iteration without spread moves nothing either
            watcher.first_ratio(number, seen.worst, algorithm.edge_objective.tightest_clip)
        optimizer.step()
        trainable.publish()
        if average is not None:
            average.update()
        norms.append(norm)
        sums.append(seen)
    clock.add("train", started)
    others = sum(name != "policy" for name in algorithm.objective.weight_sets)
    counter.train += computed
    counter.reference += computed * others
    names, rows = (sums[0].metrics, sum(s.rows for s in sums)) if sums else ((), 1)
    return {
        **{name: sum(s.metrics[name] for s in sums) / rows for name in names},
        "trained_edges": taught.forwards,
        "updates": len(norms),
        "loss": sum(s.loss for s in sums) / max(1, len(sums)),
        "grad_norm": max(norms, default=0.0),
        "log_ratio_max": max((s.worst for s in sums), default=0.0),
    }


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


@dataclass(frozen=True)
class Sums:
    """Over all ranks' items of an update: its loss, the largest |log ratio|, sums of the metrics over `rows` rows."""

    loss: float
    worst: float
    metrics: Mapping[str, float]
    rows: float


def accumulate(
    setting: Setting,
    experience: Experience,
    given: Credit,
    part: Lessons,
    share: float,
    trainable: Trainable,
    may_pause: bool,
) -> Sums:
    """Adds the gradient of `share` · Σ loss over the units of `part` to the masters, all ranks' together."""
    sharded = setting.shards is not None
    own = part.of(experience.first, len(experience.forest.edges))
    if not len(own.row):
        if may_pause:
            setting.pause()
        return _summed(setting.world, trainable, _idle(setting, experience, given, part, trainable), sharded)
    batches = own.batches(setting.train_rows)
    sums: dict[str, float] = {}
    worst, total, rows = 0.0, 0.0, 0
    for number, batch in enumerate(batches):
        if may_pause:
            setting.pause()
        if setting.shards is not None:
            setting.shards.before_backward(last=number + 1 == len(batches))
        loss = loss_of(setting, experience, given, batch)
        value = loss.value * (batch.units * share)
        value.backward()
        trainable.collect()
        total += value.item()
        rows += len(batch.row)
        if "log_ratio_abs" in loss.metrics:
            worst = max(worst, loss.metrics["log_ratio_abs"].max().item())
        for name, column in loss.metrics.items():
            sums[name] = sums.get(name, 0.0) + column.sum().item()
    return _summed(setting.world, trainable, Sums(total, worst, sums, rows), sharded)


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
    return Sums(0.0, 0.0, dict.fromkeys(names, 0.0), 0)


def _summed(world: World, trainable: Trainable, own: Sums, sharded: bool) -> Sums:
    """All ranks' sums, and their gradients in the masters; a sharded network's gradients are summed already."""
    if world.size == 1:
        return own
    worst = [own.worst if rank == world.rank else 0.0 for rank in range(world.size)]
    given = [] if sharded else [float(m.grad is not None) for m in trainable.masters]
    figures = torch.tensor([own.loss, own.rows, *own.metrics.values(), *worst, *given], device=world.device)
    world.sum_([figures])
    loss, rows, *rest = figures.tolist()
    metrics, rest = dict(zip(own.metrics, rest, strict=False)), rest[len(own.metrics) :]
    # Ranks may have used different parameters. All exchange those that any of them used; what none used keeps no
    # gradient, so that the optimizer passes over it as in one process.
    used = [m for m, ranks in zip(trainable.masters, rest[world.size :], strict=False) if ranks]
    for master in used:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    world.sum_([master.grad for master in used if master.grad is not None])
    return Sums(loss, max(rest[: world.size]), metrics, rows)
