"""The updates of one iteration: phase by phase, in which order and minibatches, and the optimizers' steps."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tempflow.algorithms.lesson import POLICY, Batch, Grown, Lesson, Models, Phase
from tempflow.core.objective.edges import Loss
from tempflow.core.objective.old import Old
from tempflow.core.rng import Stream
from tempflow.models.finite import decoded, decoded_pixels
from tempflow.request import Prompt
from tempflow.rewards.protocol import differentiable_of
from tempflow.rewards.safe import faults
from tempflow.rewards.scoring import Scoring, as_scored
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Advantages, Experience, bound, laid_out
from tempflow.train.guards import GuardError, Guards, NonFiniteError, check_finite_loss, check_rewards, clip_gradients
from tempflow.train.parallel import World
from tempflow.train.weights import Learner, Trainable, holds_policy


def predictors(context: Context, prompts: Sequence[Prompt], phase: Phase | None = None) -> Models:
    """Of the policy and of every other network, for this rank's prompt slots of the iteration, with the guidance that
    the phase asks them with; without a phase, the run's."""
    slots, networks = context.world.block(len(prompts)), {POLICY: None, **context.sets}
    predictor = bound(context, prompts, slots)
    models = {name: predictor(network) for name, network in networks.items()}
    for name, guidance in ({} if phase is None else phase.guidance).items():
        own = replace(context, guidance=context.guidance.at(guidance))
        models[name] = bound(own, prompts, slots)(networks[name])
    return models


@dataclass(eq=False)
class Scorer:
    """The run's rewards for losses that have samples scored while they are computed: of this rank's prompt slots."""

    context: Context
    prompts: Sequence[Prompt]
    clock: Clock
    valid: bool = False
    moments: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `core.objective.noises.Judge`."""
        context, started, slots = self.context, time.perf_counter(), rows.tolist()
        owner = [self.prompts[slot] for slot in slots]
        with (
            torch.no_grad(),
            Scoring(context.rewards, context.pause, context.overlap, context.compose or as_scored) as scoring,
        ):
            seen = decoded(context.model, x, context.size)
            texts, metadata = [p.text for p in owner], [p.told for p in owner]
            scores = scoring.submit(seen.media, texts, metadata, slots, seen.ok).scores()
        value, ok = scores.total(context.algorithm.credit.reward_weights)
        self._told(value, ok, started)
        return value.to(x.device), ok.to(x.device)

    def tell(self, counter: Counter) -> None:
        """Counts what all ranks had scored since the last time. All of them call it."""
        world = self.context.world
        figures = self.moments if world.size == 1 else self.moments.to(world.device)
        world.sum_([figures])
        count, total, squares = figures.tolist()
        counter.scores, counter.score_sum = counter.scores + int(count), counter.score_sum + total
        counter.score_squares += squares
        self.moments = torch.zeros_like(self.moments)

    def through(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `core.objective.noises.GradientJudge`: the sum by weight of the rewards that train, each in its own
        scores with gradients. Raises ValueError for a decoder or a reward that has none."""
        context, started, slots = self.context, time.perf_counter(), rows.tolist()
        held = x.clone()
        pixels, ok = decoded_pixels(context.model, held, context.size)
        owner = [self.prompts[slot] for slot in slots]
        texts, metadata = [p.text for p in owner], [p.told for p in owner]
        weights, total = context.algorithm.credit.reward_weights, torch.zeros(len(x), device=x.device)
        for reward in context.rewards:
            weight, score = 1.0 if weights is None else weights.get(reward.name, 0.0), differentiable_of(reward)
            if not weight:
                continue
            if score is None:
                raise ValueError(f"reward {reward.name!r} has no gradients; nearest valid: one that is differentiable")
            value = score(pixels, texts, metadata).to(x.device, torch.float32)
            ok = ok & value.isfinite()
            total = total + weight * value
        total = torch.where(ok, total, torch.zeros_like(total))
        if held.requires_grad:  # 0 times what is not finite is not 0
            held.register_hook(lambda grad: torch.where(ok.view(-1, *[1] * (grad.dim() - 1)), grad, 0.0))
        self._told(total.detach(), ok, started)
        return total, ok

    def _told(self, value: Tensor, ok: Tensor, started: float) -> None:
        self.valid |= bool(ok.any())
        good = value[ok].double().cpu()
        self.moments += torch.stack([ok.sum().cpu().double(), good.sum(), good.square().sum()])
        self.clock.add("reward", started)

    def check(self, iteration: int) -> None:
        """Raises GuardError when no score of any rank was valid."""
        if not self.context.world.any(self.valid):
            why = faults(self.context.rewards) or ["the rewards said so themselves (None, NaN or infinity)"]
            raise GuardError(
                f"iteration {iteration}: all rewards failed, so there is nothing to learn from: {'; '.join(why)}"
            )


