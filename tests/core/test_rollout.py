"""The engine: counted forwards, hand-written loops, independence from batching, and closed forms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.distribution import Gaussian
from tempflow.core.dynamics import CPS, ODE, DanceSDE, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, Predict, rollout, skeleton
from tempflow.core.schedule import Schedule, linear
from tempflow.core.solver import DPMSolver2, Solver, UniPC2

SHAPE = (2, 3)
NOISE = Noise(seed=11, iteration=5)


def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    """Elementwise, nonlinear, different per prompt."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    c = rows.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return (0.4 + 0.2 * s) * x + 0.05 * x * x - 0.1 * c


class Counting:
    """Wraps a prediction and records the rows of every call."""

    def __init__(self, inner: Predict = velocity) -> None:
        self.inner = inner
        self.calls: list[int] = []
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        assert sigma.shape == rows.shape == x.shape[:1]
        assert rows.dtype == torch.long and sigma.unique().numel() == 1
        assert not torch.is_grad_enabled()
        self.calls.append(len(x))
        self.seen.append(x.clone())
        return self.inner(x, sigma, rows)


def grow(plans: list[Plan], predict: Predict = velocity, schedule: Schedule | None = None, **options: object) -> Forest:
    grid = linear(plans[0].steps, 3.0) if schedule is None else schedule
    arguments = {"shape": SHAPE, "noise": NOISE, "dynamics": FlowSDE(0.7), **options}
    return rollout(plans, schedule=grid, predict=predict, **arguments)  # type: ignore[arg-type]


def tensors(f: Forest) -> list[Tensor]:
    seen: list[Tensor] = [f.nodes]
    f.edges.map(lambda t: seen.append(t) or t)
    f.leaves.map(lambda t: seen.append(t) or t)
    return [*seen, *f.descent]


def assert_same(a: Forest, b: Forest) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def leaf_states(f: Forest) -> Tensor:
    return f.nodes[f.leaves.node]


def shuffled_tree(seed: int, steps: int) -> Plan:
    """A random forest whose edges within a step are in random order, with dead ends and unscored leaves."""
    rng = random.Random(seed)
    roots = rng.randint(1, 3)
    parent, step, front = [], [], list(range(roots))
    for i in range(steps):
        chosen = [n for n in front for _ in range(rng.choice([0, 1, 1, 2]))] or front[:1]
        rng.shuffle(chosen)
        chosen = chosen[:9]
        front = [roots + len(parent) + n for n in range(len(chosen))]
        parent += chosen
        step += [i] * len(chosen)
    noisy = tuple(rng.random() < 0.5 for _ in parent)
    scale = tuple(rng.choice([0.5, 1.0]) for _ in parent)
    start = tuple(rng.randrange(roots) for _ in range(roots))
    return Plan(steps, roots, tuple(parent), tuple(step), noisy, noisy, scale, start, tuple(front[::2]))


ZOO = {
    "ode": P.ode(5, 3),
    "chain": P.chain(5, 3),
    "shared": P.chain(5, 3, shared_noise=True),
    "window": P.window(5, 3, 1, 2),
    "fan_out": P.fan_out(5, 2, 3, at=1, window=2),
    "one_step": P.one_step(5, 4, 2),
    "tempflow": P.branch_each_step(5, 2, 3),
    "tempflow+leaf": P.branch_each_step(5, 2, 3, at=[0, 2], trunk_leaf=True),
    "tree": P.tree(5, 2, {0: 2, 2: 3}, scale={0: 0.5}),
    "random": shuffled_tree(4, 5),
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("max_rows", [None, 1, 4])
def test_every_node_is_predicted_once(name: str, max_rows: int | None) -> None:
    plans = [ZOO[name], ZOO["chain"]]
    count = Counting()
    grow(plans, count, max_rows=max_rows)
    assert sum(count.calls) == sum(plan.cost().forwards for plan in plans)
    if max_rows is None:
        assert len(count.calls) == 5  # T launches
    else:
        assert max(count.calls) <= max_rows


def test_chunks_are_even() -> None:
    count = Counting()
    grow([P.ode(2, 10)], count, max_rows=4)
    assert sorted(count.calls[:3]) == [3, 3, 4]
    assert len(count.calls) == 6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([None, 1, 2, 5]))
