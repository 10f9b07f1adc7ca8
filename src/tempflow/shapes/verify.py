"""The strict judge of shapes pictures. It sees the picture and the prompt's meaning, never how the picture was made.

A picture is right when its foreground consists of exactly the wanted objects: each a single piece with the holes of
its shape and no other, wholly inside the frame, with the outline of its shape, one plain palette colour, and the wanted
size and place, on a plain dark ground, with nothing else in sight, and the wanted relation holds. Anything odd (specks,
texture, rims, merged or touching objects, off-palette fill, a bright or patterned ground) is wrong.

Outlines are judged on an enlarged foreground mask, colours on the picture's own pixels: the ground is one colour, the
inside of an object another, and what lies between them must be a mixture of these two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import cv2
import numpy as np

from tempflow.shapes.prompts import SHAPES, Color, Object, Place, Relation, Shape, Size, Spec
from tempflow.shapes.render import PALETTE, SIZE, Placed, aside, draw

SCALE = 3  # outlines are judged at three times the picture's size, where they have sub-pixel accuracy
CANVAS = SIZE * SCALE
TEMPLATE = 24
BRIGHT = 118  # highest channel above which a pixel is foreground, about half of the palette's
MIN_OBJECT = 0.018  # smallest object, as a share of the picture; what is smaller is dirt
# Overlap with the shape's own outline, and by how much the next best shape must fall short of that: a square with its
# corners rounded off is neither square nor circle. Per shape, just below the worst of what a person still calls right.
MIN_IOU: dict[Shape, float] = {
    "circle": 0.92,
    "square": 0.90,
    "triangle": 0.85,
    "cross": 0.83,
    "ring": 0.84,
    "diamond": 0.86,
    "moon": 0.80,
    "dome": 0.88,
    "bar": 0.84,
}
MIN_MARGIN: dict[Shape, float] = {
    "circle": 0.09,
    "square": 0.05,
    "triangle": 0.10,
    "cross": 0.03,
    "ring": 0.05,
    "diamond": 0.04,
    "moon": 0.12,
    "dome": 0.06,
    "bar": 0.08,
}
HOLES: dict[Shape, int] = {shape: int(shape == "ring") for shape in SHAPES}
MAX_BITE = 9  # cells of any 4 × 4 window of the 24 × 24 box in which an outline may differ from its shape
MAX_STRETCH: dict[Shape, float] = {  # width over height of an object's box against its shape's
    "circle": 1.10,
    "square": 1.10,
    "triangle": 1.13,
    "cross": 1.10,
    "ring": 1.10,
    "diamond": 1.12,
    "moon": 1.12,
    "dome": 1.11,
    "bar": 1.21,
}
LARGEST_SMALL, SMALLEST_BIG = 6.6, 7.4  # half the longer side of a box, in pixels
MIN_ASIDE = 3.0  # pixels from the picture's middle, towards the place that is asked for
MAX_COLOR_DISTANCE = 70.0
MAX_COLOR_RATIO = 0.6  # distance to the nearest palette colour over that to the second
MAX_FILL_STRAY = 50.0  # largest distance, in any channel, of a pixel inside an object from its mean fill
MAX_FILL_SPREAD = 25.0  # root mean square of that distance
MAX_EDGE_STRAY = 40.0  # largest distance of a pixel on the edge from the line between ground and fill
MIN_GROUND = 0.05  # share of the picture that no object touches
MAX_GROUND_LEVEL = 72.0
MAX_GROUND_TINT = 25.0
MAX_GROUND_SPREAD = 7.0  # standard deviation
MAX_GROUND_STRAY = 32.0  # largest distance of a ground pixel's channel from the ground's mean


@dataclass(frozen=True)
class Found:
    """One component; x and y are its box's centre in pixels, `iou` its overlap with `shape`'s own outline.

    `radius` is half the longer side of its box, in pixels. `clean` is False when its outline or fill disqualifies it
    whatever the prompt, or the frame cuts it; `color` is None when it is all edge, without an inside to take it from.
    """

    shape: Shape
    color: Color | None
    x: float
    y: float
    radius: float
    iou: float
    clean: bool


@dataclass(frozen=True)
class Verdict:
    """`strict` is right or wrong; `graded` in [0, 1] gives partial credit and is 1 exactly when strict is right."""

    strict: bool
    graded: float


def _foreground(picture: np.ndarray) -> np.ndarray:
    """The enlarged 0/1 foreground mask, uint8 [CANVAS, CANVAS]."""
    red, green, blue = cv2.split(picture)
    big = cv2.resize(cv2.max(cv2.max(red, green), blue), (CANVAS, CANVAS), interpolation=cv2.INTER_LINEAR)
    return cv2.threshold(big, BRIGHT, 1, cv2.THRESH_BINARY)[1]


def _fit(mask: np.ndarray) -> np.ndarray:
    """An object's mask (0/255) from its box to the templates' size, proportions and holes kept; float32 0/1, flat."""
    h, w = mask.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    square = cv2.copyMakeBorder(mask, top, side - h - top, left, side - w - left, cv2.BORDER_CONSTANT, value=0.0)
    fit = cv2.resize(square, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA)
    return cv2.threshold(fit, 127, 1, cv2.THRESH_BINARY)[1].ravel().astype(np.float32)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [9 shapes × 45, TEMPLATE²], their areas [9 × 45], and the width over the height of their boxes [9 × 45].

    Outlines as this judge sees them: five sizes (small ones have blunted tips) at nine positions on the pixel grid.
    """
    masks, stretch = [], []
    for shape in SHAPES:
        for radius in (4.5, 5.0, 5.7, 7.0, 9.2):
            for x, y in product((16.0, 16.33, 16.67), repeat=2):
                mask = _foreground(draw([Placed(shape, "cyan", x, y, radius)], (28, 28, 28)))
                x, y, w, h = cv2.boundingRect(mask)
                masks.append(_fit(mask[y : y + h, x : x + w] * 255))
                stretch.append(w / h)
    stacked = np.stack(masks)
    return stacked, stacked.sum(1), np.array(stretch)


