"""Win rates, perceptual surprisal and dynamic sampling: closed forms, laws, and what they must not look at."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.credit import DynamicSampling, GroupZScore, PathLogProb, Surprisal, WinRate, surprisal, win_rates
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear
from tempflow.core.scores import Scores

RAW = GroupZScore(scale="none", clip=None)
"""Advantages that are centred values and nothing else."""


def grow(prompts: int = 3, roots: int = 5, train: tuple[int, ...] | None = None) -> Forest:
    plan = P.chain(3, roots, train=train)
    return rollout([plan] * prompts, FlowSDE(0.7), linear(3, 3.0), lambda x, s, r: 0.5 * x, Noise(3), shape=(2,))


FOREST = grow()


def scored(values: Tensor, ok: Tensor | None = None, names: tuple[str, ...] = ("r",)) -> Scores:
    v = values.float().view(len(values), -1)
    return Scores(v, torch.ones_like(v, dtype=torch.bool) if ok is None else ok.view(v.shape), names)


def by_leaf(advantage: Tensor, forest: Forest = FOREST) -> Tensor:
    """Every leaf's value, which all its edges share."""
    edge, leaf = forest.descent
    return torch.zeros(len(forest.leaves)).index_copy_(0, leaf, advantage[edge])


def embedded(phi: Tensor, **more: Tensor) -> Forest:
    return replace(FOREST, leaves=replace(FOREST.leaves, traits={"embedding": phi, **more}))


values = st.lists(st.integers(-5, 5), min_size=2, max_size=9)


# ---------------------------------------------------------------------------------------------------- win rates
@settings(deadline=None, max_examples=80)
@given(v=values, data=st.data())
def test_win_rates_are_counted_pair_by_pair(v: list[int], data: st.DataObject) -> None:
    ok = data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v)))
    got = win_rates(torch.tensor(v).float()[:, None], torch.tensor(ok)[:, None])[:, 0]
    for i, mine in enumerate(v):
        others = [w for j, w in enumerate(v) if j != i and ok[j]]
        if not ok[i]:
            assert math.isnan(got[i])
        elif not others:
            assert float(got[i]) == 0.5
        else:
            want = sum(1.0 if mine > w else 0.5 if mine == w else 0.0 for w in others) / len(others)
            assert float(got[i]) == pytest.approx(want, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(v=values, seed=st.integers(0, 99))
def test_win_rates_sum_to_half_ignore_monotone_changes_and_follow_a_permutation(v: list[int], seed: int) -> None:
    value = torch.tensor(v, dtype=torch.float64)[:, None]
    ok = torch.ones_like(value, dtype=torch.bool)
    rate = win_rates(value, ok)
    assert float(rate.mean()) == pytest.approx(0.5, abs=1e-12)
    assert float(rate.min()) >= 0 and float(rate.max()) <= 1
    for changed in (value.exp(), value**3 - 100, 1e-3 * value):
        assert torch.equal(win_rates(changed, ok), rate)
    torch.testing.assert_close(win_rates(-value, ok), 1 - rate)
    order = torch.randperm(len(v), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(win_rates(value[order], ok), rate[order])


@pytest.mark.parametrize("n", [2, 3, 8, 24])
def test_a_strict_order_has_the_closed_forms_spread_and_largest_advantage(n: int) -> None:
    rate = win_rates(
        torch.randperm(n, generator=torch.Generator().manual_seed(n))[:, None].double(), torch.ones(n, 1) > 0
    )
    std = rate.std(unbiased=False)
    assert float(std) == pytest.approx(math.sqrt((n + 1) / (12 * (n - 1))), rel=1e-12)
    assert float(((rate - 0.5) / std).max()) == pytest.approx(math.sqrt(3 * (n - 1) / (n + 1)), rel=1e-12)


def test_rounding_makes_ties() -> None:
    value = torch.arange(8.0)[:, None]
    ok = torch.ones(8, 1, dtype=torch.bool)
    assert win_rates(value, ok, 3)[1, 0] == 0.143 and win_rates(value, ok)[1, 0] == pytest.approx(1 / 7, rel=1e-12)
    assert set(win_rates(value, ok, 0)[:, 0].tolist()) == {0.0, 1.0}
    forest = grow(1, 8)
    rounded = WinRate(RAW, 0)(scored(value), forest).value
    assert set(by_leaf(rounded, forest).tolist()) == {-0.5, 0.5}


def test_win_rates_are_the_prompts_own_and_per_reward() -> None:
    g = torch.Generator().manual_seed(0)
    value = torch.rand(15, 2, generator=g) + 10.0 * FOREST.leaves.prompt[:, None]
    scores = scored(value, names=("a", "b"))
    got = by_leaf(WinRate(RAW.weighted({"a": 2.0, "b": 0.5}))(scores, FOREST).value).view(3, 5)
    order = value.view(3, 5, 2).argsort(1).argsort(1) / 4  # rank from 0 to 1 inside the prompt
    want = 2.0 * order[..., 0] + 0.5 * order[..., 1] - 1.25
    torch.testing.assert_close(got, want)
    alone = by_leaf(WinRate(RAW.weighted({"a": 1.0}))(scores, FOREST).value).view(3, 5)
    torch.testing.assert_close(alone, order[..., 0] - 0.5)


def test_prompts_of_another_batch_do_not_change_a_win_rate() -> None:
    g = torch.Generator().manual_seed(1)
    value = torch.rand(15, generator=g)
    changed = torch.where(FOREST.leaves.prompt == 1, torch.rand(15, generator=g), value)
    a, b = (by_leaf(WinRate(RAW)(scored(v), FOREST).value).view(3, 5) for v in (value, changed))
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])


