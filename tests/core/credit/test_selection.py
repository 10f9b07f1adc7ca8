"""Selecting, joining and pointing credits: against loops by hand, their limits, and laws over random scores."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import credit as credits
from tempflow.core import plan as P
from tempflow.core.credit import (
    Advantage,
    Around,
    BestPath,
    CreditRule,
    DynamicSampling,
    Extremes,
    FromLeaves,
    GroupZScore,
    LogProb,
    LogProbBackup,
    Mapped,
    MinNorm,
    PerReward,
    Standing,
    WinRate,
)
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import linear
from tempflow.core.scores import Scores

Z = GroupZScore(by=("prompt", "step"), unbiased=True, eps=0.0, clip=None)
EDGE = GroupZScore(by=("prompt", "step"), scale="none", clip=None)


def grow(plan: Plan, prompts: int = 2) -> Forest:
    return rollout(
        [plan] * prompts, FlowSDE(0.7), linear(plan.steps, 3.0), lambda x, sigma, rows: 0.5 * x, Noise(3), shape=(2,)
    )


CHAINS = grow(P.chain(3, roots=6))
TREE = grow(P.tree(4, roots=1, splits={0: 2, 1: 2, 3: 2}))
MIXED = grow(P.tree(5, roots=2, splits={1: 2, 3: 3}, stochastic=(1, 3)))
FORESTS = {"chains": CHAINS, "tree": TREE, "mixed": MIXED}


def scored(values: Tensor, ok: Tensor | None = None) -> Scores:
    v = values.float().view(len(values), -1)
    return Scores(v, torch.ones_like(v, dtype=torch.bool) if ok is None else ok, tuple("abcd"[: v.shape[1]]))


def random_scores(forest: Forest, seed: int, failed: float = 0.0, rewards: int = 1) -> Scores:
    g = torch.Generator().manual_seed(seed)
    shape = (len(forest.leaves), rewards)
    return scored(torch.rand(shape, generator=g), torch.rand(shape, generator=g) >= failed)


def below(forest: Forest, edge: int) -> list[int]:
    return [leaf for e, leaf in zip(*(t.tolist() for t in forest.descent), strict=True) if e == edge]


def kept_by_loop(forest: Forest, scores: Scores, best: int, worst: int) -> set[int]:
    kept: set[int] = set()
    for prompt in set(forest.leaves.prompt.tolist()):
        mine = [n for n, p in enumerate(forest.leaves.prompt.tolist()) if p == prompt and scores.ok[n, 0]]
        order = sorted(mine, key=lambda n: -float(scores.value[n, 0]))
        kept |= set(order[:best]) | (set(order[-worst:]) if worst else set())
    return kept


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(FORESTS)),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_extremes_keep_the_edges_above_the_best_and_the_worst(
    name: str, seed: int, failed: float, best: int, worst: int
) -> None:
    if best + worst == 0:
        return
    forest = FORESTS[name]
    scores = random_scores(forest, seed, failed)
    got, full = Extremes(Z, best, worst)(scores, forest), Z(scores, forest)
    kept = kept_by_loop(forest, scores, best, worst)
    want = torch.tensor([bool(kept & set(below(forest, e))) for e in range(len(forest.edges))])
    assert torch.equal(got.ok, full.ok & want) and torch.equal(got.live, full.live & want)
    assert torch.equal(got.value[got.live], full.value[got.live])  # statistics stay the full group's
    assert not got.value[~got.live].any()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 3))
def test_selection_is_symmetric_in_the_sign_of_the_reward(seed: int, half: int) -> None:
    scores = random_scores(CHAINS, seed)
    plus, minus = (Extremes(Z, half, half)(scored(s), CHAINS) for s in (scores.value, -scores.value))
    assert torch.equal(plus.ok, minus.ok)
    torch.testing.assert_close(plus.value, -minus.value)


def test_ties_are_broken_by_order_and_all_leaves_are_kept_where_there_are_few() -> None:
    flat = scored(torch.tensor([1.0, 1, 0, 0, 0, 0] * 2))
    got = Extremes(Z, 1, 1)(flat, CHAINS)
    leaf = [below(CHAINS, e)[0] % 6 for e in range(len(CHAINS.edges))]
    assert got.ok.tolist() == [n in (0, 5) for n in leaf]
    scores = random_scores(CHAINS, 5)
    everything = Extremes(Z, 3, 3)(scores, CHAINS)
    assert torch.equal(everything.value, Z(scores, CHAINS).value) and bool(everything.ok.all())


def test_by_reward_the_prompts_extremes_stay_where_credit_compares_within_trees() -> None:
    forest = skeleton([P.tree(2, 2, {0: 2})], range(1))
    scores, within = scored(torch.tensor([5.0, 0.0, 10.0, 9.0])), GroupZScore(by=("prompt", "root", "step"))
    leaf = [below(forest, e) for e in range(len(forest.edges))]

    def kept(credit: Extremes) -> set[int]:
        return {n for e, leaves in enumerate(leaf) for n in leaves if credit(scores, forest).ok[e]}

    assert kept(Extremes(within, 1, 1, by="reward")) == {1, 2}
    assert kept(Extremes(within, 1, 1)) == {0, 1}  # eps makes z-scores of the wider tree larger
    weighted = Extremes(within, 1, 1, by="reward").weighted({"r0": -1.0, "r1": 0.0})
    two = Scores(torch.tensor([[5.0, 9], [0, 9], [10, 9], [9, 0]]), torch.ones(4, 2, dtype=torch.bool), ("r0", "r1"))
    ok = weighted(two, forest).ok
    assert {n for e, leaves in enumerate(leaf) for n in leaves if ok[e]} == {1, 2}


def test_among_branches_the_best_leaf_of_every_last_split_stays() -> None:
    scores = random_scores(TREE, 1)
    got = Extremes(Z, 1, 0, among="branch")(scores, TREE)
    value = scores.value[:, 0].tolist()
    pairs = [(n, n + 1) for n in range(0, len(value), 2)]  # siblings are neighbours
    best = {max(pair, key=lambda n: value[n]) for pair in pairs}
    for e in range(len(TREE.edges)):
        assert bool(got.ok[e]) == bool(best & set(below(TREE, e)))
    last = TREE.edges.step == 3
    assert int(got.ok[last].sum()) == 8 and bool(got.ok[~last].all())
    chains = Extremes(Z, 1, 0, among="branch")(random_scores(CHAINS, 1), CHAINS)
    assert bool(chains.ok.all())  # without a split every leaf is alone


def test_the_last_split_may_lie_above_single_steps_and_differ_between_prompts() -> None:
    plans = [P.tree(4, 1, {0: 2, 1: 3}), P.chain(4, 2), P.tree(4, 1, {2: 2})]
    whole = skeleton(plans, range(3))
    scores = scored(torch.tensor([1.0, 3, 2, 6, 5, 4, 0, 0, 1, 2]))
    ok = Extremes(EDGE, 1, 0, among="branch")(scores, whole).ok
    leaves = {leaf for e in range(len(whole.edges)) if ok[e] and whole.edges.step[e] == 3 for leaf in below(whole, e)}
    assert leaves == {1, 3, 6, 7, 9}


def test_per_reward_is_the_weighted_mean_of_each_rewards_z_scores() -> None:
    scores = random_scores(CHAINS, 2, rewards=3)
    scores = scored(scores.value * torch.tensor([1.0, 100.0, 0.01]))
    weights = {"a": 3.0, "b": 1.0}
    got = PerReward(replace(Z, reward_weights=weights), clip=None)(scores, CHAINS).value
    leaf = torch.tensor([below(CHAINS, e)[0] for e in range(len(CHAINS.edges))])
    want = np.zeros(12)
    for p in range(2):
        for column, w in ((0, 0.75), (1, 0.25)):
            v = scores.value[6 * p : 6 * p + 6, column].double().numpy()
            want[6 * p : 6 * p + 6] += w * (v - v.mean()) / v.std(ddof=1)
    np.testing.assert_allclose(got.double().numpy(), want[leaf], atol=1e-5)


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
def test_per_reward_of_one_reward_is_the_inner_credit(forest: Forest) -> None:
    scores = random_scores(forest, 7, failed=0.2)
    got, want = (
        PerReward(replace(Z, eps=1e-4), clip=1.0)(scores, forest),
        replace(Z, eps=1e-4, clip=1.0)(scores, forest),
    )
    torch.testing.assert_close(got.value, want.value, rtol=1e-6, atol=1e-7)
    assert torch.equal(got.ok, want.ok) and torch.equal(got.live, want.live)


def test_per_reward_leaves_out_a_leaf_on_which_a_reward_failed_and_ignores_rewards_of_weight_0() -> None:
    scores = random_scores(CHAINS, 3, rewards=2)
    ok = torch.ones_like(scores.ok)
    ok[1, 0] = False
    broken = scored(scores.value, ok)
    leaf = torch.tensor([below(CHAINS, e)[0] for e in range(len(CHAINS.edges))])
    ok_b = torch.ones_like(scores.ok)
    ok_b[1, 1] = False
    one, other = (PerReward(Z, clip=None)(scored(scores.value, k), CHAINS) for k in (ok, ok_b))
    assert torch.equal(one.ok, leaf != 1) and torch.equal(other.ok, leaf != 1)
    torch.testing.assert_close(one.value, other.value)  # both rewards' statistics are those of the other leaves
    only_b = PerReward(replace(Z, reward_weights={"a": 0.0, "b": 2.0}), clip=None)(broken, CHAINS)
    torch.testing.assert_close(only_b.value, replace(Z, reward_weights={"b": 1.0})(scores, CHAINS).value)
    assert bool(only_b.ok.all())


def test_one_flat_reward_halves_the_other_and_both_flat_are_dead() -> None:
    value = random_scores(CHAINS, 3, rewards=2).value
    value[:, 1] = 0.5
    got = PerReward(Z, clip=None)(scored(value), CHAINS)
    torch.testing.assert_close(got.value, Z(scored(value[:, :1]), CHAINS).value / 2)
    value[:6, 0] = 0.1
    for restandardise in (False, True):
        got = PerReward(Z, restandardise=restandardise)(scored(value), CHAINS)
        first = CHAINS.edges.prompt == 0
        assert not got.live[first].any() and not got.value[first].any() and bool(got.live[~first].all())


def test_restandardised_advantages_have_mean_0_and_deviation_1_over_the_iteration() -> None:
    scores = random_scores(CHAINS, 4, rewards=3)
    plain = PerReward(Z, clip=None)(scores, CHAINS).value
    got = PerReward(Z, clip=None, restandardise=True, eps=0.0)(scores, CHAINS).value.double()
    assert abs(float(got.mean())) < 1e-6 and float(got.std(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert float(np.corrcoef(got, plain)[0, 1]) == pytest.approx(1, abs=1e-6) and float(plain.std()) < 0.8


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(FORESTS)), st.integers(0, 99), st.sampled_from([0.0, 0.4]))
def test_from_leaves_is_the_mean_of_leaf_z_scores(name: str, seed: int, failed: float) -> None:
    forest = FORESTS[name]
    scores = random_scores(forest, seed, failed)
    got = FromLeaves(Z)(scores, forest)
    value, ok, prompt = scores.value[:, 0].double().numpy(), scores.ok[:, 0].numpy(), forest.leaves.prompt.numpy()
    for e in range(len(forest.edges)):
        mine = ok & (prompt == int(forest.edges.prompt[e]))
        leaves = [n for n in below(forest, e) if ok[n]]
        assert bool(got.ok[e]) == bool(leaves)
        if leaves and mine.sum() > 1:
            z = (value - value[mine].mean()) / value[mine].std(ddof=1)
            assert float(got.value[e]) == pytest.approx(z[leaves].mean(), abs=1e-5)


def test_on_chains_leaf_and_depth_statistics_are_one() -> None:
    scores = random_scores(CHAINS, 8)
    torch.testing.assert_close(FromLeaves(Z)(scores, CHAINS).value, Z(scores, CHAINS).value, rtol=1e-6, atol=1e-6)
    tree = random_scores(TREE, 8)
    assert not torch.allclose(FromLeaves(Z)(tree, TREE).value, Z(tree, TREE).value, atol=0.1)


def softmax_by_hand(forest: Forest, scores: Scores, column: int) -> list[float]:
    """The recursion of BranchGRPO on parents and children, from node to node."""
    edges = forest.edges
    log_prob = edges.traits["log_prob"].double()
    value = scores.value[:, column].double()

    def weight_sets(e: int) -> list[int]:
        mine = set(below(forest, e))
        deeper = [f for f in range(len(edges)) if edges.step[f] > edges.step[e] and set(below(forest, f)) <= mine]
        first = min((int(edges.step[f]) for f in deeper), default=-1)
        return [f for f in deeper if edges.step[f] == first]

    def of(e: int) -> float:
        children = weight_sets(e)
        if not children:
            return float(value[below(forest, e)].mean())
        weights = torch.softmax(log_prob[children], 0)
        return sum(float(w) * of(f) for w, f in zip(weights, children, strict=True))

    return [of(e) for e in range(len(edges))]


def with_log_prob(forest: Forest, log_prob: Tensor | None = None) -> Forest:
    seen = LogProb()(forest, torch.empty(0)) if log_prob is None else log_prob
    return replace(forest, edges=replace(forest.edges, traits={"log_prob": seen}))


@pytest.mark.parametrize("forest", [TREE, MIXED, grow(P.tree(6, 1, {0: 2, 4: 3}))], ids=["tree", "mixed", "late"])
def test_softmax_backup_is_the_recursion(forest: Forest) -> None:
    given = with_log_prob(forest)
    scores = random_scores(forest, 11)
    for name, credit in (("z", EDGE), ("unscaled", replace(EDGE, by=("prompt", "root", "step")))):
        value = torch.tensor(softmax_by_hand(given, scores, 0))
        group = credit.groups(forest.edges)
        mean = torch.stack([value[group == g].mean() for g in group])
        got = LogProbBackup(credit)(scores, given)
        torch.testing.assert_close(got.value, (value - mean).float(), rtol=1e-4, atol=1e-6, msg=name)


def test_softmax_of_equal_log_probs_is_the_mean_and_of_a_sure_child_its_value() -> None:
    scores = random_scores(TREE, 12, failed=0.0)
    even = with_log_prob(TREE, torch.full((len(TREE.edges),), -3.0))
    torch.testing.assert_close(LogProbBackup(Z)(scores, even).value, Z(scores, TREE).value, rtol=1e-5, atol=1e-5)
    sure = torch.arange(len(TREE.edges)).float() * 1e3  # the later sibling has all the weight
    got = LogProbBackup(EDGE)(scores, with_log_prob(TREE, sure)).value
    top = (TREE.edges.step == 0) & (TREE.edges.prompt == 0)
    last = [below(TREE, e)[-1] for e in top.nonzero()[:, 0].tolist()]
    want = scores.value[last, 0] - scores.value[last, 0].mean()
    torch.testing.assert_close(got[top], want, rtol=1e-5, atol=1e-6)


def test_softmax_backup_leaves_failed_branches_out_and_says_what_it_misses() -> None:
    ok = torch.ones(len(TREE.leaves), 1, dtype=torch.bool)
    ok[0:2] = False  # all below the first edge of step 1, whose sibling below the same edge is sound
    scores = scored(random_scores(TREE, 3).value, ok)
    got = LogProbBackup(replace(EDGE, by=("prompt",)))(scores, with_log_prob(TREE))
    dead = {e for e in range(len(TREE.edges)) if set(below(TREE, e)) <= {0, 1}}
    assert len(dead) == 4 and {e for e in range(len(TREE.edges)) if not got.ok[e]} == dead
    assert bool(got.value.isfinite().all()) and below(TREE, 0) == [0, 1, 2, 3]
    sound = [e for e in range(len(TREE.edges)) if below(TREE, e) == [2, 3]]
    assert len(sound) == 2 and all(float(got.value[0] - got.value[e]) == pytest.approx(0, abs=1e-6) for e in sound)
    with pytest.raises(ValueError, match="traits: 'log_prob' is missing"):
        LogProbBackup(Z)(scores, TREE)


def test_standing_is_the_clamped_advantage() -> None:
    scores = random_scores(TREE, 6)
    got = Standing(FromLeaves(Z))(scores, TREE)
    assert torch.equal(got.columns["standing"], got.value.clamp(-1, 1)) and float(got.value.abs().max()) > 1
    assert got.peer is None and bool(got.live.all())


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(sorted(FORESTS)), st.integers(0, 99), st.sampled_from([0.0, 0.4]))
def test_best_path_points_to_the_best_leafs_edge_at_the_same_step(name: str, seed: int, failed: float) -> None:
    forest = FORESTS[name]
    scores = random_scores(forest, seed, failed)
    got = BestPath(FromLeaves(Z))(scores, forest)
    peer = got.peer
    assert peer is not None
    edges, value = forest.edges, torch.where(scores.ok, scores.value, -math.inf)[:, 0]
    assert torch.equal(edges.prompt[peer], edges.prompt) and torch.equal(edges.step[peer], edges.step)
    assert torch.equal(peer[peer], peer)  # the best path points to itself
    for p in range(2):
        leaves = (forest.leaves.prompt == p).nonzero()[:, 0]
        best = int(leaves[value[leaves].argmax()])
        for e in ((edges.prompt == p).nonzero()[:, 0]).tolist():
            valid = bool(torch.isfinite(value[leaves]).any())
            assert (best in below(forest, int(peer[e]))) if valid else int(peer[e]) == e


def test_best_path_points_to_itself_where_the_best_path_has_no_such_step() -> None:
    forest = grow(P.branch_each_step(4, seeds=1, branches=2), prompts=1)
    peer = BestPath(Z)(random_scores(forest, 0), forest).peer
    assert peer is not None
    alone = [e for e, q in enumerate(peer.tolist()) if e == q]
    assert len(alone) == len(forest.edges) - 1  # only the best leaf's sibling has another to look at


AROUND: list[CreditRule] = [Extremes(Z, 1, 1), PerReward(Z), FromLeaves(Z), Standing(Z), BestPath(Z), LogProbBackup(Z)]


@pytest.mark.parametrize("credit", AROUND, ids=lambda c: type(c).__name__)
def test_they_hand_weights_and_groups_on(credit: CreditRule) -> None:
    weighted = credit.weighted({"b": 2.0})
    assert weighted.reward_weights == {"b": 2.0} and credit.reward_weights is None
    assert type(weighted) is type(credit) and torch.equal(credit.groups(TREE.edges), Z.groups(TREE.edges))
    both = random_scores(TREE, 1, rewards=2)
    forest = with_log_prob(TREE)
    torch.testing.assert_close(weighted(both, forest).value, credit(scored(both.value[:, 1:]), forest).value)


@pytest.mark.parametrize("credit", AROUND, ids=lambda c: type(c).__name__)
def test_the_whole_forest_without_states_will_do(credit: CreditRule) -> None:
    plan = P.tree(4, roots=1, splits={0: 2, 1: 2, 3: 2})
    whole, scores = skeleton([plan] * 2, range(2)), random_scores(TREE, 9)
    bare = with_log_prob(whole, TREE.edges.log_prob)
    got, want = credit(scores, bare), credit(scores, with_log_prob(TREE))
    for a, b in itertools.zip_longest(
        (got.value, got.ok, got.live, got.peer), (want.value, want.ok, want.live, want.peer)
    ):
        assert (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))


def test_bad_arguments() -> None:
    for make, message in (
        (lambda: Extremes(Z, -1, 1), "best: -1 must be at least 0"),
        (lambda: Extremes(Z, 0, 0), "best: 0 with worst 0 keeps no leaf; nearest valid: 1"),
        (lambda: Extremes(Z, 1, 1, "root"), "among: 'root' is not one of prompt, branch"),  # pyright: ignore
        (lambda: Extremes(Z, 1, 1, by="rank"), "by: 'rank' is not one of advantage, reward"),  # pyright: ignore
        (lambda: PerReward(Z, clip=0.0), "clip: 0.0 must be > 0"),
        (lambda: PerReward(Z, eps=-1.0), "eps: -1.0 must be a finite number"),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert message in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- nesting
VALUES_ONLY: list[type[Around]] = [PerReward, MinNorm, FromLeaves]
DECIDING: list[CreditRule] = [Extremes(Z, 1, 1), DynamicSampling(Z, 1), Standing(Z), BestPath(Z), Mapped(Z)]


def test_every_rule_is_of_one_of_these_kinds() -> None:
    """A rule that decides more than values says so. WinRate and its like hand on what the inner credit says."""
    rules = {rule for rule in vars(credits).values() if isinstance(rule, type) and issubclass(rule, Around)} - {Around}
    deciding, joining = {type(rule) for rule in DECIDING}, set(VALUES_ONLY)
    assert {rule for rule in rules if rule.decides} == deciding and {r for r in rules if r.values_only} == joining
    assert {rule.__name__ for rule in rules - deciding - joining} == {
        "LogProbBackup",
        "PerStream",
        "StepCredit",
        "Surprisal",
        "WinRate",
    }


@pytest.mark.parametrize("outer", VALUES_ONLY)
@pytest.mark.parametrize("inner", DECIDING, ids=lambda rule: type(rule).__name__)
def test_what_decides_stands_around_what_reads_values_alone(outer: type[Around], inner: CreditRule) -> None:
    own, name = outer.__name__, type(inner).__name__
    for nested in (inner, WinRate(inner), LogProbBackup(WinRate(inner))):
        with pytest.raises(ValueError, match=f"^inner: {own} reads values alone, .*nearest valid: {name} around {own}"):
            outer(nested)


@pytest.mark.parametrize("outer", VALUES_ONLY)
def test_a_rule_that_does_not_say_that_it_decides_is_found_when_it_does(outer: type[Around]) -> None:
    @dataclass(frozen=True)
    class Bold(Around):
        def __call__(self, scores: Scores, forest: Forest) -> Advantage:
            return DynamicSampling(self.inner)(scores, forest)

    with pytest.raises(ValueError, match=f"{outer.__name__} reads values alone, and Bold selects"):
        outer(Bold(Z))(random_scores(CHAINS, 3, rewards=2), CHAINS)


@pytest.mark.parametrize("joined", [PerReward(Z), MinNorm(Z)], ids=["per_reward", "min_norm"])
def test_prompts_on_which_any_reward_has_spread_are_kept_whatever_the_rewards_order(joined: CreditRule) -> None:
    forest = grow(P.chain(3, roots=4), prompts=4)
    value = random_scores(forest, 6, rewards=2).value
    first, second, third = (forest.leaves.prompt == p for p in range(3))
    value[first] = 0.5  # no reward has spread there; at prompt 1 the second alone, at prompt 2 the first alone
    value[second, 0] = 0.5
    value[third, 1] = 0.5
    slot = forest.edges.prompt
    for table in (value, value.flip(1)):
        plain = joined(scored(table), forest)
        for keep, prompts in ((None, (1, 2, 3)), (2, (1, 2)), (1, (1,))):
            got = DynamicSampling(joined, keep)(scored(table), forest)
            kept = torch.isin(slot, torch.tensor(prompts))
            assert torch.equal(got.ok, kept) and torch.equal(got.value, torch.where(kept, plain.value, 0.0))
            assert got.pool is not None and torch.equal(got.pool.ok, plain.ok)


def test_prompts_that_are_left_out_twice_stay_in_the_first_pool() -> None:
    scores = random_scores(CHAINS, 6)
    got = DynamicSampling(DynamicSampling(Z, 1))(scores, CHAINS)
    assert got.pool is not None and torch.equal(got.pool.ok, Z(scores, CHAINS).ok) and got.pool.pool is None
    assert torch.equal(got.ok, CHAINS.edges.prompt == 0)