def test_random_plans_match_a_node_by_node_walk(seed: int, steps: int, max_rows: int | None) -> None:
    plan, slot, grid, sde = shuffled_tree(seed, steps), 6, linear(steps, 3.0), DanceSDE(0.4)
    count = Counting()
    forest = grow([plan], count, dynamics=sde, slots=[slot], max_rows=max_rows, keep="all", schedule=grid)
    assert sum(count.calls) == plan.cost().forwards
    states = [NOISE.initial([(slot, s)], SHAPE) for s in plan.start]
    for e, (parent, i) in enumerate(zip(plan.parent, plan.step, strict=True)):
        x, at = states[parent], torch.tensor([i])
        v = velocity(x, grid.at(at), torch.tensor([slot]))
        if plan.stochastic[e]:
            root, path = plan.node_root[plan.roots + e], plan.path(plan.roots + e)
            z = NOISE.edge([(slot, root, *path, i)], SHAPE)
            law = sde.transition(x, v, grid, at, plan.scale[e])
            states.append(law.sample(z))
            assert torch.equal(forest.edges.log_prob[e], law.log_prob(states[-1])[0])
        else:
            states.append(ODE().transition(x, v, grid, at).mean)
            assert bool(forest.edges.log_prob[e].isnan())
        assert torch.equal(forest.nodes[forest.edges.parent[e]], x[0])
        assert torch.equal(forest.nodes[forest.edges.child[e]], states[-1][0])
    for n, leaf in enumerate(plan.scored):
        assert torch.equal(forest.nodes[forest.leaves.node[n]], states[leaf][0])
    assert forest.edges.step.tolist() == list(plan.step)
    assert forest.edges.depth.tolist() == list(plan.action_depth)
    assert forest.edges.stochastic.tolist() == list(plan.stochastic)
    assert forest.edges.trained.tolist() == list(plan.trained)
    assert torch.equal(forest.edges.scale, torch.tensor(plan.scale))
    assert forest.edges.prompt.eq(slot).all() and forest.leaves.prompt.eq(slot).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(3, 5),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([DPMSolver2(), UniPC2()]),
)
def test_children_inherit_the_predictions_at_their_ancestors(
    seed: int, steps: int, max_rows: int | None, store: torch.dtype, solver: Solver
) -> None:
    """A multistep solver on any tree equals a walk node by node, whatever kind of edge led to a node."""
    plan, sde = shuffled_tree(seed, steps), FlowSDE(0.4)
    grid = Schedule(torch.linspace(0.95, 0, steps + 1))
    forest = grow([plan], dynamics=sde, solver=solver, max_rows=max_rows, keep="all", schedule=grid, store_dtype=store)
    wide = torch.promote_types(store, torch.float32)
    states = [NOISE.initial([(0, s)], SHAPE).to(store) for s in plan.start]
    above: list[tuple[Tensor, ...]] = [()] * plan.roots  # x̂0 at each node's last ancestors
    for e, (parent, i) in enumerate(zip(plan.parent, plan.step, strict=True)):
        x, at = states[parent], torch.tensor([i])
        v = velocity(x, grid.at(at), torch.tensor([0]))
        if plan.stochastic[e]:
            z = NOISE.edge([(0, plan.node_root[plan.roots + e], *plan.path(plan.roots + e), i)], SHAPE)
            child = sde.transition(x, v, grid, at, plan.scale[e]).sample(z)
        else:
            child = solver.transition(x, v, grid, at, above[parent]).mean
        states.append(child.to(store))
        above.append((x.to(wide) - grid.sigmas[i].to(v) * v.to(wide), *above[parent])[: solver.memory])
        assert torch.equal(forest.nodes[forest.edges.child[e]], states[-1][0])


def euler(x: Tensor, grid: Schedule, row: int, first: int = 0) -> list[Tensor]:
    """A hand-written Euler loop, x − Δ·v."""
    states = [x]
    rows = torch.full((len(x),), row)
    for i in range(first, grid.steps):
        sigma, after = grid.sigmas[i], grid.sigmas[i + 1]
        states.append(states[-1] + (after - sigma) * velocity(states[-1], sigma.expand(len(x)), rows))
    return states


