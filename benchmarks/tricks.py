"""The makers of cheap tricks against the shapes verifier: pictures meant to look right to it that are wrong to the eye.

A trick is a function of a random generator that returns (picture, prompt's meaning). `benchmarks.catalog` names them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
from PIL import Image

from tempflow.shapes.prompts import COLORS, SHAPES, Color, Object, Place, Shape, Size, Spec, specs
from tempflow.shapes.render import ARM, OVERSAMPLE, PALETTE, SIZE, Placed, compose, draw, polygon

Rng = np.random.Generator
Trick = Callable[[Rng], tuple[np.ndarray, Spec]]
BIG = SIZE * OVERSAMPLE
GREY = (28, 28, 28)
HUES: tuple[Color, ...] = tuple(c for c in COLORS if c != "white")  # white may be added to these as something foreign
COMPACT: tuple[Shape, ...] = ("circle", "square", "triangle", "cross", "diamond", "dome")  # solid and thick everywhere


def some(rng: Rng, kind: str | None = None) -> Spec:
    pool = [s for s in specs() if kind in (None, s.kind)]
    return pool[rng.integers(len(pool))]


def one(rng: Rng, shape: Shape | None = None) -> Spec:
    """A colour prompt: one object."""
    return Spec("color", (Object(shape or COMPACT[rng.integers(len(COMPACT))], HUES[rng.integers(len(HUES))]),))


def paint(canvas: np.ndarray, outline: np.ndarray, fill: np.ndarray | tuple[int, ...]) -> None:
    """A polygon in pixels onto an oversampled canvas; `fill` is a colour or a picture of the canvas's size."""
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round((outline * OVERSAMPLE - 0.5) * 16).astype(np.int32)], 1, shift=4)
    canvas[mask > 0] = np.broadcast_to(np.asarray(fill, np.uint8), canvas.shape)[mask > 0]


def blank(color: tuple[int, ...] = GREY) -> np.ndarray:
    return np.full((BIG, BIG, 3), color, np.uint8)


def small(canvas: np.ndarray) -> np.ndarray:
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def spot(rng: Rng, radius: float) -> np.ndarray:
    return rng.uniform(radius + 1, SIZE - radius - 1, 2)


def outlined(make: Callable[[Rng], np.ndarray], asked: Shape, low: float = 5.5, high: float = 10) -> Trick:
    """One object of a foreign outline in the asked colour, where `asked` is wanted."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec, canvas, radius = one(rng, asked), blank(), rng.uniform(low, high)
        paint(canvas, make(rng) * radius + spot(rng, radius), PALETTE[spec.objects[0].color or "red"])
        return small(canvas), spec

    return trick


def filled(make: Callable[[Rng, tuple[int, int, int]], np.ndarray | tuple[int, ...]]) -> Trick:
    """The right outline with a foreign fill; the object stands in the middle, where fills with a pattern have it."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec, canvas, radius = one(rng), blank(), rng.uniform(6, 10)
        color = PALETTE[spec.objects[0].color or "red"]
        paint(canvas, polygon(spec.objects[0].shape) * radius + rng.uniform(14, 18, 2), make(rng, color))
        return small(canvas), spec

    return trick


def posed(objects: Callable[[Rng, Object], Placed], size: Size | None = None, place: Place | None = None) -> Trick:
    """One object of any shape where a size or a place is asked for; `objects` says where and how large it stands."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        wanted = Object(SHAPES[rng.integers(len(SHAPES))], size=size, place=place)
        return draw([objects(rng, wanted)], GREY), Spec("single", (wanted,))

    return trick


def standing(radius: float, x: float = 16.0, y: float = 16.0) -> Callable[[Rng, Object], Placed]:
    """`radius` is half the longer side of the object's box, in pixels."""

    def place(rng: Rng, wanted: Object) -> Placed:
        longer = float(np.abs(polygon(wanted.shape)).max())
        return Placed(wanted.shape, COLORS[rng.integers(len(COLORS))], x, y, radius / longer)

    return place


def spoiled(change: Callable[[np.ndarray, Rng], np.ndarray]) -> Trick:
    """A right picture of any prompt, changed afterwards."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec = some(rng)
        objects, shade = compose(spec, rng)
        return change(draw(objects, (shade, shade, shade)), rng).astype(np.uint8), spec

    return trick


def rearranged(change: Callable[[list[Placed], Spec, Rng], list[Placed]], kind: str | None = None) -> Trick:
    """The objects of a right picture, changed before they are drawn."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec = some(rng, kind)
        objects, shade = compose(spec, rng)
        return draw(change(objects, spec, rng), (shade, shade, shade)), spec

    return trick


