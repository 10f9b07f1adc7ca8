"""What a sample is: a picture or a clip, perhaps with sound; and the size that is asked for. A leaf of the house."""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["picture", "video", "sound", "video and sound"]
"""What a model makes, and what a reward takes. "sound" is for rewards, which may take the sound alone: a model that
makes nothing else cannot be expressed, as media have frames."""

KINDS: tuple[Kind, ...] = get_args(Kind)

BYTES_AT_ONCE = 1 << 30
"""Of decoded frames that are held at a time, unless a single medium has more."""

DURATION = 100
"""Milliseconds that a frame of a clip without a rate is shown."""

SLACK = 0.1
"""Seconds by which a sound may be longer or shorter than was asked for: models make it in blocks."""


@dataclass(frozen=True)
class Size:
    """How large a sample is to be.

    height, width  pixels
    frames         1 is a picture
    fps            frames a second; None where nobody asks
    seconds        of sound; None: as long as the frames

    Raises ValueError for a number below 1, or a rate or a length that is not above 0.
    """

    height: int
    width: int
    frames: int = 1
    fps: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too small; nearest valid: 1")
        for name in ("fps", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value} must be above 0; nearest valid: null")

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.height * self.width * self.frames

    def at_once(self, most: int) -> int:
        """How many media of this size are made and held at a time: at most `most` frames together, and BYTES_AT_ONCE of
        them; one at least."""
        return max(1, min(most // self.frames, BYTES_AT_ONCE // (3 * self.pixels)))

    def __str__(self) -> str:
        rate = f" at {self.fps:.5g} a second" if self.fps is not None else ""
        frames = f", {self.frames} frames{rate}" if self.frames > 1 else ""
        sound = f", {self.seconds:.5g} s of sound" if self.seconds is not None else ""
        return f"{self.height}×{self.width}{frames}{sound}"


@dataclass(frozen=True, eq=False)
class Media:
    """Some samples of one size.

    frames      uint8 [N, F, H, W, 3] on the CPU; a picture has F = 1
    fps         frames a second of a clip, where it has a rate
    sound       float32 [N, C, S] on the CPU in −1 … 1; None without
    sound_rate  samples of it a second

    N may be 0, no other side. Raises ValueError for tensors of another kind or with an empty side, a rate that is not
    above 0 and finite, or a sound without a rate.
    """

    frames: Tensor
    fps: float | None = None
    sound: Tensor | None = None
    sound_rate: int | None = None

    def __post_init__(self) -> None:
        f, s = self.frames, self.sound
        if f.dtype != torch.uint8 or f.ndim != 5 or f.shape[-1] != 3 or f.device.type != "cpu":
            raise ValueError(
                f"media is {f.dtype} {list(f.shape)} on {f.device}; nearest valid: torch.uint8 [N, F, H, W, 3] on cpu"
            )
        if s is not None and (s.dtype != torch.float32 or s.ndim != 3 or len(s) != len(f) or s.device.type != "cpu"):
            raise ValueError(
                f"sound is {s.dtype} {list(s.shape)} on {s.device}; nearest valid: float32 [{len(f)}, C, S] on cpu"
            )
        for name, given, sides in (("media", f, "F, H and W"), ("sound", s, "C and S")):
            if given is not None and 0 in given.shape[1:]:
                raise ValueError(f"{name} is {list(given.shape)}; nearest valid: {sides} of at least 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps: {self.fps} must be above 0 and finite; nearest valid: None")
        if (s is None) != (self.sound_rate is None):
            raise ValueError(f"sound_rate: {self.sound_rate} {'without a sound' if s is None else 'of a sound'}")
        if self.sound_rate is not None and self.sound_rate < 1:
            raise ValueError(f"sound_rate: {self.sound_rate} is too small; nearest valid: 1")

    @staticmethod
    def of(media: Media | Tensor) -> Media:
        """Media as they are; pictures, uint8 [N, H, W, 3] on the CPU, as media of one frame. Raises ValueError for
        anything else."""
        if isinstance(media, Media):
            return media
        if not isinstance(media, Tensor):
            raise ValueError(f"media is a {type(media).__name__}; nearest valid: torch.uint8 [N, H, W, 3] on cpu")
        if media.dtype != torch.uint8 or media.ndim != 4 or media.shape[-1] != 3 or media.device.type != "cpu":
            raise ValueError(
                f"media is {media.dtype} {list(media.shape)} on {media.device}; "
                "nearest valid: torch.uint8 [N, H, W, 3] on cpu"
            )
        return Media(media[:, None])

    @staticmethod
    def cat(parts: Sequence[Media]) -> Media:
        """One after the other. Raises ValueError where they are of different sizes, rates or lengths of sound, or there
        are none."""
        kinds = list(dict.fromkeys(p._form for p in parts))
        if len(kinds) != 1:
            differ = f" ({kinds[0]}, and {kinds[1]})" if kinds else ""
            raise ValueError(f"parts: {len(kinds)} kinds of media{differ}; nearest valid: 1")
        sounds = [p.sound for p in parts if p.sound is not None]
        sound = torch.cat(sounds) if sounds else None
        return replace(parts[0], frames=torch.cat([p.frames for p in parts]), sound=sound)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: Sequence[int] | Tensor | slice) -> Media:
        """Some of them, in that order."""
        at = rows if isinstance(rows, Tensor | slice) else list(rows)
        return replace(self, frames=self.frames[at], sound=None if self.sound is None else self.sound[at])

    def clone(self) -> Media:
        """With tensors of its own."""
        return replace(self, frames=self.frames.clone(), sound=None if self.sound is None else self.sound.clone())

    @property
    def _form(self) -> str:
        """All but how many there are, and of what."""
        sound = "" if self.sound is None else f", sound {list(self.sound.shape[1:])} at {self.sound_rate}"
        return f"frames {list(self.frames.shape[1:])} at {self.fps}{sound}"

    @property
    def kind(self) -> Kind:
        """Never "sound": media have frames. With sound a still picture is a clip."""
        if self.sound is not None:
            return "video and sound"
        return "picture" if self.frames.shape[1] == 1 else "video"

    @property
    def size(self) -> Size:
        _, frames, height, width, _ = self.frames.shape
        if self.sound is None or self.sound_rate is None:
            return Size(height, width, frames, self.fps)
        return Size(height, width, frames, self.fps, self.sound.shape[2] / self.sound_rate)

    def misfit(self, size: Size) -> str:
        """Both sizes, where media are not of `size`; "" where they are. A rate and a length of sound count where they
        are asked for, the rate of clips alone."""
        own = self.size
        fits = (own.height, own.width, own.frames) == (size.height, size.width, size.frames)
        if size.fps is not None and size.frames > 1:
            fits = fits and own.fps is not None and math.isclose(own.fps, size.fps, rel_tol=1e-6)
        if size.seconds is not None:
            fits = fits and own.seconds is not None and abs(own.seconds - size.seconds) <= SLACK
        return "" if fits else f"{own}, and {size} is asked for"

    def pictures(self, count: int = 1) -> Tensor:
        """uint8 [N·count, H, W, 3]: of each medium `count` frames in order, evenly apart, its middle one for 1.

        Raises ValueError for a count below 1. A medium with fewer frames gives some of them more than once.
        """
        if count < 1:
            raise ValueError(f"count: {count} is too small; nearest valid: 1")
        return self.frames[:, evenly(self.frames.shape[1], count)].flatten(0, 1)

    def strips(self, count: int = 4) -> Tensor:
        """uint8 [N, H, K·W, 3]: a picture as it is; of a clip K = `count` frames (or all) side by side."""
        frames = self.frames.shape[1]
        side = min(count, frames)
        return self.pictures(side).unflatten(0, (-1, side)).transpose(1, 2).flatten(2, 3)

    def write(self, row: int, file: Path) -> list[Path]:
        """Writes one medium into new files: a PNG, of a clip an animated one, and beside it its sound as WAV. Returns
        them. Raises FileExistsError for a file that is there.

        No pixel is lost. But equal frames that follow each other are one frame of the file, shown for as long as all of
        them: who reads it counts by durations, as `data.pictures` does. The last frame is always one of its own, so
        that a clip that stands still remains a clip.
        """
        from PIL import Image

        first, *others = (Image.fromarray(frame.numpy()) for frame in self.frames[row])
        duration = DURATION if self.fps is None else 1000 / self.fps
        with file.open("xb") as stream:
            if others:
                blend = [0] * len(others) + [1]  # all the same without transparency, but PIL joins only what is alike
                told = {"append_images": others, "duration": duration, "loop": 0, "blend": blend}
                first.save(stream, format="PNG", save_all=True, **told)
            else:
                first.save(stream, format="PNG")
        if self.sound is None or self.sound_rate is None:
            return [file]
        heard = file.with_suffix(".wav")
        samples = (self.sound[row].clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()
        with heard.open("xb") as stream, wave.open(stream, "wb") as out:
            out.setnchannels(samples.shape[1])
            out.setsampwidth(2)
            out.setframerate(self.sound_rate)
            out.writeframes(samples.numpy().tobytes())
        return [file, heard]


def serves(made: Kind, taken: Kind) -> bool:
    """Whether who takes `taken` can be given what is `made`: a clip with sound has both."""
    return made == taken or (made == "video and sound" and taken in ("video", "sound"))


def evenly(frames: int, count: int) -> list[int]:
    """Which `count` of so many frames are evenly apart, in order; the middle one for 1."""
    return [frames // 2] if count == 1 else [round(k * (frames - 1) / (count - 1)) for k in range(count)]
