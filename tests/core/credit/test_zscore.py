"""Advantages against numpy by hand, Flow-GRPO's leaf statistics, and the laws of a group z-score."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.credit import AsScored, GroupZScore, Key, group_index
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.groups import moments
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear
from tempflow.core.scores import Scores

SEED_GROUP: tuple[Key, ...] = ("prompt", "root", "step")
KEYS: tuple[Key, ...] = get_args(Key)


def grow(plan: Plan, prompts: int = 2) -> Forest:
    return rollout(
        [plan] * prompts,
        FlowSDE(0.7),
        linear(plan.steps, 3.0),
        lambda x, sigma, rows: 0.5 * x,
        Noise(3),
        shape=(2,),
    )


BRANCHED = grow(P.branch_each_step(4, seeds=2, branches=3))
CHAINS = grow(P.chain(3, roots=5))
TREE = grow(P.tree(4, roots=2, splits={0: 2, 2: 3}))
FORESTS = {"branched": BRANCHED, "chains": CHAINS, "tree": TREE}


def scored(values: Tensor, ok: Tensor | None = None) -> Scores:
    v = values.float()[:, None]
    return Scores(v, torch.ones_like(v, dtype=torch.bool) if ok is None else ok[:, None], ("r",))


def random_scores(forest: Forest, seed: int = 0, failed: float = 0.0) -> Scores:
    g = torch.Generator().manual_seed(seed)
    n = len(forest.leaves)
    return scored(torch.rand(n, generator=g), torch.rand(n, generator=g) >= failed)


def edge_values(forest: Forest, scores: Scores) -> np.ndarray:
    """Mean over the valid leaves below each edge, by a loop."""
    value, ok = scores.value[:, 0].double().numpy(), scores.ok[:, 0].numpy()
    edge, leaf = (t.numpy() for t in forest.descent)
    out = np.full(len(forest.edges), np.nan)
    for e in range(len(out)):
        below = [value[n] for n in leaf[edge == e] if ok[n]]
        out[e] = np.mean(below) if below else np.nan
    return out


def keys_of(forest: Forest, by: tuple[Key, ...]) -> list[tuple[int, ...]]:
    edges = forest.edges
    columns = {"prompt": edges.prompt, "root": edges.root, "step": edges.step, "depth": edges.depth}
    columns["parent"] = edges.parent
    return [tuple(int(columns[key][e]) for key in by) for e in range(len(edges))]


def by_hand(forest: Forest, scores: Scores, credit: GroupZScore) -> np.ndarray:
    value, keys = edge_values(forest, scores), keys_of(forest, credit.by)
    steps = forest.edges.step.numpy()
    leaf = scores.value[:, 0].double().numpy()
    everyone = leaf[scores.ok[:, 0].numpy()]
    out = np.zeros(len(value))
    for e, v in enumerate(value):
        if np.isnan(v):
            continue
        group = [w for w, key in zip(value, keys, strict=True) if key == keys[e] and not np.isnan(w)]
        if len(group) < 2 or np.ptp(group) == 0:
            continue
        same_step = value[(steps == steps[e]) & ~np.isnan(value)]
        pool = {"group": group, "global": everyone, "batch": same_step, "none": None}[credit.scale]
        deviation = 1.0 if pool is None else np.std(pool, ddof=int(credit.unbiased)) + credit.eps
        z = (v - np.mean(group)) / deviation
        out[e] = z if credit.clip is None else np.clip(z, -credit.clip, credit.clip)
    return out


SUBSETS = [c for n in range(len(KEYS) + 1) for c in itertools.combinations(KEYS, n)]


@pytest.mark.parametrize("by", SUBSETS, ids=lambda by: "+".join(by) or "all")
def test_every_key_subset_groups_equal_keys_and_matches_numpy(by: tuple[Key, ...]) -> None:
    for forest in FORESTS.values():
        index, keys = group_index(forest.edges, by), keys_of(forest, by)
        distinct = sorted(set(keys))
        assert index.tolist() == [distinct.index(key) for key in keys]
        scores = random_scores(forest, failed=0.2)
        got = GroupZScore(by=by)(scores, forest)
        np.testing.assert_allclose(got.value, by_hand(forest, scores, GroupZScore(by=by)), atol=2e-5)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("scale", ["group", "global", "batch", "none"])
def test_scale_forms_match_numpy(scale: str, unbiased: bool, name: str) -> None:
    forest = FORESTS[name]
    for eps, clip in ((1e-4, 5.0), (0.0, None), (0.3, 0.7)):
        credit = GroupZScore(scale=scale, unbiased=unbiased, eps=eps, clip=clip)  # type: ignore[arg-type]
        scores = random_scores(forest, 5, failed=0.1)
        want = by_hand(forest, scores, credit)
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(credit(scores, forest).value, want, rtol=1e-5, atol=1e-6)


def test_group_scale_is_scipys_zscore() -> None:
    scores = random_scores(CHAINS, 1)
    by_step = scores.value[:, 0].double().numpy().reshape(2, 5)
    for unbiased in (False, True):
        got = GroupZScore(eps=0.0, clip=None, unbiased=unbiased)(scores, CHAINS).value
        want = stats.zscore(by_step, axis=1, ddof=int(unbiased))
        for step in range(3):
            at = CHAINS.edges.step == step
            np.testing.assert_allclose(got[at].reshape(2, 5), want, rtol=1e-5)


def test_flow_grpo_statistics_by_prompt_and_step_are_those_of_the_leaves() -> None:
    """Official code: mean and population std per prompt over pictures, tiled over steps; `global_std` over all."""
    scores = random_scores(CHAINS, 2)
    reward = scores.value[:, 0].double().numpy().reshape(2, 5)
    mean = reward.mean(1, keepdims=True)
    for scale, std in (("group", reward.std(1, keepdims=True)), ("global", reward.std())):
        want = (reward - mean) / (std + 1e-4)
        credit = GroupZScore(by=("prompt", "step"), scale=scale)  # type: ignore[arg-type]
        got = credit(scores, CHAINS).value
        leaf_of = torch.empty(len(CHAINS.edges), dtype=torch.long)
        leaf_of[CHAINS.descent[0]] = CHAINS.descent[1]
        np.testing.assert_allclose(got, want.reshape(-1)[leaf_of], rtol=1e-5)


def test_seed_group_sums_to_zero_per_seed_and_step_and_prompt_group_only_over_seeds() -> None:
    scores, edges = random_scores(BRANCHED, 3), BRANCHED.edges
    seed = GroupZScore(by=SEED_GROUP)(scores, BRANCHED)
    prompt = GroupZScore(by=("prompt", "step"))(scores, BRANCHED)
    assert bool(seed.live.all()) and bool(prompt.live.all())
    worst = 0.0
    for p, s in itertools.product(range(2), range(3)):
        at = (edges.prompt == p) & (edges.step == s)
        assert abs(float(prompt.value[at].sum())) < 1e-5
        for r in range(2):
            group = at & (edges.root == r)
            assert int(group.sum()) == 3
            assert abs(float(seed.value[group].sum())) < 1e-5
            worst = max(worst, abs(float(prompt.value[group].sum())))
    assert worst > 0.1  # else the two groupings could not be told apart


def test_group_batch_and_global_differ_by_one_divisor_only() -> None:
    """All three centre alike; with branches, every edge has its own leaf, so "global" is one number for all steps and
    "batch" one number for each step."""
    scores = random_scores(BRANCHED, 4)
    credits = {s: GroupZScore(scale=s, eps=0.0, clip=None) for s in ("group", "global", "batch", "none")}  # type: ignore[arg-type]
    a = {s: credit(scores, BRANCHED).value.double() for s, credit in credits.items()}
    overall = a["none"] / a["global"]
    assert torch.allclose(overall, overall[0].expand_as(overall), rtol=1e-4)
    for step in range(3):
        at = BRANCHED.edges.step == step
        divisor = (a["none"] / a["batch"])[at]
        assert torch.allclose(divisor, divisor[0].expand_as(divisor), rtol=1e-4)
        one_prompt = at & (BRANCHED.edges.prompt == 0)
        divisor = (a["none"] / a["group"])[one_prompt]
        assert torch.allclose(divisor, divisor[0].expand_as(divisor), rtol=1e-4)
    single = BRANCHED.select((BRANCHED.edges.prompt == 0) & (BRANCHED.edges.step == 1))
    group, batch = (credits[s](scores, single).value for s in ("group", "batch"))
    assert torch.equal(group, batch)  # one group left: the batch is the group


@pytest.mark.parametrize("scale", ["group", "global", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -1e6, 1 / 3])
def test_zero_variance_gives_exactly_zero_and_not_live(scale: str, value: float) -> None:
    leaf = torch.full((len(BRANCHED.leaves),), value)
    varied = BRANCHED.leaves.prompt == 1
    leaf[varied] = random_scores(BRANCHED).value[:, 0][varied]
    advantage = GroupZScore(by=SEED_GROUP, scale=scale)(scored(leaf), BRANCHED)  # type: ignore[arg-type]
    flat = BRANCHED.edges.prompt == 0
    assert bool((advantage.value[flat] == 0).all()) and not bool(advantage.live[flat].any())
    assert bool(advantage.ok.all())
    assert bool(advantage.live[~flat].all()) and bool((advantage.value[~flat] != 0).all())


def test_equal_means_of_equal_leaves_have_no_spread_in_a_tree() -> None:
    """An edge's value is a mean over leaves; rounding of that mean must not look like a difference."""
    advantage = GroupZScore(by=("prompt", "step"))(scored(torch.full((len(TREE.leaves),), 0.1)), TREE)
    assert not bool(advantage.live.any()) and bool((advantage.value == 0).all())