# ------------------------------------------------------------------------------------------------------ outlines
def superellipse(power: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.sign(c) * abs(c) ** (2 / power), np.sign(s) * abs(s) ** (2 / power)], 1) * 0.95


def regular(corners: int, turn: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False) - np.pi / 2 + turn
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def turned(shape: Shape, degrees: float) -> np.ndarray:
    t = np.deg2rad(degrees)
    return polygon(shape) @ np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])


def fat_cross(arm: float) -> np.ndarray:
    thin = polygon("cross")
    return np.where(np.isclose(abs(thin), ARM), np.sign(thin) * arm, thin)


def half_disc() -> np.ndarray:
    """Twice as wide as high, its flat side below."""
    return np.concatenate([regular(48)[36:], regular(48)[:13]]) + np.array([0, 0.5])


def trapezoid(top: float) -> np.ndarray:
    return np.array([(-top, -0.95), (top, -0.95), (1, 0.95), (-1, 0.95)], float)


# --------------------------------------------------------------------------------------------------------- fills
def between(rng: Rng, color: tuple[int, int, int]) -> tuple[int, ...]:
    """Half-way to the nearest other palette colour."""
    others = sorted(
        (c for c in PALETTE.values() if c != color),
        key=lambda c: sum((a - b) ** 2 for a, b in zip(c, color, strict=True)),
    )
    return tuple((a + b) // 2 for a, b in zip(color, others[0], strict=True))


def gradient(rng: Rng, color: tuple[int, int, int], other: tuple[int, ...] | None = None) -> np.ndarray:
    end = other or next(c for c in rng.permutation(list(PALETTE.values())) if tuple(c) != color)
    ramp = np.clip((np.arange(BIG) / BIG - 0.3) / 0.4, 0, 1)[None, :, None]
    return np.broadcast_to(np.asarray(color) * (1 - ramp) + np.asarray(end) * ramp, (BIG, BIG, 3))


def texture(rng: Rng, color: tuple[int, int, int], cell: int) -> np.ndarray:
    y, x = np.mgrid[:BIG, :BIG] // (cell * OVERSAMPLE)
    other = next(tuple(c) for c in rng.permutation(list(PALETTE.values())) if tuple(c) != color)
    return np.where(((x + y) % 2)[..., None] > 0, np.array(color), np.array(other))


def on_object(paint_on: Callable[[np.ndarray, np.ndarray, float, Rng, tuple[int, int, int]], None]) -> Trick:
    """Paints something on or around one right object."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec, canvas, radius = one(rng), blank(), rng.uniform(7, 10)
        shape, color = spec.objects[0].shape, PALETTE[spec.objects[0].color or "red"]
        center = spot(rng, radius)
        paint(canvas, polygon(shape) * radius + center, color)
        paint_on(canvas, center + np.array([0, 0.25 * radius * (shape == "triangle")]), radius, rng, color)
        return small(canvas), spec

    return trick


def rim(color: tuple[int, int, int] | None, width: float) -> Trick:
    """A right object with an edge of another colour (None: any of the palette), outside in."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec, canvas, radius = one(rng), blank(), rng.uniform(7, 10)
        center, outline, own = (
            spot(rng, radius),
            polygon(spec.objects[0].shape),
            PALETTE[spec.objects[0].color or "red"],
        )
        paint(canvas, outline * radius + center, color or other_color(rng, own))
        paint(canvas, outline * (radius - width) + center, own)
        return small(canvas), spec

    return trick


def hollow(rng: Rng) -> tuple[np.ndarray, Spec]:
    """The right outline, two pixels wide, with the ground inside."""
    spec, canvas, radius = one(rng), blank(), rng.uniform(7, 10)
    center, outline = spot(rng, radius), polygon(spec.objects[0].shape)
    paint(canvas, outline * radius + center, PALETTE[spec.objects[0].color or "red"])
    paint(canvas, outline * (radius - 2) + center, GREY)
    return small(canvas), spec


def other_color(rng: Rng, color: tuple[int, int, int]) -> tuple[int, ...]:
    return next(tuple(int(v) for v in c) for c in rng.permutation(list(PALETTE.values())) if tuple(c) != color)


# --------------------------------------------------------------------------------------------- changes afterwards
def objects_of(picture: np.ndarray, level: int) -> np.ndarray:
    """uint8 0/1: pixels within two of one that differs from the ground."""
    away = np.abs(picture.astype(int) - picture[0, 0].astype(int)).max(2)
    return cv2.dilate((away > level).astype(np.uint8), np.ones((5, 5), np.uint8))


def noisy(level: float) -> Callable[[np.ndarray, Rng], np.ndarray]:
    return lambda p, rng: np.clip(p + rng.normal(0, level, p.shape), 0, 255)


def jpeg(quality: int) -> Callable[[np.ndarray, Rng], np.ndarray]:
    def change(picture: np.ndarray, rng: Rng) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=2 if quality < 90 else 0)
        return np.asarray(Image.open(file))

    return change


