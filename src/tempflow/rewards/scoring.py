"""Scores one chunk of pictures while the next is grown: a thread for each reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from types import TracebackType

import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import score_all
from tempflow.rewards.protocol import Reward
from tempflow.rewards.safe import SLICE

CHUNKS = 2
"""Chunks whose pictures may be there at a time: one that is scored, and one that was just decoded."""

Answer = Future[Scores]
"""A reward's scores of a chunk."""

Call = Callable[[Reward], Scores]
"""A chunk's pictures, for a reward to score."""


Compose = Callable[[Scores, Sequence[int]], Scores]
"""What several rewards become: scores of rows, and the rows' slots → those scores, perhaps with a column more."""


def as_scored(scores: Scores, slots: Sequence[int]) -> Scores:
    """The scores as they are."""
    return scores


@dataclass(frozen=True, eq=False)
class Pending:
    """A chunk that is being scored, by each reward."""

    answers: Sequence[Answer]
    wait: Callable[[Sequence[Answer]], None]
    slots: Sequence[int] = ()
    compose: Compose = as_scored

    def scores(self) -> Scores:
        """Of all rewards, in their order, once they are there, and what they become. Raises what the first of them
        raised that did."""
        self.wait(self.answers)
        return self.compose(Scores.stack([answer.result() for answer in self.answers]), self.slots)


class Scoring:
    """Use as a context manager around the chunks of one rollout.

    A reward has a thread of its own, with the caller's context variables, gradient mode and GPU. It takes the chunks in
    the order in which they are given, and is never called twice at once. So its scores are the same bits as without
    threads, if it shares nothing with other rewards (a random generator, a state): these may be called meanwhile.

    `compose`: what several rewards become. `threads`: False scores in the calling thread, at once. `pause` is called
    while scores are waited for, and while a call with a timeout goes on; it may raise to leave. Whoever leaves early
    waits for the calls that have begun, as without threads, and for none after KeyboardInterrupt; calls that have not
    begun are dropped. Threads are daemons: no reward keeps a program from ending.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        pause: Callable[[], None],
        threads: bool = True,
        compose: Compose = as_scored,
    ) -> None:
        self.rewards, self.pause, self.compose = rewards, pause, compose
        self._unfinished: list[Pending] = []
        self._left = Event()
        self._jobs: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in rewards] if threads else []
        self._threads = [
            _thread(reward, jobs, self._left) for reward, jobs in zip(rewards, self._jobs, strict=bool(self._jobs))
        ]

    def __enter__(self) -> Scoring:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._left.set()
        for jobs in self._jobs:
            jobs.put(None)
        for thread in self._threads if kind is None or not issubclass(kind, KeyboardInterrupt) else ():
            while thread.is_alive():
                thread.join(SLICE)

    def ready(self) -> None:
        """Waits until another chunk may be decoded: at most `CHUNKS` have pictures then. Raises what a reward raised
        in the meantime."""
        while self._unfinished and (len(self._unfinished) >= CHUNKS or _over(self._unfinished[0].answers)):
            self._wait(self._unfinished.pop(0).answers)

    def submit(
        self,
        media: Media,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
        slots: Sequence[int],
        ok: Tensor,
    ) -> Pending:
        """Has a chunk of pictures scored, as `rewards.score_all` does; see there for the arguments and errors."""

        def call(reward: Reward) -> Scores:
            return score_all([reward], media, prompts, metadata, slots, ok=ok, pause=self.pause)

        pending = Pending([Future() for _ in self.rewards], self._wait, slots, self.compose)
        for place, answer in enumerate(pending.answers):
            job = _Job(call, answer)
            if self._jobs:
                self._jobs[place].put(job)
            else:
                _settle(job, self.rewards[place])
                answer.result()
        self._unfinished.append(pending)
        return pending

    def _wait(self, answers: Sequence[Answer]) -> None:
        while not _over(answers):
            wait_for(answers, SLICE)
            self.pause()
        for answer in answers:
            answer.result()


class _Job:
    """A chunk for one reward. The pictures are let go before the answer is there."""

    def __init__(self, call: Call, answer: Answer) -> None:
        self.call: Call | None = call
        self.answer = answer


def _thread(reward: Reward, jobs: SimpleQueue[_Job | None], left: Event) -> Thread:
    """A reward's thread, not started. What Python and torch keep by thread is there as in the calling one: context
    variables, whether gradients are taken, and the GPU."""
    gradients = torch.is_grad_enabled()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def work() -> None:
        torch.set_grad_enabled(gradients)
        if gpu is not None:
            torch.cuda.set_device(gpu)
        while (job := jobs.get()) is not None and not left.is_set():
            _settle(job, reward)
            del job

    return Thread(target=copy_context().run, args=(work,), name=f"reward {reward.name}", daemon=True)


def _settle(job: _Job, reward: Reward) -> None:
    call, job.call = job.call, None
    assert call is not None
    try:
        scores = call(reward)
    except BaseException as error:  # whoever reads the answer gets it
        del call
        job.answer.set_exception(error)
    else:
        del call
        job.answer.set_result(scores)


def _over(answers: Sequence[Answer]) -> bool:
    return all(answer.done() for answer in answers)
