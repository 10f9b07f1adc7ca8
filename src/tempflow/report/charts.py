"""Geometry of the page's charts. The template draws them; here is where every mark goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_POINTS = 240
"""A longer line is drawn by means over equal stretches."""
SMOOTH_FROM = 40
"""From this many points on, a noisy line is drawn faintly, with its moving mean over it."""
MOST_COLUMNS = 96


@dataclass(frozen=True)
class Series:
    """A line to draw: `colour` numbers the page's palette; `faint` lines are background."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    faint: bool = False


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Stroke:
    """A polyline (SVG path data) and its dots."""

    label: str
    colour: int
    faint: bool
    path: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Chart:
    """A line chart in its viewBox; the plot is left … right, top … bottom."""

    title: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    strokes: Sequence[Stroke]


@dataclass(frozen=True)
class Cell:
    x: float
    width: float
    row: int
    strength: float | None
    title: str


@dataclass(frozen=True)
class Heat:
    """A heat map: a row a step; `strength` 0 … 1 of `top`."""

    width: int
    height: int
    left: float
    right: float
    row_height: float
    steps: Sequence[int]
    means: Sequence[str]
    cells: Sequence[Cell]
    x_ticks: Sequence[Tick]
    top: str


@dataclass(frozen=True)
class Whisker:
    """An interval on a scale of 0 … 100, with where 0 is."""

    zero: float
    at: float
    low: float | None
    high: float | None


def number(value: float | None, signed: bool = False) -> str:
    """For reading: three significant digits, thousands grouped, tiny and huge ones by exponent."""
    if value is None or not math.isfinite(value):
        return "–"
    sign = "+" if signed and value > 0 else "−" if value < 0 else ""
    v = abs(value)
    if v == 0:
        return "0"
    if v >= 1e9 or v < 1e-3:
        mantissa, exponent = f"{v:.1e}".split("e")
        return f"{sign}{mantissa.removesuffix('.0')}e{int(exponent)}"
    if v >= 1000 or float(v).is_integer():
        return f"{sign}{v:,.0f}"
    return f"{sign}{v:.3f}" if 0.01 <= v < 1 else f"{sign}{v:.3g}"


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels of evenly spaced values, all with as many decimals as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0])
    if not 1e-4 <= step < 1e7:
        return [number(v) for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:,.{decimals}f}".replace("-", "−") for v in values]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round values (1, 2 or 5 times a power of ten apart) inside low … high."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    *,
    width: int = 340,
    height: int = 200,
    log: bool = False,
    smooth: bool = False,
    dots: bool = True,
) -> Chart | None:
    """A chart of all series on common axes; None where there is nothing to draw. `log`: values ≤ 0 are
    left out, unless all are."""
    log = log and any(y is not None and y > 0 for s in series for y in s.y)
    known = [(s, _known(s, log)) for s in series]
    known = [(s, points) for s, points in known if points]
    if not known:
        return None
    left, right, top, bottom = 52.0, width - 12.0, 12.0, height - 34.0
    xs, ys = [x for _, p in known for x, _ in p], [y for _, p in known for _, y in p]
    x_low, x_high = widened(min(xs), max(xs), 0.0)
    y_low, y_high = widened(min(ys), max(ys), 0.06)
    if not log and min(ys) >= 0:
        y_low = max(0.0, y_low)

    def px(x: float) -> float:
        return round(left + (x - x_low) / (x_high - x_low) * (right - left), 2)

    def py(y: float) -> float:
        return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), 2)

    strokes: list[Stroke] = []
    for s, points in known:
        curves = [(thinned(points), s.faint, dots)]
        if smooth and len(points) >= SMOOTH_FROM:
            curves = [(thinned(points), True, False), (thinned(moving_mean(points)), s.faint, dots)]
        for curve, faint, marked in curves:
            path = "M" + "L".join(f"{px(x)} {py(y)}" for x, y in curve)
            value = [(x, y, 10**y if log else y) for x, y in curve]
            marks = [Dot(px(x), py(y), f"{s.label}: {number(v)} at {x_label} {number(x)}") for x, y, v in value]
            strokes.append(Stroke(s.label, s.colour, faint, path, marks if marked else ()))
    across, up = ticks(x_low, x_high, 4 if width < 500 else 8), _y_ticks(y_low, y_high, log)
    labels = [number(10**y) for y in up] if log else tick_labels(up)
    return Chart(
        title, width, height, left, right, top, bottom, x_label,
        [Tick(px(x), label) for x, label in zip(across, tick_labels(across), strict=True)],
        [Tick(py(y), label) for y, label in zip(up, labels, strict=True)],
        sorted(strokes, key=lambda stroke: not stroke.faint),
    )  # fmt: skip


