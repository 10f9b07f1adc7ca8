"""Plans are data: the edge list of one prompt's forest, and what it costs.

A plan says where trajectories start, where they branch, which steps draw noise and which of those a loss trains.  It
holds no tensors and knows no model; `tempflow.core.rollout` runs any plan.  Every node sits at a grid index ("step"):
roots at 0, the child of a node at step i at step i + 1, finished samples at T.  See `papers/trajectory.md` §1-§4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from tempflow.core.cost import Cost

Carry = Literal["ode", "candidate"]
"""How a chain goes on where several successors were drawn."""

MAX_EDGES = 1_000_000
"""Of one prompt's forest: what lists in memory can hold, and hundreds of times what any method grows."""

MAX_STEPS = 10_000


@dataclass(frozen=True)
class Plan:
    """The forest that one prompt grows, as an explicit edge list in wavefront order.

    Node ids: roots are 0 … roots − 1; edge e creates node roots + e.

    steps       T, the number of sampling steps; must equal the schedule's when the plan is run. 0: the roots are
                samples already (`given.finished`), and no schedule is that short, so nothing runs such a plan
    roots       number of roots R (≥ 1)
    parent      per edge: the node it leaves
    step        per edge: i, it goes from σ_i to σ_{i+1}; never decreasing over the edges
    stochastic  per edge: an SDE step (an action) or an ODE step
    trained     per edge: used by the loss; only stochastic edges can be
    scale       per edge: finite multiplier > 0 of the dynamics' noise level, 1.0 = as it is
    start       per root: index ≥ 0 of the initial noise it starts from; all 0 = one shared noise
    scored      ids of the nodes at the last σ that are decoded and scored, in leaf order
    variant     per root: index ≥ 0 of the prompt's condition that its tree is walked with; default all 0

    Raises ValueError when the lists do not describe such a forest.
    """

    steps: int
    roots: int
    parent: tuple[int, ...]
    step: tuple[int, ...]
    stochastic: tuple[bool, ...]
    trained: tuple[bool, ...]
    scale: tuple[float, ...]
    start: tuple[int, ...]
    scored: tuple[int, ...]
    variant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1 if self.parent else 0)
        _at_least("roots", self.roots, 1)
        if not self.variant:  # written out, so that equal plans compare equal
            object.__setattr__(self, "variant", (0,) * self.roots)
        _check_edges(self)
        _check_roots_and_leaves(self)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a long plan is a cache key at every rollout
        shape = (self.steps, self.roots, self.parent, self.step, self.stochastic, self.trained, self.scored)
        return hash((*shape, self.variant))

    @cached_property
    def node_step(self) -> tuple[int, ...]:
        """Grid index of every node; it is the node's depth below its root too."""
        return (0,) * self.roots + tuple(i + 1 for i in self.step)

    @cached_property
    def node_root(self) -> tuple[int, ...]:
        """Root above every node (a root's own is itself)."""
        root = list(range(self.roots))
        for parent in self.parent:
            root.append(root[parent])
        return tuple(root)

    @cached_property
    def child_index(self) -> tuple[int, ...]:
        """Position of every edge among its siblings, 0, 1, … in edge order."""
        count = [0] * (self.roots + len(self.parent))
        index: list[int] = []
        for parent in self.parent:
            index.append(count[parent])
            count[parent] += 1
        return tuple(index)

    @cached_property
    def action_depth(self) -> tuple[int, ...]:
        """Per edge: the number of stochastic edges above it on its path."""
        below = [0] * self.roots
        depth: list[int] = []
        for parent, stochastic in zip(self.parent, self.stochastic, strict=True):
            depth.append(below[parent])
            below.append(below[parent] + int(stochastic))
        return tuple(depth)

    def path(self, node: int) -> tuple[int, ...]:
        """Child indices on the way from the root to `node`, () for a root; with the root it names the node."""
        way: list[int] = []
        while node >= self.roots:
            way.append(self.child_index[node - self.roots])
            node = self.parent[node - self.roots]
        return tuple(reversed(way))

    @cached_property
    def leaves_below(self) -> tuple[tuple[int, ...], ...]:
        """Per edge: positions in `scored` of the leaves that descend from it, ascending."""
        below: list[list[int]] = [[] for _ in self.parent]
        for position, leaf in enumerate(self.scored):
            node = leaf
            while node >= self.roots:
                below[node - self.roots].append(position)
                node = self.parent[node - self.roots]
        return tuple(tuple(b) for b in below)

    def cost(self) -> Cost:
        """Exact cost of the plan for one prompt."""
        return Cost(forwards=len(set(self.parent)), leaves=len(self.scored), trained_edges=sum(self.trained))


