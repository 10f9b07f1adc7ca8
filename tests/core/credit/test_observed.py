"""Progress, L1rel, and the credits that tell steps, objectives or places apart, against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.core import plan as P
from tempflow.core.credit import GroupZScore, Mapped, MinNorm, Progress, RelativeChange, StepCredit, nearest_to_zero
from tempflow.core.dynamics import ODE, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.core.units import leaf_of

SHAPE = (2, 3, 3)
PLAN = P.chain(6, 4)
X0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2))


def grow(plan=PLAN, dynamics=None, schedule: Schedule | None = None, keep="stochastic", prompts=2) -> Forest:
    """Rollouts toward the single point X0."""
    return rollout(
        [plan] * prompts,
        dynamics or FlowSDE(0.7),
        schedule or linear(6, 2.0),
        lambda x, sigma, rows: (x - X0.to(x)) / sigma.to(x).view(-1, 1, 1, 1),
        Noise(3),
        shape=SHAPE,
        keep=keep,
        store_dtype=torch.float64,
    )


FOREST = grow()
NO_MEDIA = torch.empty(0)


def with_traits(forest: Forest, edges=None, leaves=None) -> Forest:
    forest = replace(forest, edges=replace(forest.edges, traits=edges or {}))
    return replace(forest, leaves=replace(forest.leaves, traits=leaves or {}))


def scores(forest: Forest, *columns: Tensor, names=None, ok=None) -> Scores:
    value = torch.stack([c.float() for c in columns], 1)
    ok = torch.ones_like(value, dtype=torch.bool) if ok is None else ok
    return Scores(value, ok, names or tuple("abcd"[: len(columns)]))


def random_scores(forest: Forest, rewards: int = 1, seed: int = 0) -> Scores:
    g = torch.Generator().manual_seed(seed)
    return scores(forest, *torch.randn(rewards, len(forest.leaves), generator=g))


# ----------------------------------------------------------------------------------------------------- observations
def straight() -> tuple[Forest, Tensor, Tensor]:
    """ODE chains whose velocity is constant, so that every path is x_σ = (1−σ)·x0 + σ·ε; its ε and x0 by leaf."""
    forest = grow(P.ode(6, 3), ODE(), linear(6, 2.0), keep="all", prompts=1)
    start = forest.nodes[forest.edges.parent[forest.edges.step == 0]]
    return forest, start, X0.double().expand_as(start)


def test_l1rel_of_a_straight_path_has_a_closed_form() -> None:
    """‖x' − x‖₁ / ‖x‖₁ = Δ·‖ε − x0‖₁ / ‖(1−σ)x0 + σε‖₁."""
    forest, noise, x0 = straight()
    sigma = linear(6, 2.0).sigmas.double()
    got, edges = RelativeChange()(forest, NO_MEDIA), forest.edges
    for e in range(len(edges)):
        i, n = int(edges.step[e]), int(edges.root[e])
        x = (1 - sigma[i]) * x0[n] + sigma[i] * noise[n]
        want = (sigma[i] - sigma[i + 1]) * (noise[n] - x0[n]).abs().sum() / x.abs().sum()
        assert float(got[e]) == pytest.approx(float(want), rel=1e-5)


def test_progress_of_a_straight_path_is_monotone_and_adds_up() -> None:
    forest, noise, x0 = straight()
    got, edges = Progress()(forest, NO_MEDIA), forest.edges
    cosine = torch.nn.functional.cosine_similarity(noise.flatten(1), x0.flatten(1))
    for n in range(3):
        d = got[edges.root == n]
        assert bool((d > 0).all())
        assert float(d.sum()) == pytest.approx(1 - float(cosine[n]), rel=1e-5)
    with_weights = with_traits(forest, {"progress": got})
    w = StepCredit(GroupZScore(), floor=1e-6).shares(with_weights)
    d = got.view(6, 3)
    torch.testing.assert_close(w.view(6, 3) / w.view(6, 3)[:1], d / d[:1], rtol=1e-3, atol=0)