def test_a_small_true_spread_is_live() -> None:
    leaf = torch.full((len(CHAINS.leaves),), 0.5)
    leaf[0] += 1e-5
    advantage = GroupZScore(eps=0.0, clip=None)(scored(leaf), CHAINS)
    first = CHAINS.edges.prompt == 0
    assert bool(advantage.live[first].all()) and not bool(advantage.live[~first].any())
    assert float(advantage.value.max()) == pytest.approx(2.0, rel=1e-3)  # (n−1)/sqrt(n−1) for n = 5


def test_failed_rewards_are_dropped_and_never_zero() -> None:
    scores = random_scores(CHAINS, 6)
    ok = torch.ones(10, dtype=torch.bool)
    ok[[1, 7]] = False
    failed = scored(scores.value[:, 0], ok)
    advantage = GroupZScore()(failed, CHAINS)
    leaf_of = torch.empty(len(CHAINS.edges), dtype=torch.long)
    leaf_of[CHAINS.descent[0]] = CHAINS.descent[1]
    dropped = ~ok[leaf_of]
    assert torch.equal(advantage.ok, ~dropped) and torch.equal(advantage.live, ~dropped)
    assert bool((advantage.value[dropped] == 0).all()) and bool(advantage.value.isfinite().all())
    zeros = GroupZScore()(scored(scores.value[:, 0].masked_fill(~ok, 0.0)), CHAINS)
    assert not torch.allclose(advantage.value[~dropped], zeros.value[~dropped], atol=1e-2)
    # what is left is exactly the group without the failed pictures
    reward = scores.value[[0, 2, 3, 4], 0].double().numpy()
    at = (CHAINS.edges.prompt == 0) & (CHAINS.edges.step == 0) & ~dropped
    np.testing.assert_allclose(advantage.value[at], (reward - reward.mean()) / (reward.std() + 1e-4), rtol=1e-5)


