"""Pictures that prompts name in their metadata: found inside one folder, checked before a run, read as bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tempflow.data.prompts import source_path
from tempflow.media import Media, Size
from tempflow.request import Prompt

MAX_BYTES = 64 * 2**20
"""Of a picture's file."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""No others are tried: some of PIL's readers start other programs."""

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
"""What becomes 8-bit RGB without a guess about its range."""

ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""

BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What PIL raises on files that are no pictures, are cut short, or unpack to too much."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of prompts: under each of `keys` the prompt's metadata has a path relative to `root`.

    root  the folder that all pictures are in; a path that leaves it, by "..", from "/" or by a link, is refused
    keys  which of a prompt's metadata
    size  of the run's media; a clip is an animated PNG or WebP. A picture of another size is refused: cropping or
          scaling is a choice about the data, and nobody would see a wrong one

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
        """Looks at the header of every picture.

        Raises ValueError, naming the prompt, the key and the file, for the first that is missing, outside `root`, too
        large, no picture, turned by EXIF, or of another size or range.
        """
        for number, prompt in enumerate(prompts, start=1):
            for key in self.keys:
                with self._opened(prompt, key, f"prompt {number}"):
                    pass

    def __call__(self, prompts: Sequence[Prompt]) -> Media:
        """N·keys media, a prompt's in the keys' order. Raises ValueError as `check` does, and where
        a file's data are broken, which its header does not show."""
        found: list[np.ndarray] = []
        for prompt in prompts:
            for key in self.keys:
                with self._opened(prompt, key, "prompt") as picture:
                    found.append(np.stack([np.array(frame.convert("RGB")) for frame in _frames(picture, self.size)]))
        return Media(torch.from_numpy(np.stack(found)), self.size.fps)

    @contextmanager
    def _opened(self, prompt: Prompt, key: str, who: str) -> Iterator[Image.Image]:
        """The picture, its header read and found good. What PIL raises inside becomes a ValueError with its name."""
        name = _named(prompt, key, who)
        where = f"{who} ({prompt.text!r}), {key} {name!r}"
        path = _inside(self.root, name, where)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=FORMATS) as picture:
                    fault = _fault(picture, self.size)
                    if not fault:
                        yield picture
        except BROKEN as error:
            why = f"no picture that can be read ({error}); nearest valid: a {', '.join(FORMATS)} file"
            raise ValueError(f"{where}: {why}") from error
        if fault:
            raise ValueError(f"{where}: {fault}")


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


def _frames(picture: Image.Image, size: Size) -> Iterator[Image.Image]:
    """Those of a clip; of a picture, and of an animation where pictures are asked for, the first."""
    for number in range(size.frames):
        if number:
            picture.seek(number)
        yield picture


def _fault(picture: Image.Image, size: Size) -> str:
    """What is wrong with a picture by its header; "" where nothing is."""
    width, height = picture.size
    if (height, width) != (size.height, size.width):
        return (
            f"is {height}×{width} (height × width), and the run draws {size.height}×{size.width}; scale or crop it, or "
            f"set model.height {height} and model.width {width} where all are alike"
        )
    frames = getattr(picture, "n_frames", 1)
    if size.frames > 1 and frames != size.frames:
        return f"has {frames} frames, and the run draws {size.frames}; nearest valid: model.frames {frames}"
    if picture.mode not in MODES:
        return f"has mode {picture.mode}, whose range is not 8 bits; nearest valid: RGB"
    turned = picture.getexif().get(ORIENTATION, 1) if "exif" in picture.info else 1  # of a PNG it would read all
    if turned != 1:
        return f"is stored turned (EXIF orientation {turned}); nearest valid: saved upright"
    return ""