def lessons(
    context: Context,
    prompts: Sequence[Prompt],
    iteration: int,
    experience: Experience | None,
    advantages: Sequence[Advantages],
    skip: Collection[int] = (),
) -> list[Lesson]:
    """What each phase learns from: the iteration's experience as it sees it, with its own advantages, where there was a
    rollout. Prompt slots in `skip` are left out altogether. Raises GuardError when no reward is valid."""
    slots = context.world.block(len(prompts))
    lesson = Lesson(
        grown=None,
        slots=slots,
        prompts=len(prompts),
        iteration=iteration,
        schedule=context.algorithm.schedule(iteration, context.schedule),
        shape=context.model.noise_shape(context.size),
        layout=laid_out(context, prompts, slots),
        seed=context.seed,
        device=context.model.device,
        skip=skip,
        rounding=context.rounding,
        norms=context.norms,
    )
    if experience is None:
        return [lesson] * len(context.algorithm.phases)
    scores = experience.of(context.algorithm.first).credited[0]
    valid = scores.total(experience.rule(context.algorithm.credit).reward_weights)[1]
    check_rewards(int(valid.sum()), len(scores), iteration + 1)
    found = list[Lesson]()
    for phase, given in zip(context.algorithm.phases, advantages, strict=True):
        seen = experience.of(phase)
        grown = Grown(
            forest=seen.forest,
            whole=seen.whole,
            first=seen.first,
            numbers=seen.numbers,
            dynamics=context.algorithm.dynamics,
            advantage=given.advantage,
            weight=given.weight,
        )
        norms = context.norms and "reference" in phase.networks and phase.role == POLICY
        found.append(replace(lesson, grown=grown, norms=norms))
    return found


def learn(
    context: Context,
    prompts: Sequence[Prompt],
    lessons: Sequence[Lesson],
    learners: Mapping[str, Learner],
    counter: Counter,
    clock: Clock,
    guards: Guards,
) -> dict[str, float]:
    """All phases of an iteration, one after the other, turn by turn; returns its metrics, those of the policy's first
    phase without a prefix, of others as "role/name", and of a role's second phase as "role.2/name".

    Where there are several, whatever stops one of them takes all roles back to where the iteration found them: a
    loss or a gradient that is not finite ends the iteration's updates, so that no role moves without the others. So
    does a fault, or an interruption, while a loss has samples scored. Raises GuardError when `guards` does.
    """
    phases, turns, found = context.algorithm.phases, context.algorithm.turns, dict[int, list[dict[str, float]]]()
    models = [predictors(context, prompts, phase) for phase in phases]
    several = len(phases) * turns > 1
    before = {name: learner.snapshot() for name, learner in learners.items() if context.algorithm.taken_back}
    judge, scored = Scorer(context, prompts, clock), counter.decodes
    try:
        for turn in range(turns):
            for place, (phase, lesson) in enumerate(zip(phases, lessons, strict=True)):
                learner, decodes = learners[phase.role], counter.decodes
                lesson = replace(lesson, turn=turn, judge=judge, spread=counter.spread)
                told = update(context, phase, models[place], lesson, learner, counter, clock, guards, place, several)
                if counter.decodes > decodes:
                    judge.tell(counter)
                found.setdefault(place, []).append(told)
        if counter.decodes > scored:
            judge.check(lessons[0].iteration + 1)
    except BaseException as fault:
        for name, state in before.items():
            learners[name].restore(state)
        if not isinstance(fault, _DroppedError):
            raise
        return {"trained_edges": 0, "updates": 0, "loss": 0.0, "grad_norm": 0.0}
    return {
        _prefix(phases, place) + name: value
        for place in sorted(found, key=lambda place: place != context.algorithm.place)
        for name, value in _of_turns(found[place], phases[place]).items()
    }


def _prefix(phases: Sequence[Phase], place: int) -> str:
    """Of the names of that phase's metrics."""
    role = phases[place].role
    number = sum(phase.role == role for phase in phases[: place + 1])
    return ("" if role == POLICY else f"{role}/") if number == 1 else f"{role}.{number}/"


def _of_turns(told: Sequence[dict[str, float]], phase: Phase) -> dict[str, float]:
    """A phase's metrics of all turns: counts add up, the largest values stay the largest, others are means."""
    largest = {"grad_norm", *phase.largest.values()}
    join = {"trained_edges": sum, "updates": sum} | dict.fromkeys(largest, max)
    names = dict.fromkeys(name for one in told for name in one)
    return {name: join.get(name, _mean)([one[name] for one in told if name in one]) for name in names}


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


