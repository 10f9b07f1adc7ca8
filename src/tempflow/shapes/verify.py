"""The strict judge of shapes pictures. It sees the picture and the prompt's meaning, never how the picture was made.

A picture is right when its foreground consists of exactly the wanted objects: each a single piece without holes, wholly
inside the frame, with the outline of its shape and one plain palette colour, on a plain dark ground, with nothing else
in sight, and the wanted relation holds. Anything odd (specks, texture, rims, merged or touching objects, off-palette
fill, a bright or patterned ground) is wrong.

Outlines are judged on an enlarged foreground mask, colours on the picture's own pixels: the ground is one colour, the
inside of an object another, and what lies between them must be a mixture of these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import cv2
import numpy as np

from tempflow.shapes.prompts import COLORS, SHAPES, Color, Object, Relation, Shape, Spec
from tempflow.shapes.render import PALETTE, SIZE, Placed, draw

SCALE = 3  # outlines are judged at three times the picture's size, where they have sub-pixel accuracy
CANVAS = SIZE * SCALE
TEMPLATE = 24
SATURATED = 80  # max - min channel above which a pixel is foreground, about half of the palette's; the ground is grey
MIN_OBJECT = 0.022  # smallest object, as a share of the picture; what is smaller is dirt
MAX_DIRT = 0.0005  # half a pixel in all: antialiasing crumbs
# Overlap with the shape's own outline, and how much the next best shape must fall short of that: a square with its corners
# rounded off is neither square nor circle. Floors lie below the worst of pictures that a person calls right, per shape.
MIN_IOU: dict[Shape, float] = {"circle": 0.90, "square": 0.86, "triangle": 0.86, "cross": 0.87}
MIN_MARGIN: dict[Shape, float] = {"circle": 0.08, "square": 0.05, "triangle": 0.20, "cross": 0.08}
MAX_ASPECT = 1.25  # of an object's box
MAX_COLOR_DISTANCE = 70.0
MAX_COLOR_RATIO = 0.6  # distance to the nearest palette colour over that to the second
MAX_FILL_STRAY = 70.0  # largest distance of a pixel inside an object from its mean fill
MAX_FILL_SPREAD = 25.0  # root mean square of the same
MAX_EDGE_STRAY = 50.0  # and of one on its edge from the line between ground and fill
MIN_GROUND = 0.05  # share of the picture that no object touches
MAX_GROUND_LEVEL = 72.0
MAX_GROUND_TINT = 25.0
MAX_GROUND_SPREAD = 8.0  # mean absolute deviation
MAX_GROUND_STRAY = 40.0  # largest distance of a ground pixel's channel from the ground's mean


@dataclass(frozen=True)
class Found:
    """One component. `clean` is False when its outline, fill or box disqualifies it whatever the prompt."""

    shape: Shape
    color: Color
    x: float
    y: float
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
    high, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    big = cv2.resize(cv2.subtract(high, low), (CANVAS, CANVAS), interpolation=cv2.INTER_LINEAR)
    return cv2.threshold(big, SATURATED, 1, cv2.THRESH_BINARY)[1]


def _stretch(mask: np.ndarray) -> np.ndarray:
    """An outline's mask, stretched from its box to the templates' size; float32 0/1, flat."""
    fit = cv2.resize(mask, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA)
    return cv2.threshold(fit, 127, 1, cv2.THRESH_BINARY)[1].ravel().astype(np.float32)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """float32 [4 shapes × 16, TEMPLATE²] and their areas [4 × 16].

    Outlines as this judge sees them: four sizes (small ones have blunted tips) at four positions on the pixel grid.
    """
    masks = []
    for shape in SHAPES:
        for radius in (4.6, 5.3, 6.5, 9.0):
            for dx, dy in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
                mask = _foreground(draw([Placed(shape, "cyan", SIZE / 2 + dx, SIZE / 2 + dy, radius)], (28, 28, 28)))
                x, y, w, h = cv2.boundingRect(mask)
                masks.append(_stretch(mask[y : y + h, x : x + w] * 255))
    stacked = np.stack(masks)
    return stacked, stacked.sum(1)


_PALETTE = np.array([PALETTE[c] for c in COLORS], np.float32)
_INSIDE = np.ones((5, 5), np.uint8)  # eroded by this, a mask keeps the pixels that lie wholly in it
_AROUND = np.ones((7, 7), np.uint8)  # dilated by this, it takes in every pixel that it touches


@dataclass(frozen=True)
class _Piece:
    """A filled outline: its mask (0/255) on a window that starts and ends on whole pixels, and its box in the mask."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    left: int  # the window's corner on the canvas
    top: int