def test_ode_plan_equals_an_euler_loop_bit_for_bit() -> None:
    grid = linear(6, 3.0)
    forest = grow([P.ode(6, 4)], schedule=grid)
    start = NOISE.initial([(0, s) for s in range(4)], SHAPE)
    assert torch.equal(leaf_states(forest), euler(start, grid, 0)[-1])
    assert len(forest.edges) == 0 and len(forest.nodes) == 4  # nothing but leaves is stored


def test_tempflow_trunk_equals_plain_ode() -> None:
    T, S, K = 6, 2, 3
    grid = linear(T, 3.0)
    forest = grow([P.branch_each_step(T, S, K, trunk_leaf=True)], schedule=grid)
    start = NOISE.initial([(0, s) for s in range(S)], SHAPE)
    path = euler(start, grid, 0)
    for i in range(T - 1):
        for s in range(S):
            here = (forest.edges.step == i) & (forest.edges.root == s)
            assert int(here.sum()) == K
            parent = forest.edges.parent[here].unique()
            assert torch.equal(forest.nodes[parent][0], path[i][s])
    below_an_action = torch.zeros(len(forest.leaves), dtype=torch.bool)
    below_an_action[forest.descent[1]] = True
    assert torch.equal(leaf_states(forest)[~below_an_action], path[-1])


def test_a_branch_is_a_plain_rollout_with_noise_at_its_step_only() -> None:
    T, K = 6, 3
    grid, sde = linear(T, 3.0), FlowSDE(0.7)
    plan = P.branch_each_step(T, 1, K)
    forest = grow([plan], schedule=grid)
    x = NOISE.initial([(0, 0)], SHAPE)
    trunk = euler(x, grid, 0)
    for e in range(len(forest.edges)):
        i, leaf = int(forest.edges.step[e]), int(forest.descent[1][forest.descent[0] == e])
        k = e - int((forest.edges.step < i).sum())
        z = NOISE.edge([(0, 0, *[K] * i, k, i)], SHAPE)
        at = torch.tensor([i])
        v = velocity(trunk[i], grid.at(at), torch.tensor([0]))
        child = sde.transition(trunk[i], v, grid, at).sample(z)
        assert torch.equal(forest.nodes[forest.edges.child[e]], child[0])
        assert torch.equal(leaf_states(forest)[leaf], euler(child, grid, 0, i + 1)[-1][0])


def test_siblings_share_their_parent_and_differ_in_everything_after() -> None:
    forest = grow([P.branch_each_step(5, 2, 4)])
    edges = forest.edges
    for parent in edges.parent.unique():
        group = edges.parent == parent
        assert edges.step[group].unique().numel() == edges.root[group].unique().numel() == 1
        children = forest.nodes[edges.child[group]]
        assert children.flatten(1).unique(dim=0).shape[0] == 4
    assert leaf_states(forest).flatten(1).unique(dim=0).shape[0] == len(forest.leaves)


def test_one_branch_per_seed_at_one_step_is_a_window_of_one() -> None:
    T, S, i = 6, 5, 2
    branches, window = grow([P.branch_each_step(T, S, 1, at=[i])]), grow([P.window(T, S, i, 1)])
    assert_same(branches, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chain_equals_a_hand_loop(dtype: torch.dtype) -> None:
    T, G, slot = 5, 3, 2
    grid = Schedule(linear(T, 3.0).sigmas.to(dtype))
    forest = grow([P.chain(T, G)], slots=[slot], schedule=grid, store_dtype=dtype)
    x = NOISE.initial([(slot, g) for g in range(G)], SHAPE).to(dtype)
    a = 0.7
    for i in range(T):
        s, d = float(grid.sigmas[i]), float(grid.sigmas[i] - grid.sigmas[i + 1])
        rate2 = a * a * s / (1 - (s if i else float(grid.sigmas[1])))
        z = NOISE.edge([(slot, g, *[0] * (i + 1), i) for g in range(G)], SHAPE).to(dtype)
        v = velocity(x, grid.sigmas[i].expand(G), torch.full((G,), slot))
        x = (1 - rate2 * d / (2 * s)) * x - d * (1 + rate2 * (1 - s) / (2 * s)) * v + math.sqrt(rate2 * d) * z
        here = forest.edges.step == i
        child = forest.nodes[forest.edges.child[here]]
        assert child.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(child, x, rtol=tolerance, atol=tolerance)
    assert forest.edges.trained.tolist() == (forest.edges.step < T - 1).tolist()


MIXED = [ZOO["tempflow"], ZOO["tree"], ZOO["chain"], ZOO["random"], ZOO["fan_out"]]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 1000])
def test_results_do_not_depend_on_max_rows(max_rows: int) -> None:
    assert_same(grow(MIXED, max_rows=max_rows), grow(MIXED))


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_results_of_a_multistep_solver_do_not_depend_on_max_rows(max_rows: int) -> None:
    grid = Schedule(torch.linspace(0.95, 0, 6))
    whole = grow(MIXED, schedule=grid, solver=DPMSolver2())
    assert_same(grow(MIXED, schedule=grid, solver=DPMSolver2(), max_rows=max_rows), whole)
    parts = [grow([plan], schedule=grid, solver=DPMSolver2(), slots=[n]) for n, plan in enumerate(MIXED)]
    assert_same(Forest.cat(parts), whole)
    assert not torch.equal(whole.nodes, grow(MIXED, schedule=grid).nodes)