def _y_ticks(low: float, high: float, log: bool) -> list[float]:
    whole = [float(e) for e in range(math.ceil(low), math.floor(high) + 1)] if log else []
    return whole[:: 1 + len(whole) // 5] if len(whole) > 1 else ticks(low, high, 4)


def _known(series: Series, log: bool) -> list[tuple[float, float]]:
    points = [
        (float(x), float(y)) for x, y in zip(series.x, series.y, strict=True) if y is not None and math.isfinite(y)
    ]
    return [(x, math.log10(y)) for x, y in points if y > 0] if log else points


def widened(low: float, high: float, share: float) -> tuple[float, float]:
    """An axis that holds both ends, with that share of their distance beyond each."""
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """`points`, or where there are more than `most`, the means of `most` equal stretches."""
    if len(points) <= most:
        return list(points)
    cuts = [round(i * len(points) / most) for i in range(most + 1)]
    parts = [points[a:b] for a, b in pairwise(cuts)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def moving_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred mean over a tenth of the line."""
    half = max(2, len(points) // 20)
    windows = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [(points[i][0], sum(y for _, y in w) / len(w)) for i, w in enumerate(windows)]


def heat_map(lines: Sequence[tuple[int, dict[int, float]]], limit: float | None = None) -> Heat | None:
    """`lines`: (iteration, step → value), ascending. `limit`: what is full strength; the largest value if None."""
    steps = sorted({step for _, values in lines for step in values})
    if not steps:
        return None
    width, left, right, row_height = 900, 64.0, 840.0, max(14.0, min(30.0, 300 / len(steps)))
    count = min(MOST_COLUMNS, len(lines))
    cuts = [round(i * len(lines) / count) for i in range(count + 1)]
    columns = [lines[a:b] for a, b in pairwise(cuts)]
    table = [[_mean_of([v[s] for _, v in column if s in v]) for s in steps] for column in columns]
    known = [v for column in table for v in column if v is not None]
    top = limit if limit is not None else max(known, default=0.0)
    wide = (right - left) / count
    cells: list[Cell] = []
    for i, (column, values) in enumerate(zip(columns, table, strict=True)):
        first, last = column[0][0], column[-1][0]
        when = f"iteration {first}" if first == last else f"iterations {first}–{last}"
        for row, value in enumerate(values):
            strength = None if value is None else round(max(0.0, min(1.0, value / top)) if top > 0 else 0.0, 3)
            cells.append(
                Cell(
                    round(left + i * wide, 2),
                    round(wide, 2),
                    row,
                    strength,
                    f"step {steps[row]}, {when}: {number(value)}",
                )
            )
    every = max(1, math.ceil(count / 12))
    marks = [Tick(round(left + (i + 0.5) * wide, 2), number(columns[i][0][0])) for i in range(0, count, every)]
    means = [number(_mean_of([v[s] for _, v in lines if s in v])) for s in steps]
    return Heat(
        width, round(len(steps) * row_height + 34), left, right, row_height, steps, means, cells, marks, number(top)
    )


def _mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def whiskers(rows: Sequence[tuple[float, float | None, float | None]]) -> list[Whisker]:
    """(value, low, high) of each row on one scale that holds them all and 0."""
    ends = [v for row in rows for v in row if v is not None and math.isfinite(v)]
    low, high = widened(min([0.0, *ends]), max([0.0, *ends]), 0.04)

    def at(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else round((value - low) / (high - low) * 100, 2)

    return [Whisker(at(0.0) or 0.0, at(v) or 0.0, at(a), at(b)) for v, a, b in rows]
