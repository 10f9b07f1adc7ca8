"""Draws shapes pictures: the truth that the base model is pretrained on and the verifier is tested with."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tempflow.shapes.prompts import COLORS, Color, Object, Place, Relation, Shape, Size, Spec

SIZE = 32
OVERSAMPLE = 4
PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (228, 44, 44),
    "green": (44, 186, 64),
    "blue": (52, 84, 232),
    "yellow": (238, 216, 44),
    "purple": (178, 56, 224),
    "cyan": (48, 206, 220),
    "white": (236, 236, 236),
}
RADII = {1: (5.0, 10.0), 2: (5.2, 7.0), 3: (4.6, 5.6), 4: (4.5, 5.2)}
SIZED: dict[Size, tuple[float, float]] = {"small": (4.8, 5.8), "big": (8.6, 10.0)}
GAP = 2.0  # pixels between two objects, at least
ASIDE = 5.0  # pixels from the picture's middle at least, where a place is asked for
HOLE, ARM, WALL, THICK = 0.48, 0.32, 0.4, 0.38  # a ring's hole, half a cross's arm, a dome's wall, half a bar


@dataclass(frozen=True)
class Placed:
    """One drawn object; centre and radius (half the longer side of its box) in pixels."""

    shape: Shape
    color: Color
    x: float
    y: float
    radius: float


def _arc(start: float, end: float, points: int, radius: float = 1.0) -> np.ndarray:
    """From `start` to `end` in degrees, 0 to the right and 90 downwards."""
    angle = np.deg2rad(np.linspace(start, end, points))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius


def polygon(shape: Shape, points: int = 48) -> np.ndarray:
    """The outline in the box [-1, 1]², float64 [N, 2], y downwards; a ring's is its outer one."""
    if shape in ("circle", "ring"):
        return _arc(0, 360, points + 1)[:-1]
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float) * 0.92
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.95), (-1, 0.95)], float)
    if shape == "diamond":
        return np.array([(0, -1), (1, 0), (0, 1), (-1, 0)], float)
    if shape == "bar":
        return np.array([(-1, -THICK), (1, -THICK), (1, THICK), (-1, THICK)], float)
    if shape == "dome":
        lift = (1 - WALL) / 2
        half = _arc(180, 360, points) + np.array([0, lift])
        return np.concatenate([half, np.array([(1, lift + WALL), (-1, lift + WALL)])])
    if shape == "moon":  # a disc less another one; its tips are cut, for they would be thinner than a pixel
        inner, middle, tip = 0.75, 0.45, 0.1
        far, near = np.rad2deg(np.arccos(tip)), np.rad2deg(np.arccos((tip - middle) / inner))
        bay = _arc(360 - near, near, points, inner) + np.array([middle, 0])
        return np.concatenate([_arc(far, 360 - far, points), bay]) - np.array([(tip - 1) / 2, 0])
    return np.array(
        [
            *[(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)],
            *[(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
        ],
        float,
    )


def _outlines(shape: Shape) -> list[np.ndarray]:
    outer = polygon(shape)
    return [outer, outer * HOLE] if shape == "ring" else [outer]


def draw(objects: list[Placed], background: tuple[int, int, int]) -> np.ndarray:
    """uint8 [32, 32, 3], antialiased."""
    canvas = np.full((SIZE * OVERSAMPLE, SIZE * OVERSAMPLE, 3), background, np.uint8)
    for o in objects:
        outlines = [(line * o.radius + (o.x, o.y)) * OVERSAMPLE - 0.5 for line in _outlines(o.shape)]
        cv2.fillPoly(canvas, [np.round(line * 16).astype(np.int32) for line in outlines], PALETTE[o.color], shift=4)
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _related(first: tuple[float, ...], second: tuple[float, ...], relation: Relation) -> bool:
    """Apart along the relation's axis and nearly level on the other."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= 10 and abs(across) <= 5


def aside(x: float, y: float, place: Place) -> tuple[float, float]:
    """How far (x, y) lies from the picture's middle: towards `place`, and across."""
    dx, dy = x - SIZE / 2, y - SIZE / 2
    return {"on the left": (-dx, dy), "on the right": (dx, dy), "at the top": (-dy, dx), "at the bottom": (dy, dx)}[
        place
    ]


def _placed(spot: tuple[float, ...], wanted: Object) -> bool:
    if wanted.place is None:
        return True
    along, across = aside(spot[0], spot[1], wanted.place)
    return along >= ASIDE and abs(across) <= along - 2


def _layout(spec: Spec, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii by rejection: whole layouts are proposed at once and the first good one is kept."""
    count, wanted = len(spec.objects), spec.objects[0]
    tries = (4, 16, 64, 256)[count - 1] * (4 if wanted.place else 1)
    low, high = SIZED[wanted.size] if wanted.size else RADII[count]
    first, second = np.triu_indices(count, 1)
    while True:
        radius = np.clip(rng.uniform(low, high, (tries, 1)) + rng.uniform(-0.4, 0.4, (tries, count)), low, high)
        spot = rng.uniform(0, 1, (2, tries, count)) * (SIZE - 2 * radius - 2) + radius + 1
        gap = np.abs(spot[:, :, first] - spot[:, :, second]).max(0) - radius[:, first] - radius[:, second]
        for row in np.flatnonzero((gap >= GAP).all(1)):
            placed = list(zip(spot[0, row].tolist(), spot[1, row].tolist(), radius[row].tolist(), strict=True))
            if spec.relation is not None and not _related(placed[0], placed[1], spec.relation):
                continue
            if _placed(placed[0], wanted):
                return placed


def compose(spec: Spec, rng: np.random.Generator) -> tuple[list[Placed], int]:
    """Objects that show exactly `spec`, and the grey level of their ground. What the prompt leaves open is random."""
    spots = _layout(spec, rng)
    free: Color = COLORS[rng.integers(len(COLORS))]  # objects of a counted group share one colour
    colors: list[Color] = [
        o.color or (free if spec.kind == "count" else COLORS[rng.integers(len(COLORS))]) for o in spec.objects
    ]
    shade = int(rng.integers(14, 44))
    return [Placed(o.shape, c, x, y, r) for o, c, (x, y, r) in zip(spec.objects, colors, spots, strict=True)], shade


def scene(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """A random picture that shows exactly `spec`; uint8 [32, 32, 3]."""
    objects, shade = compose(spec, rng)
    return draw(objects, (shade, shade, shade))