@dataclass(frozen=True)
class Spy:
    """A solver that takes Euler steps and records what history it is given."""

    memory: int
    seen: list[tuple[int, list[tuple[int, ...]]]] = field(
        default_factory=lambda: list[tuple[int, list[tuple[int, ...]]]]()
    )

    def transition(
        self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
    ) -> Gaussian:
        self.seen.append((int(step[0]), [tuple(p.shape) for p in previous]))
        return ODE().transition(x, velocity, schedule, step)


def test_history_is_kept_only_for_a_solver_that_wants_it() -> None:
    plain, three = grow([P.window(4, 3, 1, 1)]), (3, *SHAPE)
    for memory, seen in ((0, [[], [], []]), (1, [[], [three], [three]]), (2, [[], [three] * 2, [three] * 2])):
        spy = Spy(memory)
        assert_same(grow([P.window(4, 3, 1, 1)], solver=spy), plain)
        assert spy.seen == list(zip((0, 2, 3), seen, strict=True))  # step 1 is noisy


def test_a_solver_without_correction_is_the_ode() -> None:
    """Two steps, the first at σ = 1 and the second into 0, leave a multistep solver nothing to correct."""
    plans = [P.ode(2, 3), P.chain(2, 2), P.branch_each_step(2, 2, 2)]
    assert_same(grow(plans, solver=DPMSolver2()), grow(plans))


def test_results_do_not_depend_on_how_prompts_are_put_together() -> None:
    slots = [4, 0, 9, 2, 7]
    whole = grow(MIXED, slots=slots)
    pairs = list(zip(MIXED, slots, strict=True))
    for cuts in ([1, 2, 3, 4], [2], [3, 4]):
        bounds = [0, *cuts, 5]
        parts = [pairs[a:b] for a, b in pairwise(bounds)]
        chunked = [grow([p for p, _ in part], slots=[s for _, s in part]) for part in parts]
        assert_same(Forest.cat(chunked), whole)
    swapped = grow(MIXED[::-1], slots=slots[::-1])
    assert_same(Forest.cat([grow([plan], slots=[slot]) for plan, slot in pairs[::-1]]), swapped)


def test_the_noise_depends_on_seed_iteration_slot_and_root() -> None:
    plan = P.chain(3, 2)
    base = grow([plan])
    assert_same(grow([plan]), base)
    for other in (
        grow([plan], noise=Noise(12, 5)),
        grow([plan], noise=Noise(11, 6)),
        grow([plan], slots=[1], predict=lambda x, sigma, rows: velocity(x, sigma, rows * 0)),
    ):
        assert not torch.isclose(other.nodes, base.nodes).any()


