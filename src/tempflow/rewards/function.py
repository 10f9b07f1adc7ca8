"""Any Python function as a reward."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import KINDS, Kind, Media
from tempflow.rewards.protocol import RewardError
from tempflow.rewards.safe import SafeReward

Metadata = list[Mapping[str, object]]
"""What each picture's prompt came with, beside its text."""

Result = Sequence[float | None] | np.ndarray | Tensor
Function = Callable[[list[Any], list[str]], Result] | Callable[[list[Any], list[str], Metadata], Result]
"""Of what is judged (PIL images where pictures are), the prompts and perhaps their metadata."""


@dataclass(frozen=True)
class FunctionReward:
    """See `from_function`."""

    function: Callable[..., Result]
    name: str
    groupwise: bool
    wants_metadata: bool = False
    takes: Kind = "picture"

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; a row is failed where the function says None, NaN or an infinity. Raises what it raises."""
        judged, more = _as_taken(media, self.takes), ({**m} for m in metadata)
        given = (judged, list(prompts), list(more)) if self.wants_metadata else (judged, list(prompts))
        return _column(_values(self.function(*given), len(media), self.name), self.name)


def _as_taken(media: Media, takes: Kind) -> list[Any]:
    """Each medium as a function gets it."""
    if takes == "picture":
        return [Image.fromarray(picture) for picture in media.pictures().numpy()]
    frames = list(media.frames.numpy())
    if takes == "video":
        return frames
    if media.sound is None:
        raise RewardError(f"media without sound for a reward that takes {takes}")
    sound = list(media.sound.numpy())
    return sound if takes == "sound" else list(zip(frames, sound, strict=True))


def from_function(
    function: Function,
    name: str | None = None,
    groupwise: bool = False,
    timeout: float | None = None,
    takes: Kind = "picture",
) -> SafeReward:
    """A reward from `function(images, prompts) -> scores`, or from `function(images, prompts, metadata)`.

    images: list of PIL images (RGB); prompts: as many strings; metadata: as many dictionaries, what a prompt's line
    said beside its text, for a function whose third parameter is called so ("meta…"). scores: a number each, larger is
    better, as a list, a numpy array or a tensor of shape [N]. None, NaN and infinities mean that this picture could not
    be scored; a row whose score failed is left out of training and is never counted as 0. An exception, or a call that
    takes longer than `timeout` seconds, fails all rows of the call and is logged as a warning (see `SafeReward`).
    Pictures and metadata are the function's own: it may change them. `name` is the function's own unless given.
    `groupwise`: one call per prompt, with all its pictures. `takes`: "video", in place of each image an array uint8
    [F, H, W, 3]; "sound", float32 [C, S]; "video and sound", the pair of them.

    Raises ValueError for another `takes`, something that cannot be called so or has no name, and a timeout not above 0;
    `score` raises RewardError for a result of another length, or one that is not made of numbers.
    """
    if takes not in KINDS:
        raise ValueError(f"takes: {takes!r} is not one of {', '.join(KINDS)}; nearest valid: 'picture'")
    if not callable(function):
        raise ValueError(f"function = {function!r} cannot be called; nearest valid: def score(images, prompts): ...")
    name = name if name is not None else _own_name(function)
    if not name:
        raise ValueError("name = '': a reward needs one; nearest valid: name='my_reward'")
    return SafeReward(FunctionReward(function, name, groupwise, _wants_metadata(function), takes), timeout)


def _wants_metadata(function: Callable[..., object]) -> bool:
    """Whether its third parameter is called so. Raises ValueError where a call would not fit."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return False
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [p.name for p in signature.parameters.values() if p.kind in placed][2:3]
    wants = any(name.startswith("meta") for name in third)
    try:
        signature.bind(*range(3 if wants else 2))
    except TypeError as error:
        shown = f"def {_own_name(function)}{signature}"
        shown = shown if len(shown) <= 80 else shown[:79] + "…"
        raise ValueError(
            f"reward: {shown} cannot be called with images and prompts ({error}); nearest valid: "
            "def score(images, prompts), or def score(images, prompts, metadata)"
        ) from error
    return wants


def _own_name(function: Callable[..., object]) -> str:
    own = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return "reward" if own == "<lambda>" else own


def _values(result: object, count: int, name: str) -> list[float | None]:
    """The function's answer as numbers, None for failed. Raises RewardError."""
    expected = f"expected {count} numbers, one per image"
    if isinstance(result, Tensor):
        if result.is_complex():
            raise RewardError(f"reward {name!r} returned a tensor of {result.dtype}; {expected}")
        result = result.detach().cpu()  # before float64, which not every device has
        result = (result if result.dtype == torch.bool else result.double()).numpy()
    if isinstance(result, np.ndarray):
        if result.ndim != 1:
            raise RewardError(f"reward {name!r} returned an array of shape {list(result.shape)}; {expected}")
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence):
        raise RewardError(f"reward {name!r} returned {_short(result)}, a {type(result).__name__}; {expected}")
    if len(result) != count:
        raise RewardError(f"reward {name!r} returned {len(result)} scores; {expected}")
    return [_number(value, row, name) for row, value in enumerate(result)]


def _number(value: object, row: int, name: str) -> float | None:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    # A bool is a number to Python, but a verdict is more often a bug (a forgotten score) than a reward.
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        hint = f"; write float({value})" if isinstance(value, bool | np.bool_) else ""
        raise RewardError(
            f"reward {name!r} returned {_short(value)}, a {type(value).__name__}, for image {row}; "
            f"expected a number, or None for failed{hint}"
        )
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return number if math.isfinite(number) else None


def _column(values: Sequence[float | None], name: str) -> Scores:
    column = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32)[:, None]
    ok = torch.isfinite(column)  # also a number too large for float32 is no score
    return Scores(column, ok, (name,))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
