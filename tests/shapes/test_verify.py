"""The judge of shapes pictures: truth passes, everything else fails, partial credit is partial and monotone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempflow.shapes.prompts import COLORS, KINDS, SHAPES, Kind, Object, Shape, Spec, by_prompt, specs
from tempflow.shapes.render import PALETTE, SIZE, Placed, compose, draw, polygon, scene
from tempflow.shapes.verify import judge, look

GREY = (28, 28, 28)
WORLD = specs()
seeds = st.integers(0, 2**32 - 1)
some_spec = st.sampled_from(WORLD)


def one(shape: Shape = "circle", color: str = "red", radius: float = 8.0) -> tuple[np.ndarray, Spec]:
    picture = draw([Placed(shape, color, 16, 16, radius)], GREY)  # type: ignore[arg-type]
    return picture, Spec("color", (Object(shape, color),))  # type: ignore[arg-type]


def filled(outline: np.ndarray, color: tuple[int, int, int] = PALETTE["red"], radius: float = 9.0) -> np.ndarray:
    canvas = np.full((SIZE * 4, SIZE * 4, 3), GREY, np.uint8)
    points = ((outline * radius + 16) * 4 - 0.5) * 16
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], color, shift=4)
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


# ------------------------------------------------------------------------------------------------------------- truth
@pytest.mark.parametrize("kind", KINDS)
def test_rendered_truth_is_right(kind: Kind) -> None:
    rng = np.random.default_rng(11)
    pool = [s for s in WORLD if s.kind == kind]
    wrong = [
        spec.prompt
        for spec in (pool[i] for i in rng.integers(0, len(pool), 400))
        if not judge(scene(spec, rng), spec).strict
    ]
    assert len(wrong) <= 0.005 * 400, wrong


def test_what_is_seen_is_what_was_drawn() -> None:
    objects = [Placed("cross", "cyan", 8, 9, 6), Placed("triangle", "purple", 22, 21, 7)]
    found, plain = look(draw(objects, GREY))
    assert plain and all(f.clean for f in found)
    for drawn in objects:
        seen = next(f for f in found if f.shape == drawn.shape)
        assert seen.color == drawn.color
        assert (seen.x, seen.y) == pytest.approx((drawn.x, drawn.y), abs=0.5)


@settings(max_examples=60, deadline=None)
@given(some_spec, seeds)
def test_a_mirror_image_turns_left_and_right_round_and_nothing_else(spec: Spec, seed: int) -> None:
    picture = np.ascontiguousarray(scene(spec, np.random.default_rng(seed))[:, ::-1])
    assert judge(picture, spec).strict == (spec.relation not in ("left of", "right of"))


# ----------------------------------------------------------------------------------------------- mismatches and noise
def other_meaning(spec: Spec, asked: Spec) -> bool:
    """Whether a scene of `spec` can never show `asked`: other shapes or colours, or an opposed relation."""
    left = sorted((o.shape, o.color or "") for o in spec.objects)
    right = sorted((o.shape, o.color or "") for o in asked.objects)
    if [s for s, _ in left] != [s for s, _ in right]:
        return True
    if spec.kind == asked.kind == "attribution" or spec.kind == asked.kind == "color":
        return left != right
    if spec.relation and asked.relation:
        turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return asked.relation != (spec.relation if spec.objects == asked.objects else turned[spec.relation])
    return False


def test_scenes_of_another_meaning_are_wrong() -> None:
    rng = np.random.default_rng(12)
    judged = passed = 0
    while judged < 1500:
        spec, asked = (WORLD[i] for i in rng.integers(0, len(WORLD), 2))
        if judged % 2:  # every other pair of one kind: nearer by
            pool = [s for s in WORLD if s.kind == spec.kind]
            asked = pool[rng.integers(len(pool))]
        if spec.kind != "single" and other_meaning(spec, asked):
            judged += 1
            passed += judge(scene(spec, rng), asked).strict
    assert passed <= 0.005 * judged


def test_noise_is_wrong() -> None:
    rng, shape = np.random.default_rng(13), (SIZE, SIZE, 3)
    for i in range(250):
        field = cv2.GaussianBlur(rng.normal(0, 1, shape), (0, 0), rng.uniform(1, 6))
        pictures = [
            rng.integers(0, 256, shape),
            rng.normal(rng.uniform(30, 128), rng.uniform(10, 80), shape),
            127 + field / field.std() * rng.uniform(20, 120),
            np.where(rng.random((SIZE, SIZE, 1)) < 0.1, rng.integers(0, 256, shape), 28),
        ]
        for picture in pictures:
            assert not judge(np.clip(picture, 0, 255).astype(np.uint8), WORLD[i % len(WORLD)]).strict


def test_a_blank_is_worth_nothing() -> None:
    assert judge(np.full((SIZE, SIZE, 3), 28, np.uint8), WORLD[0]).graded == 0.0


# ------------------------------------------------------------------------------------------------------ cheap tricks
def speck(picture: np.ndarray, color: tuple[int, int, int], side: int = 1) -> np.ndarray:
    picture[2 : 2 + side, 2 : 2 + side] = color
    return picture


def ringed(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """One pixel of `color` all round the object."""
    inside = (np.ptp(picture, axis=2) > 3).astype(np.uint8)
    picture[cv2.dilate(inside, np.ones((3, 3), np.uint8)) > inside] = color
    return picture


def dotted(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    picture[15:18, 15:18] = color
    return picture


def bar(picture: np.ndarray) -> np.ndarray:
    picture[15:17, 7:25] = 230
    return picture


def superellipse(power: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.sign(c) * abs(c) ** (2 / power), np.sign(s) * abs(s) ** (2 / power)], 1)


def pentagon() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 5, endpoint=False) - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def ramp() -> np.ndarray:
    picture, _ = one()
    across = np.linspace(1, 0, SIZE)[None, :, None]
    inside = np.ptp(picture, axis=2, keepdims=True) > 100
    return np.where(inside, np.array(PALETTE["red"]) * across + np.array(PALETTE["yellow"]) * (1 - across), picture)


def split_fill() -> np.ndarray:
    picture, _ = one()
    picture[:, 16:][np.ptp(picture[:, 16:], axis=2) > 100] = PALETTE["purple"]
    return picture


RED_CIRCLE = Spec("color", (Object("circle", "red"),))
RED_SQUARE = Spec("color", (Object("square", "red"),))
RED_TRIANGLE = Spec("color", (Object("triangle", "red"),))
TRICKS = {
    "coloured speck": (speck(one()[0], PALETTE["red"]), RED_CIRCLE),
    "white speck": (speck(one()[0], (200, 200, 200)), RED_CIRCLE),
    "white block": (speck(one()[0], (200, 200, 200), 4), RED_CIRCLE),
    "white rim": (ringed(one()[0], (235, 235, 235)), RED_CIRCLE),
    "white rim on a square": (ringed(one("square")[0], (235, 235, 235)), RED_SQUARE),
    "blue rim": (ringed(one()[0], PALETTE["blue"]), RED_CIRCLE),
    "hole": (dotted(one()[0], GREY), RED_CIRCLE),
    "white dot": (dotted(one()[0], (240, 240, 240)), RED_CIRCLE),
    "yellow dot": (dotted(one()[0], PALETTE["yellow"]), RED_CIRCLE),
    "bar across": (bar(one()[0]), RED_CIRCLE),
    "gradient": (ramp(), RED_CIRCLE),
    "two halves": (split_fill(), RED_CIRCLE),
    "between red and purple": (filled(polygon("circle"), (203, 50, 134)), RED_CIRCLE),
    "pale": (filled(polygon("circle"), (240, 150, 150)), RED_CIRCLE),
    "dark": (filled(polygon("circle"), (110, 22, 22)), RED_CIRCLE),
    "squircle as circle": (filled(superellipse(3.5)), RED_CIRCLE),
    "squircle as square": (filled(superellipse(3.0)), RED_SQUARE),
    "pentagon as circle": (filled(pentagon()), RED_CIRCLE),
    "pentagon as triangle": (filled(pentagon()), RED_TRIANGLE),
    "trapezoid as triangle": (filled(np.array([(-0.4, -1), (0.4, -1), (1, 1), (-1, 1)])), RED_TRIANGLE),
    "triangle upside down": (filled(-polygon("triangle")), RED_TRIANGLE),
    "oblong as square": (filled(polygon("square") * (1, 0.7)), RED_SQUARE),
    "half a circle": (filled(polygon("circle") * (1, 0.5)), RED_CIRCLE),
    "bright ground": (draw([Placed("circle", "red", 16, 16, 8)], (150, 150, 150)), RED_CIRCLE),
    "coloured ground": (draw([Placed("circle", "red", 16, 16, 8)], (20, 70, 25)), RED_CIRCLE),
    "cut by the border": (draw([Placed("circle", "red", 5, 16, 8)], GREY), RED_CIRCLE),
    "too small": (one(radius=2.0)[0], RED_CIRCLE),
    "concentric": (draw([Placed("circle", "red", 16, 16, 12), Placed("square", "blue", 16, 16, 4)], GREY), RED_CIRCLE),
    "merged": (
        draw([Placed("square", "red", 10, 16, 6), Placed("square", "red", 21, 16, 6)], GREY),
        Spec("count", (Object("square"),) * 2),
    ),
}


@pytest.mark.parametrize("name", TRICKS)
def test_cheap_tricks_are_wrong(name: str) -> None:
    picture, spec = TRICKS[name]
    verdict = judge(picture.astype(np.uint8), spec)
    assert not verdict.strict and verdict.graded <= 0.9


@pytest.mark.parametrize("level", [2, 5])
def test_a_little_noise_is_no_fault(level: int) -> None:
    rng = np.random.default_rng(level)
    right = [
        judge(np.clip(scene(s, rng) + rng.normal(0, level, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8), s).strict
        for s in WORLD[::2]
    ]
    assert np.mean(right) >= 0.98


# ------------------------------------------------------------------------------------------------------------ grading
@settings(max_examples=150, deadline=None)
@given(some_spec, some_spec, seeds, st.floats(0, 60))
def test_graded_is_a_fraction_and_one_exactly_when_strict(drawn: Spec, asked: Spec, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    picture = np.clip(scene(drawn, rng) + rng.normal(0, noise, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    verdict = judge(picture, asked)
    assert 0.0 <= verdict.graded <= 1.0
    assert (verdict.graded == 1.0) == verdict.strict
    assert verdict == judge(picture, asked)


@settings(max_examples=80, deadline=None)
@given(some_spec, seeds, st.randoms(use_true_random=False))
def test_adding_a_missing_object_never_lowers_the_grade(spec: Spec, seed: int, random: Random) -> None:
    objects, shade = compose(spec, np.random.default_rng(seed))
    random.shuffle(objects)
    grades = [judge(draw(objects[:n], (shade, shade, shade)), spec).graded for n in range(len(objects) + 1)]
    assert grades == sorted(grades) and grades[0] == 0.0 and grades[-1] == 1.0


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([s for s in WORLD if len(s.objects) > 1]), seeds)
def test_putting_one_object_right_never_lowers_the_grade(spec: Spec, seed: int) -> None:
    """From wrong shapes to right ones, object by object."""
    objects, shade = compose(spec, np.random.default_rng(seed))
    wrong = [replace(o, shape=SHAPES[(SHAPES.index(o.shape) + 1) % 4]) for o in objects]
    states = [objects[:n] + wrong[n:] for n in range(len(objects) + 1)]
    grades = [judge(draw(state, (shade, shade, shade)), spec).graded for state in states]
    if spec.kind == "count":  # elsewhere a wrong shape may be the other object's right one
        assert grades == sorted(grades)
    assert max(grades[:-1]) < grades[-1] == 1.0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([s for s in WORLD if s.kind in ("single", "color")]), st.sampled_from(COLORS), seeds)
def test_something_more_or_another_colour_costs(spec: Spec, color: str, seed: int) -> None:
    placed = Placed(spec.objects[0].shape, spec.objects[0].color or "red", 10, 10, 7)
    more = draw([placed, Placed(SHAPES[seed % 4], color, 25, 25, 5)], GREY)  # type: ignore[arg-type]
    assert 0 < judge(more, spec).graded < 0.9
    if spec.kind == "color" and color != placed.color:
        assert 0 < judge(draw([replace(placed, color=color)], GREY), spec).graded < 0.9  # type: ignore[arg-type]


def test_a_relation_that_does_not_hold_costs_and_a_dirty_ground_too() -> None:
    spec = by_prompt()["a circle left of a square"]
    pair = [Placed("circle", "red", 9, 16, 6), Placed("square", "blue", 23, 16, 6)]
    turned = [replace(pair[0], x=23.0), replace(pair[1], x=9.0)]
    assert judge(draw(pair, GREY), spec).strict
    assert 0.4 < judge(draw(turned, GREY), spec).graded < 0.7
    dirty = speck(draw(pair, GREY), PALETTE["red"])
    assert 0.4 < judge(dirty, spec).graded < 0.7


def test_two_more_that_are_right_count_before_better_looking_wrong_ones() -> None:
    """Candidates are chosen by what was asked, not by how clean they look."""
    spec = Spec("count", (Object("cross"),) * 2)
    squares = [Placed("square", "red", 7, 7, 5), Placed("square", "red", 24, 7, 5)]
    crosses = [Placed("cross", "red", 7, 24, 5), Placed("cross", "red", 24, 24, 5)]
    worth = [judge(draw(squares + crosses[:n], GREY), spec).graded for n in range(3)]
    assert worth == sorted(worth) and worth[0] < worth[1]


@pytest.mark.parametrize(
    "picture",
    [np.zeros((32, 32), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((32, 32, 3), np.float32)],
)
def test_another_shape_or_dtype_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"picture: expected uint8 \[32, 32, 3\], got"):
        judge(picture, WORLD[0])