def test_shared_initial_noise() -> None:
    forest = grow([P.chain(4, 5, shared_noise=True)])
    first = forest.edges.step == 0
    starts = forest.nodes[forest.edges.parent[first]]
    assert starts.flatten(1).unique(dim=0).shape[0] == 1
    assert forest.nodes[forest.edges.child[first]].flatten(1).unique(dim=0).shape[0] == 5
    apart = grow([P.chain(4, 5)])
    starts = apart.nodes[apart.edges.parent[apart.edges.step == 0]]
    assert starts.flatten(1).unique(dim=0).shape[0] == 5


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["tempflow", "chain", "tree"])
def test_log_prob_is_that_of_the_stored_transition(store: torch.dtype, name: str) -> None:
    grid, sde = linear(5, 3.0), FlowSDE(0.7)
    forest = grow([ZOO[name]], schedule=grid, store_dtype=store)
    edges = forest.edges
    assert forest.nodes.dtype == store
    x, y = forest.nodes[edges.parent], forest.nodes[edges.child]
    law = sde.transition(x, velocity(x, grid.at(edges.step), edges.prompt), grid, edges.step, edges.scale)
    assert torch.equal(law.log_prob(y.to(law.mean.dtype)), edges.log_prob)
    assert bool(torch.isfinite(edges.log_prob).all())


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keep", ["stochastic", "all"])
def test_mean_is_that_of_the_stored_transition(store: torch.dtype, keep: str) -> None:
    grid, sde = linear(5, 3.0), FlowSDE(0.7)
    forest = grow(MIXED, schedule=grid, store_dtype=store, keep=keep, keep_mean=True, max_rows=3)
    edges, mean = forest.edges, forest.edges.mean
    assert mean is not None and mean.dtype == edges.log_prob.dtype == torch.promote_types(store, torch.float32)
    x = forest.nodes[edges.parent]
    v = velocity(x, grid.at(edges.step), edges.prompt)
    noisy = edges.stochastic
    law = sde.transition(x[noisy], v[noisy], grid, edges.step[noisy], edges.scale[noisy])
    assert torch.equal(mean[noisy], law.mean)
    assert not torch.equal(mean[noisy], forest.nodes[edges.child[noisy]].to(mean.dtype))
    assert bool((~noisy).any()) == (keep == "all")
    assert torch.equal(mean[~noisy], forest.nodes[edges.child[~noisy]].to(mean.dtype))


def test_asking_for_the_mean_changes_nothing_else() -> None:
    plain, kept = grow(MIXED), grow(MIXED, keep_mean=True)
    assert plain.edges.mean is None and kept.edges.mean is not None
    assert kept.edges.mean.shape == (len(kept.edges), *SHAPE)
    assert_same(replace(kept, edges=replace(kept.edges, mean=None)), plain)
    halves = [grow(MIXED[:2], keep_mean=True), grow(MIXED[2:], keep_mean=True, slots=[2, 3, 4])]
    assert_same(Forest.cat(halves), kept)
    bare = skeleton(MIXED, range(len(MIXED)))
    assert bare.edges.mean is None and not bare.edges.traits and not bare.leaves.traits
    none = grow([P.ode(4, 2)], schedule=linear(4), keep_mean=True)
    assert none.edges.mean is not None and none.edges.mean.shape == (0, *SHAPE)


def test_mean_without_spread_is_the_child() -> None:
    forest = grow([P.chain(4, 2)], dynamics=CPS(0.8), keep_mean=True)
    last = forest.edges.step == 3
    assert forest.edges.mean is not None and bool(last.any())
    assert torch.equal(forest.edges.mean[last], forest.nodes[forest.edges.child[last]])


def test_log_prob_against_torch_distributions() -> None:
    grid = linear(5, 3.0)
    forest = grow([ZOO["tree"]], schedule=Schedule(grid.sigmas.double()), store_dtype=torch.float64)
    edges = forest.edges
    x, y = forest.nodes[edges.parent], forest.nodes[edges.child]
    grid = grid.double()
    v = velocity(x, grid.at(edges.step), edges.prompt)
    a, b, s = (c.view(-1, 1, 1) for c in FlowSDE(0.7).coefficients(grid, edges.step, edges.scale))
    want = torch.distributions.Normal(a * x + b * v, s.expand_as(x)).log_prob(y).flatten(1).mean(1)
    torch.testing.assert_close(edges.log_prob, want, rtol=1e-10, atol=1e-10)


