"""Grows a forest from plans, wavefront by wavefront.

At step i every live node of every prompt shares σ_i, so a step is one batched prediction (in chunks that fit memory):
T launches whatever the plan's shape.  A node is predicted once and its children share that prediction.  States are
moved by `transition` and `sample` only; there is no arithmetic on states here, which may be tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.core.compiled_plan import Keep, Level, compiled, long, merged
from tempflow.core.corruption import Corruption, check_velocity
from tempflow.core.distribution import gaussian
from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rng import NoiseKind, Stream
from tempflow.core.schedule import Schedule
from tempflow.core.solver import OneStep, Solver, predict_clean
from tempflow.core.state import WHOLE, StateLayout, placed

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, *S], sigma [B], rows LongTensor[B]) -> velocity [B, *S], or of tokens logits [B, *S, V]; `rows` index
conditions: the prompt slots, or with several conditions a prompt slot · variants + variant."""


@dataclass(frozen=True)
class Noise:
    """The noise of one iteration, on the CPU, each a function of its identity alone: standard normals, float32, or of
    another kind (`core.rng`)."""

    seed: int
    iteration: int = 0

    def initial(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int], kind: NoiseKind = "normal") -> Tensor:
        """[len(ids), *shape]: initial noises; an id is (prompt slot, start index)."""
        return self._draw("rollout.initial", ids, shape, kind)

    def edge(self, ids: Sequence[tuple[int, ...]], shape: Sequence[int], kind: NoiseKind = "normal") -> Tensor:
        """[len(ids), *shape]: noises of stochastic edges; an id is (prompt slot, root, *path of the child, step)."""
        return self._draw("rollout.edge", ids, shape, kind)

    def _draw(self, stream: str, ids: Sequence[tuple[int, ...]], shape: Sequence[int], kind: NoiseKind) -> Tensor:
        return Stream(self.seed, stream).noise(kind, [(self.iteration, *i) for i in ids], shape)


