"""Rewards by name, entry points, and scoring by several rewards at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tempflow.rewards as rewards
from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import REWARDS, Reward, RewardError, build, from_function, score_all
from tempflow.rewards.jpeg_compressibility import JPEGCompressibility
from tempflow.rewards.options import options_of
from tempflow.rewards.protocol import check


def media(count: int) -> Tensor:
    """Picture i is filled with the value i."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 2, 3)


def of(prompts: Sequence[str]) -> list[dict[str, object]]:
    return [{"row": i} for i in range(len(prompts))]


@dataclass
class Rank:
    """Groupwise: a picture's rank in its group, first best; keeps what it was called with."""

    calls: list[tuple[list[int], list[str], list[object]]]
    name: str = "rank"
    groupwise: bool = True

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        values = media.pictures()[:, 0, 0, 0].tolist()
        self.calls.append((values, list(prompts), [m["row"] for m in metadata]))
        rank = torch.tensor([-float(sorted(values).index(v)) for v in values])[:, None]
        return Scores(rank, torch.ones_like(rank, dtype=torch.bool), ("rank",))


class Constant:
    """Returns whatever it was made with."""

    groupwise = False

    def __init__(self, result: object, name: str = "constant") -> None:
        self.result, self.name = result, name

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        return self.result  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------- by name
ASKED = {"url": "http://127.0.0.1:1/v1", "model": "m", "template": "unified_1", "path": "x"}
"""What must be said of some rewards: where their weights lie, or whom they ask. Nothing is loaded or asked."""


@pytest.mark.parametrize("name", REWARDS)
def test_every_shipped_reward_is_built_under_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPFLOW_REWARD_TOKEN", "t" * 32)
    fields = options_of(REWARDS[name]).model_fields
    options = {option: ASKED[option] for option, field in fields.items() if field.is_required()}
    options |= {"template": "unified_1_pairs"} if name == "judge_pairs" else {}
    reward = build(name, options=options)
    assert isinstance(reward, Reward) and reward.name == name and reward.groupwise is (name == "judge_pairs")


@pytest.mark.parametrize(
    ("name", "meant"), [("shape", "shapes"), ("shapes-strict", "shapes_strict"), ("jpeg", "jpeg_compressibility")]
)
def test_unknown_name_did_you_mean(name: str, meant: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"reward: '{name}' is unknown; did you mean '{meant}'\? Known: .*jpeg_compressibility, .*shapes, ",
    ):
        build(name)


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    points = EntryPoints(EntryPoint(n, v, "tempflow.rewards") for n, v in values.items())
    monkeypatch.setattr(rewards, "entry_points", lambda group: points.select(group=group))


def test_installed_packages_add_rewards_but_never_replace_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, theirs="tempflow.rewards.jpeg_compressibility:JPEGCompressibility", shapes="nowhere:Missing")
    assert isinstance(build("theirs"), JPEGCompressibility)
    assert build("shapes").name == "shapes"
    assert rewards.names() == (*REWARDS, "theirs")
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        build("their")


def test_an_entry_point_that_makes_no_reward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, theirs="collections:Counter")
    with pytest.raises(RewardError, match=r"reward 'theirs' is a Counter; expected an object"):
        build("theirs")


# --------------------------------------------------------------------------------------------------------- score_all
def test_columns_in_order_and_a_failure_stays_in_its_cell() -> None:
    first = from_function(lambda images, prompts: [float(i.getpixel((0, 0))[0]) for i in images], name="first")  # type: ignore[index]
    second = from_function(lambda images, prompts: [None, 5.0, 6.0], name="second")
    scores = score_all([first, second], media(3), ["a", "a", "b"], of("aab"), groups=[0, 0, 1])
    assert scores.names == ("first", "second")
    assert scores.value[:, 0].tolist() == [0.0, 1.0, 2.0] and scores.value[1:, 1].tolist() == [5.0, 6.0]
    assert scores.ok.tolist() == [[True, False], [True, True], [True, True]]


@given(st.lists(st.integers(0, 4), max_size=12))
def test_groupwise_rewards_see_each_slot_once_and_whole(groups: list[int]) -> None:
    """Also where a slot's media do not lie together, and where two slots have the same prompt."""
    reward, prompts = Rank([]), ["same" for _ in groups]
    scores = score_all([reward], media(len(groups)), prompts, of(prompts), groups)
    by_slot = {g: [i for i, h in enumerate(groups) if h == g] for g in groups}
    if groups:
        assert sorted(values for values, _, _ in reward.calls) == sorted(by_slot.values())
    assert all(rows == values for values, _, rows in reward.calls)
    expected = [-float(by_slot[g].index(i)) for i, g in enumerate(groups)]
    assert scores.value.flatten().tolist() == expected and len(scores) == len(groups)


def test_groupwise_and_pointwise_together() -> None:
    reward = Rank([])
    prompts = ["a", "b", "a", "b"]
    scores = score_all([JPEGCompressibility(), reward], media(4), prompts, of(prompts), groups=[7, 3, 7, 3])
    assert scores.names == ("jpeg_compressibility", "rank")
    assert [(v, p) for v, p, _ in reward.calls] == [([0, 2], ["a", "a"]), ([1, 3], ["b", "b"])]
    assert scores.value[:, 1].tolist() == [0.0, 0.0, -1.0, -1.0]


def test_a_groupwise_function_is_called_per_slot() -> None:
    reward = from_function(lambda images, prompts: [float(len(images))] * len(images), name="n", groupwise=True)
    assert score_all([reward], media(3), ["a", "b", "b"], of("abb"), [0, 1, 1]).value.flatten().tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"reward 'constant' returned a NoneType; expected tempflow\.core\.scores\.Scores"),
        (torch.zeros(2), r"reward 'constant' returned a Tensor"),
        (Scores(torch.zeros(3, 1), torch.ones(3, 1).bool(), ("x",)), r"reward 'constant' returned 3 rows; expected 2"),
    ],
)
def test_a_reward_that_breaks_the_protocol_is_named(result: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_all([Constant(result)], media(2), ["a", "b"], of("ab"), [0, 1])


def test_check_returns_what_is_right() -> None:
    scores = Scores(torch.zeros(2, 1), torch.ones(2, 1).bool(), ("x",))
    assert check(scores, 2, "x") is scores
    with pytest.raises(RewardError, match="scores on meta; expected cpu"):
        check(_elsewhere(scores), 2, "x")


def _elsewhere(scores: Scores) -> Scores:
    moved = object.__new__(Scores)
    for field, value in (("value", scores.value.to("meta")), ("ok", scores.ok.to("meta")), ("names", scores.names)):
        object.__setattr__(moved, field, value)
    return moved


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match=r"rewards = \[\]: nothing to score by"):
        score_all([], media(1), ["a"], of("a"), [0])
    with pytest.raises(ValueError, match=r"groups has 1 entries for 2 media; nearest valid: 2"):
        score_all([JPEGCompressibility()], media(2), ["a", "b"], of("ab"), [0])
    with pytest.raises(ValueError, match=r"prompts has 1 entries for 2 media; nearest valid: 2"):
        score_all([JPEGCompressibility()], media(2), ["a"], of("ab"), [0, 1])
    with pytest.raises(ValueError, match=r"at least one name, all distinct"):
        score_all([JPEGCompressibility(), JPEGCompressibility()], media(1), ["a"], of("a"), [0])