def test_only_what_is_needed_is_stored() -> None:
    T, S, K = 6, 2, 3
    plan = P.branch_each_step(T, S, K)
    forest = grow([plan])
    assert bool(forest.edges.stochastic.all())
    assert len(forest.edges) == plan.cost().trained_edges == S * K * (T - 1)
    # branched trunk nodes, noisy children, leaves; the children of the last branch step are no leaves (σ_{T−1} > 0)
    assert len(forest.nodes) == S * (T - 1) + S * K * (T - 1) + S * K * (T - 1)
    everything = grow([plan], keep="all")
    assert len(everything.edges) == len(plan.parent)
    assert len(everything.nodes) == plan.roots + len(plan.parent)
    assert_same(everything.select(everything.edges.stochastic), forest)


def test_small_noise_brings_siblings_together() -> None:
    forest = grow([P.branch_each_step(5, 2, 3)], dynamics=FlowSDE(1e-9))
    none = grow([P.branch_each_step(5, 2, 3)], dynamics=FlowSDE(0.0))
    for f in (forest, none):
        for root in (0, 1):
            leaves = leaf_states(f)[f.leaves.root == root]
            torch.testing.assert_close(leaves, leaves[:1].expand_as(leaves), rtol=1e-5, atol=1e-6)
    assert bool(forest.edges.log_prob.isfinite().all())
    assert bool(none.edges.log_prob.isnan().all())  # without spread there is no density


def test_a_kernel_without_noise_at_the_last_step() -> None:
    forest = grow([P.chain(4, 2)], dynamics=CPS(0.8))
    assert torch.equal(forest.edges.log_prob.isnan(), forest.edges.step == 3)


@pytest.mark.parametrize("step", range(5))
def test_reward_variance_of_a_branch_in_a_linear_toy(step: int) -> None:
    """v = κx ⇒ the ODE after the branch multiplies by Π(1 − Δ_j κ), so Var R = (Π…)² S_i² (trajectory.md §2 g)."""
    T, K, kappa = 6, 300, 0.8
    grid, sde = linear(T, 3.0).double(), FlowSDE(0.7)
    plan = P.branch_each_step(T, 1, K, at=[step])
    forest = grow([plan], lambda x, sigma, rows: kappa * x, grid, shape=(16,), dynamics=sde, store_dtype=torch.float64)
    after = torch.arange(step + 1, T)
    slope = float((1 - grid.delta(after) * kappa).prod())
    closed = slope**2 * float(sde.coefficients(grid, torch.tensor([step]))[2]) ** 2
    rewards = leaf_states(forest)  # 16 independent linear rewards, each the latent's own coordinate
    degrees = 16 * (K - 1)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], degrees) / degrees
    assert low < float(rewards.var(dim=0).mean()) / closed < high


