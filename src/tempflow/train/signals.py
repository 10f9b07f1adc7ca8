"""Measurements of an iteration's leaves in which reward hacking shows before a reward does.

Latents are measured of all leaves. Pictures are measured where the latents are, of a fixed sample: up to SAMPLE of each
prompt's. What no guard asks for is not measured. Shares of picture energy are variances over pixels, per channel, added
over channels; pictures count in 8-bit steps. All sums over pixels are of whole numbers and exact, so a picture's figure
does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.config.guards import GuardsConfig
from tempflow.core.state import has_double
from tempflow.perception.diversity import features

PATCH = 2
"""Latent cells along a side of a transformer's patch, as in SD3, FLUX, Qwen-Image and the shapes model."""

SAMPLE = 8
"""Pictures of a slot that are looked at, evenly spaced among its leaves; where there are fewer, all."""

FIGURES = frozenset({"latent_rms", "diversity", "high_frequency", "grid"})
"""What may be left unmeasured; failures are always counted."""

PIXELS_AT_ONCE, PIXELS_AT_ONCE_ELSEWHERE = 1 << 20, 1 << 25
"""On a CPU they stay in a core's cache; on other devices they bound memory."""


@dataclass(frozen=True, eq=False)
class Signals:
    """One entry per prompt slot, on the CPU.

    prompt          long[P], the slots, ascending
    leaves          long[P], how many leaves a slot has
    latent_rms      float64[P], root mean square of its final latents
    diversity       float64[P], mean distance (`perception.diversity`) of pairs of its sampled pictures; NaN with one
    high_frequency  float64[P], mean of `high_frequency` over these pictures; NaN where they are too small
    grid            float64[P], mean of `grid_share` over these pictures; NaN where they are too small
    failed          float64[P], share of its leaves without a valid score; NaN where that was not said

    A figure that no guard asks for is NaN.
    """

    prompt: Tensor
    leaves: Tensor
    latent_rms: Tensor
    diversity: Tensor
    high_frequency: Tensor
    grid: Tensor
    failed: Tensor

    @staticmethod
    def cat(parts: Sequence[Signals]) -> Signals:
        """Chunks of whole prompts, joined in ascending order of slot.

        Raises ValueError for no part, and when two parts have leaves of one prompt.
        """
        if not parts:
            raise ValueError("parts = []: nothing to join; nearest valid: one Signals")
        slots, order = torch.sort(torch.cat([p.prompt for p in parts]))
        twice = slots[1:][slots[1:] == slots[:-1]]
        if len(twice):
            raise ValueError(f"prompt: slot {int(twice[0])} is in two parts; nearest valid: parts of whole prompts")
        columns = zip(*(p.columns for p in parts), strict=True)
        return Signals(*(torch.cat(column)[order] for column in columns))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The fields in their order, [P] each: what a process sends when prompts are spread over several."""
        return tuple(vars(self).values())

    def with_failures(self, prompt: Tensor, ok: Tensor) -> Signals:
        """With the share of leaves without a valid score, where it was not there yet. prompt: long[N], the leaves'
        slots; ok: bool[N]."""
        slot = torch.searchsorted(self.prompt, prompt.cpu())
        return replace(self, failed=_share(~ok.cpu(), slot, self.leaves))

    def metrics(self) -> dict[str, float]:
        """Means over prompts of what was measured, `reward_failures` over leaves; NaN where nothing was."""
        return {
            "latent_rms": self.latent_rms.mean().item(),
            "diversity": self.diversity.nanmean().item(),
            "high_frequency": self.high_frequency.nanmean().item(),
            "grid": self.grid.nanmean().item(),
            "reward_failures": ((self.failed * self.leaves).sum() / self.leaves.sum()).item(),
        }


def asked(guards: GuardsConfig) -> frozenset[str]:
    """Those of FIGURES that some guard looks at."""
    looked_at = {
        "latent_rms": guards.latent_norm.action,
        "diversity": guards.diversity.action,
        "high_frequency": guards.artefacts.action,
        "grid": guards.artefacts.action,
    }
    return frozenset(name for name, action in looked_at.items() if action != "off")


@torch.no_grad()
def measure(
    x0: Tensor, media: Tensor, prompt: Tensor, ok: Tensor | None = None, figures: Collection[str] = FIGURES
) -> Signals:
    """Measures leaves, on the device of x0, or on the CPU where that has no float64.

    x0: final latents, float [N, *S], or tokens, any device; media: uint8 [N, H, W, 3], any device; prompt: long[N],
    their slots; ok: bool[N], whether a leaf has a valid score; figures: those of FIGURES to measure. A slot's figures
    depend on its own leaves alone. Raises ValueError where the lengths differ or there is no leaf.
    """
    given = {"media": len(media), "prompt": len(prompt), "ok": len(x0) if ok is None else len(ok)}
    for name, count in given.items():
        if count != len(x0) or count == 0:
            raise ValueError(f"{name}: {count} rows; nearest valid: {max(1, len(x0))}, one for each of x0's leaves")
    slots, slot, leaves = torch.unique(prompt.cpu(), return_inverse=True, return_counts=True)
    rows, there = _sample(slot, leaves)
    place = x0.device if has_double(x0.device) else torch.device("cpu")
    looked = media[rows[there].to(media.device)].to(place) if set(figures) - {"latent_rms"} else media[:0]
    unknown = torch.full((len(slots),), math.nan, dtype=torch.float64)
    return Signals(
        slots,
        leaves,
        _rms(x0, slot, leaves) if "latent_rms" in figures else unknown,
        _distance(features(looked), there) if "diversity" in figures else unknown,
        _mean(high_frequency(looked), there) if "high_frequency" in figures else unknown,
        _mean(grid_share(looked, grid_period(x0.shape, media.shape)), there) if "grid" in figures else unknown,
        unknown if ok is None else _share(~ok.cpu(), slot, leaves),
    )


@torch.no_grad()
def measure_given(x0: Tensor, prompt: Tensor, ok: Tensor) -> Signals:
    """Of given samples, as `measure` takes them: the latents' norm and the failures. Their pictures are no work of the
    model's, so NaN is what is said of these."""
    slots, slot, leaves = torch.unique(prompt.cpu(), return_inverse=True, return_counts=True)
    unknown = torch.full((len(slots),), math.nan, dtype=torch.float64)
    return Signals(slots, leaves, _rms(x0, slot, leaves), unknown, unknown, unknown, _share(~ok.cpu(), slot, leaves))