def test_progress_against_numpy_on_noisy_chains() -> None:
    got, edges = Progress()(FOREST, NO_MEDIA), FOREST.edges
    assert got.dtype == torch.float64 and got.shape == (len(edges),)
    flat = FOREST.nodes.flatten(1).numpy()
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    leaf = leaf_of(FOREST)
    for e in range(0, len(edges), 5):
        end = flat[FOREST.leaves.node[leaf[e]]]
        want = cos(flat[edges.child[e]], end) - cos(flat[edges.parent[e]], end)
        assert float(got[e]) == pytest.approx(want, abs=1e-6)


def test_observations_need_leaf_latents_and_progress_needs_chains() -> None:
    with pytest.raises(ValueError, match="forest: leaf latents were dropped"):
        Progress()(grow(P.chain(6, 2, stochastic=[0])).drop_leaf_states(), NO_MEDIA)
    with pytest.raises(ValueError, match="forest: 2 leaves descend from edge 0"):
        Progress()(grow(P.tree(6, 1, {1: 2})), NO_MEDIA)
    assert len(RelativeChange()(grow(P.tree(6, 1, {1: 2})), NO_MEDIA)) > 0
    assert (Progress().of, RelativeChange().of) == ("edge", "edge")


# ------------------------------------------------------------------------------------------------------ step credit
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), floor=st.floats(1e-4, 10))
def test_step_weights_are_positive_with_mean_one_on_every_path(seed: int, floor: float) -> None:
    d = torch.randn(len(FOREST.edges), generator=torch.Generator().manual_seed(seed))
    w = StepCredit(GroupZScore(), floor=floor).shares(with_traits(FOREST, {"progress": d}))
    leaf, trained = leaf_of(FOREST), FOREST.edges.trained
    assert bool((w > 0).all())
    for n in range(len(FOREST.leaves)):
        mine = (leaf == n) & trained
        assert float(w[mine].mean()) == pytest.approx(1, abs=1e-9)
        want = d[mine].double().clamp(min=0) + floor
        torch.testing.assert_close(w[mine], want * len(want) / want.sum())


def test_step_credit_multiplies_the_inner_advantage_and_keeps_the_rest() -> None:
    d = torch.rand(len(FOREST.edges), generator=torch.Generator().manual_seed(5))
    forest, inner = with_traits(FOREST, {"progress": d}), GroupZScore(eps=0.0)
    credit, s = StepCredit(inner, floor=0.1), random_scores(FOREST)
    plain, got = inner(s, forest), credit(s, forest)
    torch.testing.assert_close(got.value.double(), plain.value.double() * credit.shares(forest), rtol=1e-6, atol=1e-7)
    assert torch.equal(got.live, plain.live) and torch.equal(got.ok, plain.ok) and got.value.dtype == torch.float32
    assert float((got.value - plain.value).abs().max()) > 0.1


def test_a_large_floor_is_the_inner_credit() -> None:
    forest = with_traits(FOREST, {"progress": torch.rand(len(FOREST.edges))})
    inner, s = GroupZScore(), random_scores(FOREST)
    torch.testing.assert_close(StepCredit(inner, floor=1e9)(s, forest).value, inner(s, forest).value, rtol=1e-6, atol=0)


def test_a_broken_path_gives_0_and_leaves_the_others_alone() -> None:
    d = torch.rand(len(FOREST.edges), generator=torch.Generator().manual_seed(6))
    leaf = leaf_of(FOREST)
    broken = torch.where(leaf == 1, torch.nan, d)
    ok = torch.ones(len(FOREST.leaves), 1, dtype=torch.bool)
    ok[1] = False
    s = scores(FOREST, torch.arange(8.0), ok=ok)
    want = StepCredit(GroupZScore())(s, with_traits(FOREST, {"progress": d})).value
    got = StepCredit(GroupZScore())(s, with_traits(FOREST, {"progress": broken})).value
    assert torch.equal(got, want) and bool((got[leaf == 1] == 0).all()) and float(got.abs().max()) > 0.5