def rollout(
    plans: Sequence[Plan],
    dynamics: Dynamics,
    schedule: Schedule,
    predict: Predict,
    noise: Noise,
    *,
    shape: Sequence[int],
    slots: Sequence[int] | None = None,
    solver: Dynamics | Solver | None = None,
    variants: int = 1,
    max_rows: int | None = None,
    store_dtype: torch.dtype = torch.float32,
    keep: Keep = "stochastic",
    keep_mean: bool = False,
    keep_log_prob: bool = True,
    layout: StateLayout = WHOLE,
    device: torch.device | str = "cpu",
) -> Forest:
    """Run one plan per prompt, all prompts together, without gradients.

    plans        one per prompt; they may differ but each has schedule.steps steps
    dynamics     draws the stochastic edges; its corruption says what roots start from, and what is predicted
    predict      the velocity (of tokens: logits [B, *S, V]) of [B, *S] states at one common σ (in the schedule's
                 dtype); called once per step and chunk, every node that has a child in exactly one call
    noise        seed and iteration; with slot, root, path and step it fixes every draw, so results do not depend on
                 `max_rows` or on which prompts share a call (as far as `predict` does not)
    shape        *S, one sample's latent shape
    slots        per prompt its slot in the iteration, distinct and ≥ 0; default 0, 1, …  It enters the noise, is what
                 `predict` gets as `rows`, and is `edges.prompt` and `leaves.prompt`
    variants     conditions that `predict` has for a prompt: its row is slot · variants + the root's variant. A variant
                 changes no noise
    solver       walks the deterministic edges: a deterministic dynamics, default `ODE()`, or a `Solver`, which gets x̂0
                 at the node's last ancestors, whatever kind of edge led from there, in float32 at least. Tokens have no
                 default and no x̂0: they jump, also where nothing is trained (`plan.chain(steps, roots, train=())`)
    max_rows     upper bound of B; default no bound.  Chunks of a step are of even size
    store_dtype  dtype of every state.  A child is rounded to it first; the rounded value is what the next step starts
                 from and what log_prob is taken at, so that training sees exactly the sampled transition. Tokens are
                 stored as they are, in int64
    keep         edges to record: "stochastic" ones or "all"
    keep_mean    fill `edges.mean`, in float32 at least; for a recorded ODE edge it is the child
    keep_log_prob  fill `edges.log_prob`; without it that is NaN. A jump of tokens takes V² terms for it
    layout       by prompt slot: which elements are held from root to leaf, and what counts in a log_prob. What
                 `predict` says of held elements is not read; the noise of the others is what it is without any
    device       where states live and `predict` computes

    Prompts and their leaves come out in the order given: joining the forests of two calls with `Forest.cat` equals
    one call with all the prompts.  ValueError when the arguments do not fit together.
    """
    walker = _Walker(
        dynamics=dynamics,
        solver=solver if isinstance(solver, Solver) else OneStep(ODE() if solver is None else solver),
        schedule=schedule,
        predict=predict,
        noise=noise,
        shape=tuple(shape),
        max_rows=max_rows,
        dtype=store_dtype,
        device=torch.device(device),
        layout=layout,
        variants=variants,
    )
    owners = list(range(len(plans))) if slots is None else list(slots)
    _check(plans, owners, walker, keep, variants)
    if walker.corruption.prediction != "velocity":
        _check_tokens(plans, walker, solver is not None, keep_mean)
    programs = [compiled(plan, keep) for plan in plans]
    frame = Forest.cat([program.frame_for(slot) for program, slot in zip(programs, owners, strict=True)])
    edges = [len(program.frame.edges) for program in programs]
    count = [program.frame.nodes.shape[0] for program in programs]
    log_dtype = torch.promote_types(store_dtype, torch.float32)
    log_prob = torch.full((sum(edges),), math.nan, dtype=log_dtype, device=walker.device)
    mean = torch.empty(sum(edges), *walker.shape, dtype=log_dtype, device=walker.device) if keep_mean else None
    with torch.no_grad():
        front = walker.start(plans, owners)
        nodes = torch.empty(sum(count), *walker.shape, dtype=front.x.dtype, device=walker.device)
        _put(nodes, front.x, merged([program.born for program in programs], owners, count, edges, variants))
        for i in range(schedule.steps):
            level = merged([program.levels[i] for program in programs], owners, count, edges, variants)
            front = walker.advance(front, i, level, log_prob if keep_log_prob else None, mean)
            _put(nodes, front.x, level)
    if mean is not None:
        calm = (~frame.edges.stochastic).nonzero()[:, 0]
        mean[calm.to(walker.device)] = nodes[frame.edges.child[calm].to(walker.device)].to(log_dtype)
    frame = frame.to(walker.device)
    return replace(frame, nodes=nodes, edges=replace(frame.edges, log_prob=log_prob, mean=mean))


def skeleton(plans: Sequence[Plan], slots: Sequence[int], keep: Keep = "stochastic") -> Forest:
    """The forest that `rollout` would grow, without its states (0 elements each), log-probabilities (NaN) and means.

    Edges, leaves and descent are those of a rollout of all these plans in one process, so that a process that grows a
    part of them can place its part in the whole.
    """
    return Forest.cat([compiled(plan, keep).frame_for(slot) for plan, slot in zip(plans, slots, strict=True)])


@dataclass(frozen=True, eq=False)
class _Front:
    """The nodes of one step."""

    x: Tensor  # their states
    clean: tuple[Tensor, ...] = ()  # x̂0 at their parents, each once; at the parents of these; … as the solver wants
    parent_of: Tensor | None = None  # per node: index into each of `clean`, on the CPU

    def previous(self, at: Tensor) -> tuple[Tensor, ...]:
        """x̂0 at the last ancestors of the nodes at these positions, the nearest first; () at the roots."""
        if self.parent_of is None:
            return ()
        return tuple(clean[self.parent_of[at].to(clean.device)] for clean in self.clean)