class _DroppedError(Exception):
    """A step was dropped, and others have been taken or will be."""


def update(
    context: Context,
    phase: Phase,
    models: Models,
    lesson: Lesson,
    learner: Learner,
    counter: Counter,
    clock: Clock,
    guards: Guards,
    place: int = 0,
    several: bool = False,
) -> dict[str, float]:
    """One phase's updates in an iteration; its metrics. `place`: which of the phases it is; `several`: there are
    others, so that a dropped step ends them all.

    An update's loss is a mean over its share of all valid units (`Phase.items` says of which). The old log-probs of
    edges come from forwards in the batches that train them: for the first update from the training forward itself, for
    later ones from a forward before any weight moves. Raises GuardError when `guards` does.
    """
    trainable, number = learner.trainable, lesson.iteration + 1  # as metrics.jsonl counts
    started = time.perf_counter()
    asked = phase.updates or context.updates
    order = (lesson.iteration, place, lesson.turn) if lesson.turn else (lesson.iteration, place)
    batch = shuffled(phase.items(lesson), lesson.seed, order if place or lesson.turn else (lesson.iteration,))
    norms, sums = list[float](), list[Sums]()
    computed, parts = 0, list(batch.updates(asked))
    teaching = _Teaching(context, phase, models, lesson, trainable, drawn_by(context, phase, trainable))
    old: list[list[Old] | None] = [None] * len(parts)
    if teaching.drawn_by == POLICY:
        old[1:] = [teaching.recorded(part) for part in parts[1:]]
        counter.old += sum(part.forwards for part in parts[1:])
    for part, before in zip(parts, old, strict=True):
        trainable.zero_grad()
        seen = teaching.accumulate(part, asked / batch.valid, several or not norms, before)
        spent = phase.spent(part, lesson.schedule.steps)
        computed += part.forwards
        counter.reference += spent.forwards
        counter.alone += spent.alone
        counter.decodes += spent.leaves
        counter.reward_calls += spent.leaves * len(context.rewards)
        norm = _checked(context, trainable, seen, number, guards)
        if norm is None:
            if several:
                raise _DroppedError
            continue
        if "rollout_gap" in seen.largest:
            guards.first_ratio(number, seen.largest["rollout_gap"], (context.rollout_rows, context.train_rows))
        learner.step()
        norms.append(norm)
        sums.append(seen)
    clock.add("train", started)
    counter.train += computed
    if teaching.drawn_by not in ("", POLICY, *phase.networks):
        counter.old += computed
    kept = phase.largest.items()
    largest = {shown: max((s.largest.get(name, 0.0) for s in sums), default=0.0) for name, shown in kept}
    return {
        **_means(sums),
        "trained_edges": batch.forwards,
        "updates": len(norms),
        "loss": sum(s.loss for s in sums) / max(1, len(sums)),
        "grad_norm": max(norms, default=0.0),
        **largest,
    }


def shuffled(batch: Batch, seed: int, of: tuple[int, ...]) -> Batch:
    """The items with their units in a drawn order, the same whatever the number of ranks."""
    place = torch.empty(batch.units, dtype=torch.long)
    order = Stream(seed, "train.order").permutation(of, batch.units)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(batch.units)
    position, taken = torch.sort(place[batch.unit], stable=True)
    return replace(batch, row=batch.row[taken], pair=batch.pair[taken], unit=position)


def drawn_by(context: Context, phase: Phase, trainable: Trainable) -> str:
    """The network whose forward gives old log-probs: the one that rolled out, or the policy where the two are one
    before the first update; "" where none are wanted. The same on all ranks, each of which may hold another part of the
    weights."""
    name = phase.drawn_by(context.algorithm.sampler)
    if name in ("", POLICY):
        return name
    return name if context.world.any(not holds_policy(context.sets[name], trainable)) else POLICY


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


@dataclass(frozen=True)
class Sums:
    """Over all ranks' items of an update: its loss, the metrics' sums with how many samples these are of, and the
    largest value of those that the phase names and that are there; NaN where one of them is."""

    loss: float
    metrics: Mapping[str, tuple[float, float]]
    largest: Mapping[str, float]


def _means(sums: Sequence[Sums]) -> dict[str, float]:
    """The metrics of an iteration's updates; one that no sample has is left out."""
    found = dict[str, float]()
    for name in sums[0].metrics if sums else ():
        total, count = (sum(part) for part in zip(*(s.metrics[name] for s in sums), strict=True))
        if count:
            found[name] = total / count
    return found


