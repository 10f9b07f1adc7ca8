"""What an algorithm is: a rollout (Plan × Dynamics × CreditRule) and phases that learn from it. One file per paper."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tempflow.algorithms.lesson import POLICY, Phase, Role, Seeded
from tempflow.core.checks import positive
from tempflow.core.credit import AsScored, CreditRule
from tempflow.core.draft import Draft, NoDraft, Precision
from tempflow.core.dynamics import Dynamics, ModelJump
from tempflow.core.ema import Frozen, Rule
from tempflow.core.forest import Forest
from tempflow.core.objective.noises import through_rewards
from tempflow.core.offline import OfflineSamples
from tempflow.core.perturb import OwnCondition, Perturbation
from tempflow.core.plan import Cost, Plan
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule, linear
from tempflow.core.solver import Solver
from tempflow.core.times import StratifiedGridTimes


class Observation(Protocol):
    """What an algorithm wants to know of a rollout while its states and pictures are there."""

    @property
    def name(self) -> str:
        """The trait it becomes."""
        ...

    @property
    def of(self) -> Literal["edge", "leaf"]: ...

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        """[E, …] or [N, …], on the CPU. forest: some whole prompts, leaf latents included; media: uint8 [N, H, W, 3],
        its leaves decoded. A row may depend on its own prompt's rows alone."""
        ...


Of = TypeVar("Of")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., object])

ARGS = "Args:"
"""The part of a docstring that says what each argument is."""