def test_a_group_with_one_valid_edge_is_not_live_and_all_failed_is_not_ok() -> None:
    ok = torch.zeros(10, dtype=torch.bool)
    ok[3] = True
    for scale in ("group", "global", "batch", "none"):
        advantage = GroupZScore(scale=scale, unbiased=True)(scored(torch.rand(10), ok), CHAINS)
        assert int(advantage.ok.sum()) == 3 and not bool(advantage.live.any())
        assert bool((advantage.value == 0).all())
        nothing = GroupZScore(scale=scale)(scored(torch.rand(10), torch.zeros(10, dtype=torch.bool)), CHAINS)
        assert not bool(nothing.ok.any()) and bool((nothing.value == 0).all())


def test_clip_bounds_and_eps_shrinks() -> None:
    leaf = torch.zeros(10)
    leaf[0] = 1.0
    free = GroupZScore(eps=0.0, clip=None)(scored(leaf), CHAINS).value
    assert float(free.max()) == pytest.approx(2.0)
    tight = GroupZScore(eps=0.0, clip=1.5)(scored(leaf), CHAINS).value
    assert torch.equal(tight, free.clamp(-1.5, 1.5))
    soft = GroupZScore(eps=0.4, clip=None)(scored(leaf), CHAINS).value
    assert float(soft.max()) == pytest.approx(0.8 / (0.4 + 0.4))  # the std of (1, 0, 0, 0, 0) is 0.4


