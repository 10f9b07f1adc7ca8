"""What a reward is: media and prompts in, one row of scores per medium out. A failed score is failed; it is never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tempflow.core.scores import Scores

Media = Tensor
"""Pictures: uint8 [N, H, W, 3] on the CPU."""


class RewardError(ValueError):
    """A reward that broke the protocol (not a picture that could not be scored: that is a failed score)."""


@runtime_checkable
class Reward(Protocol):
    """Scores pictures; knows nothing of diffusion.

    name       what its column is called in metrics and configurations
    groupwise  True: `score` is called with all media of one prompt at once (and of no other), as comparisons need
    """

    @property
    def name(self) -> str: ...

    @property
    def groupwise(self) -> bool: ...

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """`Scores` with a row per medium, in order. media uint8 [N, H, W, 3]; a prompt and its metadata per medium."""
        ...


def check_media(media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
    """Raises ValueError unless media is uint8 [N, H, W, 3] on the CPU with N prompts and N metadata."""
    if media.dtype != torch.uint8 or media.ndim != 4 or media.shape[-1] != 3 or media.device.type != "cpu":
        raise ValueError(
            f"media is {media.dtype} {list(media.shape)} on {media.device}; "
            "nearest valid: torch.uint8 [N, H, W, 3] on cpu"
        )
    for field, given in (("prompts", prompts), ("metadata", metadata)):
        if len(given) != len(media):
            raise ValueError(f"{field} has {len(given)} entries for {len(media)} media; nearest valid: {len(media)}")


def check(scores: object, count: int, reward: str) -> Scores:
    """`scores` if it is a `Scores` of `count` rows on the CPU, which is what a reward owes; else RewardError."""
    if not isinstance(scores, Scores):
        raise RewardError(f"reward {reward!r} returned a {type(scores).__name__}; expected tempflow.core.scores.Scores")
    if len(scores) != count:
        raise RewardError(f"reward {reward!r} returned {len(scores)} rows; expected {count}, one per medium")
    if scores.value.device.type != "cpu":
        raise RewardError(f"reward {reward!r} returned scores on {scores.value.device}; expected cpu")
    return scores
