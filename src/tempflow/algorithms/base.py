"""What an algorithm is: Plan × Dynamics × CreditRule × Weight × Objective. One file per paper composes these."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.checks import positive
from tempflow.core.credit import CreditRule
from tempflow.core.draft import Draft
from tempflow.core.dynamics import Dynamics
from tempflow.core.ema import Frozen, Rule
from tempflow.core.forest import Forest
from tempflow.core.objective.edges import Objective
from tempflow.core.objective.leaves import LeafObjective
from tempflow.core.offline import OfflineSamples
from tempflow.core.perturb import Perturbation
from tempflow.core.plan import Cost, Plan
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule, linear
from tempflow.core.solver import Solver
from tempflow.core.times import StratifiedGridTimes
from tempflow.core.weight import Weight, uniform


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


Units = Callable[[Forest, int], Tensor]
"""(whole forest, iteration) -> LongTensor [E]: edges with equal numbers share a chunk; −1 is left out this time."""

Of = TypeVar("Of")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., object])

ARGS = "Args:"
"""The part of a docstring that says what each argument is."""


@runtime_checkable
class Seeded(Protocol):
    """A part of an algorithm that draws: which steps, where a window is, which chunks."""

    def seeded(self, seed: int) -> Self:
        """The same, drawing from that seed."""
        ...


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
    """A training method as data; the one training loop runs any.

    name         what records call it
    steps        T, sampler steps of a rollout; of offline samples, of the grid that `renoise` may take times from
    plan         (iteration, prompt slot) -> the forest grown for that slot; gives the same object for equal plans. What
                 it draws it draws from the run's seed, if it is `Seeded`, as `Drawn` is; so do `grid` and `units`
    credit       scores -> advantages, of edges; of leaves where `renoise` is given
    objective    the loss of a batch of edges; of leaves where `renoise` is given
    dynamics     the stochastic edges' step; None: the rollout draws no noise
    weight       loss weight of every edge (of no use to leaves)
    renoise      the (t, ε) at which clean samples are re-noised: the forward-process family, which trains on leaves
    weight_sets  how the objective's weight sets beside "policy" follow it; "reference" is frozen unless named
    sampler      the weight set that rolls out
    units        which edges share a chunk, for an objective whose unit is one
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

    Raises ValueError when the parts do not fit: a plan of other steps or with variants that there are not, no trained
    edge, trained steps without noise (a ratio of densities needs some), parts of a rollout beside offline samples, or
    whatever the objective's `check` finds.
    """

    name: str
    steps: int
    plan: Callable[[int, int], Plan]
    credit: CreditRule
    objective: Objective | LeafObjective
    dynamics: Dynamics | None = None
    weight: Weight = uniform
    renoise: Renoise | None = None
    weight_sets: Mapping[str, Rule] = field(default_factory=dict[str, Rule])
    sampler: str = "policy"
    units: Units | None = None
    observe: tuple[Observation, ...] = ()
    draft: Draft | None = None
    latent_reward: str | None = None
    solver: Solver | None = None
    grid: Callable[[int, Schedule], Schedule] | None = None
    conditions: Perturbation | None = None
    offline: OfflineSamples | None = None

    def __post_init__(self) -> None:
        plan = self.plan(0, 0)
        steps = self.schedule(0, linear(self.steps)).steps
        if self.offline is not None:
            _check_offline(self, self.offline)
        elif plan.steps != steps:
            raise ValueError(f"steps: {steps}, but the plan has {plan.steps}; nearest valid: {plan.steps}")
        if max(plan.variant) >= self.variants:
            last = max(plan.variant)
            raise ValueError(f"conditions: {self.variants}, but the plan has variant {last}; nearest valid: {last + 1}")
        if self.draft is not None and self.conditions is not None:
            raise ValueError("draft: is walked with a prompt's own condition alone; nearest valid: no `conditions`")
        if self.draft is not None and self.draft.pool < plan.roots:
            raise ValueError(f"pool: {self.draft.pool} for {plan.roots} roots a prompt; nearest valid: {plan.roots}")
        missing = [s for s in self.sets if s != "reference" and s not in self.weight_sets]
        if missing:
            raise ValueError(f"weight_sets: {missing[0]!r} has no rule; nearest valid: Copy(), the policy as it was")
        if self.sampler not in ("policy", *self.sets):
            raise ValueError(f"sampler: {self.sampler!r} is not one of {', '.join(('policy', *self.sets))}")
        if self.renoise is not None:
            self.renoise.times.count(steps)
            if not plan.scored:
                raise ValueError("plan: scores no leaf, and leaves are trained; nearest valid: plan.ode")
            return
        _check_edges(self, plan)

    @property
    def sets(self) -> tuple[str, ...]:
        """The weight sets beside the policy that the objective asks for, and the sampler's."""
        asked = (*self.objective.weight_sets, self.sampler)
        return tuple(dict.fromkeys(name for name in asked if name != "policy"))

    @property
    def reads(self) -> tuple[str, ...]:
        """The keys of a prompt that name samples of its own: those taken, and "image", for one file may serve several
        algorithms of offline samples."""
        return () if self.offline is None else (*self.offline.keys, "image")

    @property
    def variants(self) -> int:
        """How many conditions a prompt has when it is sampled."""
        return 1 if self.conditions is None else self.conditions.count

    @property
    def edge_objective(self) -> Objective:
        """The objective, where edges are trained."""
        assert self.renoise is None
        return cast(Objective, self.objective)

    @property
    def leaf_objective(self) -> LeafObjective:
        """The objective, where leaves are trained."""
        assert self.renoise is not None
        return cast(LeafObjective, self.objective)

    def seeded(self, seed: int) -> Algorithm:
        """The same, whose plan, grid and units draw from the run's seed; until then they draw from 0."""
        parts = {"plan": self.plan, "grid": self.grid, "units": self.units}
        drawing = {name: part.seeded(seed) for name, part in parts.items() if isinstance(part, Seeded)}
        return replace(self, **drawing) if drawing else self

    def rule(self, name: str) -> Rule:
        """How that weight set follows the policy."""
        return self.weight_sets.get(name, Frozen())

    def schedule(self, iteration: int, grid: Schedule) -> Schedule:
        """The grid of an iteration's rollout, from the model's own of `steps` steps."""
        return grid if self.grid is None else self.grid(iteration, grid)

    def old_forwards(self, trained: int, updates: int) -> int:
        """Forwards that give old log-probs and nothing else, at most: of `trained` edges shared by so many updates.

        The first update's come with its training forward, later ones' from before any weight moves. A sampler that is
        not the policy any more is asked at every edge, unless the objective asks it anyway.
        """
        if self.renoise is not None:
            return 0
        if self.sampler not in ("policy", *self.objective.weight_sets):
            return trained
        if updates == 1 or self.objective.unit == "edge":
            return trained - -(-trained // updates)
        return trained  # which units are how large is not known before the rollout

    def cost(self, iteration: int, prompts: int) -> Cost:
        """What an iteration of that many prompts costs: its rollout exactly, its trained edges at most."""
        total = Cost(0, 0, 0)
        for slot in range(prompts):
            total = total + self.cost_of(self.plan(iteration, slot))
        return total

    def cost_of(self, plan: Plan) -> Cost:
        """What one of its plans costs, its draft included. Where leaves are trained, an edge is a leaf's (t, ε)."""
        cost = plan.cost()
        if self.offline is not None and self.renoise is not None:
            return Cost(0, 0, cost.leaves * self.renoise.times.count(self.steps))
        drafted = Cost(0, 0, 0) if self.draft is None else self.draft.cost()
        if self.renoise is None:
            return cost + drafted
        pairs = cost.leaves * self.renoise.times.count(plan.steps)
        return Cost(cost.forwards, cost.leaves, pairs) + drafted


def _check_offline(algorithm: Algorithm, offline: OfflineSamples) -> None:
    if algorithm.plan(0, 0) != offline.plan(0, 0):
        raise ValueError(f"plan: grows a rollout beside offline samples {offline.keys}; nearest valid: offline.plan")
    if algorithm.renoise is None:
        raise ValueError("renoise: None, and offline samples have no edges; nearest valid: Renoise(UniformTimes())")
    parts = {
        "dynamics": algorithm.dynamics,
        "observe": algorithm.observe or None,
        "draft": algorithm.draft,
        "latent_reward": algorithm.latent_reward,
        "solver": algorithm.solver,
        "grid": algorithm.grid,
        "conditions": algorithm.conditions,
    }
    asked = next((name for name, part in parts.items() if part is not None), None)
    if asked is not None:
        raise ValueError(f"{asked}: is a rollout's, and samples are given in its place; nearest valid: none")


def _check_edges(algorithm: Algorithm, plan: Plan) -> None:
    dynamics, objective = algorithm.dynamics, algorithm.edge_objective
    trained = sorted({i for i, use in zip(plan.step, plan.trained, strict=True) if use})
    if not trained:
        raise ValueError("plan: trains none of its edges; nearest valid: a plan with a stochastic, trained edge")
    if dynamics is None or not dynamics.stochastic:
        raise ValueError(
            f"dynamics: {dynamics} draws no noise, and a ratio objective needs the density of a noisy step; "
            "nearest valid: FlowSDE(noise_level=0.7)"
        )
    std = dynamics.coefficients(algorithm.schedule(0, linear(algorithm.steps)), torch.tensor(trained))[2]
    silent = [i for i, s in zip(trained, std.tolist(), strict=True) if not s > 0]
    if silent:
        noisy = [i for i in trained if i not in silent]
        raise ValueError(f"plan: trains step {silent[0]}, where {dynamics} has no noise; nearest valid: train {noisy}")
    if objective.unit == "chunk" and algorithm.units is None:
        raise ValueError("units: None, and the objective's unit is a chunk; nearest valid: core.units.whole_path")
    objective.check(dynamics)


def at_least(field: str, value: int, low: int, why: str = "") -> None:
    """Raises ValueError naming field, value and nearest valid value unless value ≥ low."""
    if value < low:
        raise ValueError(f"{field}: {value} must be at least {low}{why and f', {why}'}; nearest valid: {low}")


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
