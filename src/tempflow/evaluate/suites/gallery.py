"""Pictures in a folder, as prompts' numbers and samples; and one picture as it is judged."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tempflow.data.pictures import BROKEN, FORMATS
from tempflow.folder import kind_of
from tempflow.strict import cut

FOLDER, PICTURES = "suite", "pictures"
"""What a suite's folder is marked as, and where its pictures lie in it."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Key = tuple[int, int]
"""Number of a prompt, and of a picture of it."""


def is_gallery(place: Path) -> bool:
    """Whether it is a folder of pictures in one of the layouts that `gallery` reads."""
    return place.is_dir() and bool(_found(place))


def gallery(place: Path) -> dict[Key, Path]:
    """The pictures in a folder.

    Layouts: {number}_{sample}.png, as suites and UniGenBench have them; {number}.png, as `tempflow sample` writes; and
    GenEval's {number}/samples/{sample}.png. Also .jpg, .jpeg and .webp. The folder may be a suite's. Samples are
    counted from 0 in the order of their numbers.

    Raises ValueError for two files of one number, and for a folder with none.
    """
    found = _found(place)
    if not found:
        raise ValueError(f"what: {str(place)!r} holds no pictures; nearest valid: names such as 00000_0.png")
    by_number: dict[int, dict[int, Path]] = defaultdict(dict)
    for number, sample, file in found:
        other = by_number[number].setdefault(sample, file)
        if other != file:
            raise ValueError(f"what: {str(file)!r} and {other.name!r} are the same picture of prompt {number}")
    return {(n, k): file for n, of in by_number.items() for k, (_, file) in enumerate(sorted(of.items()))}


def _found(place: Path) -> list[tuple[int, int, Path]]:
    """(number, sample, file)."""
    home = place / PICTURES if kind_of(place) == FOLDER else place
    found: list[tuple[int, int, Path]] = []
    for entry in sorted(home.iterdir()) if home.is_dir() else []:
        if entry.is_dir() and _is_number(entry.name) and (entry / "samples").is_dir():
            inside = [f for f in sorted((entry / "samples").iterdir()) if _is_number(f.stem)]
            found += [(int(entry.name), int(file.stem), file) for file in inside if _is_picture(file)]
        elif _is_picture(entry) and (said := re.fullmatch(r"([0-9]{1,9})(?:_([0-9]{1,9}))?", entry.stem)):
            found.append((int(said[1]), int(said[2] or 0), entry))
    return found


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file()


def load_picture(file: Path) -> Tensor:
    """uint8 [H, W, 3], upright. Raises ValueError, naming the file, for what is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                upright = ImageOps.exif_transpose(picture)
                return torch.from_numpy(np.array(upright.convert("RGB")))
    except BROKEN as error:
        raise ValueError(f"{str(file)!r} is no picture that can be read ({cut(str(error))})") from error


def named(keys: Iterable[Key], most: int = 8) -> str:
    """Pictures in words: "3_0, 3_1 and 5 more"."""
    told = [f"{number}_{sample}" for number, sample in keys]
    more = f" and {len(told) - most} more" if len(told) > most else ""
    return ", ".join(told[:most]) + more


def missing(there: Mapping[Key, Path], numbers: Iterable[int], samples: int) -> list[Key]:
    """Pictures of the prompts that are not there."""
    return [(n, k) for n in numbers for k in range(samples) if (n, k) not in there]