@dataclass(frozen=True)
class Drawn(Generic[Of, Result]):
    """`of`(seed, iteration, …) as a function of (iteration, …): the plan or the grid of an algorithm that draws it.

    The seed is 0 until `Algorithm.seeded` says the run's.
    """

    of: Callable[[int, int, Of], Result]
    seed: int = 0

    def __call__(self, iteration: int, of: Of) -> Result:
        return self.of(self.seed, iteration, of)

    def seeded(self, seed: int) -> Self:
        """The same, drawing from that seed."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Algorithm:
    """A training method as data, a rollout and phases that learn; the one training loop runs any.

    name         what records call it
    phases       what learns in an iteration, one after the other (`algorithms.phase`)
    steps        T, sampler steps of a rollout; of offline samples, of the grid that times may be taken from; without a
                 rollout, of the grid that starting noises are unrolled on
    plan         (iteration, prompt slot) -> the forest grown for that slot; gives the same object for equal plans. What
                 it draws it draws from the run's seed, if it is `Seeded`, as `Drawn` is; so do `grid` and what phases
                 have. None: nothing is rolled out
    credit       scores -> advantages of what phases train
    dynamics     the stochastic edges' step; None: the rollout draws no noise
    turns        how often the phases have their turn in an iteration, each time from noises of their own
    roles        the networks that learn beside the policy
    weight_sets  how weight sets beside "policy" follow it; "reference" is frozen unless named
    sampler      the weight set that rolls out
    observe      what credit and units want to know of the rollout, as traits of its edges and leaves
    draft        a pool of noises that is drafted and scored first; the plan's roots start from those it chooses
    latent_reward  folder of one that scores every trained edge's end at its σ; credit then sees these scores,
                 and the leaves' are only looked at. None: credit sees the leaves' scores
    solver       walks the deterministic edges; None: Euler
    grid         (iteration, the model's grid of T steps) -> the grid of that rollout, whose length the plan has
    conditions   the conditions of a prompt that the plan's variants are walked with; None: its own alone. They are for
                 sampling: objectives see every sample as one of the prompt's own condition
    offline      samples that the prompts name stand in the rollout's place, with scores of their own: nothing is
                 drawn, decoded or rewarded. The plan is `offline.plan`

    Raises ValueError when the parts do not fit: no phase, or none of the policy's, a plan of other steps or with
    variants that there are not, a network that nothing gives, parts of a rollout beside offline samples or without one,
    or whatever a phase's `check` finds.
    """

    name: str
    phases: tuple[Phase, ...]
    steps: int
    plan: Callable[[int, int], Plan] | None = None
    credit: CreditRule = field(default_factory=AsScored)
    dynamics: Dynamics | None = None
    turns: int = 1
    roles: tuple[Role, ...] = ()
    weight_sets: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    sampler: str = POLICY
    observe: tuple[Observation, ...] = ()
    draft: Draft | None = None
    latent_reward: str | None = None
    solver: Solver | None = None
    grid: Callable[[int, Schedule], Schedule] | None = None
    conditions: Perturbation | None = None
    offline: OfflineSamples | None = None

    def __post_init__(self) -> None:
        _check_roles(self)
        grid = self.schedule(0, linear(self.steps))
        plan = self.plan_of(0, 0)
        if plan is None:
            _check_alone(self)
        elif self.offline is not None:
            _check_offline(self, self.offline, plan)
        else:
            _check_rollout(self, plan, grid.steps)
        at_least("turns", self.turns, 1)
        if self.turns > 1 and self.keeps:
            raise ValueError(f"turns: {self.turns}, and a phase learns from a rollout, once; nearest valid: 1")
        for phase in self.phases:
            phase.check(grid.steps, plan, self.dynamics, self.schedule(0, linear(self.steps)))

    # ---------------------------------------------------------------------------------------------- what it is made of
    def on(self, jump: Dynamics | None, model: str) -> Self:
        """The same on the states of that model: where these are tokens, `jump` is how it is drawn, else None.

        Raises ValueError where the algorithm moves states of another kind.
        """
        self.check_states(jump is not None, model)
        return replace(self, dynamics=jump) if isinstance(self.dynamics, ModelJump) else self

    def check_states(self, tokens: bool, model: str) -> None:
        """Raises ValueError where the algorithm moves states of another kind than the model, by its name. An algorithm
        that names its own jumps may serve a model that does not say that it moves tokens."""
        mine = self.dynamics is not None and self.dynamics.corruption.prediction == "logits"
        if tokens and not mine:
            raise ValueError(
                f"algorithm: {self.name[:40]} moves real numbers, and the states of {model[:60]!r} are tokens; nearest "
                "valid: udm_grpo"
            )
        if not tokens and isinstance(self.dynamics, ModelJump):
            raise ValueError(
                f"algorithm: {self.name[:40]} trains tokens, and the states of {model[:60]!r} are numbers; nearest "
                "valid: tempflow_grpo"
            )

    @property
    def first(self) -> Phase:
        """The policy's first phase, which records tell of without a prefix."""
        return self.phases[self.place]

    @property
    def place(self) -> int:
        """Where that is among the phases."""
        return [phase.role for phase in self.phases].index(POLICY)

    @property
    def objective(self) -> Any:
        """The loss of the policy's first phase."""
        return self.first.objective

    def taught(self, objective: Any) -> Algorithm:
        """The same with another loss there."""
        place = self.place
        return replace(self, phases=(*self.phases[:place], self.first.taught(objective), *self.phases[place + 1 :]))

    @property
    def rolls_out(self) -> bool:
        """Whether there is a rollout, or offline samples in its place."""
        return self.plan is not None

    @property
    def begins(self) -> Draft | NoDraft:
        """What says which noises the plan's roots start from."""
        return self.draft or NoDraft()

    @property
    def sampled(self) -> Perturbation | OwnCondition:
        """The conditions that a prompt is sampled with."""
        return self.conditions or OwnCondition()

    @property
    def latent_rewards(self) -> tuple[str, ...]:
        """Folders of the latent rewards that score every trained edge's end: none, or one."""
        return () if self.latent_reward is None else (self.latent_reward,)

    @property
    def draft_precision(self) -> Precision:
        """Of the network that drafts: a copy of the sampler's where it is not "full", as without a draft."""
        return self.begins.precision

    @property
    def keeps(self) -> frozenset[str]:
        """What of a rollout is needed once that is scored: "edges", "leaves", "means"."""
        return frozenset(name for phase in self.phases for name in phase.keeps)

    def kept(self, forest: Forest) -> Forest:
        """The forest without the states that no phase needs once the leaves are decoded."""
        whole = self.with_edges(forest)
        return whole if "leaves" in self.keeps else whole.drop_leaf_states()

    def with_edges(self, forest: Forest) -> Forest:
        """The forest with its edges where some phase needs these, else with none."""
        return forest if "edges" in self.keeps else forest.select(NO_EDGES)

    @property
    def networks(self) -> tuple[str, ...]:
        """All networks beside the policy that phases and the sampler ask for: roles, and weight sets."""
        asked = (*(name for phase in self.phases for name in phase.networks), self.sampler)
        return tuple(dict.fromkeys(name for name in asked if name != POLICY))

    @property
    def compared(self) -> frozenset[str]:
        """The networks that the policy's phases ask for at a rollout's states, where it can be held to them."""
        held = [phase for phase in self.phases if phase.keeps and phase.role == POLICY]
        return frozenset(name for phase in held for name in phase.networks)

    @property
    def sets(self) -> tuple[str, ...]:
        """Of these, the weight sets that follow the policy, or are frozen."""
        others = {name for role in self.roles for name in (role.name, *role.weight_sets)}
        return tuple(name for name in self.networks if name not in others)

    @property
    def taken_back(self) -> bool:
        """Whether an iteration's updates end all or none: where there are several phases or turns, or where a loss may
        wait for scores between two updates, as one that learns from no rollout may."""
        return len(self.phases) * self.turns > 1 or not all(phase.keeps for phase in self.phases)

    @property
    def starts_from_reference(self) -> bool:
        """Whether a role starts from the run's reference, or the reference is asked and stays."""
        asked = "reference" in self.sets and not self.rule("reference").moves
        return asked or any(role.start == "reference" for role in self.roles)

    @property
    def takes(self) -> tuple[str, ...]:
        """The keys of a prompt whose samples stand in the rollout's place; none with a rollout."""
        return () if self.offline is None else self.offline.keys

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of a prompt that name samples of its own: those taken, and "image", for one file may serve several
        algorithms of offline samples."""
        return (*self.takes, "image") if self.takes else ()

    @property
    def variants(self) -> int:
        """How many conditions a prompt has when it is sampled."""
        return self.sampled.count

    def seeded(self, seed: int) -> Algorithm:
        """The same, whose plan, grid and phases draw from the run's seed; until then they draw from 0."""
        parts = {"plan": self.plan, "grid": self.grid}
        drawing = {name: part.seeded(seed) for name, part in parts.items() if isinstance(part, Seeded)}
        return replace(self, phases=tuple(phase.seeded(seed) for phase in self.phases), **drawing)

    def rule(self, name: str) -> Rule:
        """How that weight set follows the policy."""
        return self.weight_sets.get(name, Frozen())

    def schedule(self, iteration: int, grid: Schedule) -> Schedule:
        """The grid of an iteration's rollout, from the model's own of `steps` steps."""
        return grid if self.grid is None else self.grid(iteration, grid)

    @property
    def through_rewards(self) -> bool:
        """Whether a loss asks for scores with gradients, so that decoder and rewards must have them."""
        return any(through_rewards(phase.objective) for phase in self.phases)

    @property
    def of_rewards(self) -> bool:
        """Whether rewards' scores are what its credit sees."""
        return self.latent_reward is None and self.offline is None

    def plan_of(self, iteration: int, slot: int) -> Plan | None:
        """The plan of a prompt slot; None where nothing is rolled out."""
        return None if self.plan is None else self.plan(iteration, slot)

    def plans(self, iteration: int, count: int) -> list[Plan]:
        """The plans of an iteration's prompt slots. Raises ValueError where nothing is rolled out."""
        if self.plan is None:
            raise ValueError(f"plan: {self.name} rolls nothing out; nearest valid: an algorithm with a plan")
        return [self.plan(iteration, slot) for slot in range(count)]

    def unweighted(self) -> Algorithm:
        """The same; where offline samples bear scores of their own, without rewards' weights in its credit."""
        return self if self.offline is None else replace(self, credit=self.credit.weighted(None))

    # --------------------------------------------------------------------------------------------------- what it costs
    def old_forwards(self, trained: int, updates: int) -> int:
        """Forwards that give old log-probs and nothing else, at most: of `trained` edges shared by so many updates."""
        return sum(phase.old_forwards(trained, phase.updates or updates, self.sampler) for phase in self.phases)

    def cost(self, iteration: int, prompts: int) -> Cost:
        """What an iteration of that many prompts costs: its rollout exactly, what phases train at most."""
        total = Cost(0, 0, 0)
        for slot in range(prompts):
            total = total + self.cost_of(self.plan_of(iteration, slot))
        return total

    def cost_of(self, plan: Plan | None) -> Cost:
        """What one of its plans costs, its draft included. An edge is whatever a phase trains with one forward; leaves
        are those of the rollout."""
        drawn = Cost(0, 0, 0)
        if plan is not None and self.offline is None:
            drawn = plan.cost() + self.begins.cost()
        trained = sum(self.taught_cost(phase, plan).trained_edges for phase in self.phases)
        return Cost(drawn.forwards, drawn.leaves, trained)

    def taught_cost(self, phase: Phase, plan: Plan | None) -> Cost:
        """What one of its phases costs with a plan, in all turns, at most (`Phase.cost`)."""
        return phase.cost(self.steps_of(plan), plan) * self.turns

    def steps_of(self, plan: Plan | None) -> int:
        """Steps of the grid that phases take times from, or unroll on."""
        return self.steps if plan is None or self.offline is not None else plan.steps


NO_EDGES = torch.zeros(0, dtype=torch.long)
"""What is kept of a rollout's edges where none is trained: their states are freed."""


def _check_roles(algorithm: Algorithm) -> None:
    names = [role.name for role in algorithm.roles]
    if len(set(names)) < len(names):
        raise ValueError(f"roles: {names} must be distinct")
    if not any(phase.role == POLICY for phase in algorithm.phases):
        raise ValueError(f"phases: none is of the policy, which is what is kept; nearest valid: role {POLICY!r}")
    idle = [name for name in names if all(phase.role != name for phase in algorithm.phases)]
    if idle:
        raise ValueError(
            f"roles: {idle[0]!r} learns in no phase; nearest valid: a phase with that role, or no such role"
        )
    for phase in algorithm.phases:
        if phase.role not in (POLICY, *names):
            raise ValueError(f"phases: {phase.role!r} is no role; nearest valid: Role({phase.role!r}) in `roles`")
    missing = [s for s in algorithm.sets if s != "reference" and s not in algorithm.weight_sets]
    if missing:
        raise ValueError(
            f"weight_sets: {missing[0]!r} has no rule and is no role; nearest valid: Role({missing[0]!r}) with a phase "
            "of its own, or a rule by which it follows the policy"
        )
    if algorithm.sampler not in (POLICY, *algorithm.sets):
        raise ValueError(f"sampler: {algorithm.sampler!r} is not one of {', '.join((POLICY, *algorithm.sets))}")


def _check_rollout(algorithm: Algorithm, plan: Plan, steps: int) -> None:
    if plan.steps != steps:
        raise ValueError(f"steps: {steps}, but the plan has {plan.steps}; nearest valid: {plan.steps}")
    if max(plan.variant) >= algorithm.variants:
        last = max(plan.variant)
        raise ValueError(
            f"conditions: {algorithm.variants}, but the plan has variant {last}; nearest valid: {last + 1}"
        )
    tokens = algorithm.dynamics is not None and algorithm.dynamics.corruption.prediction == "logits"
    if tokens and not all(plan.stochastic):
        raise ValueError(
            f"plan: {algorithm.name[:40]} walks steps that draw no noise, and tokens have none such; nearest valid: "
            "plan.chain(steps, roots)"
        )
    if algorithm.latent_reward is not None and {"edges", "leaves"} <= algorithm.keeps:
        raise ValueError("latent_reward: scores edges or leaves, and phases learn from both; nearest valid: None")
    if algorithm.draft is not None and algorithm.conditions is not None:
        raise ValueError("draft: is walked with a prompt's own condition alone; nearest valid: no `conditions`")
    if algorithm.draft is not None and algorithm.draft.pool < plan.roots:
        raise ValueError(f"pool: {algorithm.draft.pool} for {plan.roots} roots a prompt; nearest valid: {plan.roots}")


def _rollouts_own(algorithm: Algorithm) -> Mapping[str, object]:
    """What only a rollout has, by name; None where it is not given."""
    return {
        "dynamics": algorithm.dynamics,
        "observe": algorithm.observe or None,
        "draft": algorithm.draft,
        "latent_reward": algorithm.latent_reward,
        "solver": algorithm.solver,
        "conditions": algorithm.conditions,
    }


def _check_alone(algorithm: Algorithm) -> None:
    """Without a plan."""
    parts = {**_rollouts_own(algorithm), "offline": algorithm.offline}
    asked = next((name for name, part in parts.items() if part is not None), None)
    if asked is not None:
        raise ValueError(f"{asked}: is a rollout's, and there is no plan; nearest valid: none")


def _check_offline(algorithm: Algorithm, offline: OfflineSamples, plan: Plan) -> None:
    if plan != offline.plan(0, 0):
        raise ValueError(f"plan: grows a rollout beside offline samples {offline.keys}; nearest valid: offline.plan")
    if "edges" in algorithm.keeps:
        raise ValueError("phases: one learns from edges, and offline samples have none; nearest valid: a LeafPhase")
    parts = {**_rollouts_own(algorithm), "grid": algorithm.grid}
    asked = next((name for name, part in parts.items() if part is not None), None)
    if asked is not None:
        raise ValueError(f"{asked}: is a rollout's, and samples are given in its place; nearest valid: none")


def at_least(field: str, value: int, low: int, why: str = "") -> None:
    """Raises ValueError naming field, value and nearest valid value unless value ≥ low."""
    if value < low:
        raise ValueError(f"{field}: {value} must be at least {low}{why and f', {why}'}; nearest valid: {low}")


def within(field: str, value: int, steps: int) -> int:
    """The value. Raises ValueError naming the field unless it is 1 … steps."""
    if not 1 <= value <= max(1, steps):
        raise ValueError(f"{field}: {value} of {steps} steps; nearest valid: {min(max(1, value), max(1, steps))}")
    return value


def positive_or(field: str, value: float | None, usual: float) -> float:
    """`usual` for None, else the value. Raises ValueError as `positive`."""
    given = usual if value is None else value
    positive(field, given, usual)
    return given


def proportion(field: str, value: float | None, usual: float, whole: bool = False) -> float:
    """`usual` for None, else the value. Raises ValueError naming field, value and `usual` unless the value is above 0
    and below 1, or with `whole` at most 1."""
    given = positive_or(field, value, usual)
    if given > 1 or (given == 1 and not whole):
        raise ValueError(f"{field}: {given} must be {'at most' if whole else 'below'} 1; {usual} is usual")
    return given


def on_grid(times: StratifiedGridTimes, pairs: int, steps: int) -> StratifiedGridTimes:
    """The times, which draw `pairs` from a grid of `steps`. Raises ValueError, naming `pairs`, for too many."""
    most = times.room(steps) + times.initial
    if pairs > most:
        near = str(most) if times.room(steps) else f"{pairs}, with more steps"
        raise ValueError(f"pairs: {pairs} do not fit the {most} times of {steps} steps; nearest valid: {near}")
    return times


def one_of(field: str, value: str, options: tuple[str, ...]) -> None:
    """Raises ValueError naming field, value and the options unless value is one of them."""
    if value not in options:
        listed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{field}: {value!r} is not one of {listed}; nearest valid: {options[0]!r}")


def some_steps(name: str, seed: int, iteration: int, count: int, among: int) -> tuple[int, ...]:
    """`count` of the steps 0 … among − 1, ascending, drawn anew each iteration; the same for all its prompts."""
    return tuple(sorted(Stream(seed, f"{name}.steps").permutation((iteration,), among)[:count]))


# ----------------------------------------------------------------------------------------------------- argument texts
COMMON = {
    "steps": "T, sampler steps of a rollout.",
    "group": "pictures per prompt, compared with each other.",
    "shared_noise": "all pictures of a prompt start from one noise.",
    "noise_level": "a of the SDE.",
    "clip": "ratio clip below and above 1.",
    "clip_high": "clip above 1, where it differs.",
    "kl": "β, weight of the KL to the starting model; 0 saves its forwards.",
    "std": '"global": standard deviation of all the iteration\'s scores; "group": of the prompt\'s own.',
    "eps": "added to the standard deviation.",
    "advantage_clip": "bound of |A|; None for no bound.",
}
"""What an argument of that name is, unless its algorithm says otherwise."""

EXACT_KL = {"kl": "β, weight of the exact KL to the starting model; 0 saves its forwards."}
"""The same of an algorithm whose KL has one form."""


def texts_of(*sources: Callable[..., object] | Mapping[str, str]) -> Callable[[Function], Function]:
    """A decorator that completes a docstring: the arguments that its "Args:" part leaves out get their texts there.

    sources  functions whose docstrings have the texts, or the texts by name; the first that has one counts, and
             `COMMON` where none does

    `help` and the command line then show all arguments, in the signature's order.
    """

    def complete(function: Function) -> Function:
        doc = inspect.cleandoc(function.__doc__ or "")
        texts = dict(COMMON)
        for source in (*reversed(sources), function):
            texts |= source if isinstance(source, Mapping) else argument_texts(source.__doc__ or "")
        said = [part for part in doc.split("\n\n") if not part.startswith(ARGS)]
        place = next((i for i, part in enumerate(said) if part.startswith("Raises ")), len(said))
        lines = [_wrapped(f"{name}: {texts[name]}") for name in inspect.signature(function).parameters if name in texts]
        function.__doc__ = "\n\n".join([*said[:place], "\n".join([ARGS, *lines]), *said[place:]])
        return function

    return complete


def argument_texts(docstring: str) -> dict[str, str]:
    """What the "Args:" part of a docstring says of each argument."""
    part = inspect.cleandoc(docstring).partition(f"{ARGS}\n")[2]
    texts: dict[str, str] = {}
    current = ""
    for line in part.splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            current = start[1]
            texts[current] = start[2]
        elif current and line.startswith("        "):
            texts[current] += " " + line.strip()
        else:
            break
    return texts


def _wrapped(text: str) -> str:
    lines = textwrap.wrap(text, 112, break_on_hyphens=False, break_long_words=False)
    return textwrap.indent("\n".join([lines[0], *(" " * 4 + line for line in lines[1:])]), " " * 4)
