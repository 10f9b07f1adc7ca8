"""Dense features by hand, without a network: enough for pictures as plain as those of `shapes`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.perception.pictures import Pictures, check_pictures


@dataclass(frozen=True)
class HandFeatures:
    """Five numbers per cell of a `grid`×`grid` over the picture.

    Mean colour (three), contrast (standard deviation in the cell, root mean square over the colours) and edge strength
    (mean length of the gradient over all colours), of colours in [0, 1]. A picture whose sides `grid` does not divide
    has overlapping cells. Raises ValueError for a grid below 1.
    """

    grid: int = 8

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid: {self.grid} must be at least 1; 8 is usual")

    def __call__(self, media: Pictures) -> Tensor:
        """float32 [N, grid, grid, 5]. Raises ValueError for media that is not uint8 [N, H, W, 3] on the CPU."""
        check_pictures(media)
        picture = media.permute(0, 3, 1, 2).contiguous().float() / 255
        mean = self._cells(picture)
        variance = (self._cells(picture**2) - mean**2).mean(1, keepdim=True).clamp(min=0)
        return torch.cat([mean, variance.sqrt(), self._cells(_strength(picture))], 1).movedim(1, -1).contiguous()

    def _cells(self, maps: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(maps, self.grid)


def _strength(picture: Tensor) -> Tensor:
    """[N, 3, H, W] to [N, 1, H, W]: the root mean square over colours of the gradient's length."""
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return (x * x + y * y).mean(1, keepdim=True).sqrt()
