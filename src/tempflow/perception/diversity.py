"""How different pictures of one prompt are: distances between hand-made features, without a network.

A picture is averaged to 32×32 and blurred. Its features are, on a 4×4 grid of overlapping windows, the mean colour (48
numbers) and what edges there are (80 numbers: their strength m and, θ being their direction, m·cos 2θ, m·sin 2θ,
m·cos 4θ, m·sin 4θ, by the structure tensor over all colours; cf. the windows and orientations of Dalal and Triggs,
"Histograms of oriented gradients", CVPR 2005). The distance is Euclidean: 0 for equal pictures, 1 between a black and a
white one. It sees layout, colour and coarse shape, not meaning: compare it only with itself, on the same prompts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, WINDOW, STRIDE = 32, 14, 6
"""Working size of a picture; its 4×4 windows. 32 = 14 + 3·6."""

EDGE_GAIN = 6.0
"""Weight of edges beside colour: another shape in the same place is then half as far as another colour."""

PIXELS_AT_ONCE, PIXELS_AT_ONCE_ELSEWHERE = 1 << 16, 1 << 25
"""On a CPU 64 working pictures, which stay in a core's cache; on other devices they bound memory."""

FAINT = 1e-6
"""Below this squared gradient there is no direction; 8-bit steps are ten times as large."""


def features(media: Tensor) -> Tensor:
    """Pictures, uint8 [N, H, W, 3] of any size, to float32 [N, 128]; a row depends on its picture alone.

    Pictures that are not square are seen squeezed to one. Raises ValueError for another dtype or shape.
    """
    if media.dtype != torch.uint8 or media.ndim != 4 or media.shape[-1] != 3 or 0 in media.shape[1:]:
        raise ValueError(f"media is {media.dtype} {list(media.shape)}; nearest valid: torch.uint8 [N, H, W, 3]")
    pixels = PIXELS_AT_ONCE if media.device.type == "cpu" else PIXELS_AT_ONCE_ELSEWHERE
    at_once = max(1, pixels // (media.shape[1] * media.shape[2]))
    parts = [_features(part) for part in media.split(at_once)] if len(media) else []
    return torch.cat(parts) if parts else torch.empty(0, 8 * 16, device=media.device)


def within_groups(features: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean Euclidean distance over the pairs of rows of each group.

    features: float [N, D]; group: long [N]. Returns the groups that occur, ascending, long [G], and their distances,
    float64 [G]; NaN for a group of one. Raises ValueError when the lengths differ.
    """
    if features.ndim != 2 or group.shape != features.shape[:1]:
        raise ValueError(
            f"features is {list(features.shape)} and group {list(group.shape)}; nearest valid: [N, D] and [N]"
        )
    groups = torch.unique(group)
    rows = (features[group == g].cpu().double() for g in groups)
    # Of one row pdist is empty, and the mean of nothing is NaN. It takes differences: equal rows are exactly 0 apart.
    return groups, torch.tensor([float(F.pdist(r).mean()) for r in rows], dtype=torch.float64)


def _features(media: Tensor) -> Tensor:
    picture = media.permute(0, 3, 1, 2).contiguous().float() / 255
    if picture.shape[2:] != (SIDE, SIDE):
        picture = F.adaptive_avg_pool2d(picture, SIDE)
    picture = _blurred(picture)
    colour = _windows(picture)
    edges = _windows(_edges(picture)) * EDGE_GAIN
    return torch.cat([colour, edges], 1).flatten(1) / math.sqrt(colour[0].numel())


def _blurred(x: Tensor) -> Tensor:
    """Binomial blur of five taps, which is four sums of neighbours. No matrix product: a row's rounding is its own."""
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    for _ in range(4):
        x = x[:, :, 1:] + x[:, :, :-1]
    for _ in range(4):
        x = x[..., 1:] + x[..., :-1]
    return x / 256


def _edges(picture: Tensor) -> Tensor:
    """[N, 5, 32, 32]: strength and its first two even harmonics of direction."""
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    xx, yy, xy = (x * x).mean(1), (y * y).mean(1), (x * y).mean(1)
    m = (xx + yy + FAINT).sqrt()
    c, s = (xx - yy) / m, 2 * xy / m
    return torch.stack([m - FAINT**0.5, c, s, (c * c - s * s) / m, 2 * c * s / m], 1)


def _windows(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, WINDOW, STRIDE)
