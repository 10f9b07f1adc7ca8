"""What a reward is: media and prompts in, one row of scores per medium out. A failed score is failed; it is never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media, serves


class RewardError(ValueError):
    """A reward that broke the protocol (not a picture that could not be scored: that is a failed score)."""


@runtime_checkable
class Reward(Protocol):
    """Scores media; knows nothing of diffusion.

    name       what its column is called in metrics and configurations
    groupwise  True: `score` is called with all media of one prompt at once (and of no other), as comparisons need

    One that takes anything but pictures says so by a further member, `takes`: "video", "sound" or "video and sound".
    """

    @property
    def name(self) -> str: ...

    @property
    def groupwise(self) -> bool: ...

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """`Scores` with a row per medium, in order; a prompt's text and its metadata per medium.

        One that judges pictures looks at `media.pictures()`, uint8 [N, H, W, 3].
        """
        ...


def takes_of(reward: object) -> Kind:
    """What a reward takes; "picture" where it does not say."""
    return getattr(reward, "takes", "picture")


def check_takes(rewards: Sequence[Reward], made: Kind, model: str) -> None:
    """Raises ValueError for a reward that takes something else than the model makes; before work starts."""
    for reward in rewards:
        taken = takes_of(reward)
        if not serves(made, taken):
            hint = "over_frames(reward)" if taken == "picture" else f"a reward of {made}"
            raise ValueError(
                f"reward {reward.name!r} takes {taken}, and the model {model!r} makes {made}; nearest valid: {hint}"
            )


def check_media(media: Media | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Media:
    """`media` as media (pictures may come as uint8 [N, H, W, 3] on the CPU). Raises ValueError unless there are N
    prompts and N metadata for them."""
    found = Media.of(media)
    for field, given in (("prompts", prompts), ("metadata", metadata)):
        if len(given) != len(found):
            raise ValueError(f"{field} has {len(given)} entries for {len(found)} media; nearest valid: {len(found)}")
    return found


def check(scores: object, count: int, reward: str) -> Scores:
    """`scores` if it is a `Scores` of `count` rows on the CPU, which is what a reward owes; else RewardError."""
    if not isinstance(scores, Scores):
        raise RewardError(f"reward {reward!r} returned a {type(scores).__name__}; expected tempflow.core.scores.Scores")
    if len(scores) != count:
        raise RewardError(f"reward {reward!r} returned {len(scores)} rows; expected {count}, one per medium")
    if scores.value.device.type != "cpu":
        raise RewardError(f"reward {reward!r} returned scores on {scores.value.device}; expected cpu")
    return scores
