"""Forests: back-up, selection, freeing, joining; on hand-made and on grown forests."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Edges, Forest, Leaves
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores


def long(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def hand_made() -> Forest:
    """root 0 -> 1 -> {2, 3 leaves}, root 0 -> 4 (dead end); one more root 5 whose leaf 6 has no recorded edge."""
    edges = Edges(
        parent=long(0, 0, 1, 1),
        child=long(1, 4, 2, 3),
        step=long(0, 0, 1, 1),
        prompt=long(7, 7, 7, 7),
        root=long(0, 0, 0, 0),
        depth=long(0, 0, 1, 1),
        scale=torch.ones(4),
        log_prob=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        stochastic=torch.ones(4, dtype=torch.bool),
        trained=torch.tensor([True, False, True, True]),
    )
    leaves = Leaves(node=long(2, 3, 5), prompt=long(7, 7, 7), root=long(0, 0, 1))
    return Forest(torch.arange(12.0).view(6, 2), edges, leaves, (long(0, 0, 2, 3), long(0, 1, 0, 1)), 2)


def grown(plans: list[Plan], slots: list[int] | None = None, keep: str = "stochastic") -> Forest:
    schedule = Schedule(torch.linspace(1, 0, plans[0].steps + 1))
    return rollout(
        plans,
        FlowSDE(0.7),
        schedule,
        lambda x, sigma, rows: 0.5 * x + rows[:, None],
        Noise(3),
        shape=(3,),
        slots=slots,
        keep=keep,  # type: ignore[arg-type]
    )


def same(a: Forest, b: Forest) -> bool:
    """Bit-equal in every tensor."""
    tensors = [
        (a.nodes, b.nodes),
        *((x, y) for x, y in zip(fields(a), fields(b), strict=True)),
    ]
    return a.steps == b.steps and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(77.0), y.nan_to_num(77.0)) for x, y in tensors
    )


def fields(f: Forest) -> list[Tensor]:
    seen: list[Tensor] = []
    f.edges.map(lambda t: seen.append(t) or t)
    f.leaves.map(lambda t: seen.append(t) or t)
    return [*seen, *f.descent]


def observed(forest: Forest, mean: bool = True) -> Forest:
    """The same forest with a mean and traits on edges and leaves, all different."""
    E, N = len(forest.edges), len(forest.leaves)
    edges = replace(
        forest.edges,
        mean=torch.arange(E * 2.0).view(E, 2) + 0.5 if mean else None,
        traits={"score": torch.arange(E) * 1.5, "pair": torch.arange(E * 2).view(E, 2)},
    )
    return replace(forest, edges=edges, leaves=replace(forest.leaves, traits={"size": 10 + torch.arange(N)}))


def test_backup_is_the_mean_over_valid_descendants() -> None:
    value, ok = hand_made().backup(torch.tensor([1.0, 4.0, 100.0]), torch.ones(3, dtype=torch.bool))
    assert value[[0, 2, 3]].tolist() == [2.5, 1.0, 4.0]
    assert ok.tolist() == [True, False, True, True]  # the dead end has no leaf
    assert bool(value[1].isnan())


def test_failed_leaves_take_no_part() -> None:
    value, ok = hand_made().backup(torch.tensor([math.nan, 4.0, 0.0]), torch.tensor([False, True, True]))
    assert ok.tolist() == [True, False, False, True]
    assert value[[0, 3]].tolist() == [4.0, 4.0]
    assert bool(value[[1, 2]].isnan().all())


def test_backup_on_a_grown_tree_against_numpy() -> None:
    plan = P.tree(5, 2, {0: 2, 2: 3})
    forest = grown([plan, P.chain(5, 4)])
    g = torch.Generator().manual_seed(0)
    value, ok = torch.randn(len(forest.leaves), generator=g), torch.rand(len(forest.leaves), generator=g) > 0.4
    got, valid = forest.backup(value, ok)
    plans, start, edge = [plan, P.chain(5, 4)], 0, 0
    for p in plans:
        for below in p.leaves_below:
            scores = [float(value[start + n]) for n in below if ok[start + n]]
            assert bool(valid[edge]) == bool(scores)
            if scores:
                assert float(got[edge]) == pytest.approx(np.mean(scores), rel=1e-6)
            edge += 1
        start += len(p.scored)
    assert not valid.all()


def test_backup_of_equal_leaves_is_that_value_exactly() -> None:
    forest = grown([P.tree(4, 1, {0: 3, 1: 3, 2: 7})])
    value = torch.full((len(forest.leaves),), 0.1)
    got, _ = forest.backup(value, torch.ones_like(value, dtype=torch.bool))
    assert torch.equal(got, torch.full_like(got, 0.1))


@pytest.mark.parametrize("which", ["value", "ok"])
def test_backup_refuses_wrong_lengths(which: str) -> None:
    value, ok = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"{which} has shape .*nearest valid: \[3\]"):
        hand_made().backup(value[:2] if which == "value" else value, ok[:2] if which == "ok" else ok)


def test_select_keeps_states_leaves_and_descent() -> None:
    forest = grown([P.tree(5, 2, {0: 2, 2: 3}), P.chain(5, 4)])
    g = torch.Generator().manual_seed(1)
    kept = torch.randperm(len(forest.edges), generator=g)[:17]
    part = forest.select(kept)
    assert torch.equal(part.nodes[part.edges.parent], forest.nodes[forest.edges.parent[kept]])
    assert torch.equal(part.nodes[part.edges.child], forest.nodes[forest.edges.child[kept]])
    assert torch.equal(part.nodes[part.leaves.node], forest.nodes[forest.leaves.node])
    assert torch.equal(part.edges.log_prob, forest.edges.log_prob[kept])
    value, ok = torch.randn(len(forest.leaves), generator=g), torch.rand(len(forest.leaves), generator=g) > 0.3
    for whole, chosen in zip(forest.backup(value, ok), part.backup(value, ok), strict=True):
        torch.testing.assert_close(chosen, whole[kept], rtol=0, atol=0, equal_nan=True)
    assert bool((part.descent[0].diff() >= 0).all())
    wanted = {*part.edges.parent.tolist(), *part.edges.child.tolist(), *part.leaves.node.tolist()}
    assert wanted == set(range(len(part.nodes)))  # nothing else is kept


def test_select_by_mask_and_all_is_the_identity() -> None:
    forest = grown([P.branch_each_step(4, 2, 3)])
    assert same(forest.select(torch.ones(len(forest.edges), dtype=torch.bool)), forest)
    mask = forest.edges.step == 1
    assert same(forest.select(mask), forest.select(mask.nonzero()[:, 0]))
    with pytest.raises(ValueError, match="twice"):
        forest.select(long(0, 0))


def test_dropping_leaf_states_frees_exactly_what_no_edge_needs() -> None:
    T, S, K = 5, 2, 3
    forest = grown([P.branch_each_step(T, S, K)])
    assert len(forest.nodes) == S * (T - 1) + 2 * S * K * (T - 1)  # branched nodes, noisy children, leaves
    dropped = forest.drop_leaf_states()
    assert len(dropped.nodes) == S * (T - 1) + S * K * (T - 1)
    assert dropped.nbytes < forest.nbytes
    assert bool((dropped.leaves.node == -1).all())
    assert torch.equal(dropped.leaves.root, forest.leaves.root)
    assert torch.equal(dropped.nodes[dropped.edges.child], forest.nodes[forest.edges.child])
    assert torch.equal(dropped.nodes[dropped.edges.parent], forest.nodes[forest.edges.parent])
    assert same(dropped.drop_leaf_states(), dropped)
    one = dropped.select(long(4))
    assert len(one.nodes) == 2 and bool((one.leaves.node == -1).all())


def test_a_leaf_that_an_edge_reaches_stays() -> None:
    forest = grown([P.chain(3, 2)])  # the last step is stochastic, so its edge's child is the leaf
    assert same(forest.drop_leaf_states(), forest)
    trained = forest.select(forest.edges.trained)
    assert bool((trained.drop_leaf_states().leaves.node == -1).all())


def test_cat_shifts_indices_and_keeps_slots() -> None:
    a, b = hand_made(), replace(hand_made(), nodes=hand_made().nodes + 100).drop_leaf_states()
    both = Forest.cat([a, b])
    assert torch.equal(both.nodes[both.edges.parent], torch.cat([a.nodes[a.edges.parent], b.nodes[b.edges.parent]]))
    assert both.edges.prompt.tolist() == [7] * 8
    # leaves 2 and 3 are children of edges, the third leaf's state was dropped from b
    assert both.leaves.node.tolist()[:3] == [2, 3, 5] and both.leaves.node.tolist()[5] == -1
    value, ok = torch.arange(6.0), torch.ones(6, dtype=torch.bool)
    parts = [a.backup(value[:3], ok[:3])[0], b.backup(value[3:], ok[3:])[0]]
    torch.testing.assert_close(both.backup(value, ok)[0], torch.cat(parts), rtol=0, atol=0, equal_nan=True)


def test_cat_refuses_what_does_not_fit() -> None:
    a = hand_made()
    with pytest.raises(ValueError, match="nothing to join"):
        Forest.cat([])
    with pytest.raises(ValueError, match="nearest valid: 2"):
        Forest.cat([a, replace(a, steps=3)])
    with pytest.raises(ValueError, match=r"nearest valid: \[2\] torch.float32"):
        Forest.cat([a, replace(a, nodes=a.nodes.double())])


def test_to_and_nbytes() -> None:
    forest = hand_made()
    assert forest.nbytes == forest.nodes.nbytes + sum(t.nbytes for t in fields(forest))
    assert forest.to("meta").nodes.device.type == "meta"
    assert {t.device.type for t in fields(forest.to("meta"))} == {"meta"}
    assert same(forest.to("cpu"), forest)


def test_mean_and_traits_follow_their_edges_and_leaves() -> None:
    whole = observed(hand_made())
    kept = long(3, 0)
    for part in (whole.select(kept), whole.select(kept).drop_leaf_states()):
        assert part.edges.mean is not None
        assert part.edges.mean.tolist() == [[6.5, 7.5], [0.5, 1.5]]
        assert part.edges.traits["score"].tolist() == [4.5, 0.0]
        assert part.edges.traits["pair"].tolist() == [[6, 7], [0, 1]]
        assert part.leaves.traits["size"].tolist() == [10, 11, 12]  # all leaves stay
    assert same(whole.select(torch.arange(4)), whole)
    plain = hand_made()
    extra = 4 * 2 * 4 + 4 * 4 + 4 * 2 * 8 + 3 * 8  # mean, score, pair, size
    assert whole.nbytes == plain.nbytes + extra
    assert {t.device.type for t in fields(whole.to("meta"))} == {"meta"}
    assert len(fields(whole)) == len(fields(plain)) + 4


def test_cat_joins_mean_and_traits() -> None:
    a, b = observed(hand_made()), observed(hand_made().drop_leaf_states())
    both = Forest.cat([a, b])
    for got, x, y in (
        (both.edges.mean, a.edges.mean, b.edges.mean),
        *((both.edges.traits[n], a.edges.traits[n], b.edges.traits[n]) for n in ("score", "pair")),
        (both.leaves.traits["size"], a.leaves.traits["size"], b.leaves.traits["size"]),
    ):
        assert got is not None and x is not None and y is not None
        assert torch.equal(got, torch.cat([x, y]))
    assert Forest.cat([hand_made(), hand_made()]).edges.mean is None


def test_cat_refuses_mean_and_traits_that_do_not_fit() -> None:
    a = observed(hand_made())
    with pytest.raises(ValueError, match=r"mean: 2 of 3 forests.*nearest valid: all"):
        Forest.cat([a, observed(hand_made(), mean=False), a])
    edges = replace(a.edges, traits={"score": a.edges.traits["score"]})
    with pytest.raises(ValueError, match=r"edges.traits = \['score'\].*nearest valid: \['pair', 'score'\]"):
        Forest.cat([a, replace(a, edges=edges)])
    with pytest.raises(ValueError, match=r"leaves.traits = \[\].*nearest valid: \['size'\]"):
        Forest.cat([a, replace(a, leaves=hand_made().leaves)])


def test_as_leaves_makes_an_edge_of_every_leaf() -> None:
    forest = replace(observed(hand_made()), leaves=replace(observed(hand_made()).leaves, prompt=long(7, 8, 9)))
    view = forest.as_leaves()
    edges = view.edges
    assert view.nodes is forest.nodes and view.leaves is forest.leaves and view.steps == 2
    assert edges.parent.tolist() == edges.child.tolist() == [2, 3, 5]
    assert edges.step.tolist() == [1, 1, 1]
    assert edges.prompt.tolist() == [7, 8, 9] and edges.root.tolist() == [0, 0, 1]
    assert edges.depth.tolist() == [0, 0, 0] and edges.scale.tolist() == [1.0, 1.0, 1.0]
    assert bool(edges.log_prob.isnan().all()) and edges.mean is None
    assert edges.stochastic.tolist() == [False] * 3 and edges.trained.tolist() == [True] * 3
    assert edges.traits["size"].tolist() == [10, 11, 12] and set(edges.traits) == {"size"}
    assert [d.tolist() for d in view.descent] == [[0, 1, 2], [0, 1, 2]]
    for old, new in zip(fields(forest)[:10], fields(view)[:10], strict=True):
        assert old.dtype == new.dtype  # so that both kinds can be stored and joined alike
    value, ok = view.backup(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([True, False, True]))
    assert ok.tolist() == [True, False, True] and value[[0, 2]].tolist() == [1.0, 9.0]


def test_as_leaves_of_dropped_leaves() -> None:
    dropped = hand_made().drop_leaf_states()
    view = dropped.as_leaves()
    assert view.edges.parent.tolist() == view.edges.child.tolist() == [2, 3, -1]
    both = Forest.cat([view, view])
    assert both.edges.parent.tolist() == [2, 3, -1, 7, 8, -1] == both.edges.child.tolist()
    assert both.leaves.node.tolist() == both.edges.parent.tolist()
    assert both.descent[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_group_z_score_on_leaves_of_an_ode_plan() -> None:
    """A plan without stochastic edges: per prompt A = (r − mean) / (population std + eps), failed leaves left out."""
    plans = [P.ode(3, 4), P.ode(3, 3)]
    forest = grown(plans, slots=[5, 2]).drop_leaf_states()
    assert len(forest.edges) == 0
    rewards = [[1.0, 2.0, 4.0, 9.0], [0.5, -1.0, 3.0]]
    ok = torch.tensor([True, True, True, False, True, True, True])
    value = torch.tensor([r for group in rewards for r in group])
    credit = GroupZScore(by=("prompt",), eps=1e-4, clip=None)
    got = credit(Scores(value[:, None], ok[:, None], ("r",)), forest.as_leaves())
    want: list[float] = []
    for group in (rewards[0][:3], rewards[1]):
        want += ((np.array(group) - np.mean(group)) / (np.std(group) + 1e-4)).tolist()
    want.insert(3, 0.0)
    assert got.value.tolist() == pytest.approx(want, rel=1e-6)
    assert torch.equal(got.ok, ok) and torch.equal(got.live, ok)
    whole = skeleton(plans, [5, 2]).as_leaves()
    assert torch.equal(credit(Scores(value[:, None], ok[:, None], ("r",)), whole).value, got.value)
