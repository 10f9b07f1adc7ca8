"""A reward that raises, hangs or writes into what it is given: its own scores fail, and nothing else."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import RewardError, faults, from_function, safe, score_all
from tempflow.rewards.safe import Fault, SafeReward

MEDIA = torch.arange(4, dtype=torch.uint8)[:, None, None, None].repeat(1, 2, 2, 3)
PROMPTS = ["a", "b", "c", "c"]
META: list[dict[str, object]] = [{"tags": ["x"]} for _ in PROMPTS]
SLOTS = [0, 1, 2, 2]


class Own:
    """A reward of the pictures' values; `act` comes first and is given what it was given."""

    def __init__(self, act: Callable[..., Any], columns: tuple[str, ...] = ("own",), groupwise: bool = False) -> None:
        self.act, self.columns, self.name, self.groupwise = act, columns, "own", groupwise
        self.calls: list[list[str]] = []

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        self.calls.append(list(prompts))
        value = media.pictures()[:, 0, 0, :1].float().expand(-1, len(self.columns)).clone()
        self.act(media, prompts, metadata)
        return Scores(value, torch.ones_like(value, dtype=torch.bool), self.columns)


def nothing(*given: object) -> None:
    pass


def fails(*given: object) -> None:
    raise KeyError("style")


def fails_for(prompt: str) -> Callable[..., None]:
    def act(media: Media, prompts: Sequence[str], metadata: object) -> None:
        if prompt in prompts:
            raise KeyError(prompt)

    return act


def score(*rewards: Any, **how: Any) -> Scores:
    return score_all(rewards, MEDIA, PROMPTS, META, SLOTS, **how)


def test_an_exception_fails_all_rows_and_no_other_reward(caplog: pytest.LogCaptureFixture) -> None:
    scores = score(Own(fails), from_function(lambda images, prompts: [1.0] * len(images), name="other"))
    assert scores.names == ("own", "other") and scores.ok.tolist() == [[False, True]] * 4
    assert scores.value[:, 0].isnan().all()
    assert "reward 'own' raised KeyError: 'style'; its 4 scores are failed" in caplog.text


def test_a_kind_of_exception_is_told_once_and_the_last_one_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    errors = iter([KeyError("one"), KeyError("two"), ValueError("three")])

    def act(*given: object) -> None:
        raise next(errors)

    reward = safe(Own(act))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not reward.score(MEDIA, PROMPTS, META).ok.any()
    told = [(r.getMessage().split(";")[0], bool(r.exc_info)) for r in caplog.records]
    assert told == [("reward 'own' raised KeyError: 'one'", True), ("reward 'own' raised ValueError: three", True)]
    assert faults([reward, Own(nothing)]) == ["reward 'own' raised ValueError: three"]


def test_a_prompt_that_cannot_be_scored_does_not_cost_the_others_theirs() -> None:
    reward = Own(fails_for("c"))
    scores = score(reward)
    assert scores.ok.flatten().tolist() == [True, True, False, False]
    assert scores.value.flatten()[:2].tolist() == [0.0, 1.0]
    assert reward.calls == [PROMPTS, ["a"], ["b"], ["c", "c"]]


def test_a_groupwise_reward_is_called_by_slot_only() -> None:
    reward = Own(fails_for("a"), groupwise=True)
    assert score(reward).ok.flatten().tolist() == [False, True, True, True]
    assert reward.calls == [["a"], ["b"], ["c", "c"]]


def test_a_mistake_in_the_answer_is_still_an_error() -> None:
    with pytest.raises(RewardError, match="returned 3 scores; expected 4"):
        score(from_function(lambda images, prompts: [1.0] * 3))


def test_what_is_no_exception_passes() -> None:
    def act(*given: object) -> None:
        raise KeyboardInterrupt

    for timeout in (None, 5.0):
        with pytest.raises(KeyboardInterrupt):
            score(Own(act), timeout=timeout)