def test_reward_weights_are_those_of_the_weighted_sum() -> None:
    a, b = random_scores(CHAINS, 7).value, random_scores(CHAINS, 8).value
    both = Scores(torch.cat([a, b], 1), torch.ones(10, 2, dtype=torch.bool), ("a", "b"))
    got = GroupZScore(reward_weights={"a": 0.25, "b": 2.0})(both, CHAINS)
    want = GroupZScore()(scored((0.25 * a + 2.0 * b)[:, 0]), CHAINS)
    torch.testing.assert_close(got.value, want.value, rtol=1e-5, atol=1e-6)
    plain = GroupZScore()(both, CHAINS)
    assert not torch.allclose(got.value, plain.value, atol=1e-2)


def reordered(forest: Forest, order: Tensor, leaf_order: Tensor) -> Forest:
    """The same forest with edges and leaves listed in another order."""
    edge_place, leaf_place = torch.argsort(order), torch.argsort(leaf_order)
    leaves = forest.leaves
    return replace(
        forest,
        edges=forest.edges.map(lambda t: t[order]),
        leaves=replace(
            leaves, node=leaves.node[leaf_order], prompt=leaves.prompt[leaf_order], root=leaves.root[leaf_order]
        ),
        descent=(edge_place[forest.descent[0]], leaf_place[forest.descent[1]]),
    )


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(FORESTS)),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from(["group", "global", "batch", "none"]),
    by=st.sets(st.sampled_from(KEYS)).map(lambda s: tuple(sorted(s))),
)
def test_permuting_edges_and_leaves_permutes_advantages(name: str, seed: int, scale: str, by: tuple[Key, ...]) -> None:
    forest = FORESTS[name]
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(forest.edges), generator=g)
    leaf_order = torch.randperm(len(forest.leaves), generator=g)
    scores = random_scores(forest, seed, failed=0.2)
    credit = GroupZScore(by=by, scale=scale)  # type: ignore[arg-type]
    plain = credit(scores, forest)
    moved = credit(scores.select(leaf_order), reordered(forest, order, leaf_order))
    torch.testing.assert_close(moved.value, plain.value[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(moved.ok, plain.ok[order]) and torch.equal(moved.live, plain.live[order])


@settings(max_examples=40, deadline=None)
@given(
    shift=st.floats(-100, 100),
    factor=st.floats(0.01, 100),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from(["group", "global", "batch"]),
)
def test_advantages_ignore_shift_and_positive_scale_of_rewards(
    shift: float, factor: float, seed: int, scale: str
) -> None:
    scores = random_scores(BRANCHED, seed)
    credit = GroupZScore(by=SEED_GROUP, scale=scale, eps=0.0)  # type: ignore[arg-type]
    changed = scored((scores.value[:, 0].double() * factor + shift).float())
    noise = 1e-5 * (1 + abs(shift) / factor)  # what float32 rewards lose by the shift, in units of their spread
    torch.testing.assert_close(
        credit(changed, BRANCHED).value, credit(scores, BRANCHED).value, rtol=100 * noise, atol=100 * noise
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), unbiased=st.booleans())
def test_moments_match_numpy(data: st.DataObject, unbiased: bool) -> None:
    n = data.draw(st.integers(1, 12))
    value = data.draw(st.lists(st.floats(-1e3, 1e3, width=32), min_size=n, max_size=n))
    ok = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    group = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    got = moments(torch.tensor(value), torch.tensor(ok), torch.tensor(group), unbiased)
    for j in range(n):
        mine = [v for v, o, g in zip(value, ok, group, strict=True) if o and g == group[j]]
        assert int(got[2][j]) == len(mine)
        if mine:
            assert float(got[0][j]) == pytest.approx(np.mean(mine), abs=1e-9)
            deviation = np.std(mine, ddof=int(unbiased)) if len(mine) > 1 else 0.0
            assert float(got[1][j]) == pytest.approx(deviation, abs=1e-6)


def test_nothing_recorded_gives_nothing() -> None:
    forest = grow(P.ode(3, 2))
    advantage = GroupZScore()(random_scores(forest), forest)
    assert advantage.value.shape == advantage.ok.shape == advantage.live.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": ("prompt", "seed")}, "by: 'seed' is not one of prompt, root, step"),
        ({"scale": "std"}, "scale: 'std' is not one of group, global"),
        ({"eps": -1e-4}, "eps: -0.0001 must be"),
        ({"eps": float("nan")}, "eps: nan must be"),
        ({"clip": 0.0}, "clip: 0.0 must be > 0"),
        ({"clip": float("nan")}, "clip: nan must be > 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupZScore(**arguments)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- center, power, pooled scale and gain
def of_leaves(credit: GroupZScore, values: Tensor, ok: Tensor | None = None) -> np.ndarray:
    """Advantages of CHAINS' leaves, [2 prompts, 5]; all edges of a chain have that of its leaf."""
    advantage = credit(scored(values, ok), CHAINS).value
    edge, leaf = CHAINS.descent
    out = torch.full((10,), math.nan).index_copy_(0, leaf, advantage[edge])
    assert torch.equal(out[leaf], advantage[edge])
    return out.view(2, 5).double().numpy()


REWARD = random_scores(CHAINS, 11).value[:, 0]
RAW = GroupZScore(scale="none", clip=None)


def test_the_others_mean_as_baseline_is_n_over_n_minus_one_times_the_plain_centring() -> None:
    r = REWARD.view(2, 5).double().numpy()
    others = (r.sum(1, keepdims=True) - r) / 4
    got = of_leaves(replace(RAW, center="others"), REWARD)
    np.testing.assert_allclose(got, r - others, atol=1e-6)
    np.testing.assert_allclose(got, 5 / 4 * of_leaves(RAW, REWARD), rtol=1e-6)


def test_leave_one_out_counts_the_valid_ones_only() -> None:
    ok = torch.ones(10, dtype=torch.bool)
    ok[[0, 3]] = False
    r = REWARD.double().numpy()
    got = of_leaves(replace(RAW, center="others"), REWARD, ok)
    for n in (1, 2, 4):
        rest = [r[m] for m in (1, 2, 4) if m != n]
        assert got[0, n] == pytest.approx(r[n] - np.mean(rest), abs=1e-6)
    assert got[0, 0] == got[0, 3] == 0
    ok[:4] = False  # one valid leaf: nothing to compare it with
    assert (of_leaves(replace(RAW, center="others"), REWARD, ok)[0] == 0).all()


def test_batch_baseline_and_pooled_scale_are_the_batchs_zscore() -> None:
    """REINFORCE++: (R − mean)/(std + eps) over all the iteration's pictures."""
    r = REWARD.double().numpy()
    credit = GroupZScore(center="batch", scale="pooled", eps=1e-3, clip=None)
    want = ((r - r.mean()) / (r.std() + 1e-3)).reshape(2, 5)
    np.testing.assert_allclose(of_leaves(credit, REWARD), want, atol=1e-5)
    assert abs(want[0].mean()) > 0.05  # or the group's mean could not be told apart from the batch's
    flat = torch.where(CHAINS.leaves.prompt == 0, 0.9, REWARD)
    got = of_leaves(credit, flat)
    assert (got[0] == got[0, 0]).all() and got[0, 0] > 0.3  # a flat group still moves
    assert (of_leaves(credit, torch.full((10,), 0.3)) == 0).all()


def test_power_one_pooled_is_mean_centred_over_the_batchs_std() -> None:
    """SLAS at γ = 0. The mean of group-centred values is 0, so their root mean square is a standard deviation."""
    r = REWARD.view(2, 5).double().numpy()
    centred = r - r.mean(1, keepdims=True)
    credit = GroupZScore(scale="pooled", eps=0.0, clip=None, power=1.0)
    np.testing.assert_allclose(of_leaves(credit, REWARD), centred / centred.std(), atol=1e-5)
    failed = torch.ones(10, dtype=torch.bool)
    failed[2] = False
    rest = np.delete(r[0], 2)
    pool = np.concatenate([rest - rest.mean(), centred[1]])
    got = of_leaves(credit, REWARD, failed)
    np.testing.assert_allclose(got[1], centred[1] / np.sqrt((pool**2).mean()), atol=1e-5)


@pytest.mark.parametrize("gamma", [0.25, 1.0, 2.0])
def test_power_shapes_the_centred_value_and_keeps_its_sign_and_order(gamma: float) -> None:
    r = REWARD.view(2, 5).double().numpy()
    c = r - r.mean(1, keepdims=True)
    shaped = np.sign(c) * np.abs(c) ** (1 + gamma)
    want = shaped / np.sqrt((shaped**2).mean())
    got = of_leaves(GroupZScore(scale="pooled", eps=0.0, clip=None, power=1 + gamma), REWARD)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (got**2).mean() == pytest.approx(1, abs=1e-5)
    assert (np.argsort(got, axis=1) == np.argsort(r, axis=1)).all()
    # odd: mirrored rewards give mirrored advantages
    np.testing.assert_allclose(of_leaves(replace(RAW, power=1 + gamma), -REWARD), -shaped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_twice_the_deviation_is_two_to_the_one_plus_gamma_times_the_advantage(gamma: float) -> None:
    """Centred values −2, −1, 0, 1, 2 (times ¼): Ã(2x)/Ã(x) = 2^(1+γ), with and without a pooled scale."""
    values = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).repeat(2)
    for scale in ("none", "pooled"):
        got = of_leaves(GroupZScore(scale=scale, eps=0.0, clip=None, power=1 + gamma), values)[0]  # type: ignore[arg-type]
        assert got[4] / got[3] == pytest.approx(2 ** (1 + gamma), rel=1e-6)
        assert got[0] / got[1] == pytest.approx(2 ** (1 + gamma), rel=1e-6)
        assert got[2] == 0 and got[1] < 0 < got[3]


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 999), gamma=st.floats(0, 2))
def test_shaped_advantages_ignore_the_rewards_unit(factor: float, seed: int, gamma: float) -> None:
    values = random_scores(CHAINS, seed).value[:, 0]
    credit = GroupZScore(scale="pooled", eps=0.0, clip=None, power=1 + gamma)
    a, b = of_leaves(credit, values), of_leaves(credit, (values.double() * factor).float())
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    # raw: equivariant of degree 1 + γ
    raw = replace(RAW, power=1 + gamma)
    scaled = of_leaves(raw, (values.double() * factor).float())
    np.testing.assert_allclose(scaled, of_leaves(raw, values) * factor ** (1 + gamma), rtol=1e-3, atol=1e-4)


