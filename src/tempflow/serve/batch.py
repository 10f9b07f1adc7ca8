"""Scores the rows of several requests in one call of a reward."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

import torch

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards.safe import Fault, SafeReward


@dataclass(frozen=True, eq=False)
class Scored:
    """Of one request: scores, and of each row why a score of it failed, where the reward raised or took too long."""

    scores: Scores
    reasons: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """The media of a request."""

    media: Media
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, object]]
    answer: Future[Scored] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.media)

    @property
    def form(self) -> tuple[object, ...]:
        """What media must have in common to be joined."""
        m = self.media
        return (m.frames.shape[1:], m.fps, None if m.sound is None else m.sound.shape[1:], m.sound_rate)


class Stopped(Exception):
    """The server stops."""


class Batcher:
    """Calls `reward` in a daemon thread of its own, never twice at once, with the rows of one or several requests.

    rows     most rows of a call that joins requests. A request of more is a call by itself
    latency  seconds that a request waits for others to be joined with

    Requests of a groupwise reward are never joined. A call that raises is made again request by request, and then row
    by row (never for a groupwise reward), so that only those rows fail that make it raise; one that takes too long is
    not made again. Counts what it does: `calls`, `joined` (requests that shared a call), `seconds` in the reward,
    `scored` and `failed` rows.
    """

    def __init__(self, reward: SafeReward, rows: int, latency: float) -> None:
        self.reward, self.rows, self.latency = reward, rows, latency
        self.columns: tuple[str, ...] | None = None
        self.calls = self.joined = self.scored = self.failed = 0
        self.seconds = 0.0
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._stopped = False
        Thread(target=self._work, name=f"scorer {reward.name}", daemon=True).start()

    def submit(self, job: Job) -> Future[Scored]:
        """Has a job scored. What the future raises is a mistake of ours, or `Stopped`."""
        with self._changed:
            if self._stopped:
                raise Stopped("the server stops")
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    @property
    def queued(self) -> int:
        """Rows that wait for a call."""
        with self._changed:
            return sum(map(len, self._waiting))

    def stop(self) -> None:
        """Lets go of all jobs; a call that goes on is left behind."""
        with self._changed:
            self._stopped = True
            waiting = [*self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Stopped("the server stops"))

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            jobs = [job for job in taken if job.answer.set_running_or_notify_cancel()]
            if not jobs:  # whoever asked has gone
                continue
            try:
                answers = self._score(jobs)
            except BaseException as error:  # whoever waits for an answer gets it
                for job in jobs:
                    job.answer.set_exception(error)
                continue
            for job, answer in zip(jobs, answers, strict=True):
                self.columns = answer.scores.names if answer.scores.ok.any() else self.columns
                self.scored += int(answer.scores.ok.all(1).sum())
                self.failed += int((~answer.scores.ok.all(1)).sum())
                job.answer.set_result(answer)

    def _next(self) -> list[Job] | None:
        """The jobs of the next call; None when the server stops."""
        with self._changed:
            while not self._waiting and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            first = self._waiting.popleft()
            jobs, left = [first], self.rows - len(first)
            until = time.monotonic() + self.latency
            while left > 0 and not self.reward.groupwise and not self._stopped:
                for job in [job for job in self._waiting if job.form == first.form]:
                    if len(job) <= left:
                        self._waiting.remove(job)
                        jobs.append(job)
                        left -= len(job)
                if left == 0 or (wait := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(wait)
            return jobs

    def _score(self, jobs: Sequence[Job]) -> list[Scored]:
        """Of each job."""
        if len(jobs) == 1:
            return [self._one(jobs[0])]
        self.joined += len(jobs)
        whole = self._call(
            Media.cat([job.media for job in jobs]),
            [text for job in jobs for text in job.prompts],
            [m for job in jobs for m in job.metadata],
        )
        if isinstance(whole, Scores):
            ends = torch.tensor([len(job) for job in jobs]).cumsum(0).tolist()
            parts = [torch.arange(end - len(job), end) for job, end in zip(jobs, ends, strict=True)]
            return [Scored(whole.select(part), (None,) * len(part)) for part in parts]
        if whole.late:
            return [self._nothing(len(job), whole) for job in jobs]
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Scored:
        """Of a job by itself; of each of its rows by itself where that fails."""
        answer = self._call(job.media, job.prompts, job.metadata)
        if isinstance(answer, Scores):
            return Scored(answer, (None,) * len(job))
        if answer.late or self.reward.groupwise or len(job) == 1:
            return self._nothing(len(job), answer)
        answers: list[Scores | Fault] = []
        for row in range(len(job)):
            late = next((a for a in answers if isinstance(a, Fault) and a.late), None)
            answers.append(late or self._call(job.media[[row]], [job.prompts[row]], [job.metadata[row]]))
        names = next((a.names for a in answers if isinstance(a, Scores)), self._columns)
        value = torch.full((len(job), len(names)), math.nan)
        ok, reasons = torch.zeros(value.shape, dtype=torch.bool), list[str | None]()
        for row, found in enumerate(answers):
            reasons.append(found.text if isinstance(found, Fault) else None)
            if isinstance(found, Scores):
                if found.names != names:
                    reasons[row] = f"the reward returned columns {found.names}, then {names}"
                    continue
                value[row], ok[row] = found.value[0], found.ok[0]
        return Scored(Scores(value, ok, names), tuple(reasons))

    def _nothing(self, rows: int, fault: Fault) -> Scored:
        shape = (rows, len(self._columns))
        none = Scores(torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool), self._columns)
        return Scored(none, (fault.text,) * rows)

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.columns or (self.reward.name,)

    def _call(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores | Fault:
        began = time.monotonic()
        try:
            answer = self.reward.attempt(media, prompts, metadata, self._leave)
            if isinstance(answer, Scores) and answer.names != (self.columns or answer.names):
                answer = Fault(f"reward {self.reward.name!r} returned columns {answer.names}, then {self.columns}")
            return answer
        except Stopped:
            raise
        except BaseException as error:  # an answer that breaks the protocol, or sys.exit: the server goes on
            return Fault(" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            self.calls += 1
            self.seconds += time.monotonic() - began

    def _leave(self) -> None:
        if self._stopped:
            raise Stopped("the server stops")
