"""A picture as one vector, so that a group's spread can be measured where the eye looks (perceptual entropy).

Perceptual entropy, arXiv 2605.12112, is known here from its project page alone: which layer of an encoder it takes and
how it scales the vectors is not stated. A bonus is a squared distance times λ, so the scale matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.perception.dino import DinoBackbone
from tempflow.perception.diversity import features
from tempflow.perception.pictures import Pictures, check_pictures

Pool = Literal["cls", "patches"]


@runtime_checkable
class Embedding(Protocol):
    """Turns each picture into a vector; like pictures lie close."""

    def __call__(self, media: Pictures) -> Tensor:
        """Pictures, uint8 [N, H, W, 3], to float32 [N, d] on the CPU; equal pictures give equal rows."""
        ...


@dataclass(frozen=True)
class HandEmbedding:
    """The features of `perception.diversity`: colour, layout and edges, without a network. Black is 1 from white."""

    def __call__(self, media: Pictures) -> Tensor:
        """float32 [N, 128]. Raises ValueError for media that is not uint8 [N, H, W, 3] on the CPU."""
        check_pictures(media)
        return features(media)


class DinoEmbedding:
    """A picture's vector by DINOv2.

    pool  "cls": the CLS token after the last norm; "patches": the mean of the patches' tokens
    unit  True: scaled to length 1, so that squared distances lie in [0, 4] whatever the backbone (ours; the paper does
          not say)

    Other arguments and errors are those of `DinoBackbone`; ValueError for another `pool`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        *,
        pool: Pool = "cls",
        unit: bool = True,
        patches: int = 16,
        rows: int = 1,
        device: str = "cpu",
    ) -> None:
        if pool not in get_args(Pool):
            raise ValueError(f"pool: {pool!r} is not one of {', '.join(get_args(Pool))}")
        self.backbone = DinoBackbone(path, revision, patches=patches, rows=rows, device=device)
        self.pool, self.unit = pool, unit

    def __call__(self, media: Pictures) -> Tensor:
        """float32 [N, d] on the CPU, d the backbone's width."""
        pooled = [cls if self.pool == "cls" else grid.mean((1, 2)) for cls, grid in self.backbone.tokens(media)]
        found = torch.cat(pooled) if pooled else torch.empty(0, self.backbone.width)
        return F.normalize(found, dim=1) if self.unit else found