def test_gain_multiplies_before_the_bound() -> None:
    free = of_leaves(GroupZScore(clip=None), REWARD)
    np.testing.assert_allclose(of_leaves(GroupZScore(clip=None, gain=0.1), REWARD), 0.1 * free, rtol=1e-6)
    bounded = of_leaves(GroupZScore(clip=0.5, gain=2.0), REWARD)
    np.testing.assert_allclose(bounded, np.clip(2 * free, -0.5, 0.5), rtol=1e-6)
    assert (np.abs(bounded) == 0.5).any() and (np.abs(bounded) < 0.5).any()


@pytest.mark.parametrize("center", ["group", "others", "batch"])
@pytest.mark.parametrize("scale", ["group", "global", "batch", "pooled", "none"])
def test_no_spread_anywhere_is_exactly_nothing(center: str, scale: str) -> None:
    credit = GroupZScore(center=center, scale=scale, power=1.5)  # type: ignore[arg-type]
    for value in (0.0, 0.1, -1e6):
        advantage = credit(scored(torch.full((10,), value)), CHAINS)
        assert bool((advantage.value == 0).all()) and not bool(advantage.live.any()) and bool(advantage.ok.all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"center": "prompt"}, "center: 'prompt' is not one of group, others, batch"),
        ({"power": 0.0}, "power: 0.0 must be finite and above 0; 1 is usual"),
        ({"power": math.nan}, "power: nan must be"),
        ({"gain": -1.0}, "gain: -1.0 must be finite and above 0; 1 is usual"),
    ],
)
def test_bad_centre_power_and_gain(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupZScore(**arguments)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- no baseline
def test_scores_as_they_are() -> None:
    """A = Σ w·R of the leaves below, against nothing; a failed one is neither 0 nor live; a prompt is a group."""
    values, ok = torch.tensor([1.0, 0.0, 0.0, -2.0]), torch.tensor([True, True, False, True])
    forest = grow(P.ode(2, 2)).as_leaves()
    given = AsScored()(scored(values, ok), forest)
    assert given.value.tolist() == [1.0, 0.0, 0.0, -2.0]
    assert given.ok.equal(ok) and given.live.equal(ok)
    assert AsScored().groups(forest.edges).tolist() == [0, 0, 1, 1]
    two = Scores(torch.tensor([[1.0, 5.0]] * 4), torch.ones(4, 2, dtype=torch.bool), ("a", "b"))
    assert AsScored().weighted({"a": 2.0, "b": -1.0})(two, forest).value.tolist() == [-3.0] * 4
    for credit in (AsScored(), GroupZScore(by=("prompt",), scale="none", clip=None)):
        scores = random_scores(CHAINS)
        value, _ = CHAINS.backup(*scores.total())
        order = credit(scores, CHAINS).value[:5].argsort()
        assert order.equal(value[:5].argsort())
