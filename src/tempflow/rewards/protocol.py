"""What a reward is: media and prompts in, one row of scores per medium out. A failed score is failed; it is never 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media, serves


class RewardError(ValueError):
    """A reward that broke the protocol (not a picture that could not be scored: that is a failed score)."""


class Unreachable(Exception):
    """What a reward raises when that which scores for it cannot be had: to call it again with other rows is no use."""


@runtime_checkable
class Reward(Protocol):
    """Scores media; knows nothing of diffusion.

    name       what its column is called in metrics and configurations
    groupwise  True: `score` is called with all media of one prompt at once (and of no other), as comparisons need

    Further members that it may have:

    takes          "video", "sound" or "video and sound", where it takes anything but pictures
    prepare        () -> None: loads its weights, or asks its server. Called before the first call of a run, so that a
                   weight that is missing is an error and no failed score; it raises
    check_prompts  (prompts, metadata) -> None: raises ValueError for a prompt that it cannot judge. Called with all
                   prompts of a run when they are read
    differentiable  its scores with gradients (`Differentiable`), where they can be had; None where not
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


@runtime_checkable
class Prepares(Protocol):
    """A reward that has something to load."""

    def prepare(self) -> None: ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A reward that cannot judge every prompt."""

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None: ...


class Differentiable(Protocol):
    """A reward's scores with gradients to what they are of."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Tensor:
        """Scores [N], on any device, of frames: float32 [N, F, 3, H, W] in 0 … 1, one frame for a picture. With
        gradients to the pixels and to nothing else; a row depends on its own pixels alone, and one that is not finite
        has failed. On pixels that are whole 255ths it is the reward's own column, to rounding."""
        ...


def differentiable_of(reward: object) -> Differentiable | None:
    """A reward's scores with gradients; None where it has none."""
    return getattr(reward, "differentiable", None)


def takes_of(reward: object) -> Kind:
    """What a reward takes; "picture" where it does not say."""
    return getattr(reward, "takes", "picture")


def prepare(*rewards: object) -> None:
    """Has rewards load what they need, those that have something to load. Raises what they do."""
    for reward in rewards:
        if isinstance(reward, Prepares):
            reward.prepare()


def check_prompts(reward: object, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
    """Raises ValueError for a prompt that the reward cannot judge, where it looks at prompts."""
    if isinstance(reward, ChecksPrompts):
        reward.check_prompts(prompts, metadata)


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
    prompts, each a text, and N metadata for them."""
    found = Media.of(media)
    wrong = [prompts] if isinstance(prompts, str) else [prompt for prompt in prompts if not isinstance(prompt, str)]
    if wrong:
        what = "one text" if isinstance(prompts, str) else f"a {type(wrong[0]).__name__}"
        raise ValueError(f"prompts has {what}; nearest valid: a list of texts, one for each of the {len(found)} media")
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
