"""The three kinds of phases: from a rollout's edges, from clean samples, from starting noises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tempflow.algorithms.lesson import ALL, POLICY, Batch, Grown, Lesson, Models, Seeded
from tempflow.core.cost import Cost
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.forest import Forest
from tempflow.core.groups import dense
from tempflow.core.objective.edges import EdgeBatch, Loss, Objective, Peers, Predict
from tempflow.core.objective.leaves import LeafBatch, LeafObjective, leaf_batch, renoise_leaves
from tempflow.core.objective.noises import NoiseBatch, NoiseObjective
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.old import Old, detached, old_of, told
from tempflow.core.plan import Plan
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.rollout import skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.times import Id
from tempflow.core.weight import Weight, uniform

Units = Callable[[Forest, int], Tensor]
"""(whole forest, iteration) -> LongTensor [E]: edges with equal numbers share a chunk; −1 is left out this time."""


class _FromRollout:
    """What phases share that learn from a rollout."""

    @property
    def networks(self) -> tuple[str, ...]:
        raise NotImplementedError

    @property
    def guidance(self) -> Mapping[str, float]:
        """They are compared where the run's guidance drew."""
        return {}

    def spent(self, batch: Batch, steps: int) -> Cost:
        """Every other network is asked where the one that learns is."""
        return Cost(batch.forwards * (len(self.networks) - 1), 0, batch.forwards)

    def own(self, lesson: Lesson, batch: Batch) -> Batch:
        first, count = lesson.rollout.first, len(lesson.rollout.forest.edges)
        return batch.where((batch.row >= first) & (batch.row < first + count))

    def idle(self, lesson: Lesson) -> tuple[Lesson, int]:
        """The rank's first trained edge, all states 0: a rank may own nothing because its latents broke, and 0 times
        what is not finite is not 0."""
        at = lesson.rollout
        blank = replace(at.forest, nodes=torch.zeros_like(at.forest.nodes[:1]).expand_as(at.forest.nodes))
        row = at.first + int(at.forest.edges.trained.nonzero()[0, 0])
        return replace(lesson, grown=replace(at, forest=blank)), row