@cache
def _stretches() -> dict[Shape, tuple[float, float]]:
    """The least and largest width over height of each shape's box."""
    mean = np.exp(np.log(_templates()[2]).reshape(len(SHAPES), -1).mean(1)).tolist()
    return {shape: (m / MAX_STRETCH[shape], m * MAX_STRETCH[shape]) for shape, m in zip(SHAPES, mean, strict=True)}


_INSIDE = np.ones((5, 5), np.uint8)  # eroded by this, a mask keeps the pixels that lie wholly in it
_AROUND = np.ones((7, 7), np.uint8)  # dilated by this, it takes in every pixel that it touches


@dataclass(frozen=True)
class _Piece:
    """One object: its mask (0/255) on a window of whole pixels, one wider than it needs, and its box in there."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    left: int  # the window's corner on the canvas
    top: int
    holes: int


def _pieces(mask: np.ndarray) -> list[_Piece]:
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = [parent for *_, parent in hierarchy[0].tolist()] if contours else []
    pieces: list[_Piece] = []
    for i, contour in enumerate(contours):
        if parents[i] >= 0:
            continue
        x, y, w, h = cv2.boundingRect(contour)
        left, top = max(x // SCALE - 1, 0) * SCALE, max(y // SCALE - 1, 0) * SCALE
        right, bottom = (min(-(-end // SCALE) + 1, SIZE) * SCALE for end in (x + w, y + h))
        own = np.zeros((bottom - top, right - left), np.uint8)
        cv2.drawContours(own, [contour], 0, 255, cv2.FILLED, offset=(-left, -top))
        holes = [contours[child] for child, parent in enumerate(parents) if parent == i]
        for hole in holes:  # a hole's contour runs on the object round it: what lies inside is erased
            cv2.drawContours(own, [hole], 0, 0, cv2.FILLED, offset=(-left, -top))
            cv2.drawContours(own, [hole], 0, 255, 1, offset=(-left, -top))
        pieces.append(_Piece(own, (x - left, y - top, w, h), left, top, len(holes)))
    return pieces


def _outline(piece: _Piece) -> tuple[Shape, float, bool]:
    """The best shape, its overlap with the outline, and whether it is that shape beyond doubt and inside the frame."""
    x, y, w, h = piece.box
    fit = _fit(piece.mask[y : y + h, x : x + w])
    templates, areas, _ = _templates()
    overlap = templates @ fit
    every = overlap / (areas + float(fit.sum()) - overlap)
    closest = int(every.argmax())
    iou = every.reshape(len(SHAPES), -1).max(1).tolist()
    best = closest * len(SHAPES) // len(every)
    shape, second = SHAPES[best], sorted(iou)[-2]
    whole = piece.left + x > 0 and piece.top + y > 0 and piece.left + x + w < CANVAS and piece.top + y + h < CANVAS
    certain = iou[best] >= MIN_IOU[shape] and iou[best] - second >= MIN_MARGIN[shape] and piece.holes == HOLES[shape]
    if certain:
        differs = cv2.absdiff(templates[closest], fit).reshape(TEMPLATE, TEMPLATE)
        bite = cv2.boxFilter(differs, -1, (4, 4), normalize=False, borderType=cv2.BORDER_CONSTANT)
        certain = float(bite.max()) < MAX_BITE + 0.5
    low, high = _stretches()[shape]
    return shape, iou[best], whole and certain and low <= w / h <= high


def _nearest(fill: Sequence[float]) -> tuple[Color, bool]:
    """The palette colour nearest to `fill`, and whether it is that colour and no other."""
    away = {color: math.dist(fill, rgb) for color, rgb in PALETTE.items()}
    nearest, other = sorted(PALETTE, key=lambda color: away[color])[:2]
    first, second = away[nearest], away[other]
    return nearest, first <= MAX_COLOR_DISTANCE and first <= MAX_COLOR_RATIO * second


def _pixels(mask: np.ndarray) -> np.ndarray:
    """The enlarged mask at the middle of each of the picture's own pixels."""
    return np.ascontiguousarray(mask[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE])


