"""Requests that share a call of the reward, and those that must not."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards.safe import SafeReward
from tempflow.serve.batch import Batcher, Job, Scored, Stopped


class Numbers:
    """A score is the number in the prompt; "raise" raises, "blank" cannot be scored. `open` holds calls back."""

    name = "numbers"

    def __init__(self, groupwise: bool = False) -> None:
        self.groupwise = groupwise
        self.calls: list[list[str]] = []
        self.open, self.busy = threading.Event(), threading.Event()
        self.open.set()

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        self.calls.append([*prompts])
        self.busy.set()
        assert self.open.wait(20)
        assert [int(m) for m in media.frames[:, 0, 0, 0, 0]] == [m["n"] for m in metadata]
        for text in prompts:
            if text.startswith("raise"):
                raise RuntimeError(text)
            if text.startswith("exit"):
                raise SystemExit(3)
        value = torch.tensor([float("nan") if text == "blank" else float(text) for text in prompts])[:, None]
        rows = 1 if "short" in str(metadata[0].get("how")) else len(prompts)
        return Scores(value[:rows], value[:rows].isfinite(), (self.name,))


def job(*prompts: str, height: int = 2, how: str = "") -> Job:
    pixels = torch.zeros((len(prompts), height, 2, 3), dtype=torch.uint8)
    numbers = [n + 1 for n in range(len(prompts))]
    pixels[:] = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None]
    return Job(Media.of(pixels), prompts, [{"n": n, "how": how} for n in numbers])


@pytest.fixture
def made() -> Iterator[Any]:
    batchers: list[Batcher] = []

    def make(reward: Numbers, rows: int = 4, latency: float = 0.0, timeout: float | None = None) -> Batcher:
        batchers.append(Batcher(SafeReward(reward, timeout), rows, latency))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.stop()


def said(scored: Scored) -> list[float | None]:
    return [
        v if ok else None
        for v, ok in zip(scored.scores.value[:, 0].tolist(), scored.scores.ok[:, 0].tolist(), strict=True)
    ]


def held(make: Any, reward: Numbers, jobs: Sequence[Job], **how: Any) -> list[Scored]:
    """Answers of jobs that all wait while another one is at work."""
    batcher = make(reward, **how)
    reward.open.clear()
    first = batcher.submit(job("0"))
    assert reward.busy.wait(20)
    answers = [batcher.submit(one) for one in jobs]
    reward.open.set()
    first.result(20)
    return [answer.result(20) for answer in answers]


def test_rows_of_several_requests_are_one_call(made: Any) -> None:
    reward = Numbers()
    found = held(made, reward, [job("1"), job("2", "3"), job("4"), job("5")])
    assert [said(one) for one in found] == [[1.0], [2.0, 3.0], [4.0], [5.0]]
    assert reward.calls == [["0"], ["1", "2", "3", "4"], ["5"]]


def test_a_request_waits_for_others_as_long_as_is_said(made: Any) -> None:
    reward = Numbers()
    batcher = made(reward, rows=2, latency=20.0)
    first = batcher.submit(job("1"))
    second = batcher.submit(job("2"))  # fills the call, which then does not wait
    assert said(first.result(10)) == [1.0] and said(second.result(10)) == [2.0] and reward.calls == [["1", "2"]]


def test_media_of_different_sizes_are_different_calls(made: Any) -> None:
    reward = Numbers()
    found = held(made, reward, [job("1"), job("2", height=3), job("3")])
    assert [said(one) for one in found] == [[1.0], [2.0], [3.0]]
    assert reward.calls == [["0"], ["1", "3"], ["2"]]


def test_requests_of_a_groupwise_reward_are_never_joined(made: Any) -> None:
    reward = Numbers(groupwise=True)
    held(made, reward, [job("1", "1"), job("1"), job("2")])
    assert reward.calls == [["0"], ["1", "1"], ["1"], ["2"]]


def test_a_large_request_is_a_call_by_itself(made: Any) -> None:
    reward = Numbers()
    held(made, reward, [job(*map(str, range(9))), job("1")])
    assert [len(call) for call in reward.calls] == [1, 9, 1]


@pytest.mark.parametrize("word", ["raise", "exit"])
def test_only_the_rows_that_make_it_raise_fail(made: Any, word: str) -> None:
    found = held(made, Numbers(), [job("1"), job("2", word, "3"), job("blank")], rows=8)
    assert [said(one) for one in found] == [[1.0], [2.0, None, 3.0], [None]]
    assert found[1].reasons[0] is found[1].reasons[2] is None and found[2].reasons == (None,)
    assert ("RuntimeError: raise" if word == "raise" else "SystemExit: 3") in str(found[1].reasons[1])


def test_a_groupwise_call_that_raises_is_not_made_by_rows(made: Any) -> None:
    reward = Numbers(groupwise=True)
    scored = made(reward).submit(job("raise", "1")).result(20)
    assert said(scored) == [None, None] and len(reward.calls) == 1


def test_too_few_rows_fail_the_call_and_the_thread_goes_on(made: Any) -> None:
    batcher = made(Numbers())
    scored = batcher.submit(job("1", "2", how="short")).result(20)
    assert said(scored) == [1.0, 2.0]  # by themselves its rows have answers
    reward = Numbers(groupwise=True)
    batcher = made(reward)
    scored = batcher.submit(job("1", "2", how="short")).result(20)
    assert said(scored) == [None, None] and "returned 1 rows; expected 2" in str(scored.reasons[0])
    assert said(batcher.submit(job("1")).result(20)) == [1.0]


def test_a_call_that_takes_too_long_fails_and_is_not_made_again(made: Any) -> None:
    reward = Numbers()
    reward.open.clear()
    batcher = made(reward, timeout=0.1)
    scored = batcher.submit(job("1", "2")).result(20)
    assert said(scored) == [None, None] and "took longer than 0.1 s" in str(scored.reasons[0])
    assert len(reward.calls) == 1
    reward.open.set()
    assert said(batcher.submit(job("3")).result(20)) == [3.0]


def test_columns_that_change_fail_the_call(made: Any) -> None:
    reward = Numbers()
    batcher = made(reward)
    assert said(batcher.submit(job("1")).result(20)) == [1.0]
    reward.name = "other"
    scored = batcher.submit(job("1")).result(20)
    assert said(scored) == [None] and scored.scores.names == ("numbers",)


def test_who_has_gone_is_not_scored(made: Any) -> None:
    reward = Numbers()
    batcher = made(reward)
    reward.open.clear()
    first = batcher.submit(job("0"))
    assert reward.busy.wait(20)
    assert batcher.submit(job("1")).cancel()
    last = batcher.submit(job("2", height=3))
    reward.open.set()
    assert said(first.result(20)) == [0.0] and said(last.result(20)) == [2.0]
    assert reward.calls == [["0"], ["2"]]


def test_all_are_let_go_when_the_server_stops(made: Any) -> None:
    reward = Numbers()
    batcher = made(reward, timeout=20.0)
    reward.open.clear()
    answers = [batcher.submit(job("0"))]
    assert reward.busy.wait(20)
    answers.append(batcher.submit(job("1")))
    batcher.stop()
    for answer in answers:
        with pytest.raises(Stopped):
            answer.result(20)
    with pytest.raises(Stopped):
        batcher.submit(job("2"))
    reward.open.set()