@dataclass(frozen=True)
class EdgePhase(_FromRollout):
    """The policy learns from the stochastic edges of its rollout.

    objective  the loss of a batch of edges
    weight     loss weight of every edge
    units      which edges share a chunk, for an objective whose unit is one
    """

    objective: Objective
    weight: Weight = uniform
    units: Units | None = None
    updates: int | None = None
    role = POLICY

    @property
    def networks(self) -> tuple[str, ...]:
        return self.objective.weight_sets

    @property
    def keeps(self) -> tuple[str, ...]:
        means = {"means": self.objective.keeps_peers, "old means": self.objective.keeps_mean}
        return ("edges", *(name for name, asked in means.items() if asked))

    @property
    def by_stream(self) -> bool:
        return self.objective.by_stream

    def drawn_by(self, sampler: str) -> str:
        return sampler

    @property
    def largest(self) -> Mapping[str, str]:
        return {"log_ratio_abs": "log_ratio_max", "rollout_gap": "rollout_gap_max"}

    def taught(self, objective: Any) -> EdgePhase:
        return replace(self, objective=objective)

    def seeded(self, seed: int) -> EdgePhase:
        return replace(self, units=self.units.seeded(seed)) if isinstance(self.units, Seeded) else self

    def check(self, steps: int, plan: Plan | None, dynamics: Dynamics | None, schedule: Schedule) -> None:
        """Raises ValueError for no trained edge, trained steps without noise, as a ratio of densities needs some, a
        chunk objective without units, or whatever the objective's own check finds."""
        trained = sorted({i for i, use in zip(plan.step, plan.trained, strict=True) if use}) if plan else []
        if not trained:
            raise ValueError("plan: trains none of its edges; nearest valid: a plan with a stochastic, trained edge")
        if dynamics is None or not dynamics.stochastic:
            raise ValueError(
                f"dynamics: {dynamics} draws no noise, and a ratio objective needs the density of a noisy step; "
                "nearest valid: FlowSDE(noise_level=0.7)"
            )
        spreads = dynamics.spreads(schedule, torch.tensor(trained)).tolist()
        silent = [i for i, spread in zip(trained, spreads, strict=True) if not spread]
        if silent:
            noisy = [i for i in trained if i not in silent]
            raise ValueError(
                f"plan: trains step {silent[0]}, where {dynamics} has no noise; nearest valid: train {noisy}"
            )
        if self.objective.unit == "chunk" and self.units is None:
            raise ValueError("units: None, and the objective's unit is a chunk; nearest valid: core.units.whole_path")
        self.objective.check(dynamics)
        if dynamics.corruption.prediction == "logits" and plan is not None:
            self.weight(skeleton([plan], [0]), schedule, dynamics)  # one that reads a mean or a std says so

    def cost(self, steps: int, plan: Plan | None) -> Cost:
        trained = 0 if plan is None else plan.cost().trained_edges
        return Cost(trained * (len(self.networks) - 1), 0, trained)

    def old_forwards(self, trained: int, updates: int, drawn_by: str) -> int:
        """The first update's come with its training forward, later ones' from before any weight moves. A sampler that
        is not the policy any more is asked at every edge, unless the objective asks it anyway."""
        if drawn_by not in (POLICY, *self.networks):
            return trained
        if updates == 1 or self.objective.unit == "edge":
            return trained - -(-trained // updates)
        return trained  # which units are how large is not known before the rollout

    def view(self, forest: Forest) -> Forest:
        return forest

    def weigh(self, whole: Forest, schedule: Schedule, dynamics: Dynamics | None) -> Tensor:
        assert dynamics is not None
        return self.weight(whole, schedule, dynamics)

    def items(self, lesson: Lesson) -> Batch:
        """Units without an edge that is live are not computed (so they bear no KL either, as in the official codes,
        which drop them) but count in the mean."""
        at = lesson.rollout
        number = torch.arange(len(at.whole.edges))
        if self.objective.unit == "chunk" and self.units is not None:
            number = self.units(at.whole, lesson.iteration)
        counted = _allowed(lesson, at) & (number >= 0)
        row = (counted & _any_live(at.advantage.live & counted, number)).nonzero()[:, 0]
        return _batch(row, torch.zeros_like(row), number[row], len(torch.unique(number[counted])), 1)

    def loss(
        self, models: Models, lesson: Lesson, batch: Batch, old: Old | None = None, drawn_by: str = POLICY
    ) -> Loss:
        """Its metrics have "rollout_gap" (`core.objective.old.roundings`)."""
        edges, objective = self.batch(lesson, batch), self.objective
        sets = {n: p if n == POLICY else detached(p) for n, p in models.items()}
        names = (POLICY,) if old is not None else tuple(dict.fromkeys((POLICY, drawn_by)))
        said = {name: _velocity(sets[name], edges) for name in names}
        if old is None:
            old = old_of(edges, said[drawn_by], lesson.rounding, objective.keeps_mean)
        edges = replace(edges, log_prob=old.log_prob, mean=old.mean)
        sets |= {name: told(velocity, edges.x, sets[name]) for name, velocity in said.items()}
        rows = len(batch.row)
        loss = with_velocity_norm(objective, sets, edges, rows) if lesson.norms else objective(sets, edges)
        return replace(loss, metrics={**loss.metrics, "rollout_gap": old.gap})

    def recorded(self, models: Models, lesson: Lesson, batch: Batch) -> Old:
        """Gradients are on, though none is taken: kernels are chosen by that, and these are compared with a training
        forward."""
        edges = self.batch(lesson, batch)
        with torch.enable_grad():
            velocity = _velocity(models[POLICY], edges)
        return old_of(edges, velocity, lesson.rounding, self.objective.keeps_mean)

    def batch(self, lesson: Lesson, batch: Batch) -> EdgeBatch:
        """The edges of those items; their log-probs (and means, where these were kept) are the rollout's."""
        at, rows = lesson.rollout, batch.row
        forest, device = at.forest, at.forest.nodes.device
        edges, own = forest.edges, (rows - at.first).to(device)
        advantage, dynamics = at.advantage, at.dynamics
        assert dynamics is not None
        peers = None
        if advantage.peer is not None and edges.mean is not None:
            peer = (advantage.peer[rows] - at.first).to(device)
            peers = Peers(forest.nodes[edges.parent[peer]], edges.mean[peer], edges.scale[peer])
        return EdgeBatch(
            x=forest.nodes[edges.parent[own]],
            y=forest.nodes[edges.child[own]],
            step=edges.step[own],
            scale=edges.scale[own],
            rows=edges.prompt[own],
            log_prob=edges.log_prob[own],
            advantage=advantage.value[rows].to(device),
            weight=at.weight[rows].to(device),
            schedule=lesson.schedule,
            dynamics=dynamics,
            mean=None if edges.mean is None else edges.mean[own],
            unit=batch.unit.to(device),
            columns={name: column[rows].to(device) for name, column in advantage.columns.items()},
            peers=peers,
            layout=lesson.layout.take(edges.prompt[own]),
        )


@dataclass(frozen=True)
class LeafPhase(_FromRollout):
    """A role learns from the rollout's clean samples (or offline ones), re-noised: the forward-process family. The
    objective's "policy" is the role that learns.

    objective  the loss of a batch of clean samples
    renoise    the (t, ε) at which they are re-noised
    """

    objective: LeafObjective
    renoise: Renoise
    updates: int | None = None
    role: str = POLICY
    keeps = ("leaves",)

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(self.role if name == POLICY else name for name in self.objective.weight_sets)

    @property
    def by_stream(self) -> bool:
        return self.objective.by_stream

    def drawn_by(self, sampler: str) -> str:
        return ""

    @property
    def largest(self) -> Mapping[str, str]:
        return {"log_ratio_abs": "log_ratio_max"}

    def taught(self, objective: Any) -> LeafPhase:
        return replace(self, objective=objective)

    def seeded(self, seed: int) -> LeafPhase:
        return self

    def check(self, steps: int, plan: Plan | None, dynamics: Dynamics | None, schedule: Schedule) -> None:
        """Raises ValueError for times that the grid has not, a plan that scores no leaf, and a loss that needs another
        kind of prediction than the states have."""
        self.objective.check((dynamics or ODE()).corruption)
        self.renoise.times.count(steps)
        if plan is None or not plan.scored:
            raise ValueError("plan: scores no leaf, and leaves are trained; nearest valid: plan.ode")

    def cost(self, steps: int, plan: Plan | None) -> Cost:
        trained = 0 if plan is None else plan.cost().leaves * self.renoise.times.count(steps)
        return Cost(trained * (len(self.networks) - 1), 0, trained)

    def old_forwards(self, trained: int, updates: int, drawn_by: str) -> int:
        return 0

    def view(self, forest: Forest) -> Forest:
        return forest.as_leaves()

    def weigh(self, whole: Forest, schedule: Schedule, dynamics: Dynamics | None) -> Tensor:
        return torch.ones(len(whole.edges))

    def items(self, lesson: Lesson) -> Batch:
        """All leaves with a valid score: without an advantage they still hold the role where it is."""
        at, unit = lesson.rollout, self.objective.unit
        number = at.whole.edges.prompt if unit == "group" else torch.arange(len(at.whole.edges))
        counted = _allowed(lesson, at)
        row, valid = counted.nonzero()[:, 0], len(torch.unique(number[counted]))
        number, pairs = number[row], self.renoise.times.count(lesson.schedule.steps)
        if unit not in ("pair", "group"):
            return _batch(row, torch.full_like(row, ALL), number, valid, pairs)
        # a group is compared pair by pair: its unit is all its samples at one pair, not at all of them
        pair = torch.arange(pairs).repeat(len(row))
        row, number = row.repeat_interleave(pairs), number.repeat_interleave(pairs) * pairs + pair
        return _batch(row, pair, number, valid * pairs, 1)

    def loss(
        self, models: Models, lesson: Lesson, batch: Batch, old: Old | None = None, drawn_by: str = POLICY
    ) -> Loss:
        asked = {POLICY: self.role} | {name: name for name in self.objective.weight_sets if name != POLICY}
        sets = {name: models[of] if of == self.role else detached(models[of]) for name, of in asked.items()}
        leaves = self.batch(lesson, batch)
        if lesson.norms:
            return with_velocity_norm(self.objective, sets, leaves, len(batch.row))
        return self.objective(sets, leaves)

    def recorded(self, models: Models, lesson: Lesson, batch: Batch) -> Old:
        raise ValueError("recorded: clean samples have no old log-probs; nearest valid: an EdgePhase")

    def batch(self, lesson: Lesson, batch: Batch) -> LeafBatch:
        """The clean samples of those items with their pairs."""
        at, rows, unit = lesson.rollout, batch.row, self.objective.unit
        own = (rows - at.first).to(at.forest.nodes.device)
        # what is noised anew is what was decoded
        x0 = lesson.schedule.samples(at.forest.nodes[at.forest.edges.child[own]])
        slots = at.whole.edges.prompt[rows]
        ids: list[Id] = [
            (lesson.iteration, slot, number)
            for slot, number in zip(slots.tolist(), at.numbers[rows].tolist(), strict=True)
        ]
        advantage, prompt = at.advantage.value[rows], slots.to(x0.device)
        layout, renoise, corruption = lesson.layout.take(prompt), self.renoise, (at.dynamics or ODE()).corruption
        if unit not in ("pair", "group"):
            return renoise_leaves(
                x0,
                advantage,
                prompt,
                ids,
                renoise,
                lesson.seed,
                lesson.schedule,
                layout=layout,
                corruption=corruption,
            )
        shape, pairs = x0.shape[1:], batch.pair.tolist()
        t, noise = renoise.single(lesson.seed, ids, pairs, lesson.schedule, shape, corruption.noise)
        group = batch.unit.to(x0.device) if unit == "group" else prompt
        return leaf_batch(x0, advantage, prompt, group, t, noise, layout, corruption)


@dataclass(frozen=True)
class NoisePhase:
    """A role learns from fresh starting noises, which its objective unrolls itself.

    objective  the loss of a batch of starting noises
    count      noises of a prompt, in each update
    updates    optimizer steps in an iteration, each from noises of its own
    together   whether a prompt's noises of an update are never split over minibatches, as the loss compares them

    Raises ValueError for a count or a number of updates below 1.
    """

    objective: NoiseObjective
    count: int
    updates: int = 1
    role: str = POLICY
    together: bool = False
    keeps = ()
    by_stream = False

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("updates", self.updates)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1; nearest valid: 1")

    @property
    def networks(self) -> tuple[str, ...]:
        return self.objective.weight_sets

    @property
    def guidance(self) -> Mapping[str, float]:
        return self.objective.guidance

    def drawn_by(self, sampler: str) -> str:
        return ""

    @property
    def largest(self) -> Mapping[str, str]:
        return {}

    def taught(self, objective: Any) -> NoisePhase:
        return replace(self, objective=objective)

    def seeded(self, seed: int) -> NoisePhase:
        return self

    def check(self, steps: int, plan: Plan | None, dynamics: Dynamics | None, schedule: Schedule) -> None:
        """Any rollout will do."""

    def cost(self, steps: int, plan: Plan | None) -> Cost:
        return self.objective.cost(steps) * (self.count * self.updates)

    def spent(self, batch: Batch, steps: int) -> Cost:
        return self.objective.cost(steps) * len(batch.row)

    def old_forwards(self, trained: int, updates: int, drawn_by: str) -> int:
        return 0

    def view(self, forest: Forest) -> Forest:
        return forest

    def weigh(self, whole: Forest, schedule: Schedule, dynamics: Dynamics | None) -> Tensor:
        return torch.ones(len(whole.edges))

    def items(self, lesson: Lesson) -> Batch:
        """In each update as many of every slot."""
        slots = [slot for slot in range(lesson.prompts) if slot not in lesson.skip]
        each = (torch.tensor(slots, dtype=torch.long)[:, None] * self.count + torch.arange(self.count)).flatten()
        whole = lesson.prompts * self.count
        row = (torch.arange(self.updates)[:, None] * whole + each).flatten()
        trained = self.objective.cost(lesson.schedule.steps).trained_edges
        number = torch.arange(len(row)) // (self.count if self.together else 1)
        return _batch(row, torch.zeros_like(row), number, len(torch.unique(number)), max(1, trained))

    def own(self, lesson: Lesson, batch: Batch) -> Batch:
        slot = self._slots(lesson, batch.row)
        return batch.where((slot >= lesson.slots.start) & (slot < lesson.slots.stop))

    def idle(self, lesson: Lesson) -> tuple[Lesson, int]:
        """A row of the rank's own; nothing is decoded or scored for it."""
        quiet = lesson if lesson.judge is None else replace(lesson, judge=Indifferent())
        return quiet, lesson.slots.start * self.count

    def loss(
        self, models: Models, lesson: Lesson, batch: Batch, old: Old | None = None, drawn_by: str = POLICY
    ) -> Loss:
        sets = {n: p if n == self.role else _without_gradient(p) for n, p in models.items()}
        return self.objective(sets, self.batch(lesson, batch))

    def recorded(self, models: Models, lesson: Lesson, batch: Batch) -> Old:
        raise ValueError("recorded: starting noises have no old log-probs; nearest valid: an EdgePhase")

    def batch(self, lesson: Lesson, batch: Batch) -> NoiseBatch:
        """The starting states of those items, each drawn for its role, turn and update, prompt slot and number."""
        whole, row = lesson.prompts * self.count, batch.row
        slots, update = self._slots(lesson, row), row // whole + lesson.turn * self.updates
        told = zip(update.tolist(), slots.tolist(), (row % self.count).tolist(), strict=True)
        ids: list[Id] = [(lesson.iteration, update, slot, number) for update, slot, number in told]
        noise = Stream(lesson.seed, f"{self.role}.initial").normal(ids, lesson.shape)
        rows = slots.to(lesson.device)
        layout = lesson.layout.take(rows)
        x = layout.hold(lesson.schedule.start(noise).to(lesson.device, torch.float32))
        return NoiseBatch(x, rows, tuple(ids), lesson.seed, lesson.schedule, layout, lesson.judge, lesson.spread)

    def _slots(self, lesson: Lesson, row: Tensor) -> Tensor:
        return row % (lesson.prompts * self.count) // self.count


class Indifferent:
    """A judge (`core.objective.noises.GradientJudge`) to whom all samples are worth 0."""

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x)), torch.ones(len(x), dtype=torch.bool, device=x.device)

    through = __call__


def _without_gradient(predict: Predict) -> Predict:
    def answer(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return predict(x, sigma, rows)

    return answer


def _velocity(predict: Predict, edges: EdgeBatch) -> Tensor:
    return predict(edges.x, edges.schedule.at(edges.step), edges.rows)


def _allowed(lesson: Lesson, at: Grown) -> Tensor:
    """Which of the whole's edges may be trained: those of the plan with a valid score, of prompts that count."""
    skipped = torch.isin(at.whole.edges.prompt, torch.tensor(list(lesson.skip), dtype=torch.long))
    return at.whole.edges.trained & at.advantage.ok & ~skipped


def _any_live(live: Tensor, number: Tensor) -> Tensor:
    """Whether an edge's unit has a live one."""
    seen = torch.zeros(int(number.max()) + 2 if len(number) else 1, dtype=torch.bool)
    seen[number[live]] = True
    seen[-1] = False  # where −1 points
    return seen[number]


def _batch(row: Tensor, pair: Tensor, number: Tensor, valid: int, pairs: int) -> Batch:
    """Items with unit numbers of any kind."""
    unit = dense(number)
    return Batch(row, pair, unit, int(unit.max()) + 1 if len(unit) else 0, valid, pairs)