def _stray(picture: np.ndarray, mean: Sequence[float], mask: np.ndarray) -> int:
    """The largest distance of any channel of a masked pixel from `mean`."""
    away = cv2.absdiff(picture, np.array([*mean, 0.0]))  # four numbers are a colour to OpenCV
    return int(cv2.bitwise_and(away, away, mask=mask).max())


def _fill(picture: np.ndarray, piece: _Piece, ground: np.ndarray) -> tuple[Color | None, bool]:
    """The nearest palette colour (None: no inside to speak of), and whether inside and edge are plainly that colour."""
    top, left = piece.top // SCALE, piece.left // SCALE
    core = _pixels(cv2.erode(piece.mask, _INSIDE, borderType=cv2.BORDER_CONSTANT, borderValue=0.0))
    if cv2.countNonZero(core) < 2:
        return None, False
    window = np.ascontiguousarray(picture[top : top + core.shape[0], left : left + core.shape[1]])
    mean, deviation = cv2.meanStdDev(window, mask=core)
    fill = mean[:, 0]
    color, plain = _nearest(fill.tolist())
    if not plain or math.hypot(*deviation[:, 0].tolist()) > MAX_FILL_SPREAD:
        return color, False
    if _stray(window, fill.tolist(), core) > MAX_FILL_STRAY:
        return color, False
    rest = cv2.subtract(_pixels(cv2.dilate(piece.mask, _AROUND)), core)
    axis, edge = fill - ground, window[rest > 0] - ground
    share = np.minimum(np.maximum(edge @ (axis / (axis @ axis)), 0.0), 1.0)
    return color, bool(np.abs(edge - share[:, None] * axis).max(initial=0.0) <= MAX_EDGE_STRAY)