@dataclass(frozen=True, eq=False)
class _Teaching:
    """What the updates of one phase share. `drawn_by`: as for `Phase.loss`."""

    context: Context
    phase: Phase
    models: Models
    lesson: Lesson
    trainable: Trainable
    drawn_by: str

    def recorded(self, part: Batch) -> list[Old]:
        """Old log-probs of this rank's items of a later update, in the batches in which it will train them."""
        own, found = self.phase.own(self.lesson, part), list[Old]()
        with self.context.in_step():
            for batch in own.minibatches(self.context.train_rows) if len(own.row) else ():
                self.context.pause()
                found.append(self.phase.recorded(self.models, self.lesson, batch))
        return found

    def accumulate(self, part: Batch, share: float, may_pause: bool, old: Sequence[Old] | None = None) -> Sums:
        """Adds the gradient of `share` · Σ loss over the units of `part` to the masters, all ranks' together.

        old: of each of this rank's batches of edges; None: `drawn_by` is asked in it.
        """
        context, trainable, own = self.context, self.trainable, self.phase.own(self.lesson, part)
        batches = own.minibatches(context.train_rows) if len(own.row) else []
        # a sharded network's ranks compute together, minibatch for minibatch; others meet once, behind the last
        count = len(batches) if context.shards is None else context.world.most(len(batches))
        sums, largest, total = dict[str, tuple[float, float]](), dict[str, float](), 0.0
        for number in range(max(1, count)):
            if may_pause:
                context.pause()
            if number >= len(batches):
                names = self._idle(part)
                if not batches:
                    sums = dict.fromkeys(names, (0.0, 0.0))
                    largest = {name: 0.0 for name in names if name in self.phase.largest}
                continue
            batch = batches[number]
            loss = self._loss(self.models, self.lesson, batch, None if old is None else old[number])
            value = loss.value * (batch.units * share)
            (value * trainable.loss_scale).backward()
            trainable.collect()
            total += value.item()
            for name, (added, count) in loss.sums().items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + added, before[1] + count)
                if name in self.phase.largest:
                    largest[name] = _larger(largest.get(name, 0.0), loss.metrics[name].max().item())
        return _summed(context.world, trainable, Sums(total, sums, largest))

    def _loss(self, models: Models, lesson: Lesson, batch: Batch, old: Old | None = None) -> Loss:
        """Of a minibatch. Where noises are walked, how many forwards there are hangs on where the batch's rows stop."""
        with nullcontext() if self.phase.keeps else self.context.in_step():
            return self.phase.loss(models, lesson, batch, old, self.drawn_by)

    def _idle(self, part: Batch) -> list[str]:
        """What a rank computes where others have a minibatch and it has none: a row that counts 0, by the same
        forwards, and a backward that adds exactly 0. Returns the names of the metrics, which ranks exchange by place.

        It starts from what the role says, not from the loss: 0 times what is not finite is not 0.
        """
        lesson, row = self.phase.idle(self.lesson)
        said, role = list[Tensor](), self.phase.role

        def learning(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            said.append(self.models[role](x, sigma, rows))
            return said[-1]

        loss = self._loss({**self.models, role: learning}, lesson, part.one(row))
        silent = [torch.where(out.isfinite(), out, 0.0).sum() * 0.0 for out in said if out.requires_grad]
        torch.stack(silent).sum().backward()
        self.trainable.collect()
        return list(loss.metrics)


def _summed(world: World, trainable: Trainable, own: Sums) -> Sums:
    """All ranks' sums, and their gradients in the masters; those of sharded ones are summed already."""
    if world.size == 1:
        return own
    masters = [master for master in trainable.masters if not isinstance(master, DTensor)]
    largest = [value if rank == world.rank else 0.0 for value in own.largest.values() for rank in range(world.size)]
    has_gradient = [float(master.grad is not None) for master in masters]
    totals = [figure for pair in own.metrics.values() for figure in pair]
    figures = torch.tensor([own.loss, *totals, *largest, *has_gradient], device=world.device)
    world.sum_([figures])
    loss, *rest = figures.tolist()
    pairs, rest = zip(rest[: len(totals) : 2], rest[1 : len(totals) : 2], strict=True), rest[len(totals) :]
    metrics = dict(zip(own.metrics, pairs, strict=True))
    # Ranks may have used different parameters. All exchange those that any of them used; what none used keeps no
    # gradient, so that the optimizer passes over it as in one process.
    used = [master for master, ranks in zip(masters, rest[len(largest) :], strict=True) if ranks]
    for master in used:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
    world.sum_([master.grad for master in used if master.grad is not None])
    by_rank = torch.tensor(rest[: len(largest)]).view(-1, world.size)
    return Sums(loss, metrics, dict(zip(own.largest, by_rank.amax(1).tolist(), strict=True)))


def _larger(a: float, b: float) -> float:
    return b if b > a or math.isnan(b) else a
