"""Pictures that prompts name in their metadata: found inside one folder, checked before a run, read as bytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tempflow.data.prompts import source_path
from tempflow.media import DURATION, Media, Size
from tempflow.request import Prompt

MAX_BYTES = 64 * 2**20
"""Of a picture's file."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""No others are tried: some of PIL's readers start other programs."""

ANIMATED = ("PNG", "WEBP")
"""Of these, those whose further pictures are frames of a clip; in a JPEG they are previews and depths."""

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
"""What becomes 8-bit RGB without a guess about its range."""

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""

BROKEN = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What PIL raises on files that are no pictures, are cut short, or unpack to too much."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of prompts: under each of `keys` the prompt's metadata has a path relative to `root`.

    root  the folder that all pictures are in; a path that leaves it, by "..", from "/" or by a link, is refused
    keys  which of a prompt's metadata
    size  of the run's media; a clip is an animated PNG or WebP. A picture of another size is refused: cropping or
          scaling is a choice about the data, and nobody would see a wrong one. So is a clip of another length or rate:
          by its duration a frame stands for several equal ones, at the run's rate, or else at DURATION a frame.
          Where all stand for several the clip is of a lower rate, and nobody says that its frames come twice

    PNG, JPEG and WebP files up to 64 MiB. Grey, palette and CMYK pictures become RGB; transparency is dropped.
    """

    root: Path
    keys: tuple[str, ...]
    size: Size

    @classmethod
    def beside(cls, source: str, keys: tuple[str, ...], size: Size) -> Pictures:
        """Those that a prompts' file names: its folder is the root."""
        return cls(source_path(source).parent, keys, size)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Looks at the header of every picture, and at every frame of a clip.

        Raises ValueError, naming the prompt, the key and the file, for the first that is missing, outside `root`, too
        large, no picture, turned by EXIF, or of another size, length, rate or range.
        """
        for number, prompt in enumerate(prompts, start=1):
            for key in self.keys:
                self._read(prompt, key, f"prompt {number}", header=self.size.frames == 1)

    def __call__(self, prompts: Sequence[Prompt]) -> Media:
        """N·keys media, a prompt's in the keys' order. Raises ValueError as `check` does, and where
        a file's data are broken, which its header does not show."""
        found: list[np.ndarray] = []
        for prompt in prompts:
            for key in self.keys:
                found.append(np.stack(self._read(prompt, key, "prompt")))
        return Media(torch.from_numpy(np.stack(found)), self.size.fps)

    def _read(self, prompt: Prompt, key: str, who: str, header: bool = False) -> list[np.ndarray]:
        """The run's frames of a picture or clip that is found good; none where its header alone is looked at. What PIL
        raises becomes a ValueError with its name."""
        name = _named(prompt, key, who)
        where = f"{who} ({prompt.text!r}), {key} {name!r}"
        path = _inside(self.root, name, where)
        found: list[np.ndarray] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=FORMATS) as picture:
                    fault = _fault(picture, self.size)
                    if not fault and not header:
                        shown = _frames(picture, self.size)
                        fault = _misfit([duration for _, duration in shown], picture, self.size)
                        if not fault:
                            found = [frame for frame, duration in shown for _ in range(_count(duration, self.size))]
        except BROKEN as error:
            why = f"no picture that can be read ({error}); nearest valid: a {', '.join(FORMATS)} file"
            raise ValueError(f"{where}: {why}") from error
        if fault:
            raise ValueError(f"{where}: {fault}")
        return found


def _named(prompt: Prompt, key: str, who: str) -> str:
    name = prompt.metadata.get(key)
    if isinstance(name, str) and name:
        return name
    if key in prompt.metadata:
        raise ValueError(f'{who} ({prompt.text!r}): "{key}" is {name!r}; it must be a picture\'s path')
    near = get_close_matches(key, [str(k) for k in prompt.metadata], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f'; a line looks like {{"prompt": …, "{key}": "a.png"}}'
    raise ValueError(f'{who} ({prompt.text!r}): no "{key}"{hint}')


def _inside(root: Path, name: str, where: str) -> Path:
    """The file of that name in `root`, links followed."""
    home, given = root.resolve(), Path(name)
    try:
        path = (home / given).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null byte
        raise ValueError(f"{where}: no path ({error})") from error
    if given.is_absolute() or ".." in given.parts or not path.is_relative_to(home):
        raise ValueError(f"{where}: leads out of {root}; nearest valid: a relative path to a file in it")
    if not path.is_file():
        names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, n=1)
        raise ValueError(f"{where}: {path} is no file" + (f"; nearest valid: {near[0]!r}" if near else ""))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{where}: {path.stat().st_size} bytes; the largest valid size is {MAX_BYTES}")
    return path


def _frames(picture: Image.Image, size: Size) -> list[tuple[np.ndarray, float]]:
    """Those of a clip, at most as many as are asked for, and the milliseconds that each is shown, 0 where it does not
    say; of a picture the one."""
    found: list[tuple[np.ndarray, float]] = []
    for number in range(min(size.frames, getattr(picture, "n_frames", 1))):
        if number:
            picture.seek(number)
        colours = np.array(picture.convert("RGB"))
        found.append((colours, float(picture.info.get("duration") or 0)))  # which WebP knows once it is loaded
    return found


def _step(size: Size) -> float:
    """Milliseconds a frame of the run."""
    return DURATION if size.fps is None else 1000 / size.fps


def _count(duration: float, size: Size) -> int:
    """How many of the run's frames one of a file stands for."""
    return max(1, round(duration / _step(size))) if size.frames > 1 else 1


def _misfit(durations: Sequence[float], picture: Image.Image, size: Size) -> str:
    """What is wrong with the length or the rate of a clip; "" where nothing is. WebP's times are whole milliseconds."""
    if size.frames == 1:
        return ""
    step, stored = _step(size), getattr(picture, "n_frames", 1)
    slack = min(1, step / 4)
    counts = [_count(duration, size) for duration in durations]
    fits = all(not d or abs(d - step * n) <= slack for d, n in zip(durations, counts, strict=True))
    every = math.gcd(*counts)  # 2: no frame is shown for less than two of the run's, so the clip has half its rate
    if fits and every == 1 and sum(counts) == size.frames and stored == len(durations):
        return ""
    shortest = step * every if fits else min(duration for duration in durations if duration)
    frames = max(stored, sum(max(1, round(duration / shortest)) for duration in durations))
    rate = f"{1000 / shortest:.5g}"
    return (
        f"has {frames} frames at {rate} a second, and the run draws {size.frames} at {1000 / step:.5g}; "
        f"nearest valid: model.frames {frames}, model.fps {rate}"
    )


def _fault(picture: Image.Image, size: Size) -> str:
    """What is wrong with a picture by its header; "" where nothing is."""
    width, height = picture.size
    if (height, width) != (size.height, size.width):
        return (
            f"is {height}×{width} (height × width), and the run draws {size.height}×{size.width}; scale or crop it, or "
            f"set model.height {height} and model.width {width} where all are alike"
        )
    stored = getattr(picture, "n_frames", 1) if picture.format in ANIMATED else 1
    if size.frames == 1 and stored > 1:
        return f"has {stored} frames, and the run draws pictures; nearest valid: one frame, or model.frames {stored}"
    if picture.mode not in MODES:
        return f"has mode {picture.mode}, whose range is not 8 bits; nearest valid: RGB"
    turned = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info else 1  # of a PNG it would read all
    if turned != 1:
        return f"is stored turned (EXIF orientation {turned}); nearest valid: saved upright"
    return ""
