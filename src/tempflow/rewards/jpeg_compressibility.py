"""JPEG compressibility: the classic reward that needs no model (DDPO, arXiv 2305.13301; kept by flow_grpo)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from PIL import Image
from pydantic import Field

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards.protocol import check_media

LICENCE, NEEDS, RANGE = "Apache-2.0", "", "−kB, below 0"

Quality = Annotated[int, Field(ge=1, le=95)]
"""Of a JPEG, on PIL's scale."""


def jpeg_compressibility(*, quality: Quality = 95) -> JPEGCompressibility:
    """Minus the kilobytes of the picture's JPEG."""
    return JPEGCompressibility(quality)


@dataclass(frozen=True)
class JPEGCompressibility:
    """Minus the size of the picture's JPEG file in kilobytes (1000 bytes). Unit: −kB, at most 0.

    quality  1 to 95, PIL's scale; DDPO and flow_grpo use 95. Raises ValueError outside.
    """

    quality: int = 95
    name: str = "jpeg_compressibility"
    groupwise: bool = False
    sign: ClassVar[int] = -1

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality = {self.quality}; nearest valid: {min(max(self.quality, 1), 95)}")

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; never fails. The prompt plays no part."""
        pictures = check_media(media, prompts, metadata).pictures()
        sizes = [self._bytes(Image.fromarray(picture)) for picture in pictures.numpy()]
        value = self.sign * torch.tensor(sizes, dtype=torch.float32)[:, None] / 1000
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))

    def _bytes(self, image: Image.Image) -> int:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=self.quality)
        return file.tell()
