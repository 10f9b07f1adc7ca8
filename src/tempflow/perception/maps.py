"""Where a picture's content is: importance maps over the latent grid, for advantages per position (ViPO).

ViPO, arXiv 2511.18719, is known here from notes and its authors' laboratory's code (good, not bit-exact to the paper).
Not known and chosen here: the rule at the edge when smoothing, the sign of a component, and `orient="border"`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.perception.pictures import DenseFeatures, Pictures, check_pictures

Orient = Literal["border", "reverse", "none"]
Normalise = Literal["minmax", "mean_one"]

FLAT = 1e-6
"""A map in [0, 1] that varies by less, or features that do so relative to their size, are constant."""

NOISE = 1e-10
"""A component with this share of the first one's variance or less is rounding."""


@runtime_checkable
class MapProvider(Protocol):
    """Says how much each place of a picture counts."""

    def __call__(self, media: Pictures, size: tuple[int, int]) -> Tensor:
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

    def __call__(self, media: Pictures, size: tuple[int, int]) -> Tensor:
        """float32 [N, h, w] ≥ 0 on the CPU; a row depends on its picture alone, if it does so in the features."""
        check_pictures(media)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: {tuple(size)} must be two sides of at least 1; nearest valid: (1, 1)")
        features = self.features(media).detach()
        self._check(features, len(media))
        if len(media) == 0:
            return torch.zeros(0, *size)
        # One picture at a time: in batches the last bits of a product may depend on the neighbours.
        found = [principal(f.flatten(0, 1), self.components) for f in features.cpu().double()]
        projections, share = (torch.stack(part) for part in zip(*found, strict=True))
        parts = oriented(projections.unflatten(2, features.shape[1:3]), self.orient)  # [N, K, gh, gw]
        summed = (share[..., None, None] * parts).sum(1).clamp(0, 1)
        coarse = unit_range(torch.stack([smoothed(x, self.smooth) for x in summed]), constant=1.0)
        resized = F.interpolate(coarse[:, None], size, mode="bilinear", antialias=True, align_corners=False)[:, 0]
        fine = unit_range(resized, constant=1.0)
        return (fine / fine.mean((1, 2), keepdim=True) if self.normalise == "mean_one" else fine).float()

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


def oriented(projections: Tensor, orient: Orient) -> Tensor:
    """Projections [..., gh, gw], each brought to [0, 1]; .5 where constant. With "border" the grid has an inside."""
    unit = unit_range(projections, constant=0.5)
    if orient == "none":
        return unit
    turned = 1 - unit
    if orient == "reverse":
        return turned
    return torch.where((border_mean(unit) > unit[..., 1:-1, 1:-1].mean((-2, -1)))[..., None, None], turned, unit)


def principal(rows: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Principal components of the rows of float64 [P, d]: projections [K, P] and their shares of variance [K], sum 1.

    K = `components`; 0 stands for those that are no more than rounding, and for all where the rows are the same or not
    finite. Projections are in units of the largest deviation from the mean, which min-max takes out. A direction's
    entry of largest size is positive.
    """
    projections, share = rows.new_zeros(components, len(rows)), rows.new_zeros(components)
    centred = rows - rows.mean(0)
    size = centred.abs().max()
    if not size > FLAT * rows.abs().max():  # NaN is not
        return projections, share
    centred = centred / size
    tall = len(centred) > centred.shape[1]
    # Eigenvectors of the smaller of the two Gram matrices: in float64 the first components lose nothing by it.
    values, vectors = torch.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    keep = values > NOISE * values[0]
    values, vectors = values[keep], vectors[:, keep]
    directions = vectors if tall else centred.T @ vectors / values.sqrt()
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))[0]
    projections[: len(values)] = (centred @ (directions * largest.sign())).T
    share[: len(values)] = values / values.sum()
    return projections, share


def unit_range(x: Tensor, constant: float) -> Tensor:
    """(x−min)/(max−min) of each map [..., h, w]; `constant` where one is constant (by `FLAT`, relative to a size of at
    least 1)."""
    low, high, size = x.amin((-2, -1), True), x.amax((-2, -1), True), x.abs().amax((-2, -1), True)
    flat = high - low <= FLAT * size.clamp(min=1)
    return torch.where(flat, constant, (x - low) / torch.where(flat, 1, high - low))


def border_mean(x: Tensor) -> Tensor:
    """Mean of the outermost ring of [..., gh, gw]."""
    return torch.cat([x[..., 0, :], x[..., -1, :], x[..., 1:-1, 0], x[..., 1:-1, -1]], -1).mean(-1)


def smoothed(x: Tensor, sigma: float) -> Tensor:
    """[gh, gw] under a Gaussian of σ cells, its weights renormalised inside the grid: a constant stays constant."""
    if sigma == 0:
        return x
    rows, columns = (_kernel(n, sigma, x.dtype) for n in x.shape)
    return rows @ x @ columns.T


@lru_cache(maxsize=64)
def _kernel(cells: int, sigma: float, dtype: torch.dtype) -> Tensor:
    place = torch.arange(cells, dtype=dtype)
    weight = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return weight / weight.sum(1, keepdim=True)