def _ground(picture: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """The ground's mean colour, float64 [3], and whether it is plain, dark and free of dirt that is not foreground."""
    bare = cv2.bitwise_not(_pixels(cv2.dilate(mask, _AROUND) * 255))
    if cv2.countNonZero(bare) < MIN_GROUND * SIZE**2:
        return np.full(3, 28.0), False
    mean, deviation = cv2.meanStdDev(picture, mask=bare)
    level = mean[:, 0].tolist()
    plain = (
        max(level) <= MAX_GROUND_LEVEL
        and max(level) - min(level) <= MAX_GROUND_TINT
        and float(deviation.max()) <= MAX_GROUND_SPREAD
        and _stray(picture, level, bare) <= MAX_GROUND_STRAY
    )
    return mean[:, 0], plain


def look(picture: np.ndarray) -> tuple[list[Found], bool]:
    """All objects in a uint8 [32, 32, 3] picture, and whether the ground is plain and free of dirt.

    Raises ValueError for another shape or dtype.
    """
    if picture.dtype != np.uint8 or picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture: expected uint8 [{SIZE}, {SIZE}, 3], got {picture.dtype} {list(picture.shape)}")
    mask = _foreground(picture)
    ground, plain = _ground(picture, mask)
    found: list[Found] = []
    for piece in _pieces(mask):
        if cv2.countNonZero(piece.mask) < MIN_OBJECT * CANVAS**2:
            plain = False
            continue
        shape, iou, certain = _outline(piece)
        color, pure = _fill(picture, piece, ground)
        x, y, w, h = piece.box
        center = (piece.left + x + w / 2) / SCALE, (piece.top + y + h / 2) / SCALE
        found.append(Found(shape, color, *center, max(w, h) / SCALE / 2, iou, certain and pure))
    return found, plain


def related(first: Found, second: Found, relation: Relation) -> bool:
    """The first stands where the relation says, by more than six pixels and mainly along that axis."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 6 and along > abs(across)


def sized(found: Found, size: Size) -> bool:
    """Small or big by half the longer side of its box; what lies between is neither."""
    return found.radius <= LARGEST_SMALL if size == "small" else found.radius >= SMALLEST_BIG


def standing(found: Found, place: Place) -> bool:
    """Off the picture's middle by more than three pixels, and mainly towards `place`."""
    along, across = aside(found.x, found.y, place)
    return along > MIN_ASIDE and along > abs(across)


def _fitting(found: Found, wanted: Object) -> list[bool]:
    """Whether each attribute that is asked for holds."""
    color = [] if wanted.color is None else [found.color == wanted.color]
    size = [] if wanted.size is None else [sized(found, wanted.size)]
    place = [] if wanted.place is None else [standing(found, wanted.place)]
    return color + size + place


def _match(found: Found, wanted: Object) -> float:
    """1 at most for the right object; parts for its shape (by outline), for its attributes, and for being clean."""
    shape = found.shape == wanted.shape
    outline = 0.5 * min(max((found.iou - 0.5) / 0.4, 0.0), 1.0) if shape else 0.0
    fitting = _fitting(found, wanted) or [shape]
    return outline + 0.35 * sum(fitting) / len(fitting) + 0.15 * found.clean


def _right(found: Found, wanted: Object) -> bool:
    return found.clean and found.shape == wanted.shape and all(_fitting(found, wanted))


def _credit(pick: Sequence[Found], spec: Spec) -> tuple[float, bool]:
    """What these objects, in the prompt's order, are worth together; and whether all are right, the relation too."""
    credit = sum(_match(f, w) for f, w in zip(pick, spec.objects, strict=False))
    right = len(pick) == len(spec.objects) and all(_right(f, w) for f, w in zip(pick, spec.objects, strict=True))
    if spec.relation is not None and not (len(pick) == 2 and related(pick[0], pick[1], spec.relation)):
        return 0.65 * credit, False
    return credit, right


def judge(picture: np.ndarray, spec: Spec) -> Verdict:
    """Judges one uint8 [32, 32, 3] picture against what its prompt asks for.

    `graded` short of right is nine tenths of a soft F1 score between wanted and seen objects, 2·Σ match / (wanted +
    seen), less a third on a ground that is not plain; a relation that does not hold costs the objects a third as well.
    Raises ValueError for a picture of another shape or dtype.
    """
    found, plain = look(picture)
    if not found:
        return Verdict(False, 0.0)
    wanted = spec.objects
    candidates = sorted(found, key=lambda f: -max(_match(f, w) for w in wanted))[:4]
    size = min(len(candidates), len(wanted))
    picks = [tuple(candidates[:size])] if spec.kind == "count" else list(permutations(candidates, size))
    credits = [_credit(pick, spec) for pick in picks]
    if plain and len(found) == len(wanted) and any(right for _, right in credits):
        return Verdict(True, 1.0)
    f1 = 2 * max(credit for credit, _ in credits) / (len(wanted) + len(found))
    return Verdict(False, 0.9 * min(f1, 1.0) * (1.0 if plain else 0.65))