def specks(count: int, side: int, color: str | tuple[int, int, int]) -> Callable[[np.ndarray, Rng], np.ndarray]:
    """Squares of `side` pixels on the bare ground."""

    def change(picture: np.ndarray, rng: Rng) -> np.ndarray:
        out = picture.copy()
        objects = objects_of(picture, 20)
        placed = 0
        for _ in range(1000):
            y, x = rng.integers(0, SIZE - side, 2)
            if not objects[y : y + side, x : x + side].any():
                out[y : y + side, x : x + side] = (
                    PALETTE[COLORS[rng.integers(len(COLORS))]] if isinstance(color, str) else color
                )
                placed += 1
            if placed == count:
                return out
        return out

    return change


def over_ground(make: Callable[[np.ndarray, Rng], np.ndarray]) -> Callable[[np.ndarray, Rng], np.ndarray]:
    """Another ground behind the same objects: `make` gets the coordinates [32, 32, 2] and returns colours."""

    def change(picture: np.ndarray, rng: Rng) -> np.ndarray:
        ground = np.asarray(picture[0, 0], float)
        share = np.clip(np.abs(picture - ground).max(2) / 140, 0, 1)[..., None]
        grid = np.stack(np.mgrid[:SIZE, :SIZE], -1)
        return picture * share + np.broadcast_to(make(grid, rng), picture.shape) * (1 - share)

    return change


def see_through(alpha: float) -> Callable[[np.ndarray, Rng], np.ndarray]:
    return lambda p, rng: p * alpha + p[0, 0].astype(float) * (1 - alpha)


def squeezed(factor: float) -> Callable[[np.ndarray, Rng], np.ndarray]:
    def change(picture: np.ndarray, rng: Rng) -> np.ndarray:
        matrix = np.array([[1, 0, 0], [0, factor, (1 - factor) * SIZE / 2]], np.float32)
        edge = tuple(int(v) for v in picture[0, 0])
        return cv2.warpAffine(
            picture, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=edge
        )

    return change


def blurred(sigma: float) -> Callable[[np.ndarray, Rng], np.ndarray]:
    return lambda p, rng: cv2.GaussianBlur(p, (0, 0), sigma)


def shifted(picture: np.ndarray, rng: Rng) -> np.ndarray:
    return np.roll(picture, tuple(rng.integers(-1, 2, 2)), (0, 1))