def test_failed_scores_do_not_play_and_ties_teach_nothing() -> None:
    value = torch.arange(15.0)
    ok = torch.ones(15, dtype=torch.bool)
    ok[:2] = False
    got = WinRate(RAW)(scored(value, ok), FOREST)
    assert by_leaf(got.value).view(3, 5)[0].tolist() == [0, 0, -0.5, 0, 0.5]
    edge, leaf = FOREST.descent
    assert torch.equal(got.ok[edge], ok[leaf])
    flat = WinRate(GroupZScore())(scored(torch.where(FOREST.leaves.prompt == 1, 3.0, value)), FOREST)
    assert not bool(flat.live[FOREST.edges.prompt == 1].any()) and bool(flat.live[FOREST.edges.prompt != 1].all())
    assert bool((flat.value[FOREST.edges.prompt == 1] == 0).all())


# ---------------------------------------------------------------------------------------------------- surprisal
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), size=st.integers(1, 7), width=st.integers(1, 5))
def test_surprisal_sums_to_half_the_groups_scatter_and_follows_a_permutation(seed: int, size: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    phi, ok = torch.randn(2 * size, width, generator=g), torch.ones(2 * size, dtype=torch.bool)
    group = torch.arange(2).repeat_interleave(size) * 7
    got = surprisal(phi, ok, group)
    for k in (0, 1):
        rows = phi[group == 7 * k].double().numpy()
        trace = np.trace(np.atleast_2d(np.cov(rows, rowvar=False, bias=True)))
        assert float(got[group == 7 * k].sum()) == pytest.approx(size * trace / 2, abs=1e-9)
    order = torch.randperm(2 * size, generator=g)
    torch.testing.assert_close(surprisal(phi[order], ok, group[order]), got[order])
    torch.testing.assert_close(surprisal(phi + 3.0, ok, group), got, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(surprisal(2 * phi, ok, group), 4 * got)


def test_equal_pictures_have_exactly_no_surprisal_and_an_outlier_the_most() -> None:
    phi = torch.full((15, 4), 0.1)
    ok = torch.ones(15, dtype=torch.bool)
    assert bool((surprisal(phi, ok, FOREST.leaves.prompt) == 0).all())
    phi[7] += 1.0
    got = surprisal(phi, ok, FOREST.leaves.prompt)
    assert int(got.argmax()) == 7 and bool((got[:5] == 0).all()) and bool((got[10:] == 0).all())
    assert float(got[7]) == pytest.approx(4 * 0.8**2 / 2) and float(got[5]) == pytest.approx(4 * 0.2**2 / 2)


def test_failed_leaves_take_no_part_in_the_mean() -> None:
    phi = torch.zeros(5, 1)
    phi[4] = 100.0
    ok = torch.tensor([True, True, True, True, False])
    assert surprisal(phi, ok, torch.zeros(5, dtype=torch.long))[:4].tolist() == [0, 0, 0, 0]


def test_the_bonus_is_added_before_the_group_is_compared() -> None:
    g = torch.Generator().manual_seed(2)
    reward, phi = torch.rand(15, generator=g), torch.randn(15, 6, generator=g)
    credit = Surprisal(GroupZScore(eps=0.0, clip=None), coefficient=0.3, scale=2.0)
    got = by_leaf(credit(scored(reward), embedded(phi)).value).view(3, 5).double().numpy()
    per = phi.view(3, 5, 6).double().numpy()
    bonus = ((per - per.mean(1, keepdims=True)) ** 2).sum(-1) / (2 * 2.0**2)
    total = reward.view(3, 5).double().numpy() + 0.3 * bonus
    want = (total - total.mean(1, keepdims=True)) / total.std(1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_coefficient_is_the_inner_credit_bitwise() -> None:
    g = torch.Generator().manual_seed(3)
    ok = torch.rand(15, 2, generator=g) > 0.2
    scores = scored(torch.rand(15, 2, generator=g), ok, ("a", "b"))
    for weights in (None, {"a": 0.3, "b": -1.0}, {"b": 2.0}):
        inner = GroupZScore(scale="global").weighted(weights)
        plain = inner(scores, FOREST)
        got = Surprisal(inner, coefficient=0.0)(scores, embedded(torch.randn(15, 4, generator=g)))
        assert torch.equal(got.value, plain.value) and torch.equal(got.ok, plain.ok)
        assert torch.equal(got.live, plain.live)


def test_equal_scores_of_different_pictures_teach_and_of_equal_ones_do_not() -> None:
    scores, phi = scored(torch.ones(15)), torch.zeros(15, 3)
    phi[3, 0] = 1.0
    got = Surprisal(GroupZScore())(scores, embedded(phi))
    leaf = by_leaf(got.value).view(3, 5)
    assert bool((leaf[1:] == 0).all()) and int(leaf[0].argmax()) == 3
    assert bool(got.live[FOREST.edges.prompt == 0].all()) and not bool(got.live[FOREST.edges.prompt > 0].any())


def test_latent_surprise_is_taken_away() -> None:
    """R̃ = R − λ(log p_perc − log p_latent): with equal pictures, what was unlikely for the policy loses."""
    log_prob = torch.arange(15.0) % 5
    got = Surprisal(RAW, coefficient=0.1, latent=True)(
        scored(torch.zeros(15)), embedded(torch.zeros(15, 2), path_log_prob=log_prob)
    )
    torch.testing.assert_close(by_leaf(got.value), 0.1 * (log_prob - 2.0))


def test_a_paths_log_prob_is_the_mean_over_its_noisy_edges() -> None:
    plan = P.tree(3, 1, {0: 2, 1: 2}, stochastic=[0, 1])
    forest = rollout([plan] * 2, FlowSDE(0.7), linear(3, 3.0), lambda x, s, r: 0.5 * x, Noise(3), shape=(2,))
    edges = forest.edges
    child_of = {int(c): e for e, c in enumerate(edges.child)}
    seen = PathLogProb()
    got = seen(forest, torch.empty(0))
    assert (seen.name, seen.of, got.shape) == ("path_log_prob", "leaf", (8,))
    edge, leaf = forest.descent
    for n in range(8):
        above = edges.log_prob[edge[leaf == n]].double().numpy()
        assert len(above) == 2 and got[n].item() == pytest.approx(above.mean())
    assert len(child_of) == 12 and len(set(got.tolist())) == 8
    quiet = rollout([P.ode(3, 2)], FlowSDE(0.7), linear(3), lambda x, s, r: 0.5 * x, Noise(3), shape=(2,))
    assert seen(quiet, torch.empty(0)).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------- dynamic sampling
def flat_prompts(*flat: int) -> Scores:
    value = torch.rand(30, generator=torch.Generator().manual_seed(4))
    for prompt in flat:
        value[POOL.leaves.prompt == prompt] = 0.5
    return scored(value)


POOL = grow(6)


@settings(deadline=None, max_examples=40)
@given(flat=st.sets(st.integers(0, 5)), keep=st.one_of(st.none(), st.integers(1, 8)))
def test_the_first_prompts_with_spread_are_kept_and_their_advantages_are_the_inner_ones(
    flat: set[int], keep: int | None
) -> None:
    scores = flat_prompts(*flat)
    plain, got = GroupZScore()(scores, POOL), DynamicSampling(GroupZScore(), keep)(scores, POOL)
    kept = [p for p in range(6) if p not in flat][:keep]
    here = torch.isin(POOL.edges.prompt, torch.tensor(kept, dtype=torch.long))
    assert torch.equal(got.ok, here) and torch.equal(got.live, here)
    assert torch.equal(got.value, torch.where(here, plain.value, 0.0))


def test_spread_on_untrained_edges_alone_does_not_keep_a_prompt() -> None:
    """The tree's only trained step is above the split: its two edges have equal values, the leaves differ."""
    plan = P.tree(3, 2, {1: 2}, train=[0])
    forest = rollout([plan] * 2, FlowSDE(0.7), linear(3), lambda x, s, r: 0.5 * x, Noise(3), shape=(2,))
    first = forest.leaves.prompt == 0
    value = torch.where(first, torch.tensor([0.0, 1.0] * 4), torch.arange(8.0))
    assert bool(GroupZScore()(scored(value), forest).live[forest.edges.prompt == 0].any())
    got = DynamicSampling(GroupZScore(), 1)(scored(value), forest)
    assert not bool(got.ok[forest.edges.prompt == 0].any()) and bool(got.ok[forest.edges.prompt == 1].all())


def test_failed_leaves_of_kept_prompts_stay_left_out() -> None:
    scores = flat_prompts()
    ok = torch.ones(30, dtype=torch.bool)
    ok[:4] = False  # the first prompt has one valid leaf left: no spread
    ok[7] = False
    got = DynamicSampling(GroupZScore(), 2)(Scores(scores.value, ok[:, None], ("r",)), POOL)
    edge, leaf = POOL.descent
    kept = torch.zeros(30, dtype=torch.bool)
    kept[5:15] = True
    assert torch.equal(got.ok[edge], (kept & ok)[leaf])


def test_columns_and_peers_pass_through() -> None:
    class Pointing(GroupZScore):
        def __call__(self, scores: Scores, forest: Forest):
            rows = torch.arange(len(forest.edges))
            return replace(super().__call__(scores, forest), columns={"standing": rows.float()}, peer=rows)

    for credit in (DynamicSampling(Pointing(), 2), WinRate(Pointing()), Surprisal(Pointing())):
        got = credit(
            flat_prompts(), replace(POOL, leaves=replace(POOL.leaves, traits={"embedding": torch.rand(30, 2)}))
        )
        assert got.peer is not None and torch.equal(got.columns["standing"], got.peer.float())


# -------------------------------------------------------------------------------------------------------- wrapping
@pytest.mark.parametrize("make", [WinRate, Surprisal, DynamicSampling])
def test_weights_and_groups_are_the_inner_credits(make: type) -> None:
    inner = GroupZScore(by=("prompt",), reward_weights={"r": 2.0})
    credit = make(inner)
    assert credit.reward_weights == {"r": 2.0}
    other = credit.weighted({"r": 3.0})
    assert type(other) is make and other.reward_weights == {"r": 3.0} and credit.reward_weights == {"r": 2.0}
    assert torch.equal(credit.groups(FOREST.edges), inner.groups(FOREST.edges))
    nested = DynamicSampling(make(inner), 1).weighted({"r": 4.0})
    assert nested.reward_weights == {"r": 4.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WinRate(RAW, -1), "rounding: -1 must be at least 0, or None"),
        (lambda: Surprisal(RAW, coefficient=-0.1), "coefficient: -0.1 must be finite and ≥ 0; 0.05 is usual"),
        (lambda: Surprisal(RAW, coefficient=math.inf), "coefficient: inf must be"),
        (lambda: Surprisal(RAW, scale=0.0), "scale: 0.0 must be finite and above 0; 1 is usual"),
        (lambda: Surprisal(RAW)(scored(torch.rand(15)), FOREST), "trait: leaves have no 'embedding' .*there: none"),
        (
            lambda: Surprisal(RAW, latent=True)(scored(torch.rand(15)), embedded(torch.zeros(15, 1))),
            "trait: leaves have no 'path_log_prob' .*there: embedding",
        ),
        (lambda: DynamicSampling(RAW, 0), "prompts: 0 must be at least 1, or None for all; nearest valid: 1"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
