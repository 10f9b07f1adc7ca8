"""Roles and phases: who learns in an iteration, and what from.

A *role* is a network with an optimizer and weight sets of its own; every algorithm has the role "policy". A *phase*
says which role learns, from what, by which objective, in how many updates; `algorithms.phase` has the kinds. The loop
asks a phase for its items, cuts these into updates and minibatches, and asks for the loss of each minibatch. It does
not know the kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.credit import Advantage
from tempflow.core.dynamics import Dynamics
from tempflow.core.ema import Rule
from tempflow.core.forest import Forest
from tempflow.core.groups import dense
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import Judge
from tempflow.core.objective.old import Old
from tempflow.core.plan import Plan
from tempflow.core.schedule import Schedule
from tempflow.core.state import StateLayout

POLICY = "policy"
"""The role that every algorithm has: the network that is evaluated and kept."""

Models = Mapping[str, Predict]
"""Predictors of prompt slots by name: roles, and the weight sets that follow them."""


@runtime_checkable
class Seeded(Protocol):
    """A part of an algorithm that draws: which steps, where a window is, which chunks."""

    def seeded(self, seed: int) -> Self:
        """The same, drawing from that seed."""
        ...


@dataclass(frozen=True)
class Role:
    """A network that learns beside the policy and has the same kind of parameters: where all of the policy is trained,
    it is a full copy; where a LoRA is, it is a second LoRA on the same base.

    name         what phases and objectives call it
    rate         its learning rate in units of the run's, whose warm-up and decay it shares
    betas        of its AdamW; None: the run's
    weight_sets  what follows it, by name, as `Algorithm.weight_sets` follow the policy
    start        "policy": it starts as the policy does; "reference": as the run's reference (`model.reference`), which
                 is another where the policy starts from trained weights

    Raises ValueError for a name that is the policy's or empty, a rate that is not above 0, betas outside [0, 1), and an
    unknown start.
    """

    name: str
    rate: float = 1.0
    betas: tuple[float, float] | None = None
    weight_sets: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    start: Literal["policy", "reference"] = "policy"

    def __post_init__(self) -> None:
        if self.start not in (POLICY, "reference"):
            raise ValueError(f"role {self.name}: start {self.start!r} is not one of policy, reference")
        if not self.name.isidentifier() or self.name in (POLICY, "reference"):
            raise ValueError(f"role: {self.name!r} is taken or no name; nearest valid: 'fake'")
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"role {self.name}: rate {self.rate} must be finite and above 0; nearest valid: 1.0")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"role {self.name}: betas {self.betas} must be in [0, 1); nearest valid: (0.9, 0.999)")


ALL = -1
"""In `Batch.pair`: all the pairs of that sample."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Items in the order in which they are taken; those of a unit are neighbours.

    row    LongTensor[I], the whole's edge (or leaf, or starting noise)
    pair   LongTensor[I], which of a leaf's pairs, or ALL; 0 for others
    unit   LongTensor[I], 0 … units − 1, ascending
    units  how many units there are
    valid  how many units the loss's mean counts, with those that are not computed
    pairs  forwards of an item that are trained: 1, or all of a leaf's pairs
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

    def where(self, mask: Tensor) -> Batch:
        """The items that the mask names, bool [I]: whole units."""
        unit = dense(self.unit[mask])
        units = int(unit.max()) + 1 if len(unit) else 0
        return Batch(self.row[mask], self.pair[mask], unit, units, self.valid, self.pairs)

    def one(self, row: int) -> Batch:
        """A single item, that row: what is computed, and counts 0, where a rank has none of its own."""
        zero = torch.zeros(1, dtype=torch.long)
        pair = torch.full_like(zero, ALL) if self.pairs > 1 else zero
        return Batch(zero + row, pair, zero, 1, self.valid, self.pairs)

    @property
    def forwards(self) -> int:
        """Rows given to the network that learns, with gradients."""
        return len(self.row) * self.pairs

    def _between(self, first: int, last: int) -> Batch:
        return self.where((self.unit >= first) & (self.unit < last))


