"""Advantages by stream: which rewards count for which, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from tempflow.core import plan
from tempflow.core.credit import (
    Advantage,
    AsScored,
    BestPath,
    DynamicSampling,
    Extremes,
    FromLeaves,
    GroupZScore,
    Mapped,
    PerReward,
    PerStream,
    Standing,
    StepCredit,
)
from tempflow.core.forest import Forest
from tempflow.core.rollout import skeleton
from tempflow.core.scores import Scores

NAMES = ("look", "sync", "voice")
STREAMS = ("video", "sound")
OWNERS = {"look": "video", "voice": "sound"}


def forest(prompts: int = 2) -> Forest:
    return skeleton([plan.chain(3, 4)] * prompts, range(prompts))


def scores(seed: int = 0, prompts: int = 2) -> Scores:
    value = torch.randn(4 * prompts, 3, generator=torch.Generator().manual_seed(seed))
    return Scores(value, torch.ones(4 * prompts, 3, dtype=torch.bool), NAMES)


def test_a_stream_has_its_own_rewards_and_those_of_none() -> None:
    inner = GroupZScore()
    found = PerStream(inner, STREAMS, OWNERS)(scores(), forest())
    video = inner.weighted({"look": 1.0, "sync": 1.0})(scores(), forest())
    sound = inner.weighted({"voice": 1.0, "sync": 1.0})(scores(), forest())
    assert found.streams == STREAMS and found.value.shape == (24, 2)
    assert torch.equal(found.value, torch.stack([video.value, sound.value], 1))
    assert torch.equal(found.ok, video.ok) and bool(found.live.all())
    torch.testing.assert_close(found.flat(found.value), (video.value + sound.value) / 2)
    weighted = PerStream(inner, STREAMS, OWNERS).weighted({"look": 2.0, "voice": 1.0, "sync": 0.5})(scores(), forest())
    assert torch.equal(weighted.value[:, 0], inner.weighted({"look": 2.0, "sync": 0.5})(scores(), forest()).value)


def test_a_reward_moves_its_own_stream_alone() -> None:
    other = scores()
    value = other.value.clone()
    value[:, 0] = value[:, 0].flip(0)
    changed = Scores(value, other.ok, NAMES)
    rule = PerStream(GroupZScore(), STREAMS, OWNERS)
    before, after = (rule(s, forest()).value for s in (other, changed))
    assert torch.equal(before[:, 1], after[:, 1]) and not torch.equal(before[:, 0], after[:, 0])


def test_a_stream_without_rewards_learns_nothing() -> None:
    rule = PerStream(GroupZScore(), STREAMS, dict.fromkeys(NAMES, "video"))
    found = rule(scores(), forest())
    assert bool((found.value[:, 1] == 0).all()) and bool((found.value[:, 0] != 0).any()) and bool(found.live.all())


def test_a_failed_reward_leaves_the_leaf_out_of_all_streams() -> None:
    ok = torch.ones(8, 3, dtype=torch.bool)
    ok[2, 0] = False
    given = Scores(scores().value, ok, NAMES)
    found = PerStream(GroupZScore(), STREAMS, OWNERS)(given, forest())
    lost = torch.zeros(24, dtype=torch.bool)
    lost[forest().descent[0][forest().descent[1] == 2]] = True
    assert torch.equal(~found.ok, lost) and bool((found.value[lost] == 0).all())
    assert math.isfinite(float(found.value.sum()))


def test_columns_of_edges_come_by_stream() -> None:
    found = PerStream(Standing(GroupZScore()), STREAMS, OWNERS)(scores(), forest())
    assert torch.equal(found.columns["standing"], found.value.clamp(-1, 1))


def test_prompts_that_any_stream_keeps_are_kept() -> None:
    value = scores().value.clone()
    value[:4, 0] = value[0, 0]  # look has no spread at prompt 0
    value[:, 1] = 0.0
    value[4:, 2] = value[4, 2]  # nor has voice at prompt 1
    given = Scores(value, torch.ones(8, 3, dtype=torch.bool), NAMES)
    found = PerStream(DynamicSampling(GroupZScore()), STREAMS, OWNERS)(given, forest())
    slot = forest().edges.prompt
    assert bool(found.ok.all())
    assert bool((found.value[slot == 0, 0] == 0).all()) and bool((found.value[slot == 1, 1] == 0).all())


def test_the_pool_is_that_of_all_streams() -> None:
    value = torch.zeros(12, 3)
    value[4:8, 2] = torch.arange(4.0)  # prompt 0 has no spread, prompt 1 one for the sound alone, prompt 2 for both
    value[8:] = torch.arange(12.0).view(4, 3)
    given, grown = Scores(value, torch.ones(12, 3, dtype=torch.bool), NAMES), forest(3)
    found = PerStream(DynamicSampling(Standing(GroupZScore())), STREAMS, OWNERS)(given, grown)
    whole = PerStream(Standing(GroupZScore()), STREAMS, OWNERS)(given, grown)
    pool, slot = found.pool, grown.edges.prompt
    assert pool is not None and pool.streams == STREAMS and pool.pool is None
    assert torch.equal(pool.value, whole.value) and torch.equal(pool.columns["standing"], whole.columns["standing"])
    assert bool(pool.ok.all()) and torch.equal(pool.live, slot > 0)
    assert torch.equal(found.ok, slot > 0) and torch.equal(found.live, slot > 0)
    alone = PerStream(DynamicSampling(GroupZScore()), ("none", *STREAMS), OWNERS)(given, grown).pool
    assert alone is not None and bool((alone.value[:, 1] == whole.value[:, 0]).all())
    silent = PerStream(DynamicSampling(GroupZScore()), STREAMS, dict.fromkeys(NAMES, "sound"))(given, grown).pool
    assert silent is not None and bool((silent.value[:, 0] == 0).all())


def test_maps_of_edges_must_be_those_of_all_streams() -> None:
    grown = forest()
    seen = replace(grown, leaves=replace(grown.leaves, traits={"map": torch.rand(8, 2, 2)}))
    found = PerStream(Mapped(GroupZScore()), STREAMS, OWNERS)(scores(), seen)
    assert torch.equal(found.columns["map"], Mapped(GroupZScore())(scores(), seen).columns["map"])

    @dataclass(frozen=True)
    class Own(Mapped):
        def __call__(self, scores: Scores, forest: Forest) -> Advantage:
            given = super().__call__(scores, forest)
            return replace(given, columns={"map": given.columns["map"] * given.value[:, None, None]})

    with pytest.raises(ValueError, match=r"columns: 'map' has shape \[24, 2, 2\] and differs by stream; nearest valid"):
        PerStream(Own(GroupZScore()), STREAMS, OWNERS)(scores(), seen)


def test_faults() -> None:
    with pytest.raises(ValueError, match=r"streams: .* must be distinct"):
        PerStream(AsScored(), ("a", "a"))
    with pytest.raises(ValueError, match="must be distinct, one at least"):
        PerStream(AsScored(), ())
    with pytest.raises(
        ValueError, match=r"rewards\['look'\]: 'smell' is no stream; nearest valid: one of video, sound"
    ):
        PerStream(AsScored(), STREAMS, {"look": "smell"})
    with pytest.raises(ValueError, match="rewards: 'taste' is no reward; nearest valid: one of look, sync, voice"):
        PerStream(AsScored(), STREAMS, {"taste": "video"})(scores(), forest())
    assert Standing(BestPath(GroupZScore())).peers and not Standing(GroupZScore()).peers and not AsScored().peers
    for inner in (BestPath(GroupZScore()), Standing(BestPath(GroupZScore()))):
        with pytest.raises(ValueError, match="inner: points to the best path"):
            PerStream(inner, STREAMS, OWNERS)


@pytest.mark.parametrize("outer", [PerReward, DynamicSampling, FromLeaves, Standing, StepCredit, BestPath])
def test_it_is_the_outermost(outer: type) -> None:
    with pytest.raises(ValueError, match=f"nearest valid: PerStream around {outer.__name__}"):
        outer(PerStream(GroupZScore(), STREAMS, OWNERS))
    with pytest.raises(ValueError, match="nearest valid: PerStream around Extremes"):
        Extremes(PerStream(GroupZScore(), STREAMS, OWNERS), 1, 1)