def ode(steps: int, roots: int) -> Plan:
    """`roots` deterministic chains from distinct noises: evaluation, and every forward-process method.

    Cost: roots·T forwards, roots leaves, 0 trained edges.
    """
    return chain(steps, roots, stochastic=())


def crossed(steps: int, noises: int, variants: int) -> Plan:
    """Deterministic chains from each of `noises` initial noises with each of `variants` conditions (E²PO, §9).

    Root r starts from noise r // variants and is walked with variant r % variants.
    Cost: noises·variants·T forwards, noises·variants leaves, 0 trained edges.
    """
    _at_least("noises", noises, 1)
    _at_least("variants", variants, 1)
    roots = range(noises * variants)
    start, variant = tuple(r // variants for r in roots), tuple(r % variants for r in roots)
    return replace(ode(steps, len(roots)), start=start, variant=variant)


def chain(
    steps: int,
    roots: int,
    train: Iterable[int] | None = None,
    stochastic: Iterable[int] | None = None,
    shared_noise: bool = False,
) -> Plan:
    """`roots` independent chains (Flow-GRPO, §1; with `shared_noise` DanceGRPO, §3.1).

    stochastic    steps that draw noise; default all, the last one included, as Flow-GRPO's sampler does
    train         steps that the loss uses, a subset of `stochastic`; default the stochastic ones but T − 1
    shared_noise  all chains start from one initial noise and differ by their transitions only
    Cost: roots·T forwards, roots leaves, roots·|train| trained edges.
    """
    _at_least("steps", steps, 1)
    noisy = _steps_in("stochastic", range(steps) if stochastic is None else stochastic, range(steps))
    trained = noisy - {steps - 1} if train is None else _steps_in("train", train, noisy)
    rule = [[_Shoot(i in noisy, i in trained)] for i in range(steps)]
    return _grow(steps, _starts("roots", roots, shared_noise), lambda i, _: rule[i])


def chains(
    steps: int, train: Sequence[Iterable[int]], stochastic: Iterable[int] | None = None, shared_noise: bool = False
) -> Plan:
    """As `chain`, but each chain trains steps of its own: one chain per entry of `train` (DanceGRPO, §3.1).

    Cost: len(train)·T forwards, len(train) leaves, Σ |train[r]| trained edges.
    """
    base = chain(steps, len(train), train=(), stochastic=stochastic, shared_noise=shared_noise)
    noisy = {i for i, draws in zip(base.step, base.stochastic, strict=True) if draws}
    own = [_steps_in(f"train[{r}]", chosen, noisy) for r, chosen in enumerate(train)]
    edges = zip(base.step, base.node_root[base.roots :], strict=True)
    return replace(base, trained=tuple(i in own[root] for i, root in edges))


def window(steps: int, roots: int, start: int, size: int, shared_noise: bool = False) -> Plan:
    """Chains that are stochastic, and trained, only at steps start … start + size − 1 (MixGRPO, §3.2; Fast, §1).

    Cost: roots·T forwards, roots leaves, roots·size trained edges.
    """
    _at_least("steps", steps, 1)
    inside = _window("start", start, "size", size, steps)
    return chain(steps, roots, train=inside, stochastic=inside, shared_noise=shared_noise)


def one_step(steps: int, roots: int, at: int, shared_noise: bool = False) -> Plan:
    """Chains with noise at the single step `at`, the same for the whole group (Flash-GRPO, §6): a window of one."""
    _at_least("steps", steps, 1)
    _between("at", at, 0, steps - 1)
    return window(steps, roots, at, 1, shared_noise)


def fan_out(steps: int, seeds: int, branches: int, at: int, window: int = 1) -> Plan:
    """One ODE prefix per seed, `branches` children at step `at`, noise for `window` steps, ODE after (Fast, §1).

    Cost: seeds·(at + 1 + branches·(T − 1 − at)) forwards, seeds·branches leaves, seeds·branches·window trained edges.
    """
    _at_least("steps", steps, 1)
    _at_least("branches", branches, 1)
    inside = _window("at", at, "window", window, steps)
    rule = [[_Shoot(i in inside, i in inside)] * (branches if i == at else 1) for i in range(steps)]
    return _grow(steps, _starts("seeds", seeds, False), lambda i, _: rule[i])


def branch_each_step(
    steps: int,
    seeds: int,
    branches: int,
    at: Iterable[int] | None = None,
    trunk_leaf: bool = False,
    jumps: bool = False,
) -> Plan:
    """An ODE trunk per seed that grows `branches` noisy children at every step of `at`; each is finished by ODE.

    TempFlow-GRPO, arXiv 2508.04324 (§2): all randomness of a leaf comes from its one stochastic edge, so the leaf's
    reward is that edge's.  `at` is a non-empty subset of 0 … T − 2, by default all of it.  The trunk's own edge comes
    after its noisy siblings, so that a branch's identity does not depend on whether the trunk goes on.  The trunk ends
    at its last branched node; `trunk_leaf` takes it to σ = 0 and scores it. With `jumps` all edges draw noise, as
    tokens have no others: a leaf's reward is then its branch's on average, the trunk goes on from the first of its
    branches, which are drawn alike, and the last step, which draws too, may be branched: |at|·(branches − 1) + 1 leaves
    a seed.
    Cost with the default `at`: seeds·(T − 1) + seeds·branches·T(T − 1)/2 forwards, seeds·branches·(T − 1) leaves and
    trained edges; `trunk_leaf` adds `seeds` forwards and leaves.
    """
    noisy = range(steps if jumps else steps - 1)
    _at_least("steps", steps, 1 if jumps else 2)
    _at_least("branches", branches, 1)
    branched = _steps_in("at", noisy if at is None else at, noisy)
    if not branched:
        raise _invalid("at", "empty", "the trunk must branch somewhere", f"any step of 0 … {noisy[-1]}")
    last = max(branched)
    follow = [_Shoot(jumps, False)]

    def rule(i: int, trunk: bool) -> list[_Shoot]:
        if not trunk:
            return follow
        noisy = [_Shoot(True, True)] * (branches if i in branched else 0)
        if jumps and noisy:
            return [replace(noisy[0], trunk=i < last), *noisy[1:]]
        return noisy + ([_Shoot(jumps, False, trunk=True)] if i < last or trunk_leaf else [])

    return _grow(steps, _starts("seeds", seeds, False), rule)


def tree(
    steps: int,
    roots: int,
    splits: Mapping[int, int],
    stochastic: Iterable[int] | None = None,
    train: Iterable[int] | None = None,
    scale: Mapping[int, float] | None = None,
) -> Plan:
    """Every node has `splits[i]` children at the steps named there and one elsewhere (BranchGRPO §3.3, TreeRPO §4).

    splits      step -> fan-out ≥ 1; a step that fans out must be stochastic, or its children would be equal
    stochastic  steps that draw noise; default all
    train       steps that the loss uses; default every stochastic one
    scale       step -> multiplier of the noise level; 1.0 where absent
    Cost: with n_i = roots·Π_{j<i} splits_j nodes at step i: Σ_{i<T} n_i forwards, n_T leaves, Σ_{i∈train} n_{i+1}
    trained edges.
    """
    _at_least("steps", steps, 1)
    noisy = _steps_in("stochastic", range(steps) if stochastic is None else stochastic, range(steps))
    trained = noisy if train is None else _steps_in("train", train, noisy)
    _steps_in("splits", [i for i, n in splits.items() if n != 1], noisy)
    _steps_in("splits", splits, range(steps))
    levels: Mapping[int, float] = {} if scale is None else scale
    _steps_in("scale", levels, noisy)
    for i, fan in splits.items():
        _at_least(f"splits[{i}]", fan, 1)
    rule = [[_Shoot(i in noisy, i in trained, levels.get(i, 1.0))] * splits.get(i, 1) for i in range(steps)]
    return _grow(steps, _starts("roots", roots, False), lambda i, _: rule[i])


def candidates(steps: int, roots: int, count: int, carry: Carry = "ode") -> Plan:
    """Chains that draw `count` successors at every step but the last (DRM, §13).

    All successors are trained, each by a score of its own (a latent reward's), and end there. The chain itself goes on
    by `carry`: "ode" an ODE step, after its noisy siblings; or "candidate", the first of these, which are drawn alike,
    so that it is going on from any. The last step is an ODE step, and its end is scored, to look at. Cost: roots·T
    forwards, roots leaves, roots·count·(T − 1) trained edges. Raises ValueError for another `carry`.
    """
    _at_least("steps", steps, 2)
    _at_least("count", count, 2)
    if carry not in get_args(Carry):
        raise _invalid("carry", carry, "names no way to go on", "'ode'")
    goes_on = [_Shoot(False, False, trunk=True)]
    noisy = [_Shoot(True, True, trunk=carry == "candidate" and n == 0) for n in range(count)]
    shoots = noisy if carry == "candidate" else noisy + goes_on

    def rule(i: int, trunk: bool) -> list[_Shoot]:
        return [] if not trunk else shoots if i < steps - 1 else goes_on

    return _grow(steps, _starts("roots", roots, False), rule)


@dataclass(frozen=True)
class _Shoot:
    """One child to be grown; `trunk` is handed to the child and says which rule applies to it."""

    stochastic: bool
    trained: bool
    scale: float = 1.0
    trunk: bool = False


def _grow(steps: int, start: tuple[int, ...], rule: Callable[[int, bool], Sequence[_Shoot]]) -> Plan:
    """Grow every live node by `rule(step, trunk)`, step by step; parents in order of birth, roots are trunk."""
    roots = len(start)
    parent: list[int] = []
    step: list[int] = []
    shoots: list[_Shoot] = []
    front = [(root, True) for root in range(roots)]
    for i in range(steps):
        children: list[tuple[int, bool]] = []
        for node, trunk in front:
            for shoot in rule(i, trunk):
                if len(shoots) == MAX_EDGES:
                    over = f"{steps} would give a prompt more than {MAX_EDGES} edges, by step {i}"
                    raise ValueError(f"steps: {over}; nearest valid: fewer steps or branches")
                children.append((roots + len(shoots), shoot.trunk))
                parent.append(node)
                step.append(i)
                shoots.append(shoot)
        front = children
    return Plan(
        steps=steps,
        roots=roots,
        parent=tuple(parent),
        step=tuple(step),
        stochastic=tuple(s.stochastic for s in shoots),
        trained=tuple(s.trained for s in shoots),
        scale=tuple(float(s.scale) for s in shoots),
        start=start,
        scored=tuple(node for node, _ in front),
    )


def _check_edges(plan: Plan) -> None:
    count = len(plan.parent)
    if count == 0 and plan.steps > 0:
        raise _invalid("parent", (), "a plan needs at least one edge", (0,))
    lengths = [("step", plan.step), ("stochastic", plan.stochastic), ("trained", plan.trained), ("scale", plan.scale)]
    for name, entries in lengths:
        if len(entries) != count:
            raise _invalid(f"len({name})", len(entries), "one entry per edge is needed", count)
    at = [0] * plan.roots
    previous = 0
    for e, (parent, step) in enumerate(zip(plan.parent, plan.step, strict=True)):
        _between(f"parent[{e}]", parent, 0, plan.roots + e - 1)
        if at[parent] != step:
            raise _invalid(f"step[{e}]", step, f"its parent, node {parent}, is at step {at[parent]}", at[parent])
        if step < previous:
            raise _invalid(f"step[{e}]", step, f"edges go in wavefront order and step {previous} came before", previous)
        _between(f"step[{e}]", step, 0, plan.steps - 1)
        previous = step
        at.append(step + 1)
        if plan.trained[e] and not plan.stochastic[e]:
            raise _invalid(f"trained[{e}]", True, "a deterministic edge has no log-probability", False)
        if not (math.isfinite(plan.scale[e]) and plan.scale[e] > 0):
            raise _invalid(f"scale[{e}]", plan.scale[e], "must be finite and > 0", 1.0)


def _check_roots_and_leaves(plan: Plan) -> None:
    for name, entries in (("start", plan.start), ("variant", plan.variant)):
        if len(entries) != plan.roots:
            raise _invalid(f"len({name})", len(entries), "one entry per root is needed", plan.roots)
        for root, entry in enumerate(entries):
            _at_least(f"{name}[{root}]", entry, 0)
    if len(set(plan.scored)) != len(plan.scored):
        raise _invalid("scored", plan.scored, "names a node twice", tuple(dict.fromkeys(plan.scored)))
    nodes = plan.roots + len(plan.parent)
    for position, node in enumerate(plan.scored):
        _between(f"scored[{position}]", node, 0, nodes - 1)
        if plan.node_step[node] != plan.steps:
            finished = [n for n in range(nodes) if plan.node_step[n] == plan.steps]
            nearest = min(finished, key=lambda n: abs(n - node), default="none, scored = ()")
            raise _invalid(f"scored[{position}]", node, f"that node is at step {plan.node_step[node]}, not T", nearest)


def _invalid(field: str, value: object, why: str, nearest: object) -> ValueError:
    return ValueError(f"{field} = {value}: {why}; nearest valid: {nearest}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise _invalid(name, value, f"must be at least {low}", low)
    if value > (most := MAX_STEPS if name == "steps" else MAX_EDGES):
        raise _invalid(name, value, f"must be at most {most}", most)


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _invalid(name, value, f"must be in {low} … {high}", min(max(value, low), high))


def _steps_in(name: str, values: Iterable[int], allowed: Collection[int]) -> frozenset[int]:
    """`values` as a set, after checking that each is one of `allowed`."""
    chosen = frozenset(values)
    for value in sorted(chosen):
        if value not in allowed:
            nearest = min(allowed, key=lambda a: (abs(a - value), a), default="none")
            raise _invalid(name, value, f"must be among the steps {sorted(allowed)}", nearest)
    return chosen


def _window(start_name: str, start: int, size_name: str, size: int, steps: int) -> range:
    _between(start_name, start, 0, steps - 1)
    _between(size_name, size, 1, steps - start)
    return range(start, start + size)


def _starts(name: str, roots: int, shared: bool) -> tuple[int, ...]:
    _at_least(name, roots, 1)
    return (0,) * roots if shared else tuple(range(roots))
