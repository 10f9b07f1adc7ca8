"""Geometry of figures of markers with intervals and labels. The template draws them; here is where every mark goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tempflow.report.charts import Tick, number, tick_labels, ticks, widened

WIDTH, HEIGHT = 900, 340
FONT, LETTER = 11.0, 6.3
"""Size of a label's text, and the mean width of its letters, in the viewBox's units."""
APART = 15.0
"""Between markers that would stand on one another."""
RADII = (9.0, 15.0, 23.0, 33.0, 45.0, 59.0)
"""How far from its marker a label may stand; beyond the first a line leads to it."""
TOWARDS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Point:
    """A marker to draw. Points of one `line` are joined in the order given. `colour` numbers the page's palette;
    `hollow` ones are squares, and their line is dashed. low … high, left … right: intervals of y and x."""

    x: float
    y: float
    line: str
    colour: int
    title: str
    label: str = ""
    hollow: bool = False
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Mark:
    """A marker, the ends of its intervals (None: none), and where its label begins, ends or has its middle (`anchor`)
    and its baseline. `leader`: where a line from the marker to the label ends."""

    x: float
    y: float
    low: float | None
    high: float | None
    left: float | None
    right: float | None
    colour: int
    hollow: bool
    title: str
    label: str
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"
    leader: tuple[float, float] | None = None


@dataclass(frozen=True)
class Joined:
    """What joins markers: its corners."""

    colour: int
    hollow: bool
    corners: Sequence[tuple[float, float]]

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x} {y}" for x, y in self.corners)


@dataclass(frozen=True)
class Scatter:
    """Markers in their viewBox; the plot is left … right, top … bottom. `told`: the figure in words."""

    title: str
    told: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Joined]
    marks: Sequence[Mark]


def scatter(title: str, points: Sequence[Point], x_label: str, *, whole: bool = False) -> Scatter | None:
    """Markers on common axes; None where there is none.

    whole  x are numbers above 0 that are few, such as steps: their axis is logarithmic, its ticks are those numbers,
           and markers on one of them stand side by side
    """
    if not points:
        return None
    left, right, top, bottom = 52.0, WIDTH - 12.0, 14.0, HEIGHT - 34.0
    xs = [v for p in points for v in (p.x, p.left, p.right) if v is not None]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_low, y_high = widened(min(ys), max(ys), 0.06)
    if min(ys) >= 0:
        y_low = max(0.0, y_low)
    scaled = [math.log2(x) for x in xs] if whole else xs
    x_low, x_high = (min(scaled), max(scaled) + 1e-9) if whole else widened(min(xs), max(xs), 0.0)
    # labels stand to the right of most markers, and room for those of the first and the last is inside the plot
    inner = (left + 90, right - 190) if len(set(scaled)) > 1 else (left + 300, right - 300)

    def px(x: float) -> float:
        share = ((math.log2(x) if whole else x) - x_low) / (x_high - x_low)
        return round(inner[0] + share * (inner[1] - inner[0]), 2)

    def py(y: float) -> float:
        return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), 2)

    shift = _beside([px(p.x) for p in points], [p.y for p in points]) if whole else [0.0] * len(points)
    marks = [
        Mark(
            round(px(p.x) + by, 2),
            py(p.y),
            _end(p.low, py),
            _end(p.high, py),
            _end(p.left, px),
            _end(p.right, px),
            p.colour,
            p.hollow,
            p.title,
            p.label,
        )
        for p, by in zip(points, shift, strict=True)
    ]
    across = _spaced(sorted({p.x for p in points}), px) if whole else ticks(x_low, x_high, 8)
    names = [number(x) for x in across] if whole else tick_labels(across)
    up, lines = ticks(y_low, y_high, 4), _joined(points, marks)
    return Scatter(
        title, _told(title, x_label, points), WIDTH, HEIGHT, left, right, top, bottom, x_label,
        [Tick(px(x), name) for x, name in zip(across, names, strict=True)],
        [Tick(py(y), name) for y, name in zip(up, tick_labels(up), strict=True)],
        lines,
        _labelled(marks, lines, (left, 2.0, right, bottom)),
    )  # fmt: skip


def _end(value: float | None, at: Callable[[float], float]) -> float | None:
    return None if value is None else at(value)


def _spaced(values: Sequence[float], px: Callable[[float], float], apart: float = 24.0) -> list[float]:
    """Those of ascending values that stand so far from the one before that their labels do not meet."""
    kept: list[float] = []
    for value in values:
        if not kept or px(value) - px(kept[-1]) >= apart:
            kept.append(value)
    return kept


def _told(title: str, x_label: str, points: Sequence[Point]) -> str:
    return f"{title} over {x_label}. " + "; ".join(p.title for p in points)


def _lines(points: Sequence[Point]) -> Mapping[str, list[int]]:
    lines: dict[str, list[int]] = {}
    for place, point in enumerate(points):
        lines.setdefault(point.line, []).append(place)
    return lines


def _joined(points: Sequence[Point], marks: Sequence[Mark]) -> list[Joined]:
    found = [[marks[i] for i in line] for line in _lines(points).values() if len(line) > 1]
    return [Joined(line[0].colour, line[0].hollow, [(mark.x, mark.y) for mark in line]) for line in found]


def _beside(at: Sequence[float], values: Sequence[float]) -> list[float]:
    """How far each marker stands aside from where it belongs, so that none stands on another; ascending values from
    left to right, all within their half of the way to the next."""
    shift = [0.0] * len(at)
    places = sorted(set(at))
    gap = min((b - a for a, b in pairwise(places)), default=math.inf)
    for place in places:
        here = sorted((i for i, x in enumerate(at) if x == place), key=lambda i: values[i])
        apart = min(APART, 0.5 * gap / len(here))
        for n, i in enumerate(here):
            shift[i] = (n - (len(here) - 1) / 2) * apart
    return shift


def _labelled(marks: Sequence[Mark], lines: Sequence[Joined], bounds: Box) -> list[Mark]:
    """The markers with places for their labels, inside `bounds`, where least stands in their way. Each is placed among
    those before it, and then again among all."""
    fixed = [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in marks]
    thin = [(m.x - 1, m.high, m.x + 1, m.low) for m in marks if m.low is not None and m.high is not None]
    thin += [(m.left, m.y - 1, m.right, m.y + 1) for m in marks if m.left is not None and m.right is not None]
    thin += [(x - 1, y - 1, x + 1, y + 1) for line in lines for x, y in _along(line.corners)]
    placed: dict[int, tuple[Box, float, int]] = {}
    order = [i for i, mark in enumerate(marks) if mark.label]
    for i in order * 2:
        others = [box for j, (box, _, _) in placed.items() if j != i]

        def cost(candidate: tuple[Box, float, int], others: Sequence[Box] = others) -> float:
            box, radius, way = candidate
            if box[0] < bounds[0] or box[1] < bounds[1] or box[2] > bounds[2] or box[3] > bounds[3]:
                return math.inf
            crossed = 100 * _met(box, others) + 50 * _met(box, fixed) + 5 * _met(box, thin)
            return crossed + 0.4 * radius + 0.3 * way

        placed[i] = min(_candidates(marks[i]), key=cost)
    return [_with_label(mark, *placed[i]) if i in placed else mark for i, mark in enumerate(marks)]


def _along(corners: Sequence[tuple[float, float]], apart: float = 10.0) -> Iterator[tuple[float, float]]:
    """Points on what joins the corners."""
    for (x, y), (to_x, to_y) in pairwise(corners):
        count = max(1, round(math.hypot(to_x - x, to_y - y) / apart))
        for n in range(count):
            yield x + (to_x - x) * n / count, y + (to_y - y) * n / count


def _candidates(mark: Mark) -> list[tuple[Box, float, int]]:
    """Where the label of a marker could stand, how far away, and the number of the direction."""
    wide, high = LETTER * len(mark.label), FONT + 1
    found: list[tuple[Box, float, int]] = []
    for radius in RADII:
        for way, (dx, dy) in enumerate(TOWARDS):
            left = mark.x + (dx * radius * (0.7 if dy else 1)) - (wide if dx < 0 else 0 if dx else wide / 2)
            top = mark.y + dy * radius - (high / 2 if dy == 0 else high if dy < 0 else 0)
            found.append(((left, top, left + wide, top + high), radius, way))
    return found


def _met(box: Box, others: Sequence[Box]) -> int:
    """How many of the others it overlaps."""
    return sum(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def _with_label(mark: Mark, box: Box, radius: float, way: int) -> Mark:
    dx = TOWARDS[way][0]
    x, anchor = ((box[0], "start"), (box[2], "end"))[dx < 0] if dx else ((box[0] + box[2]) / 2, "middle")
    near = min(max(mark.x, box[0]), box[2]), min(max(mark.y, box[1]), box[3])
    leader = (round(near[0], 2), round(near[1], 2)) if radius > RADII[0] else None
    return replace(mark, label_x=round(x, 2), label_y=round(box[3] - 2.5, 2), anchor=anchor, leader=leader)