# ----------------------------------------------------------------------------------------------------------- min-norm
NUMBERS = st.floats(-3, 3).map(lambda x: round(x, 6))


def brute(a: np.ndarray) -> float:
    """The fused advantage Σ c·a of least size over a grid of the simplex."""
    c1, c2 = np.meshgrid(np.linspace(0, 1, 401), np.linspace(0, 1, 401))
    inside = c1 + c2 <= 1
    fused = c1 * a[0] + c2 * a[1] + (1 - c1 - c2) * a[2]
    return float(fused[inside][np.abs(fused[inside]).argmin()])


@settings(deadline=None, max_examples=60)
@given(a=st.lists(NUMBERS, min_size=3, max_size=3))
def test_min_norm_against_a_search_of_the_simplex(a: list[float]) -> None:
    got = nearest_to_zero(torch.tensor(a, dtype=torch.float64)[:, None], torch.ones(3, 1, dtype=torch.bool))
    assert float(got) == pytest.approx(brute(np.array(a)), abs=0.02)


@settings(deadline=None, max_examples=60)
@given(a=NUMBERS, b=NUMBERS)
def test_two_objectives_closed_form(a: float, b: float) -> None:
    """One sign: all weight on the smaller; two: c_1 = |A_2|/(|A_1|+|A_2|), which gives 0."""
    got = float(nearest_to_zero(torch.tensor([[a], [b]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool)))
    if a * b > 0:
        assert got == min(a, b, key=abs)
    else:
        total = abs(a) + abs(b)
        c = abs(b) / total if total else 0.5
        assert got == 0 == pytest.approx(c * a + (1 - c) * b, abs=1e-12)


def test_min_norm_of_two_rewards_through_the_credit() -> None:
    inner, s = GroupZScore(eps=0.0), random_scores(FOREST, 2)
    one, two = (inner.weighted({name: 1.0})(s, FOREST).value for name in "ab")
    same = one * two > 0
    smaller = torch.where(one.abs() < two.abs(), one, two)
    got = MinNorm(inner, 0.0)(s, FOREST)
    torch.testing.assert_close(got.value, torch.where(same, smaller, torch.zeros(())), rtol=1e-6, atol=1e-7)
    assert torch.equal(got.live, same) and 0 < int(same.sum()) < len(same) and bool(got.ok.all())
    mixed = MinNorm(inner, 0.25)(s, FOREST)
    torch.testing.assert_close(mixed.value, 0.75 * got.value + 0.125 * (one + two), rtol=1e-5, atol=1e-7)
    assert bool(mixed.live.all())


def test_exploring_all_the_way_is_the_weighted_average() -> None:
    s = random_scores(FOREST, 3)
    inner = GroupZScore(reward_weights={"a": 2.0, "b": -1.0, "c": 0.0})
    a, b = (GroupZScore(reward_weights={n: w})(s, FOREST).value for n, w in (("a", 1.0), ("b", -1.0)))
    got = MinNorm(inner, 1.0)(s, FOREST).value
    torch.testing.assert_close(got, (2 * a + b) / 3, rtol=1e-5, atol=1e-7)
    even = MinNorm(GroupZScore(), 1.0)(s, FOREST).value
    each = [GroupZScore(reward_weights={n: 1.0})(s, FOREST).value for n in "abc"]
    torch.testing.assert_close(even, sum(each) / 3, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("explore", [0.0, 0.2, 1.0])
def test_one_objective_is_the_inner_credit(explore: float) -> None:
    inner, s = GroupZScore(), random_scores(FOREST)
    want, got = inner(s, FOREST), MinNorm(inner, explore)(s, FOREST)
    torch.testing.assert_close(got.value, want.value, rtol=1e-6, atol=0)
    assert torch.equal(got.live, want.live)


def test_a_saturated_objective_does_not_silence_the_others() -> None:
    s = scores(FOREST, torch.arange(8.0), torch.ones(8))
    got, want = MinNorm(GroupZScore(), 0.0)(s, FOREST), GroupZScore(reward_weights={"a": 1.0})(s, FOREST)
    torch.testing.assert_close(got.value, want.value, rtol=1e-6, atol=0)
    assert torch.equal(got.live, want.live)
    flat = MinNorm(GroupZScore(), 0.5)(scores(FOREST, torch.ones(8), torch.zeros(8)), FOREST)
    assert not bool(flat.live.any()) and bool((flat.value == 0).all()) and bool(flat.ok.all())


def test_a_leaf_that_lacks_one_objective_takes_no_part_in_any() -> None:
    ok = torch.ones(8, 2, dtype=torch.bool)
    ok[2, 1] = False
    value = torch.randn(2, 8, generator=torch.Generator().manual_seed(8))
    missing = MinNorm(GroupZScore(), 0.3)(scores(FOREST, *value, ok=ok), FOREST)
    assert torch.equal(~missing.ok, leaf_of(FOREST) == 2) and bool((missing.value[~missing.ok] == 0).all())
    loud = value.clone()
    loud[0, 2] = 1e6
    assert torch.equal(MinNorm(GroupZScore(), 0.3)(scores(FOREST, *loud, ok=ok), FOREST).value, missing.value)


# ---------------------------------------------------------------------------------------------------------------- maps
def test_mapped_gives_every_edge_its_leafs_map() -> None:
    maps = torch.rand(8, 3, 3, generator=torch.Generator().manual_seed(4))
    forest, inner, s = with_traits(FOREST, leaves={"map": maps}), GroupZScore(), random_scores(FOREST)
    got, plain = Mapped(inner)(s, forest), inner(s, forest)
    edges = FOREST.edges
    assert torch.equal(got.columns["map"], maps[edges.prompt * 4 + edges.root])
    assert torch.equal(got.value, plain.value) and torch.equal(got.live, plain.live)


# ----------------------------------------------------------------------------------------------------------- wrapping
WRAPPERS = [lambda inner: StepCredit(inner), lambda inner: MinNorm(inner), lambda inner: Mapped(inner)]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_hand_weights_and_groups_on(wrap) -> None:
    inner = GroupZScore(by=("prompt",), reward_weights={"a": 1.0})
    credit = wrap(inner)
    assert credit.reward_weights == {"a": 1.0}
    assert credit.weighted({"b": 2.0}) == wrap(replace(inner, reward_weights={"b": 2.0}))
    assert torch.equal(credit.groups(FOREST.edges), inner.groups(FOREST.edges))
    nested = StepCredit(credit).weighted(None)
    assert nested.reward_weights is None


def test_errors_name_the_field() -> None:
    s = random_scores(FOREST)
    for floor in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=r"floor: .* must be finite and above 0"):
            StepCredit(GroupZScore(), floor=floor)
    for explore, nearest in ((-0.1, "0.0"), (1.5, "1.0")):
        with pytest.raises(ValueError, match=rf"explore: .* must be in \[0, 1\]; nearest valid: {nearest}"):
            MinNorm(GroupZScore(), explore)
    with pytest.raises(
        ValueError, match=r"trait: edges have no 'progress' \(there: none\); list its observation in Algorithm\.observe"
    ):
        StepCredit(GroupZScore())(s, FOREST)
    with pytest.raises(ValueError, match=r"trait: 'progress' has shape \[3\]; nearest valid: \[48\]"):
        StepCredit(GroupZScore())(s, with_traits(FOREST, {"progress": torch.ones(3)}))
    with pytest.raises(ValueError, match="trait: leaves have no 'map'"):
        Mapped(GroupZScore())(s, FOREST)
