"""Draws shapes pictures: the truth that the base model is pretrained on and the verifier is tested with."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from tempflow.shapes.prompts import COLORS, Color, Relation, Shape, Spec

SIZE = 32
OVERSAMPLE = 4
PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (228, 44, 44),
    "green": (44, 186, 64),
    "blue": (52, 84, 232),
    "yellow": (238, 216, 44),
    "purple": (178, 56, 224),
    "cyan": (48, 206, 220),
}
RADII = {1: (6.5, 10.0), 2: (5.2, 7.0), 3: (4.6, 5.6), 4: (4.5, 5.2)}
GAP = 2.0  # pixels between two objects, at least


@dataclass(frozen=True)
class Placed:
    """One drawn object; centre and radius (half the side of its box) in pixels."""

    shape: Shape
    color: Color
    x: float
    y: float
    radius: float


def polygon(shape: Shape, points: int = 48) -> np.ndarray:
    """The outline in the box [-1, 1]², float64 [N, 2], y downwards."""
    if shape == "circle":
        angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float) * 0.92
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.95), (-1, 0.95)], float)
    arm = 0.36
    return np.array(
        [
            *[(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)],
            *[(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)],
        ],
        float,
    )


def draw(objects: list[Placed], background: tuple[int, int, int]) -> np.ndarray:
    """uint8 [32, 32, 3], antialiased."""
    canvas = np.full((SIZE * OVERSAMPLE, SIZE * OVERSAMPLE, 3), background, np.uint8)
    for o in objects:
        outline = (polygon(o.shape) * o.radius + (o.x, o.y)) * OVERSAMPLE - 0.5
        cv2.fillPoly(canvas, [np.round(outline * 16).astype(np.int32)], PALETTE[o.color], shift=4)
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _related(first: tuple[float, ...], second: tuple[float, ...], relation: Relation) -> bool:
    """Apart along the relation's axis and nearly level on the other."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= 10 and abs(across) <= 5


def _layout(spec: Spec, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii by rejection: whole layouts are proposed at once and the first good one is kept."""
    count = len(spec.objects)
    tries = (4, 16, 64, 256)[count - 1]
    low, high = RADII[count]
    first, second = np.triu_indices(count, 1)
    while True:
        radius = np.clip(rng.uniform(low, high, (tries, 1)) + rng.uniform(-0.4, 0.4, (tries, count)), low, high)
        spot = rng.uniform(0, 1, (2, tries, count)) * (SIZE - 2 * radius - 2) + radius + 1
        gap = np.abs(spot[:, :, first] - spot[:, :, second]).max(0) - radius[:, first] - radius[:, second]
        for row in np.flatnonzero((gap >= GAP).all(1)):
            placed = list(zip(spot[0, row].tolist(), spot[1, row].tolist(), radius[row].tolist(), strict=True))
            if spec.relation is None or _related(placed[0], placed[1], spec.relation):
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
