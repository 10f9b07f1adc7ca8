"""What this room is given, and the dense features that its maps are made of."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Pictures = Tensor
"""Pictures: uint8 [N, H, W, 3] on the CPU."""


@runtime_checkable
class DenseFeatures(Protocol):
    """A vector for every cell of a grid that covers the whole picture."""

    def __call__(self, media: Pictures) -> Tensor:
        """Pictures, uint8 [N, H, W, 3], to floats [N, gh, gw, d] on the CPU; a row depends on its picture alone."""
        ...


def check_pictures(media: Pictures) -> None:
    """Raises ValueError unless media is uint8 [N, H, W, 3] on the CPU with pixels in it."""
    wrong = media.dtype != torch.uint8 or media.ndim != 4 or media.shape[-1] != 3 or 0 in media.shape[1:]
    if wrong or media.device.type != "cpu":
        raise ValueError(
            f"media is {media.dtype} {list(media.shape)} on {media.device}; "
            "nearest valid: torch.uint8 [N, H, W, 3] on cpu"
        )