@dataclass(frozen=True, eq=False)
class Grown:
    """A rollout as a phase sees it: its edges are what is trained (`Phase.view`).

    forest     this rank's part
    whole      all ranks', without states
    first      where this rank's edges start among the whole's
    numbers    LongTensor [E], an edge's place among those of its prompt slot
    dynamics   of the stochastic edges; None: there are none
    advantage  of the whole's edges
    weight     loss weights of the whole's edges
    """

    forest: Forest
    whole: Forest
    first: int
    numbers: Tensor
    dynamics: Dynamics | None
    advantage: Advantage
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Lesson:
    """What an iteration offers to a phase.

    grown      the rollout, where the phase learns from one
    slots      this rank's prompt slots, of `prompts`
    iteration  which one it is, from 0
    schedule   the grid
    shape      *S, of one state
    layout     of this rank's states, by prompt slot
    seed       the run's
    device     where states live
    skip       prompt slots that are left out
    rounding   the relative rounding error of a velocity (`core.objective.old`)
    norms      whether to measure how large the policy's velocities are beside the reference's
    turn       how often the phases have had their turn in this iteration
    judge      scores samples of the slots; None: nobody does
    spread     standard deviation of what losses had scored in the run before this phase; None: too little
    """

    grown: Grown | None
    slots: range
    prompts: int
    iteration: int
    schedule: Schedule
    shape: tuple[int, ...]
    layout: StateLayout
    seed: int
    device: torch.device
    skip: Collection[int] = ()
    rounding: float = 0.0
    norms: bool = False
    turn: int = 0
    judge: Judge | None = None
    spread: float | None = None

    @property
    def rollout(self) -> Grown:
        """`grown`. Raises ValueError where the algorithm rolls nothing out."""
        if self.grown is None:
            raise ValueError("plan: None, and a phase learns from a rollout; nearest valid: a plan, or a NoisePhase")
        return self.grown


class Phase(Protocol):
    """What one role learns in an iteration. The loop calls these; rows are the whole's items."""

    @property
    def role(self) -> str: ...

    @property
    def objective(self) -> Any:
        """The loss, of the kind that the phase has batches for."""
        ...

    def taught(self, objective: Any) -> Phase:
        """The same with another loss."""
        ...

    @property
    def updates(self) -> int | None:
        """Optimizer steps in an iteration; None: the run's `optimizer.updates_per_iteration`."""
        ...

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that its loss asks for, roles and weight sets, by name."""
        ...

    @property
    def guidance(self) -> Mapping[str, float]:
        """Those of them that it asks with a guidance of their own; the run's is for all others."""
        ...

    @property
    def keeps(self) -> tuple[str, ...]:
        """What of a rollout it needs once that is scored: "edges", "leaves", the "means" that edges were drawn from,
        and "old means", which come with old log-probs."""
        ...

    @property
    def largest(self) -> Mapping[str, str]:
        """Metrics of its loss whose largest value is kept too, and what that is called."""
        ...

    def drawn_by(self, sampler: str) -> str:
        """The network whose log-probs its loss compares with, where `sampler` rolled out; "" for none."""
        ...

    @property
    def by_stream(self) -> bool:
        """Whether it can take an advantage for each stream."""
        ...

    def seeded(self, seed: int) -> Phase:
        """The same, drawing from that seed."""
        ...

    def check(self, steps: int, plan: Plan | None, dynamics: Dynamics | None, schedule: Schedule) -> None:
        """Raises ValueError where the algorithm's rollout is not what it can learn from."""
        ...

    def cost(self, steps: int, plan: Plan | None) -> Cost:
        """Of one prompt in a turn, at most: rows with gradient are its `trained_edges`, those without it its
        `forwards`, those with a guidance of their own stand `alone`, and samples that the loss has scored are its
        `leaves`."""
        ...

    def spent(self, batch: Batch, steps: int) -> Cost:
        """The same of the loss of those items."""
        ...

    def old_forwards(self, trained: int, updates: int, drawn_by: str) -> int:
        """Forwards that give old log-probs and nothing else, at most: of `trained` edges in so many updates."""
        ...

    def view(self, forest: Forest) -> Forest:
        """The forest with what is trained as its edges."""
        ...

    def weigh(self, whole: Forest, schedule: Schedule, dynamics: Dynamics | None) -> Tensor:
        """Loss weights of a view's edges, [E]."""
        ...

    def items(self, lesson: Lesson) -> Batch:
        """All ranks' items, unit by unit, in the order of the whole; `Batch.updates` shares them out."""
        ...

    def own(self, lesson: Lesson, batch: Batch) -> Batch:
        """Those of the items that are this rank's."""
        ...

    def idle(self, lesson: Lesson) -> tuple[Lesson, int]:
        """For a rank without an item: a lesson of zeros, and a row of its own in it."""
        ...

    def loss(
        self, models: Models, lesson: Lesson, batch: Batch, old: Old | None = None, drawn_by: str = POLICY
    ) -> Loss:
        """The loss of a minibatch, all of it this rank's own. Gradients flow through the role's own network alone.

        models    of all names in `networks`
        old       of edges, from before the iteration's first update (`recorded`); None: the network `drawn_by` is asked
                  now, in this batch. Of the role that learns that is the forward that is trained, detached
        """
        ...

    def recorded(self, models: Models, lesson: Lesson, batch: Batch) -> Old:
        """The batch's edges by the policy as it stands, which has not moved since the rollout."""
        ...