# ------------------------------------------------------------------------------------------------- whole pictures
def crowd(rng: Rng) -> tuple[np.ndarray, Spec]:
    """Eight of the nine shapes, as if to show every wanted object at once."""
    cells = rng.permutation(9)[:8]
    objects = [
        Placed(SHAPES[i], COLORS[rng.integers(len(COLORS))], 5.5 + 10.5 * (c % 3), 5.5 + 10.5 * (c // 3), 4.2)
        for i, c in enumerate(cells.tolist())
    ]
    return draw(objects, GREY), some(rng)


def tiled(rng: Rng) -> tuple[np.ndarray, Spec]:
    spec = some(rng)
    first = spec.objects[0]
    objects = [Placed(first.shape, first.color or "red", 4 + 8 * x, 4 + 8 * y, 3.2) for x in range(4) for y in range(4)]
    return draw(objects, GREY), spec


def touching(gap: float) -> Trick:
    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec = some(rng, "attribution")
        while gap < 0 and {"triangle", "moon", "dome"} & {o.shape for o in spec.objects}:
            spec = some(rng, "attribution")  # these boxes touch where the outlines do not
        a, b = spec.objects
        level = rng.uniform(8, 24)
        pair = [
            Placed(a.shape, a.color or "red", 16 - 6.5 - gap / 2, level, 6.5),
            Placed(b.shape, b.color or "red", 16 + 6.5 + gap / 2, level, 6.5),
        ]
        return draw(pair, GREY), spec

    return trick


def concentric(rng: Rng) -> tuple[np.ndarray, Spec]:
    spec = some(rng, "attribution")
    while spec.objects[0].shape == "ring":  # what stands in a ring's hole stands apart from it
        spec = some(rng, "attribution")
    a, b = spec.objects
    return draw(
        [Placed(a.shape, a.color or "red", 16, 16, 13), Placed(b.shape, b.color or "red", 16, 16, 5)], GREY
    ), spec


def cut(share: float) -> Trick:
    """One object of which `share` of the height or width lies outside the frame."""

    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec, radius = one(rng), rng.uniform(6, 10)
        free = rng.uniform(radius + 1, SIZE - radius - 1)
        wide, high = np.abs(polygon(spec.objects[0].shape)).max(0) * radius * (1 - 2 * share)
        x, y = [(wide, free), (SIZE - wide, free), (free, high), (free, SIZE - high)][rng.integers(4)]
        return draw([Placed(spec.objects[0].shape, spec.objects[0].color or "red", x, y, radius)], GREY), spec

    return trick


def giant(radius: float) -> Trick:
    def trick(rng: Rng) -> tuple[np.ndarray, Spec]:
        spec = one(rng)
        return draw([Placed(spec.objects[0].shape, spec.objects[0].color or "red", 16, 16, radius)], GREY), spec

    return trick


def ghost(level: int) -> Callable[[np.ndarray, Rng], np.ndarray]:
    """A grey square a little brighter than the ground."""

    def change(picture: np.ndarray, rng: Rng) -> np.ndarray:
        out, (y, x) = picture.copy(), rng.integers(1, 22, 2)
        bare = np.zeros((SIZE, SIZE), bool)
        bare[y : y + 9, x : x + 9] = True
        bare &= objects_of(picture, 3) == 0
        if bare.sum() < 12:
            return change(picture, rng)
        out[bare] = np.minimum(out[bare].astype(int) + level, 255)
        return out

    return change


def flipped(objects: list[Placed], spec: Spec, rng: Rng) -> list[Placed]:
    a, b = objects
    return [replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)]


def one_more(objects: list[Placed], spec: Spec, rng: Rng) -> list[Placed]:
    for _ in range(2000):
        r = rng.uniform(3.0, 5.0)
        x, y = spot(rng, r)
        if all(max(abs(o.x - x), abs(o.y - y)) >= o.radius + r + 1.5 for o in objects):
            return [*objects, Placed(SHAPES[rng.integers(len(SHAPES))], COLORS[rng.integers(len(COLORS))], x, y, r)]
    return objects[:-1]


def one_less(objects: list[Placed], spec: Spec, rng: Rng) -> list[Placed]:
    return objects[1:]


def another_shape(objects: list[Placed], spec: Spec, rng: Rng) -> list[Placed]:
    first = objects[0]
    return [replace(first, shape=next(s for s in rng.permutation(SHAPES) if s != first.shape)), *objects[1:]]


def swapped(objects: list[Placed], spec: Spec, rng: Rng) -> list[Placed]:
    a, b = objects
    return [replace(a, color=b.color), replace(b, color=a.color)]


def sized(radius: float) -> Callable[[list[Placed], Spec, Rng], list[Placed]]:
    return lambda objects, spec, rng: [replace(o, radius=radius) for o in objects]


def dot(radius: float, color: tuple[int, int, int] | None) -> Trick:
    """A hole or a dot of another colour on the object (None: any other colour)."""
    return on_object(
        lambda canvas, center, r, rng, own: paint(canvas, regular(24) * radius + center, color or other_color(rng, own))
    )


def white_bar(canvas: np.ndarray, center: np.ndarray, radius: float, rng: Rng, own: tuple[int, int, int]) -> None:
    paint(canvas, np.array([(-radius, -0.9), (radius, -0.9), (radius, 0.9), (-radius, 0.9)]) + center, (230, 230, 230))


def dusk(rng: Rng, color: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    return tuple(int(v * factor) for v in color)


def pale(rng: Rng, color: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(int(v * (1 - share) + 255 * share) for v in color)