@dataclass(frozen=True)
class _Walker:
    """What stays the same during a rollout."""

    dynamics: Dynamics
    solver: Solver
    schedule: Schedule
    predict: Predict
    noise: Noise
    shape: tuple[int, ...]
    max_rows: int | None
    dtype: torch.dtype
    device: torch.device
    layout: StateLayout
    variants: int

    @property
    def corruption(self) -> Corruption:
        return self.dynamics.corruption

    def start(self, plans: Sequence[Plan], slots: Sequence[int]) -> _Front:
        """The first front: every root's initial state, each distinct noise drawn once."""
        wanted = [(slot, s) for plan, slot in zip(plans, slots, strict=True) for s in plan.start]
        distinct = list(dict.fromkeys(wanted))
        place = {identity: n for n, identity in enumerate(distinct)}
        noise = self.noise.initial(distinct, self.shape, self.corruption.noise)
        drawn = self.corruption.start(noise, self.schedule)
        drawn = drawn.to(self.device, self.dtype if drawn.is_floating_point() else drawn.dtype)
        drawn = self.layout.take(long([slot for slot, _ in distinct])).hold(drawn)
        return _Front(drawn[long([place[identity] for identity in wanted]).to(self.device)])

    def advance(self, front: _Front, i: int, level: Level, log_prob: Tensor | None, mean: Tensor | None) -> _Front:
        """The front at step i -> the next front; fills in log_prob and mean, where asked, of the recorded stochastic
        edges."""
        children = torch.empty(level.born, *self.shape, dtype=front.x.dtype, device=self.device)
        remembers = self.solver.memory > 0 and i + 1 < self.schedule.steps
        wide = torch.promote_types(self.dtype, torch.float32)
        clean = children.new_empty(len(level.parents), *self.shape, dtype=wide) if remembers else None
        bounds = _chunks(len(level.parents), self.max_rows)
        first_child = _first(level.parent_of, bounds)
        first_calm, first_noisy = _first(level.calm, first_child), _first(level.noisy, first_child)
        spread = log_prob is not None and len(level.noisy) > 0 and self._spreads(i)
        for c in range(len(bounds) - 1):
            lo, hi = bounds[c], bounds[c + 1]
            state = front.x[level.parents[lo:hi].to(self.device)]
            layout = self.layout.take(level.rows[lo:hi] // self.variants)
            said = layout.silence(self._prediction(state, i, level.rows[lo:hi]))
            if clean is not None:
                clean[lo:hi] = predict_clean(state, said, self.schedule, torch.full((hi - lo,), i))
            calm = level.calm[first_calm[c] : first_calm[c + 1]]
            if len(calm):
                of = (level.parent_of[calm] - lo).to(self.device)
                step, previous = torch.full((len(calm),), i), front.previous(level.parents[level.parent_of[calm]])
                law = self.solver.transition(state[of], said[of], self.schedule, step, previous)
                children[calm.to(self.device)] = layout.take(of).hold(law.mode.to(state.dtype))
            part = slice(first_noisy[c], first_noisy[c + 1])
            noisy = level.noisy[part]
            if len(noisy):
                of = (level.parent_of[noisy] - lo).to(self.device)
                # step and scale stay on the CPU: looking at them there does not wait for the device
                step, scale = torch.full((len(noisy),), i), level.scale[part]
                own = layout.take(of)
                law = self.dynamics.transition(state[of], said[of], self.schedule, step, scale)
                drawn = placed(self.noise.edge(level.ids[part], self.shape, self.dynamics.noise), self.device)
                end = law.sample(drawn)
                child = own.hold(end.to(state.dtype))
                children[noisy.to(self.device)] = child
                edge = level.edge_to[part].to(self.device)
                if log_prob is not None and spread:
                    seen = law.counted_by(own).log_prob(child.to(end.dtype))
                    log_prob[edge] = seen.to(log_prob.dtype)
                if mean is not None:
                    mean[edge] = gaussian(law).mean.to(mean.dtype)
        if clean is None:
            return _Front(children)
        return _Front(children, (clean, *front.previous(level.parents))[: self.solver.memory], level.parent_of)

    def _spreads(self, i: int) -> bool:
        """Whether the stochastic edges of step i have a density."""
        return bool(self.dynamics.spreads(self.schedule, long([i])))

    def _prediction(self, state: Tensor, i: int, rows: Tensor) -> Tensor:
        sigma = self.schedule.at(torch.full((len(rows),), i)).to(self.device)
        said, wanted = self.predict(state, sigma, rows.to(self.device)), self.corruption.predicted(state.shape)
        if said.shape != wanted:
            as_ = "as x" if wanted == state.shape else f"{self.corruption.prediction} of tokens"
            raise ValueError(f"predict returned shape {list(said.shape)}; nearest valid: {list(wanted)}, {as_}")
        return said


def _put(nodes: Tensor, front: Tensor, level: Level) -> None:
    nodes[level.node_to.to(nodes.device)] = front[level.node_at.to(nodes.device)]


def _check(plans: Sequence[Plan], slots: Sequence[int], walker: _Walker, keep: str, variants: int) -> None:
    steps = walker.schedule.steps
    if not plans:
        raise ValueError("plans = []: there is nothing to grow; nearest valid: one plan")
    if variants < 1:
        raise ValueError(f"variants = {variants}: must be at least 1; nearest valid: 1")
    for p, plan in enumerate(plans):
        if max(plan.variant) >= variants:
            last = max(plan.variant)
            raise ValueError(f"variants = {variants}: plans[{p}] walks with variant {last}; nearest valid: {last + 1}")
        if plan.steps != steps:
            raise ValueError(f"plans[{p}].steps = {plan.steps}: must be the schedule's; nearest valid: {steps}")
    if len(slots) != len(plans):
        raise ValueError(f"slots has {len(slots)} entries: one per plan is needed; nearest valid: {len(plans)}")
    if len(set(slots)) != len(slots) or min(slots) < 0:
        raise ValueError(f"slots = {list(slots)}: must be distinct and ≥ 0; nearest valid: {list(range(len(slots)))}")
    if walker.max_rows is not None and walker.max_rows < 1:
        raise ValueError(f"max_rows = {walker.max_rows}: must be at least 1; nearest valid: 1")
    if not walker.dtype.is_floating_point:
        raise ValueError(f"store_dtype = {walker.dtype}: must be a floating-point type; nearest valid: torch.float32")
    if keep not in ("stochastic", "all"):
        raise ValueError(f"keep = {keep!r}: must be 'stochastic' or 'all'; nearest valid: 'stochastic'")


def _check_tokens(plans: Sequence[Plan], walker: _Walker, solver: bool, keep_mean: bool) -> None:
    walker.layout.check_tokens(walker.corruption.predicted(())[0])
    calm = next((p for p, plan in enumerate(plans) if not all(plan.stochastic)), None)
    if calm is not None and not solver:
        raise ValueError(
            f"plans[{calm}]: walks deterministic edges, and tokens of {walker.dynamics} jump; nearest valid: "
            "stochastic steps, trained or not, as plan.chain(steps, roots, train=())"
        )
    if keep_mean:
        check_velocity(walker.corruption, "keep_mean", "False, as tokens have no mean")
    if walker.solver.memory:
        check_velocity(walker.corruption, f"solver {walker.solver}", "a solver without memory")


def _chunks(rows: int, most: int | None) -> list[int]:
    """Bounds of the fewest chunks of at most `most` rows, of sizes that differ by one at most."""
    count = 0 if rows == 0 else 1 if most is None else math.ceil(rows / most)
    return [rows * c // count for c in range(count + 1)] if count else []


def _first(ascending: Tensor, values: Sequence[int]) -> list[int]:
    """Per value: the first place in `ascending` that holds no less."""
    return [int(place) for place in torch.searchsorted(ascending, long(values))]
