"""How far figures can be trusted: bootstrap intervals of means (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapters 13 and 8.3), seeded, so that the same scores always have the same interval.

Pictures of one prompt resemble each other, so prompts are resampled, never pictures: give their texts as `clusters`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Interval = tuple[float, float]

CELLS_AT_ONCE = 1 << 22
"""Resampled values held at once: 32 MiB."""


def interval(
    values: ArrayLike,
    draws: int = 2000,
    level: float = 0.95,
    *,
    strata: Sequence[object] | None = None,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (low, high) of the mean of `values`.

    values    float [N], or [runs, N] for runs of one method on the same N samples: runs are resampled too, all of them
              on the same resampled samples; NaN = failed: left out, as the mean leaves it out
    strata    a label per sample (its task kind): each label keeps its share in every resample
    clusters  a label per sample (its prompt): values of one cluster are drawn together, as they resemble each other;
              a cluster lies in one stratum. None: every sample is its own

    NaN, NaN where no value is valid. Raises ValueError for values of other dimensions, lengths that differ, a cluster
    in two strata, draws below 1 or a level outside (0, 1).
    """
    value = np.asarray(values, np.float64)
    _check(value, draws, level, strata, clusters)
    value = np.atleast_2d(value)
    samples = value.shape[1]
    valid = ~np.isnan(value)
    seen, runs = valid.any(0), valid.any(1)
    if not seen.any():
        return math.nan, math.nan
    value, valid = value[runs][:, seen], valid[runs][:, seen]
    label = _numbered(strata, samples)[seen]
    unit = np.arange(samples) if clusters is None else _numbered(clusters, samples)
    unit = np.unique(unit[seen], return_inverse=True)[1]
    stratum = np.zeros(unit.max() + 1, int)
    stratum[unit] = label
    if (stratum[unit] != label).any():
        raise ValueError("clusters: one lies in two strata; nearest valid: strata that are the same all over a cluster")
    cells = np.zeros((2, len(value), len(stratum)))
    for run, (row, ok) in enumerate(zip(value, valid, strict=True)):
        cells[0, run] = np.bincount(unit[ok], row[ok], len(stratum))
        cells[1, run] = np.bincount(unit[ok], minlength=len(stratum))
    totals = _resampled(cells, stratum, draws, np.random.default_rng(seed))
    low, high = np.nanquantile(totals[0] / totals[1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def macro_interval(
    values: ArrayLike,
    groups: Sequence[object],
    draws: int = 2000,
    level: float = 0.95,
    *,
    strata: Sequence[object] | None = None,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> Interval:
    """`interval` of a mean of means: each group's mean over its values, and over the groups, which count alike.

    values  float [N]; NaN = failed
    groups  a label per value. Unlike strata they may cut through clusters: a prompt has values in several of them. A
            resample that has no value of a group is the mean of the others

    NaN, NaN where no value is valid. Raises ValueError as `interval`.
    """
    value = np.asarray(values, np.float64)
    _check(value, draws, level, strata, clusters)
    if value.ndim != 1 or len(groups) != len(value):
        raise ValueError(
            f"groups has {len(groups)} labels for {list(value.shape)} values; nearest valid: one per value"
        )
    ok = ~np.isnan(value)
    if not ok.any():
        return math.nan, math.nan
    label, group = (_renumbered(_numbered(labels, len(value))[ok]) for labels in (strata, groups))
    unit = _renumbered((np.arange(len(value)) if clusters is None else _numbered(clusters, len(value)))[ok])
    stratum = np.zeros(unit.max() + 1, int)
    stratum[unit] = label
    if (stratum[unit] != label).any():
        raise ValueError("clusters: one lies in two strata; nearest valid: strata that are the same all over a cluster")
    sums, counts = np.zeros((2, len(stratum), group.max() + 1))
    np.add.at(sums, (unit, group), value[ok])
    np.add.at(counts, (unit, group), 1)
    rng, means, at_once = np.random.default_rng(seed), list[np.ndarray](), max(1, CELLS_AT_ONCE // len(stratum))
    places = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    for first in range(0, draws, at_once):
        often = np.zeros((min(at_once, draws - first), len(stratum)))
        for place in places:
            often[:, place] = rng.multinomial(len(place), np.full(len(place), 1 / len(place)), len(often))
        with np.errstate(invalid="ignore"):
            means.append(np.nanmean((often @ sums) / (often @ counts), 1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _renumbered(numbers: np.ndarray) -> np.ndarray:
    """0 … in the place of numbers of which some are not used."""
    return np.unique(numbers, return_inverse=True)[1]


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    draws: int = 2000,
    level: float = 0.95,
    *,
    strata: Sequence[object] | None = None,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
) -> Interval:
    """`interval` of the mean of a − b: two models on the same prompts and noise. A pair with a failed half is left out.

    What makes some prompts harder is in both halves and cancels: this is narrower than two intervals beside each other.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"a has shape {list(first.shape)}, b {list(second.shape)}; nearest valid: the same values' pairs"
        )
    return interval(first - second, draws, level, strata=strata, clusters=clusters, seed=seed)


def _resampled(cells: np.ndarray, stratum: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """cells [2, runs, n], stratum int [n] → [2, draws]: sums over runs and cells drawn with replacement."""
    _, runs, n = cells.shape
    places = [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    at_once = max(1, CELLS_AT_ONCE // n)
    parts = list[np.ndarray]()
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        often = rng.multinomial(runs, np.full(runs, 1 / runs), count) if runs > 1 else np.ones((count, 1))
        # [count, n]: which cells each draw takes, stratum by stratum
        taken = np.concatenate([place[rng.integers(0, len(place), (count, len(place)))] for place in places], 1)
        parts.append(np.stack([np.take_along_axis(often @ cell, taken, 1).sum(1) for cell in cells]))
    return np.concatenate(parts, 1)


def _numbered(labels: Sequence[object] | None, count: int) -> np.ndarray:
    """int [count]: equal labels, equal numbers, in order of first appearance."""
    if labels is None:
        return np.zeros(count, int)
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels], int)


def _check(
    value: np.ndarray,
    draws: int,
    level: float,
    strata: Sequence[object] | None,
    clusters: Sequence[object] | None,
) -> None:
    if value.ndim not in (1, 2):
        raise ValueError(f"values have shape {list(value.shape)}; nearest valid: [{value.size}]")
    count = value.shape[-1]
    for name, labels in (("strata", strata), ("clusters", clusters)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name} has {len(labels)} labels for {count} values; nearest valid: {count}")
    if draws < 1:
        raise ValueError(f"draws: {draws} is too few; nearest valid: 1, and 2000 is usual")
    if not 0 < level < 1:
        raise ValueError(f"level: {level} is not between 0 and 1; 0.95 is usual")