def _sample(slot: Tensor, leaves: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the sampled leaves, long [P, SAMPLE], and which places of it are taken, bool; places are taken in order.

    slot: long[N], a leaf's slot from 0; leaves: long[P], how many each has.
    """
    order, place = torch.sort(slot, stable=True).indices, torch.arange(SAMPLE)
    there = place < leaves[:, None]
    step = torch.where(there.all(1), leaves, SAMPLE)[:, None]
    within = torch.where(there, place * step // SAMPLE, 0)
    return order[(leaves.cumsum(0) - leaves)[:, None] + within], there


def _spread(values: Tensor, there: Tensor) -> Tensor:
    """Values of the sampled pictures at their places, float64 [P, SAMPLE, …]; 0 elsewhere."""
    placed = torch.zeros(*there.shape, *values.shape[1:], dtype=torch.float64, device=values.device)
    placed[there.to(values.device)] = values.double()
    return placed


def _mean(values: Tensor, there: Tensor) -> Tensor:
    return _spread(values, there).sum(1).cpu() / there.sum(1)


def _distance(features: Tensor, there: Tensor) -> Tensor:
    """Mean Euclidean distance over a slot's pairs. It takes differences: equal pictures are exactly 0 apart."""
    a, b = torch.triu_indices(SAMPLE, SAMPLE, 1)
    placed, pairs = _spread(features, there), there[:, a] & there[:, b]
    apart = torch.linalg.vector_norm(placed[:, a] - placed[:, b], dim=2).cpu()
    return torch.where(pairs, apart, 0).sum(1) / pairs.sum(1)


def _share(flags: Tensor, slot: Tensor, leaves: Tensor) -> Tensor:
    return torch.zeros(len(leaves), dtype=torch.float64).index_add_(0, slot, flags.double()) / leaves


def _rms(x: Tensor, slot: Tensor, leaves: Tensor) -> Tensor:
    """In float32 or better; 1 of tokens, which have no size that could drift."""
    if not x.is_floating_point():
        return torch.ones(len(leaves), dtype=torch.float64)
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=dtype).cpu().double().square()
    total = torch.zeros(len(leaves), dtype=torch.float64).index_add_(0, slot, squares)
    return (total / (leaves * x[0].numel())).sqrt()