def test_a_reward_changes_nothing_that_others_see() -> None:
    def spoil(media: Media, prompts: Any, metadata: Any) -> None:
        media.frames.zero_()
        prompts.clear()
        for line in metadata:
            line["tags"].clear()
        metadata.clear()

    def draw(images: list[Any], prompts: list[str]) -> list[float]:
        values = [float(i.getpixel((0, 0))[0]) for i in images]
        for image in images:
            image.paste((9, 9, 9), (0, 0, 2, 2))
        images.clear()
        prompts.clear()
        return values

    kept = MEDIA.clone()
    scores = score(Own(spoil), from_function(draw, name="draw"), safe(Own(nothing, ("last",))))
    assert scores.value.tolist() == [[float(i)] * 3 for i in range(4)]
    assert torch.equal(kept, MEDIA) and PROMPTS == ["a", "b", "c", "c"] and META == [{"tags": ["x"]}] * 4


def test_what_is_no_picture_is_not_scored() -> None:
    reward = Own(nothing)
    scores = score(reward, ok=torch.tensor([True, False, True, False]))
    assert reward.calls == [["a", "c"]]
    assert scores.ok.flatten().tolist() == [True, False, True, False] and scores.value[2] == 2.0
    assert not score(reward, ok=torch.zeros(4, dtype=torch.bool)).ok.any() and len(reward.calls) == 1
    with pytest.raises(ValueError, match="ok has 3 entries for 4 media"):
        score(reward, ok=torch.ones(3, dtype=torch.bool))


def test_a_failure_has_the_columns_that_the_reward_has() -> None:
    act = [nothing, fails, nothing]
    reward = safe(Own(lambda *given: act.pop()(*given), ("one", "two")))
    parts = [reward.score(MEDIA, PROMPTS, META) for _ in range(3)]
    assert Scores.cat(parts).ok[:, 0].tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_columns_that_change_are_a_mistake() -> None:
    reward = Own(nothing, groupwise=True)
    reward.act = lambda *given: setattr(reward, "columns", ("own",) if len(reward.calls) == 1 else ("else",))
    with pytest.raises(RewardError, match=r"returned columns \('own',\), then \('else',\)"):
        score(reward)


# ----------------------------------------------------------------------------------------------------------- patience
class Hang:
    """Waits until it is let go; counts how many calls go on at once."""

    def __init__(self) -> None:
        self.go, self.now, self.most = threading.Event(), 0, 0

    def __call__(self, *given: object) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.go.wait(10)
        self.now -= 1


def test_a_call_that_takes_too_long_is_failed_and_not_made_again(caplog: pytest.LogCaptureFixture) -> None:
    hang = Hang()
    reward = safe(Own(hang), timeout=0.1)
    started = time.monotonic()
    assert not score(reward).ok.any()
    assert time.monotonic() - started < 2
    assert "reward 'own' took longer than 0.1 s; its 4 scores are failed" in caplog.text
    assert not score(reward).ok.any() and hang.most == 1  # the first call still goes on: no second one beside it
    hang.go.set()
    assert score(reward).ok.all()
    hang.go.set()


def test_in_time_nothing_differs() -> None:
    assert torch.equal(score(Own(nothing), timeout=20.0).value, score(Own(nothing)).value)
    assert safe(Own(nothing), timeout=20.0).attempt(MEDIA, PROMPTS, META)
    late = safe(Own(fails), timeout=20.0).attempt(MEDIA, PROMPTS, META)
    assert late == Fault("reward 'own' raised KeyError: 'style'")


def test_the_run_may_be_left_while_a_reward_hangs() -> None:
    class Left(Exception):
        pass

    def pause() -> None:
        raise Left

    hang = Hang()
    started = time.monotonic()
    with pytest.raises(Left):
        score(safe(Own(hang), timeout=30.0), pause=pause)
    assert time.monotonic() - started < 2
    hang.go.set()


def test_without_a_timeout_the_caller_calls() -> None:
    seen: list[object] = []
    act = lambda *given: seen.append(threading.current_thread())  # noqa: E731
    score(Own(act))
    score(Own(act), timeout=5.0)
    assert seen[0] is threading.main_thread() and isinstance(seen[1], threading.Thread) and seen[1].daemon


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout: .* s for reward 'own'; nearest valid: 60.0, or None"):
        safe(Own(nothing), timeout)


def test_patience_is_not_stacked() -> None:
    reward = Own(nothing)
    once = safe(reward, 3.0)
    assert safe(once) is once and once.name == "own" and once.groupwise is False
    other = safe(once, 4.0)
    assert isinstance(other, SafeReward) and other.reward is reward and other.timeout == 4.0
    assert from_function(lambda images, prompts: [0.0], timeout=2.0).timeout == 2.0
