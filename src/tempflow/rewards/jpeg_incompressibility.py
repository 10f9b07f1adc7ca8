"""JPEG incompressibility, the other classic of DDPO (arXiv 2305.13301): it asks for detail, and finds noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tempflow.rewards.jpeg_compressibility import LICENCE, NEEDS, JPEGCompressibility, Quality

__all__ = ["LICENCE", "NEEDS", "RANGE", "JPEGIncompressibility", "jpeg_incompressibility"]

RANGE = "kB, above 0"


def jpeg_incompressibility(*, quality: Quality = 95) -> JPEGIncompressibility:
    """The kilobytes of the picture's JPEG."""
    return JPEGIncompressibility(quality)


@dataclass(frozen=True)
class JPEGIncompressibility(JPEGCompressibility):
    """The size of the picture's JPEG file in kilobytes (1000 bytes). Options as of `JPEGCompressibility`."""

    name: str = "jpeg_incompressibility"
    sign: ClassVar[int] = 1
