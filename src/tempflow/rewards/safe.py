"""A reward as a run calls it: what goes wrong in it stays its own."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from threading import Thread

import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media
from tempflow.rewards.protocol import (
    Differentiable,
    Reward,
    RewardError,
    Unreachable,
    check,
    check_media,
    check_prompts,
    differentiable_of,
    prepare,
    takes_of,
)

SLICE = 0.05
"""Seconds between two looks at whether the run is to be left while a call with a timeout goes on."""

_log = logging.getLogger(__name__)

Pause = Callable[[], None]


def go_on() -> None:
    """No pause."""


@dataclass(frozen=True)
class Fault:
    """Why a call has no scores. `late`: it took longer than its timeout, or is `Unreachable`: others would be too."""

    text: str
    late: bool = False


class SafeReward:
    """A reward around `reward` that can neither stop a run nor spoil what others see.

    It hands over copies, so that no reward can change what another one sees. A call that raises, or takes longer than
    `timeout` seconds, has failed scores: all its rows, never 0. Each kind of exception is logged once as a warning,
    with its traceback, and then at level DEBUG; `fault` is what went wrong last, None where nothing has.

    Without a timeout the call runs in the calling thread. With one it runs in a daemon thread; one that does not come
    back is left behind, and the next call waits for it within its own time, so that a reward is never called twice at
    once. A reward of several columns that fails before it has ever answered has a single one, under its name.

    Raises ValueError for a timeout that is not above 0.
    """

    def __init__(self, reward: Reward, timeout: float | None = None) -> None:
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout: {timeout} s for reward {reward.name!r}; nearest valid: 60.0, or None for none")
        self.reward, self.timeout = reward, timeout
        self.fault: Fault | None = None
        self._columns: tuple[str, ...] = (reward.name,)
        self._told: set[str] = set()
        self._left_behind: Future[object] | None = None

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def groupwise(self) -> bool:
        return self.reward.groupwise

    @property
    def takes(self) -> Kind:
        return takes_of(self.reward)

    def prepare(self) -> None:
        """As the reward's own; what that raises is an error."""
        prepare(self.reward)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """As the reward's own."""
        check_prompts(self.reward, prompts, metadata)

    @property
    def differentiable(self) -> Differentiable | None:
        """As the reward's own, in the calling thread and without a timeout; a call that raises has failed scores."""
        inner = differentiable_of(self.reward)
        return None if inner is None else partial(self._through, inner)

    def _through(
        self,
        inner: Differentiable,
        pixels: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        """Raises RewardError for an answer that is not a number for each row."""
        try:
            found = inner(pixels, list(prompts), copy.deepcopy(list(metadata)))
        except RewardError:
            raise
        except Exception as error:
            self._fault(f"raised {type(error).__name__}: {error}", type(error).__name__, len(pixels), error)
            return pixels.new_full([len(pixels)], math.nan)
        if not isinstance(found, Tensor) or found.shape != pixels.shape[:1]:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RewardError(
                f"reward {self.name!r} returned {shape} with gradients; expected a Tensor [{len(pixels)}]"
            )
        return found

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """As `Reward.score`. Raises RewardError for an answer that is no `Scores` with a row per medium."""
        answer = self.attempt(media, prompts, metadata)
        return self.failed(len(media)) if isinstance(answer, Fault) else answer

    def attempt(
        self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]], pause: Pause = go_on
    ) -> Scores | Fault:
        """Scores, or why there are none. `pause` is called while a call with a timeout goes on; it may raise to leave.

        Raises ValueError for media that are none, and RewardError for an answer that breaks the protocol.
        """
        media = check_media(media, prompts, metadata)
        given = (media.clone(), list(prompts), copy.deepcopy(list(metadata)))
        answer = self._settled(lambda: self.reward.score(*given), pause)
        if answer is None:
            return self._fault(f"took longer than {self.timeout:g} s", "late", len(media))
        error = answer.exception()
        if isinstance(error, Exception) and not isinstance(error, RewardError):
            return self._fault(f"raised {type(error).__name__}: {error}", type(error).__name__, len(media), error)
        scores = check(answer.result(), len(media), self.name)
        self._columns = scores.names
        return scores

    def failed(self, count: int) -> Scores:
        """Scores of which none is valid."""
        shape = (count, len(self._columns))
        return Scores(torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool), self._columns)

    def _settled(self, call: Callable[[], object], pause: Pause) -> Future[object] | None:
        """The call, which has come to an end; None when its time is over."""
        answer: Future[object] = Future()
        if self.timeout is None:
            _settle(answer, call)
            return answer
        deadline = time.monotonic() + self.timeout
        if self._left_behind is not None and not _ends(self._left_behind, deadline, pause):
            return None
        self._left_behind = answer
        Thread(target=_settle, args=(answer, call), name=f"reward {self.name}", daemon=True).start()
        if not _ends(answer, deadline, pause):
            return None
        self._left_behind = None
        return answer

    def _fault(self, text: str, kind: str, count: int, error: Exception | None = None) -> Fault:
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        late = kind == "late" or isinstance(error, Unreachable)
        self.fault = Fault(f"reward {self.name!r} {text}", late)
        hint = "; further ones of this kind are not told" if level == logging.WARNING else ""
        _log.log(level, "%s; its %d scores are failed%s", self.fault.text, count, hint, exc_info=error)
        return self.fault


def safe(reward: Reward, timeout: float | None = None) -> SafeReward:
    """`reward` as a `SafeReward`; of one that is one already, a copy with `timeout`, unless that is None."""
    if not isinstance(reward, SafeReward):
        return SafeReward(reward, timeout)
    return reward if timeout is None else SafeReward(reward.reward, timeout)


def faults(rewards: Sequence[Reward]) -> list[str]:
    """What went wrong last in each of the rewards, as far as it is known."""
    return [reward.fault.text for reward in rewards if isinstance(reward, SafeReward) and reward.fault is not None]


def _settle(answer: Future[object], call: Callable[[], object]) -> None:
    try:
        answer.set_result(call())
    except BaseException as error:  # whoever reads the answer gets it
        answer.set_exception(error)


def _ends(answer: Future[object], deadline: float, pause: Pause) -> bool:
    """Whether it does by then."""
    while not answer.done() and (left := deadline - time.monotonic()) > 0:
        wait_for([answer], min(left, SLICE))
        pause()
    return answer.done()