def _piece(contour: np.ndarray) -> _Piece:
    x, y, w, h = cv2.boundingRect(contour)
    left, top = x // SCALE * SCALE, y // SCALE * SCALE
    right, bottom = -(-(x + w) // SCALE) * SCALE, -(-(y + h) // SCALE) * SCALE
    mask = np.zeros((bottom - top, right - left), np.uint8)
    cv2.drawContours(mask, [contour], 0, 255, cv2.FILLED, offset=(-left, -top))
    return _Piece(mask, (x - left, y - top, w, h), left, top)


def _outline(piece: _Piece) -> tuple[Shape, float, bool]:
    """The best shape, its overlap with the outline, and whether it is that shape beyond doubt and inside the frame."""
    x, y, w, h = piece.box
    fit = _stretch(piece.mask[y : y + h, x : x + w])
    templates, areas = _templates()
    overlap = templates @ fit
    iou = (overlap / (areas + float(fit.sum()) - overlap)).reshape(len(SHAPES), -1).max(1).tolist()
    best = max(range(len(SHAPES)), key=iou.__getitem__)
    shape = SHAPES[best]
    second = sorted(iou)[-2]
    whole = piece.left + x > 0 and piece.top + y > 0 and piece.left + x + w < CANVAS and piece.top + y + h < CANVAS
    certain = iou[best] >= MIN_IOU[shape] and iou[best] - second >= MIN_MARGIN[shape]
    return shape, iou[best], whole and certain and max(w, h) <= MAX_ASPECT * min(w, h)


def _fill(picture: np.ndarray, piece: _Piece, ground: np.ndarray) -> tuple[Color | None, bool]:
    """The nearest palette colour (None: no inside to speak of), and whether inside and edge are plainly that colour."""
    top, left = piece.top // SCALE, piece.left // SCALE
    inside = cv2.erode(piece.mask, _INSIDE, borderType=cv2.BORDER_CONSTANT, borderValue=0.0)
    inside = inside[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]
    height, width = inside.shape
    window = picture[top : top + height, left : left + width].astype(np.float32)
    core = inside > 0
    pixels = window[core]
    if len(pixels) < 2:
        return None, False
    fill = pixels.mean(0)
    distance = np.sqrt(np.square(_PALETTE - fill).sum(1))
    nearest = int(distance.argmin())
    first, second = np.partition(distance, 1)[:2].tolist()
    plain = first <= MAX_COLOR_DISTANCE and first <= MAX_COLOR_RATIO * second
    if plain:
        touched = cv2.dilate(piece.mask, _AROUND)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE] > 0
        axis, edge = fill - ground, window[touched & ~core] - ground
        share = np.clip(edge @ axis / (axis @ axis), 0.0, 1.0)
        stray = np.square(pixels - fill).sum(1)
        plain = bool(
            stray.max() <= MAX_FILL_STRAY**2
            and stray.mean() <= MAX_FILL_SPREAD**2
            and np.square(edge - share[:, None] * axis).sum(1).max(initial=0.0) <= MAX_EDGE_STRAY**2
        )
    return COLORS[nearest], plain


def _ground(picture: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """The ground's mean colour, float32 [3], and whether it is plain, dark and free of dirt that is not foreground."""
    bare = cv2.dilate(mask, _AROUND)[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE] == 0
    pixels = picture[bare].astype(np.float32)
    if len(pixels) < MIN_GROUND * SIZE**2:
        return np.full(3, 28, np.float32), False
    mean = pixels.mean(0)
    away = np.abs(pixels - mean)
    plain = (
        mean.max() <= MAX_GROUND_LEVEL
        and mean.max() - mean.min() <= MAX_GROUND_TINT
        and away.max() <= MAX_GROUND_STRAY
        and away.mean() <= MAX_GROUND_SPREAD
    )
    return mean, bool(plain)


def look(picture: np.ndarray) -> tuple[list[Found], bool]:
    """All objects in a uint8 [32, 32, 3] picture, and whether the ground is plain and free of dirt.

    Raises ValueError for another shape or dtype.
    """
    if picture.dtype != np.uint8 or picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture: expected uint8 [{SIZE}, {SIZE}, 3], got {picture.dtype} {list(picture.shape)}")
    mask = _foreground(picture)
    ground, plain = _ground(picture, mask)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    found: list[Found] = []
    dirt = 0
    for contour, (_, _, hole, parent) in zip(contours, hierarchy[0].tolist() if contours else [], strict=True):
        if parent >= 0:
            continue
        piece = _piece(contour)
        size = cv2.countNonZero(piece.mask)
        if size < MIN_OBJECT * CANVAS**2:
            dirt += size
            continue
        shape, iou, certain = _outline(piece)
        color, pure = _fill(picture, piece, ground)
        x, y, w, h = piece.box
        center = (piece.left + x + w / 2) / SCALE, (piece.top + y + h / 2) / SCALE
        found.append(Found(shape, color or "red", *center, iou, certain and pure and hole < 0))
    return found, plain and dirt <= MAX_DIRT * CANVAS**2


def related(first: Found, second: Found, relation: Relation) -> bool:
    """The first stands where the relation says, by more than six pixels and mainly along that axis."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 6 and along > abs(across)


def _match(found: Found, wanted: Object) -> float:
    """1 at most for the right object; parts for a right shape (by outline) and a right colour, and for being clean."""
    shape = found.shape == wanted.shape
    outline = 0.5 * min(max((found.iou - 0.5) / 0.4, 0.0), 1.0) if shape else 0.0
    color = 0.35 if found.color == wanted.color or (wanted.color is None and shape) else 0.0
    return outline + color + (0.15 if found.clean else 0.0)


def _right(found: Found, wanted: Object) -> bool:
    return found.clean and found.shape == wanted.shape and wanted.color in (None, found.color)


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