def test_predict_gets_slots_sigma_and_states_in_storage_dtype() -> None:
    seen: list[tuple[torch.dtype, torch.dtype, list[int]]] = []

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        seen.append((x.dtype, sigma.dtype, rows.tolist()))
        return velocity(x, sigma, rows).bfloat16()

    grow([P.ode(2, 2), P.ode(2, 1)], predict, slots=[8, 3], store_dtype=torch.bfloat16)
    assert seen == [(torch.bfloat16, torch.float32, [8, 8, 3])] * 2


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("name", ["tempflow", "tree", "ode"])
def test_a_variant_is_another_row_and_changes_no_noise(name: str, max_rows: int | None) -> None:
    """Every root's tree is what a rollout of that plan gives when all of it is walked with that root's condition."""
    plain = ZOO[name]
    variant = tuple(root % 2 * 2 for root in range(plain.roots))
    mixed = [replace(plain, variant=variant), plain]
    seen: set[tuple[int, int]] = set()

    def condition(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        seen.update((row // 3, row % 3) for row in rows.tolist())
        return velocity(x, sigma, rows)

    both = grow(mixed, condition, variants=3, slots=[5, 2], keep="all", max_rows=max_rows)
    assert seen == {(5, v) for v in variant} | {(2, 0)}
    assert both.edges.prompt.unique().tolist() == [2, 5] == both.leaves.prompt.unique().tolist()
    for slot, chosen in ((5, variant), (2, (0,) * plain.roots)):
        for k in set(chosen):
            one = grow([plain], lambda x, s, rows, k=k: velocity(x, s, rows * 3 + k), slots=[slot], keep="all")
            mine = torch.tensor([v == k for v in chosen])
            here, there = (both.edges.prompt == slot).nonzero()[:, 0], mine[one.edges.root]
            assert torch.equal(both.nodes[both.edges.child[here[there]]], one.nodes[one.edges.child[there]])
            torch.testing.assert_close(
                both.edges.log_prob[here[there]], one.edges.log_prob[there], rtol=0, atol=0, equal_nan=True
            )


def test_variants_of_one_noise_start_alike_and_part() -> None:
    forest = grow([P.crossed(3, 2, 2)], variants=2, keep="all")
    start = forest.nodes[forest.edges.parent[forest.edges.step == 0]].flatten(1)
    assert torch.equal(start[0], start[1]) and torch.equal(start[2], start[3]) and not torch.equal(start[0], start[2])
    ends = leaf_states(forest).flatten(1)
    assert float((ends[0] - ends[1]).abs().min()) > 1e-3
    same = grow([P.crossed(3, 2, 2)], lambda x, s, rows: velocity(x, s, rows // 2), variants=2)
    assert torch.equal(leaf_states(same)[0], leaf_states(same)[1])


def test_no_gradient_is_kept_and_states_can_be_trained_on() -> None:
    weight = torch.ones((), requires_grad=True)
    forest = grow([P.chain(3, 2)], lambda x, sigma, rows: weight * x)
    assert not forest.nodes.requires_grad and not forest.nodes.is_inference()
    (weight * forest.nodes).sum().backward()
    assert weight.grad is not None


def test_scale_multiplies_the_noise_level() -> None:
    half = grow([P.tree(4, 2, {}, scale=dict.fromkeys(range(4), 0.5))], dynamics=FlowSDE(0.8))
    plain = grow([P.tree(4, 2, {})], dynamics=FlowSDE(0.4))
    assert torch.equal(half.nodes, plain.nodes)
    assert half.edges.scale.unique().tolist() == [0.5]


BAD: list[tuple[Callable[[], Forest], str]] = [
    (lambda: grow([], schedule=linear(4)), "plans = .*nearest valid: one plan"),
    (lambda: grow([P.ode(4, 1), P.ode(5, 1)], schedule=linear(4)), r"plans\[1\].steps = 5.*nearest valid: 4"),
    (lambda: grow([P.ode(4, 1)], slots=[1, 2]), "slots has 2 entries.*nearest valid: 1"),
    (lambda: grow([P.ode(4, 1)] * 2, slots=[1, 1]), "slots = .*distinct"),
    (lambda: grow([P.ode(4, 1)], slots=[-1]), "slots = .*≥ 0"),
    (lambda: grow([P.ode(4, 1)], max_rows=0), "max_rows = 0.*nearest valid: 1"),
    (lambda: grow([P.ode(4, 1)], solver=FlowSDE(0.7)), "solver = .*ODE"),
    (lambda: grow([P.ode(4, 1)], store_dtype=torch.long), "store_dtype = .*float32"),
    (lambda: grow([P.ode(4, 1)], variants=0), "variants = 0: must be at least 1; nearest valid: 1"),
    (
        lambda: grow([P.ode(4, 1), P.crossed(4, 1, 3)]),
        r"variants = 1: plans\[1\] walks with variant 2; nearest valid: 3",
    ),
    (lambda: grow([P.ode(4, 1)], keep="none"), "keep = 'none'.*'stochastic'"),
    (lambda: grow([P.ode(4, 1)], lambda x, sigma, rows: x[:, :1]), r"predict returned .*\[1, 2, 3\]"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call: Callable[[], Forest], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_on_a_device_nothing_is_mixed_up_and_nothing_waits_for_it() -> None:
    """The meta device holds no values: an operand left on the CPU, or a look at a value there, raises."""
    forest = grow(MIXED, max_rows=4, device="meta", keep="all", keep_mean=True)
    reference = grow(MIXED, keep="all", keep_mean=True)
    multistep = grow(MIXED, max_rows=4, device="meta", solver=DPMSolver2())
    assert multistep.nodes.shape == grow(MIXED).nodes.shape
    for there, here in zip(tensors(forest), tensors(reference), strict=True):
        assert there.device.type == "meta"
        assert (there.shape, there.dtype) == (here.shape, here.dtype)