def grid_period(latent: Sequence[int], media: Sequence[int]) -> int | None:
    """Pixels along a side of a latent patch, for latents [N, …, h, w] and media [N, H, W, 3].

    None where media are no whole multiple of the latents' last two sides (packed or other latents).
    """
    if len(latent) < 4:
        return None
    (height, width), (h, w) = media[1:3], latent[-2:]
    cell = height // h
    return PATCH * cell if cell > 0 and (h * cell, w * cell) == (height, width) else None


def high_frequency(media: Tensor) -> Tensor:
    """Share of each picture's energy near the Nyquist frequency, float64 [N] in [0, 1]; media uint8 [N, H, W, 3].

    It is the energy of x − Bx over that of x, without the outermost pixels, B being the blur [1 2 1]⊗[1 2 1]/16. A wave
    of (f, g) cycles per pixel counts with (1 − cos²πf · cos²πg)²: 1 at the Nyquist frequency of either axis, 0.25 at
    half of it, 0.02 at a quarter; a checkerboard has share 1, a linear gradient 0. Energies of x below one 8-bit step
    squared count as one, so flat pictures have share 0. NaN for pictures under 3 pixels.
    """
    if min(media.shape[1:3]) < 3:
        return torch.full((len(media),), math.nan, dtype=torch.float64, device=media.device)
    return torch.cat([_high_frequency(_planes(part)) for part in _parts(media)])


def grid_share(media: Tensor, period: int | None) -> Tensor:
    """Share of each picture's energy in a pattern that repeats every `period` pixels along both axes, float64 [N].

    That is the energy at frequencies (a, b)/period, a and b whole and not both 0, cleared of what chance puts there.
    What remains of the picture without its period × period box average is cut into T tiles of that size. Of its
    variance v, the part that all tiles share is estimated as in a one-way analysis of variance: (T·m − v)/(T − 1), m
    being the variance of the mean tile. The share is 1 for a periodic pattern, 0 for a linear gradient, and 0 on
    average (so at times below 0) for texture that does not repeat. Energies below one 8-bit step squared count as one.
    NaN for pictures under three periods, and without a period.
    """
    if period is None or period < 2 or min(media.shape[1:3]) < 3 * period:
        return torch.full((len(media),), math.nan, dtype=torch.float64, device=media.device)
    return torch.cat([_grid_share(_planes(part), period) for part in _parts(media)])


def _parts(media: Tensor) -> Sequence[Tensor]:
    pixels = PIXELS_AT_ONCE if media.device.type == "cpu" else PIXELS_AT_ONCE_ELSEWHERE
    return media.split(max(1, pixels // (media.shape[1] * media.shape[2])))


def _planes(media: Tensor) -> Tensor:
    return media.permute(0, 3, 1, 2).contiguous().int()


def _energy(x: Tensor) -> Tensor:
    """Variance over the last two dims, added over channels; whole numbers [N, C, h, w] -> float64 [N]."""
    count = x.shape[-1] * x.shape[-2]
    total, square = x.sum((-2, -1)).double(), (x * x).sum((-2, -1)).double()
    return ((square - total * total / count) / count).sum(1)


def _high_frequency(x: Tensor) -> Tensor:
    rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    blurred = rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]
    inside = x[:, :, 1:-1, 1:-1]
    return _energy(16 * inside - blurred) / 256 / _energy(inside).clamp(min=1)


def _grid_share(x: Tensor, period: int) -> Tensor:
    height, width = ((side - period + 1) // period * period for side in x.shape[-2:])
    half, area = period // 2, period * period
    inside = x[:, :, half : half + height, half : half + width]
    rest = (area * inside - _box_sums(x, period)[:, :, :height, :width]).double() / area
    tiles = rest.unflatten(3, (-1, period)).unflatten(2, (-1, period))
    count = tiles.shape[2] * tiles.shape[4]
    shared, whole = (v.var((-2, -1), unbiased=False).sum(1) for v in (tiles.mean((2, 4)), rest))
    return (count * shared - whole) / (count - 1) / _energy(inside).clamp(min=1)


def _box_sums(x: Tensor, side: int) -> Tensor:
    """Sums over all side × side boxes: [N, C, H − side + 1, W − side + 1]."""
    for dim in (2, 3):
        running = torch.nn.functional.pad(x.cumsum(dim, dtype=torch.int32), (0, 0, 1, 0) if dim == 2 else (1, 0))
        length = x.shape[dim]
        x = running.narrow(dim, side, length - side + 1) - running.narrow(dim, 0, length - side + 1)
    return x
