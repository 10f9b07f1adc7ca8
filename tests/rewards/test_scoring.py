"""A chunk is scored while the next is grown: seen by events, never by the clock."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness
from PIL import Image
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import from_function, scoring
from tempflow.rewards.protocol import RewardError
from tempflow.rewards.safe import SafeReward
from tempflow.rewards.scoring import Scoring
from tempflow.train.display import Interrupt, Interrupted

Images = list[Image.Image]
LONG = 20.0
"""Seconds after which what did not happen counts as never: only a failing test waits for them."""


class Told(Fake):
    """Says when a chunk's rollout begins (its first step of σ = 1) and when it is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = [threading.Event() for _ in range(8)]
        self.decoded: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        self._at = -1

    def predictor(self, condition: Any, guidance: float, network: Any = None) -> Any:
        predict = super().predictor(condition, guidance, network)

        def watched(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            if not torch.is_grad_enabled() and float(sigma[0]) == 1:
                self._at += 1
                self.begun[self._at].set()
            return predict(x, sigma, rows)

        return watched

    def decode(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        media = super().decode(x, size)
        gc.collect()
        self.decoded.append(weakref.ref(media))
        self.alive.append(sum(seen() is not None for seen in self.decoded))
        return media


def chunked(reward: Any, model: Fake | None = None, **options: Any) -> Bench:
    """Three chunks of two prompts, of 36 pictures each."""
    return Bench(model, reward=reward, rollout_leaves=36, **options)


# --------------------------------------------------------------------------------------------------------- overlap
def test_the_next_chunk_is_grown_while_a_chunk_is_scored() -> None:
    """The reward of a chunk waits for the next one's rollout to begin: one after the other, it would wait for ever."""
    model, came, calls = Told(), list[bool](), 0

    def waits(images: Images, prompts: list[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls < 3:
            came.append(model.begun[calls].wait(LONG))
        return brightness(images, prompts)

    bench = chunked(waits, model)
    bench.collect()
    assert came == [True, True] and calls == 3


def test_without_overlap_it_is_not_and_the_calling_thread_scores() -> None:
    model, seen = Told(), list[tuple[bool, bool]]()

    def looks(images: Images, prompts: list[str]) -> list[float | None]:
        seen.append((model.begun[len(seen) + 1].is_set(), threading.current_thread() is threading.main_thread()))
        return brightness(images, prompts)

    chunked(looks, model, overlap=False).collect()
    assert seen == [(False, True)] * 3


def test_rewards_score_at_the_same_time_each_in_its_order() -> None:
    """Two rewards that wait for each other; each has the chunks in the order in which they were grown."""
    meet, seen = threading.Barrier(2), dict[str, list[list[str]]](a=[], b=[])

    def named(name: str) -> Any:
        def meets(images: Images, prompts: list[str]) -> list[float | None]:
            meet.wait(LONG)
            seen[name].append(list(dict.fromkeys(prompts)))
            return brightness(images, prompts)

        return from_function(meets, name=name)

    bench = chunked(brightness, rewards=[named("a"), named("b")])
    assert bench.collect().scores.names == ("a", "b") and not meet.broken
    assert seen["a"] == seen["b"] == [list(PROMPTS[n : n + 2]) for n in (0, 2, 4)]


def test_a_reward_is_never_called_twice_at_once_and_never_out_of_order() -> None:
    inside, most, slots = 0, 0, list[str]()

    def slow(images: Images, prompts: list[str]) -> list[float | None]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        slots.append(prompts[0])
        inside -= 1
        return brightness(images, prompts)

    Bench(reward=from_function(slow, groupwise=True), rollout_leaves=18).collect()
    assert most == 1 and slots == list(PROMPTS)


def test_at_most_two_chunks_of_pictures_are_there() -> None:
    """A reward that holds the first chunk lets a second be decoded, and no third before it lets go."""
    model, first = Told(), threading.Event()

    def holds(images: Images, prompts: list[str]) -> list[float | None]:
        if not first.is_set():
            assert model.begun[2].wait(LONG)  # the third is grown, all but its pictures
            time.sleep(0.2)
            assert len(model.decoded) == 2
            first.set()
        return brightness(images, prompts)

    bench = Bench(model, reward=holds, rollout_leaves=18)
    experience = bench.collect()
    assert bool(experience.scores.ok.all()) and len(model.decoded) == 6
    assert max(model.alive) == scoring.CHUNKS == 2
    gc.collect()
    assert not any(seen() is not None for seen in model.decoded)


def test_scores_counters_and_metrics_are_those_of_serial_scoring() -> None:
    def counted() -> Callable[[Images, list[str]], list[float | None]]:
        """Depends on how often it was called before: so on the order of the calls."""
        calls = 0

        def score(images: Images, prompts: list[str]) -> list[float | None]:
            nonlocal calls
            calls += 1
            return [None if n % 7 == calls else v + calls for n, v in enumerate(brightness(images, prompts))]

        return score

    overlapped, serial = chunked(counted()), chunked(counted(), overlap=False)
    for iteration in range(2):
        assert repr(overlapped.iterate(iteration)) == repr(serial.iterate(iteration))
    assert overlapped.counter == serial.counter and overlapped.model.rows == serial.model.rows
    assert all(torch.equal(a, b) for a, b in zip(*(b.trainable.masters for b in (overlapped, serial)), strict=True))


def test_the_threads_have_the_callers_surroundings() -> None:
    seen: list[tuple[bool, int]] = []

    def looks(images: Images, prompts: list[str]) -> list[float | None]:
        seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
        return brightness(images, prompts)

    bench, threads = chunked(looks), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            bench.collect()
    finally:
        torch.set_num_threads(threads)
    bench.collect()
    assert seen == [(False, 2)] * 3 + [(True, threads)] * 3


# ---------------------------------------------------------------------------------------------------------- faults
def rewards_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reward ")]


def test_no_thread_is_left_and_none_could_keep_a_program() -> None:
    daemons: list[bool] = []

    def looks(images: Images, prompts: list[str]) -> list[float | None]:
        daemons.extend(thread.daemon for thread in rewards_threads())
        return brightness(images, prompts)

    chunked(looks).collect()
    assert daemons and all(daemons) and not rewards_threads()


def test_what_a_reward_raises_is_failed_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(images: Images, prompts: list[str]) -> list[float | None]:
        if PROMPTS[2] in prompts or PROMPTS[5] in prompts:
            raise RuntimeError("no more ink")
        return brightness(images, prompts)

    logs = list[list[tuple[int, str]]]()
    for overlap in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            experience = chunked(breaks, overlap=overlap).collect()
        failed = ~experience.scores.ok[:, 0]
        assert experience.whole.leaves.prompt[failed].unique().tolist() == [2, 5]
        logs.append([(record.levelno, record.getMessage()) for record in caplog.records])
    assert logs[0] == logs[1] and len(logs[0]) == 1


def test_a_reward_that_breaks_the_protocol_stops_the_rollout_and_no_thread_goes_on() -> None:
    calls = 0

    def wrong(images: Images, prompts: list[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        return [0.5]

    model = Told()
    with pytest.raises(RewardError, match=r"reward 'wrong' returned 1 scores; expected 36 numbers"):
        chunked(wrong, model).collect()
    assert not rewards_threads() and calls <= 3
    with pytest.raises(RewardError, match=r"reward 'wrong' returned 1 scores"):
        chunked(wrong, Told(), overlap=False).collect()


def test_the_first_rewards_fault_is_the_one_that_is_told() -> None:
    late = threading.Event()

    def first(images: Images, prompts: list[str]) -> list[float | None]:
        late.wait(LONG)
        return [0.1]

    def second(images: Images, prompts: list[str]) -> list[float | None]:
        late.set()
        return [0.2, 0.3]

    both = [from_function(first, name="first"), from_function(second, name="second")]
    with pytest.raises(RewardError, match=r"reward 'first' returned 1 scores"):
        Bench(rewards=both).collect()


def test_a_fault_of_the_rollout_waits_for_the_call_that_has_begun_and_drops_the_others() -> None:
    """As without threads, nobody is at work when the fault is told, and the reward was called once."""
    begun, failing, ended, calls = threading.Event(), threading.Event(), list[bool](), 0

    class Breaks(Told):
        def predictor(self, condition: Any, guidance: float, network: Any = None) -> Any:
            predict = super().predictor(condition, guidance, network)

            def breaks(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
                if len(self.decoded) == 2:  # the first chunk is being scored, and the second waits
                    assert begun.wait(LONG)
                    failing.set()
                    raise MemoryError("out of memory")
                return predict(x, sigma, rows)

            return breaks

    def slow(images: Images, prompts: list[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        begun.set()
        failing.wait(LONG)
        time.sleep(0.2)
        ended.append(True)
        return brightness(images, prompts)

    with pytest.raises(MemoryError):
        chunked(slow, Breaks()).collect()
    assert calls == 1 and ended == [True] and not rewards_threads()


def test_pictures_are_let_go_before_the_scores_are_there() -> None:
    """Whoever waits for the scores may decode the next chunk at once."""
    gate, seen = threading.Event(), list[bool]()

    def waits(images: Images, prompts: list[str]) -> list[float | None]:
        gate.wait(LONG)
        return brightness(images, prompts)

    media = Media.of(torch.zeros(2, 2, 2, 3, dtype=torch.uint8))
    pictures = weakref.ref(media)
    with Scoring([from_function(waits)], lambda: None) as running:
        pending = running.submit(media, ["a", "b"], [{}, {}], [0, 1], torch.ones(2, dtype=torch.bool))
        del media
        pending.answers[0].add_done_callback(lambda answer: seen.append(pictures() is None))
        gate.set()
        pending.scores()
    assert seen == [True]


# ------------------------------------------------------------------------------------------------------- interrupts
def test_an_interrupt_while_scores_are_waited_for_leaves_once_the_call_has_ended() -> None:
    ended = list[bool]()

    def slow(images: Images, prompts: list[str]) -> list[float | None]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        ended.append(True)
        return brightness(images, prompts)

    with Interrupt() as interrupt, pytest.raises(Interrupted) as left:
        Bench(reward=slow, pause=interrupt.check).collect()
    assert left.value.code == 128 + signal.SIGTERM and ended == [True] and not rewards_threads()


def test_an_interrupt_leaves_a_call_with_a_timeout_at_once() -> None:
    gate = threading.Event()

    def stuck(images: Images, prompts: list[str]) -> list[float | None]:
        os.kill(os.getpid(), signal.SIGTERM)
        gate.wait(LONG)
        return brightness(images, prompts)

    began = time.monotonic()
    try:
        with Interrupt() as interrupt, pytest.raises(Interrupted):
            Bench(reward=from_function(stuck, timeout=LONG), pause=interrupt.check).collect()
        assert time.monotonic() - began < LONG / 2
    finally:
        gate.set()


def test_a_second_ctrl_c_waits_for_no_reward() -> None:
    gate, began = threading.Event(), time.monotonic()

    def stuck(images: Images, prompts: list[str]) -> list[float | None]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # the first is heard, and the call is waited for
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait(LONG)
        return brightness(images, prompts)

    try:
        with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
            Bench(reward=stuck, pause=interrupt.check).collect()
        assert time.monotonic() - began < LONG / 2
    finally:
        gate.set()


def test_a_late_call_is_waited_for_by_the_next_chunk() -> None:
    """A timeout in one chunk: the call that was left behind ends before the reward is called again."""
    inside, most, calls = 0, 0, 0

    class Slow:
        name, groupwise = "slow", False

        def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
            nonlocal inside, most, calls
            calls += 1
            inside += 1
            most = max(most, inside)
            time.sleep(0.4 if calls == 1 else 0.0)
            inside -= 1
            value = torch.linspace(0, 1, len(media))[:, None]
            return Scores(value, torch.ones_like(value, dtype=torch.bool), ("slow",))

    experience = chunked(SafeReward(Slow(), timeout=0.3)).collect()
    ok = experience.scores.ok.view(3, 36)
    assert most == 1 and calls == 3 and not bool(ok[0].any()) and bool(ok[1:].all())


# ------------------------------------------------------------------------------------------------------------ alone
def test_scoring_alone_takes_chunks_and_gives_their_scores() -> None:
    media = Media.of(torch.arange(2 * 12, dtype=torch.uint8).view(2, 2, 2, 3))
    with Scoring([from_function(brightness)], lambda: None) as running:
        running.ready()
        pending = running.submit(media, ["a", "b"], [{}, {}], [0, 1], torch.tensor([True, False]))
        scores = pending.scores()
    assert scores.names == ("brightness",) and scores.ok[:, 0].tolist() == [True, False]
