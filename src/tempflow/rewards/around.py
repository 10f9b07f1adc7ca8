"""Rewards around a reward: of pictures for clips, and under another name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media, evenly
from tempflow.rewards.protocol import (
    Differentiable,
    Reward,
    check,
    check_prompts,
    differentiable_of,
    prepare,
    takes_of,
)


@dataclass(frozen=True)
class _Around:
    """A reward that calls another one."""

    reward: Reward

    @property
    def groupwise(self) -> bool:
        return self.reward.groupwise

    @property
    def differentiable(self) -> Differentiable | None:
        return differentiable_of(self.reward)

    def prepare(self) -> None:
        prepare(self.reward)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        check_prompts(self.reward, prompts, metadata)


@dataclass(frozen=True)
class OverFrames(_Around):
    """See `over_frames`."""

    count: int
    takes: Kind = "video"

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def differentiable(self) -> Differentiable | None:
        """The same mean with gradients."""
        inner = differentiable_of(self.reward)
        return None if inner is None else partial(self._through, inner)

    def _through(
        self,
        inner: Differentiable,
        pixels: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, object]],
    ) -> Tensor:
        frames = pixels[:, evenly(pixels.shape[1], self.count)].flatten(0, 1)[:, None]
        texts = [text for text in prompts for _ in range(self.count)]
        facts = [m for m in metadata for _ in range(self.count)]
        return inner(frames, texts, facts).unflatten(0, (len(pixels), self.count)).mean(1)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """The reward's columns; a clip of which it cannot score a frame is failed."""
        count = len(media) * self.count
        repeated = (
            [text for text in prompts for _ in range(self.count)],
            [m for m in metadata for _ in range(self.count)],
        )
        scores = check(self.reward.score(Media.of(media.pictures(self.count)), *repeated), count, self.name)
        value, ok = (t.unflatten(0, (len(media), self.count)) for t in (scores.value, scores.ok))
        whole = ok.all(1)
        return Scores(torch.where(whole, value.nan_to_num().mean(1), math.nan), whole, scores.names)


def over_frames(reward: Reward, count: int = 4) -> OverFrames:
    """`reward`, which takes pictures, as one of clips: its mean over `count` frames, evenly apart.

    Raises ValueError for a count below 1, or a reward that takes something else.
    """
    if takes_of(reward) != "picture":
        raise ValueError(f"reward {reward.name!r} takes {takes_of(reward)}; nearest valid: one that takes picture")
    if count < 1:
        raise ValueError(f"count: {count} is too small; nearest valid: 1")
    return OverFrames(reward, count)


@dataclass(frozen=True)
class Renamed(_Around):
    """`reward` under another name, as a run with two rewards of one kind needs it.

    The column that bears the reward's own name gets the new one; any other column has it put in front, "name/column".
    """

    name: str

    @property
    def takes(self) -> Kind:
        return takes_of(self.reward)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """The reward's scores, its columns renamed."""
        scores = check(self.reward.score(media, prompts, metadata), len(media), self.name)
        own = self.reward.name
        return Scores(
            scores.value, scores.ok, tuple(self.name if c == own else f"{self.name}/{c}" for c in scores.names)
        )
