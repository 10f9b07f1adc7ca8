"""Where a picture's content is: importance maps over the latent grid, for advantages per position (ViPO).

ViPO, arXiv 2511.18719, is known here from notes and its authors' laboratory's code (good, not bit-exact to the paper).
Not known and chosen here: the rule at the edge when smoothing, the sign of a component, and `orient="border"`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.perception.media import DenseFeatures, Media, check_media

Orient = Literal["border", "reverse", "none"]
Normalise = Literal["minmax", "mean_one"]

FLAT = 1e-6
"""A map in [0, 1] that varies by less, or features that do so relative to their size, are constant."""

NOISE = 1e-10
"""A component with this share of the first one's variance or less is rounding."""


@runtime_checkable
class MapProvider(Protocol):
    """Says how much each place of a picture counts."""

    def __call__(self, media: Media, size: tuple[int, int]) -> Tensor:
        """Pictures, uint8 [N, H, W, 3], to float32 [N, h, w] ≥ 0; (h, w) = `size`, the latent's rows and columns."""
        ...


@dataclass(frozen=True)
class FeatureMaps:
    """ViPO's map: principal components of a picture's dense features, made one picture.

    Per picture: the features are centred over the grid's cells; the projections on the first `components` principal
    directions are each brought to [0, 1], weighted by their explained variance (renormalised over those used) and
    summed; the sum is smoothed, brought to [0, 1], resized (bilinear, antialiased) and normalised.

    features    dense features; any callable [N, H, W, 3] -> [N, gh, gw, d]
    components  3 in the published code; fewer where the features' rank is less
    smooth      σ of the Gaussian in cells of the grid, 1 in the published code; 0: none. The kernel ends at the
                picture's edge, and its weights inside are renormalised
    orient      which end of a component is 1, as its sign means nothing:
                "border"  ours, the default: the border's cells are background, so their mean is the smaller one
                "reverse" (max−x)/(max−min), as published
                "none"    (x−min)/(max−min)
                In the last two the sign is such that the direction's entry of largest size is positive: a function of
                the picture, but a foreground may be 1 in one picture and 0 in the next
    normalise   "minmax", as published: [0, 1], so the mean is below 1 and differs between pictures; "mean_one": this
                divided by its mean, so that a mean over positions keeps its scale

    A picture with constant or non-finite features, or whose map comes out constant, counts alike everywhere: all ones.
    Raises ValueError for a value out of range; when called, for features of another shape, and with "border" for a grid
    without an inside.
    """

    features: DenseFeatures
    components: int = 3
    smooth: float = 1.0
    orient: Orient = "border"
    normalise: Normalise = "minmax"

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: {self.components} must be at least 1; 3 is usual")
        if not (math.isfinite(self.smooth) and self.smooth >= 0):
            raise ValueError(f"smooth: {self.smooth} must be finite and at least 0; 1.0 is usual")
        for name, value, known in (("orient", self.orient, Orient), ("normalise", self.normalise, Normalise)):
            if value not in get_args(known):
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(get_args(known))}")

    def __call__(self, media: Media, size: tuple[int, int]) -> Tensor:
        """float32 [N, h, w] ≥ 0 on the CPU; a row depends on its picture alone, if it does so in the features."""
        check_media(media)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: {tuple(size)} must be two sides of at least 1; nearest valid: (1, 1)")
        features = self.features(media).detach()
        self._check(features, len(media))
        # One picture at a time: in batches the last bits of a product may depend on the neighbours.
        return torch.stack([self._map(f.double(), size) for f in features]) if len(media) else torch.zeros(0, *size)

    def _check(self, features: Tensor, count: int) -> None:
        if features.ndim != 4 or len(features) != count or 0 in features.shape[1:] or not features.is_floating_point():
            raise ValueError(
                f"features is {features.dtype} {list(features.shape)} for {count} pictures; "
                f"nearest valid: torch.float32 [{count}, gh, gw, d]"
            )
        if self.orient == "border" and min(features.shape[1:3]) < 3:
            raise ValueError(
                f"orient: 'border' finds no inside in a grid of {features.shape[1]}×{features.shape[2]}; "
                "nearest valid: a grid of 3×3, or orient='none'"
            )

    def _map(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """float64 [gh, gw, d] to float32 [h, w]."""
        grid, ones = features.shape[:2], torch.ones(size)
        if not bool(features.isfinite().all()):
            return ones
        found = principal(features.flatten(0, 1), self.components)
        if found is None:
            return ones
        projections, share = found
        parts = [oriented(p.reshape(grid), self.orient) for p in projections]
        summed = sum((w * p for w, p in zip(share, parts, strict=True)), torch.zeros(grid, dtype=torch.float64))
        coarse = unit_range(smoothed(summed.clamp(0, 1), self.smooth))
        if coarse is None:
            return ones
        resized = F.interpolate(coarse[None, None], size, mode="bilinear", antialias=True, align_corners=False)[0, 0]
        fine = unit_range(resized)
        if fine is None:
            return ones
        return (fine / fine.mean() if self.normalise == "mean_one" else fine).float()


def oriented(projection: Tensor, orient: Orient) -> Tensor:
    """A projection [gh, gw] brought to [0, 1]; .5 where it is constant. With "border" the grid has an inside."""
    unit = unit_range(projection)
    if unit is None:
        return torch.full_like(projection, 0.5)
    turn = orient == "reverse" or (orient == "border" and bool(border_mean(unit) > unit[1:-1, 1:-1].mean()))
    return 1 - unit if turn else unit


def principal(rows: Tensor, components: int) -> tuple[Tensor, Tensor] | None:
    """Principal components of the rows of float64 [P, d]: projections [K, P] and their shares of variance [K], sum 1.

    K ≤ `components`: those that are more than rounding. None when the rows are all the same. Projections are in units
    of the largest deviation from the mean, which min-max takes out. A direction's entry of largest size is positive.
    """
    centred = rows - rows.mean(0)
    size = centred.abs().max()
    if size <= FLAT * rows.abs().max():
        return None
    centred = centred / size
    tall = len(centred) > centred.shape[1]
    # Eigenvectors of the smaller of the two Gram matrices: in float64 the first components lose nothing by it.
    values, vectors = torch.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    keep = values > NOISE * values[0]
    values, vectors = values[keep], vectors[:, keep]
    directions = vectors if tall else centred.T @ vectors / values.sqrt()
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    return (centred @ (directions * largest.sign())).T, values / values.sum()


def unit_range(x: Tensor) -> Tensor | None:
    """(x−min)/(max−min); None where x is constant (by `FLAT`, relative to a size of at least 1)."""
    low, high = x.min(), x.max()
    if high - low <= FLAT * max(1.0, float(x.abs().max())):
        return None
    return (x - low) / (high - low)


def border_mean(x: Tensor) -> Tensor:
    """Mean of the outermost ring of [gh, gw]."""
    return torch.cat([x[0], x[-1], x[1:-1, 0], x[1:-1, -1]]).mean()


def smoothed(x: Tensor, sigma: float) -> Tensor:
    """[gh, gw] under a Gaussian of σ cells, its weights renormalised inside the grid: a constant stays constant."""
    if sigma == 0:
        return x
    rows, columns = (_kernel(n, sigma, x.dtype) for n in x.shape)
    return rows @ x @ columns.T


def _kernel(cells: int, sigma: float, dtype: torch.dtype) -> Tensor:
    place = torch.arange(cells, dtype=dtype)
    weight = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return weight / weight.sum(1, keepdim=True)
