"""Rendered pictures and where their shapes are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tempflow.shapes.prompts import specs
from tempflow.shapes.render import compose, draw

VISIBLE = 20
"""A pixel this far from the ground in any colour belongs to a shape, antialiased rims included."""


def rendered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 32, 32, 3] of random prompts, and bool [N, 32, 32]: the pixels of shapes."""
    rng = np.random.default_rng(seed)
    pictures: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for i in rng.integers(len(specs()), size=count):
        objects, shade = compose(specs()[i], rng)
        pictures.append(draw(objects, (shade, shade, shade)))
        masks.append(np.abs(pictures[-1].astype(int) - shade).max(-1) > VISIBLE)
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(masks))


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
