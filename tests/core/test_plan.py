"""Plans: validation, derived structure, and costs against closed formulas."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.core import plan as P
from tempflow.core.plan import Cost, Plan


def random_plan(seed: int) -> Plan:
    """A random valid forest, edges of a step in no particular order."""
    rng = random.Random(seed)
    steps, roots = rng.randint(1, 5), rng.randint(1, 3)
    parent: list[int] = []
    step: list[int] = []
    front = list(range(roots))
    for i in range(steps):
        chosen = [node for node in front for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
        if i == 0 and not chosen:
            chosen = [0]
        rng.shuffle(chosen)
        chosen = chosen[:12]
        front = [roots + len(parent) + n for n in range(len(chosen))]
        parent += chosen
        step += [i] * len(chosen)
    stochastic = [rng.random() < 0.5 for _ in parent]
    last = front if step[-1] == steps - 1 else []
    rng.shuffle(last)
    return Plan(
        steps=steps,
        roots=roots,
        parent=tuple(parent),
        step=tuple(step),
        stochastic=tuple(stochastic),
        trained=tuple(s and rng.random() < 0.7 for s in stochastic),
        scale=tuple(rng.choice([1.0, 0.5, 2.0]) for _ in parent),
        start=tuple(rng.randrange(roots) for _ in range(roots)),
        scored=tuple(last[: rng.randint(0, len(last))]),
    )


plans = st.integers(0, 2**32 - 1).map(random_plan)


@given(plans)
def test_tree_invariants(plan: Plan) -> None:
    nodes = plan.roots + len(plan.parent)
    names = {(plan.node_root[n], plan.path(n)) for n in range(nodes)}
    assert len(names) == nodes  # root and path name a node
    for n in range(nodes):
        assert len(plan.path(n)) == plan.node_step[n] <= plan.steps
    for e, parent in enumerate(plan.parent):
        child = plan.roots + e
        assert plan.node_step[parent] == plan.step[e] == plan.node_step[child] - 1
        assert plan.node_root[parent] == plan.node_root[child]
        assert plan.path(child) == (*plan.path(parent), plan.child_index[e])
    for parent in set(plan.parent):
        siblings = [plan.child_index[e] for e, p in enumerate(plan.parent) if p == parent]
        assert siblings == list(range(len(siblings)))


@given(plans)
def test_leaves_below_and_action_depth_agree_with_paths(plan: Plan) -> None:
    for e in range(len(plan.parent)):
        name, root = plan.path(plan.roots + e), plan.node_root[plan.roots + e]
        below = [
            n
            for n, leaf in enumerate(plan.scored)
            if plan.node_root[leaf] == root and plan.path(leaf)[: len(name)] == name
        ]
        assert list(plan.leaves_below[e]) == below
        above = [
            a
            for a in range(len(plan.parent))
            if plan.node_root[plan.roots + a] == root
            and plan.path(plan.roots + a) == name[: plan.step[a] + 1]
            and plan.step[a] < plan.step[e]
        ]
        assert plan.action_depth[e] == sum(plan.stochastic[a] for a in above)


@given(plans)
def test_cost_counts_what_it_says(plan: Plan) -> None:
    has_child = [n for n in range(plan.roots + len(plan.parent)) if any(p == n for p in plan.parent)]
    assert plan.cost() == Cost(len(has_child), len(plan.scored), len([e for e in plan.trained if e]))


@given(plans)
def test_equal_plans_hash_equal_and_survive_replace(plan: Plan) -> None:
    again = Plan(**{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)})
    assert again == plan
    assert hash(again) == hash(plan)
    longer = dataclasses.replace(plan, steps=plan.steps + 1, scored=())
    assert longer != plan
    assert longer.cost().leaves == 0


def test_tempflow_paper_cost() -> None:
    assert P.branch_each_step(10, 4, 6).cost() == Cost(1116, 216, 216)
    assert P.branch_each_step(10, 4, 6, trunk_leaf=True).cost() == Cost(1120, 220, 216)


small = st.integers(1, 5)


@given(st.integers(2, 8), small, small, st.booleans())
def test_branch_each_step_cost(T: int, S: int, K: int, trunk_leaf: bool) -> None:
    extra = S if trunk_leaf else 0
    expected = Cost(S * (T - 1) + S * K * T * (T - 1) // 2 + extra, S * K * (T - 1) + extra, S * K * (T - 1))
    assert P.branch_each_step(T, S, K, trunk_leaf=trunk_leaf).cost() == expected


@given(st.integers(2, 8), small, small, st.data())
def test_branching_at_a_subset_of_steps(T: int, S: int, K: int, data: st.DataObject) -> None:
    at = sorted(data.draw(st.sets(st.integers(0, T - 2), min_size=1)))
    plan = P.branch_each_step(T, S, K, at=at)
    trunk = S * (max(at) + 1)
    assert plan.cost() == Cost(trunk + S * K * sum(T - 1 - i for i in at), S * K * len(at), S * K * len(at))
    assert {plan.step[e] for e in range(len(plan.parent)) if plan.trained[e]} == set(at)
    assert plan.trained == plan.stochastic
    assert len(plan.parent) == S * max(at) + S * K * sum(T - i for i in at)  # no edge leads nowhere


def test_trunk_edge_is_the_last_sibling_and_a_leaf_for_it_changes_no_path() -> None:
    plain, longer = P.branch_each_step(5, 2, 3), P.branch_each_step(5, 2, 3, trunk_leaf=True)

    def noisy(plan: Plan) -> set[tuple[int, tuple[int, ...]]]:
        children = [plan.roots + e for e, stochastic in enumerate(plan.stochastic) if stochastic]
        return {(plan.node_root[n], plan.path(n)) for n in children}

    assert noisy(plain) == noisy(longer)
    trunk = [e for e, p in enumerate(plain.parent) if p == 0 and not plain.stochastic[e]]
    assert [plain.child_index[e] for e in trunk] == [3]


def test_where_all_edges_jump_the_path_parts_at_each_step() -> None:
    plan = P.branch_each_step(6, 2, 3, at=[1, 3], jumps=True)
    assert all(plan.stochastic) and plan.cost().trained_edges == 2 * 2 * 3 and plan.cost().leaves == 2 * (2 * 2 + 1)
    for e in (e for e, trained in enumerate(plan.trained) if trained):
        assert plan.step[e] in (1, 3) and len(plan.leaves_below[e]) == (
            3 if (plan.step[e], plan.child_index[e]) == (1, 0) else 1
        )
        assert {plan.trained[s] for s, parent in enumerate(plan.parent) if parent == plan.parent[e]} == {True}
    last = P.branch_each_step(3, 1, 4, at=[2], jumps=True)
    assert last.cost() == Cost(3, 4, 4) and last.step[-4:] == (2, 2, 2, 2)
    assert P.branch_each_step(3, 1, 4, jumps=True).cost() == Cost(1 + 4 + 4 + 3, 10, 12)


def test_branches_are_followed_by_ode_only() -> None:
    plan = P.branch_each_step(6, 2, 3)
    assert {plan.action_depth[e] for e in range(len(plan.parent)) if plan.stochastic[e]} == {0}
    for e, stochastic in enumerate(plan.stochastic):
        if stochastic:
            assert len(plan.leaves_below[e]) == 1
    owners = [sum(n in below for below, s in zip(plan.leaves_below, plan.stochastic, strict=True) if s)
              for n in range(len(plan.scored))]  # fmt: skip
    assert owners == [1] * len(plan.scored)  # a leaf belongs to exactly one action


@given(st.integers(1, 8), small, st.booleans())
def test_chain_and_ode_cost(T: int, G: int, shared: bool) -> None:
    assert P.chain(T, G, shared_noise=shared).cost() == Cost(G * T, G, G * (T - 1))
    assert P.ode(T, G).cost() == Cost(G * T, G, 0)
    assert not any(P.ode(T, G).stochastic)


def test_chain_defaults_are_flow_grpos() -> None:
    plan = P.chain(4, 2)
    assert all(plan.stochastic)
    assert {plan.step[e] for e in range(8) if plan.trained[e]} == {0, 1, 2}
    assert plan.start == (0, 1)
    assert P.chain(4, 3, shared_noise=True).start == (0, 0, 0)
    chosen = P.chain(4, 1, train=[2], stochastic=[1, 2])
    assert chosen.stochastic == (False, True, True, False)
    assert chosen.trained == (False, False, True, False)
    assert P.chain(4, 1, stochastic=[1, 3]).trained == (False, True, False, False)


@given(st.integers(1, 8), small, st.data())
def test_window_cost_and_full_window(T: int, G: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, T - 1))
    size = data.draw(st.integers(1, T - start))
    plan = P.window(T, G, start, size)
    assert plan.cost() == Cost(G * T, G, G * size)
    assert {plan.step[e] for e, s in enumerate(plan.stochastic) if s} == set(range(start, start + size))
    assert P.window(T, G, 0, T) == P.chain(T, G, train=range(T))
    assert P.one_step(T, G, start) == P.window(T, G, start, 1)


@given(st.integers(1, 8), small, small, st.data())
def test_fan_out_cost(T: int, S: int, K: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, T - 1))
    window = data.draw(st.integers(1, T - at))
    plan = P.fan_out(T, S, K, at, window)
    assert plan.cost() == Cost(S * (at + 1 + K * (T - 1 - at)), S * K, S * K * window)
    assert {plan.step[e] for e, s in enumerate(plan.stochastic) if s} == set(range(at, at + window))


@given(st.integers(1, 6), st.integers(1, 3), st.data())
def test_tree_cost(T: int, R: int, data: st.DataObject) -> None:
    splits = data.draw(st.dictionaries(st.integers(0, T - 1), st.integers(1, 3), max_size=4))
    width = [R * math.prod(splits.get(j, 1) for j in range(i)) for i in range(T + 1)]
    assert P.tree(T, R, splits).cost() == Cost(sum(width[:T]), width[T], sum(width[1:]))


def test_tree_of_the_papers() -> None:
    branch = P.tree(20, 1, {0: 2, 3: 2, 6: 2, 9: 2}, scale={0: 4.0, 3: 4.0, 6: 4.0, 9: 4.0})
    assert branch.cost().leaves == 16
    assert {branch.scale[e] for e in range(len(branch.parent)) if branch.step[e] in (0, 3, 6, 9)} == {4.0}
    assert {branch.scale[e] for e in range(len(branch.parent)) if branch.step[e] not in (0, 3, 6, 9)} == {1.0}
    # Dynamic-TreeRPO: a binary tree of depth 4 inside a window has 2 + 4 + 8 + 16 edges
    tree = P.tree(10, 1, dict.fromkeys(range(2, 6), 2), stochastic=range(2, 6))
    assert tree.cost().trained_edges == 30
    assert {tree.action_depth[e] for e in range(len(tree.parent)) if tree.step[e] == 4} == {2}


def test_no_split_is_a_chain() -> None:
    assert P.tree(5, 3, {}) == P.chain(5, 3, train=range(5))


def test_costs_add_up() -> None:
    a, b = Cost(1, 2, 3), Cost(10, 20, 30)
    assert a + b == Cost(11, 22, 33)
    assert 3 * a == a * 3 == a + a + a


GOOD = P.branch_each_step(3, 1, 2)


@pytest.mark.parametrize(
    ("change", "field", "nearest"),
    [
        ({"steps": 0}, "steps", "1"),
        ({"roots": 0}, "roots", "1"),
        ({"parent": ()}, "parent", "(0,)"),
        ({"step": GOOD.step[:-1]}, "step", str(len(GOOD.parent))),
        ({"parent": (99, *GOOD.parent[1:])}, "parent[0]", "0"),
        ({"step": (1, *GOOD.step[1:])}, "step[0]", "0"),
        ({"trained": (True,) * len(GOOD.parent)}, "trained[2]", "False"),
        ({"scale": (0.0, *GOOD.scale[1:])}, "scale[0]", "1.0"),
        ({"scale": (math.inf, *GOOD.scale[1:])}, "scale[0]", "1.0"),
        ({"start": (-1,)}, "start[0]", "0"),
        ({"start": (0, 0)}, "start", "1"),
        ({"scored": (0,)}, "scored[0]", str(min(GOOD.scored))),
        ({"scored": (GOOD.scored[0],) * 2}, "scored", str((GOOD.scored[0],))),
        ({"steps": 2}, "step[", "1"),
    ],
)
def test_bad_plans_are_refused(change: dict[str, object], field: str, nearest: str) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    assert field in str(error.value)
    assert str(error.value).endswith(f"nearest valid: {nearest}")


def test_edges_out_of_wavefront_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step\[2\] = 0 after|wavefront order"):
        Plan(2, 2, (0, 2, 1), (0, 1, 0), (False,) * 3, (False,) * 3, (1.0,) * 3, (0, 1), ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P.chain(0, 1), "steps = 0: .*nearest valid: 1"),
        (lambda: P.chain(4, 0), "roots = 0: .*nearest valid: 1"),
        (lambda: P.chain(4, 1, train=[4]), "train = 4: .*nearest valid: 3"),
        (lambda: P.chain(4, 1, train=[3], stochastic=[0, 1]), "train = 3: .*nearest valid: 1"),
        (lambda: P.chain(4, 1, stochastic=[-1]), "stochastic = -1: .*nearest valid: 0"),
        (lambda: P.window(4, 1, 4, 1), "start = 4: .*nearest valid: 3"),
        (lambda: P.window(4, 1, 3, 2), "size = 2: .*nearest valid: 1"),
        (lambda: P.one_step(4, 1, -1), "at = -1: .*nearest valid: 0"),
        (lambda: P.fan_out(4, 1, 0, 1), "branches = 0: .*nearest valid: 1"),
        (lambda: P.fan_out(4, 0, 2, 1), "seeds = 0: .*nearest valid: 1"),
        (lambda: P.fan_out(4, 1, 2, 9), "at = 9: .*nearest valid: 3"),
        (lambda: P.fan_out(4, 1, 2, 3, 2), "window = 2: .*nearest valid: 1"),
        (lambda: P.branch_each_step(1, 1, 2), "steps = 1: .*nearest valid: 2"),
        (lambda: P.branch_each_step(4, 1, 2, at=[3]), "at = 3: .*nearest valid: 2"),
        (lambda: P.branch_each_step(4, 1, 2, at=[]), "at = empty"),
        (lambda: P.branch_each_step(4, 1, 0), "branches = 0: .*nearest valid: 1"),
        (lambda: P.tree(4, 1, {4: 2}), "splits = 4: .*nearest valid: 3"),
        (lambda: P.tree(4, 1, {4: 1}), "splits = 4: .*nearest valid: 3"),
        (lambda: P.tree(4, 1, {1: 0}), r"splits\[1\] = 0: .*nearest valid: 1"),
        (lambda: P.tree(4, 1, {2: 2}, stochastic=[0, 1]), "splits = 2: .*nearest valid: 1"),
        (lambda: P.tree(4, 1, {}, stochastic=[0], scale={2: 2.0}), "scale = 2: .*nearest valid: 0"),
        (lambda: P.tree(4, 1, {}, scale={2: -1.0}), r"scale\[2\] = -1.0: .*nearest valid: 1.0"),
    ],
)
def test_bad_arguments_name_the_field_and_the_nearest_valid_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@given(st.integers(2, 6), st.lists(st.sets(st.integers(0, 4), max_size=5), min_size=1, max_size=4), st.booleans())
def test_chains_train_each_its_own_steps(steps: int, train: list[set[int]], shared: bool) -> None:
    own = [{i for i in chosen if i < steps - 1} for chosen in train]
    plan = P.chains(steps, own, stochastic=range(steps - 1), shared_noise=shared)
    base = P.chain(steps, len(own), stochastic=range(steps - 1), shared_noise=shared)
    assert dataclasses.replace(plan, trained=base.trained) == base
    seen = [set[int]() for _ in own]
    for e, use in enumerate(plan.trained):
        if use:
            seen[plan.node_root[plan.roots + e]].add(plan.step[e])
    assert seen == own and plan.cost() == Cost(len(own) * steps, len(own), sum(map(len, own)))


def test_chains_with_equal_steps_are_a_chain_and_bad_steps_are_named() -> None:
    assert P.chains(4, [(0, 2)] * 3) == P.chain(4, 3, train=(0, 2))
    with pytest.raises(ValueError, match=r"train\[1\] = 3: must be among the steps \[0, 1, 2\]; nearest valid: 2"):
        P.chains(4, [(0,), (3,)], stochastic=range(3))


# --------------------------------------------------------------------------------------------------------- variants
def test_crossed_draws_every_noise_with_every_variant() -> None:
    plan = P.crossed(5, 2, 3)
    assert plan.start == (0, 0, 0, 1, 1, 1) and plan.variant == (0, 1, 2, 0, 1, 2)
    assert plan.cost() == P.ode(5, 6).cost()
    assert dataclasses.replace(plan, start=tuple(range(6)), variant=()) == P.ode(5, 6)
    for arguments, message in (((5, 0, 3), "noises = 0: must be at least 1"), ((5, 2, 0), "variants = 0: must be at")):
        with pytest.raises(ValueError, match=message):
            P.crossed(*arguments)


def test_variants_are_zero_unless_given_and_tell_plans_apart() -> None:
    plain = P.ode(3, 2)
    assert plain.variant == (0, 0) and plain == dataclasses.replace(plain, variant=(0, 0))
    other = dataclasses.replace(plain, variant=(0, 1))
    assert other != plain and hash(other) != hash(plain)
    with pytest.raises(ValueError, match=r"len\(variant\) = 3: one entry per root is needed; nearest valid: 2"):
        dataclasses.replace(plain, variant=(0, 1, 2))
    with pytest.raises(ValueError, match=r"variant\[1\] = -1: must be at least 0; nearest valid: 0"):
        dataclasses.replace(plain, variant=(0, -1))
