"""The judge of shapes pictures: truth passes, everything else fails, partial credit is partial and monotone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.catalog import FAIR, WRONG
from benchmarks.tricks import Trick, half_disc, outlined, posed, regular, superellipse, turned
from benchmarks.tricks import standing as posture
from benchmarks.verifier import mismatched, noise, rates, rng_for, truth
from tempflow.shapes.prompts import COLORS, KINDS, SHAPES, Color, Kind, Object, Shape, Spec, by_prompt, specs
from tempflow.shapes.render import PALETTE, SIZE, Placed, compose, draw, polygon, scene
from tempflow.shapes.verify import judge, look

GREY = (28, 28, 28)
WORLD = specs()
seeds = st.integers(0, 2**32 - 1)
some_kind = st.sampled_from(KINDS)
OF_KIND = {kind: [s for s in WORLD if s.kind == kind] for kind in KINDS}
some_spec = some_kind.flatmap(lambda kind: st.sampled_from(OF_KIND[kind]))


def one(shape: Shape = "circle", color: Color = "red", radius: float = 8.0) -> np.ndarray:
    return draw([Placed(shape, color, 16, 16, radius)], GREY)


# ------------------------------------------------------------------------------------------------------------- truth
@cache
def shown() -> dict[str, list[tuple[np.ndarray, Spec]]]:
    return truth(300)


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_truth_is_right(kind: Kind) -> None:
    strict, graded = rates(shown()[kind])
    assert strict >= 0.995 and graded >= strict


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_seen_is_what_was_drawn(shape: Shape) -> None:
    other = SHAPES[SHAPES.index(shape) - 1]
    objects = [Placed(shape, "white", 8, 9, 6), Placed(other, "purple", 22, 21, 7)]
    found, plain = look(draw(objects, GREY))
    assert plain and all(f.clean for f in found)
    for drawn in objects:
        seen = next(f for f in found if f.shape == drawn.shape)
        assert seen.color == drawn.color
        assert (seen.x, seen.y) == pytest.approx((drawn.x, drawn.y), abs=0.5)
        assert seen.radius == pytest.approx(drawn.radius * abs(polygon(drawn.shape)).max(), abs=0.6)


@settings(max_examples=60, deadline=None)
@given(some_spec, seeds)
def test_a_mirror_image_turns_left_and_right_and_moons_round_and_nothing_else(spec: Spec, seed: int) -> None:
    picture = np.ascontiguousarray(scene(spec, np.random.default_rng(seed))[:, ::-1])
    turns = spec.relation in ("left of", "right of") or spec.objects[0].place in ("on the left", "on the right")
    assert judge(picture, spec).strict == (not turns and all(o.shape != "moon" for o in spec.objects))


# ----------------------------------------------------------------------------------------------- mismatches and noise
def test_scenes_of_another_meaning_are_wrong_even_if_one_word_away() -> None:
    for name, cases in mismatched(250).items():
        assert rates(cases)[0] <= 0.0025, name


def test_noise_is_wrong() -> None:
    for name, cases in noise(100).items():
        assert rates(cases)[0] == 0.0, name


def test_a_blank_is_worth_nothing() -> None:
    assert judge(np.full((SIZE, SIZE, 3), 28, np.uint8), WORLD[0]).graded == 0.0


# ------------------------------------------------------------------------------------------------------ cheap tricks
def share(trick: Trick, name: str, count: int = 12) -> float:
    rng = rng_for(name)
    return rates([trick(rng) for _ in range(count)])[0]


@pytest.mark.parametrize("name", [n for n in WRONG if not n.startswith("squircle (n=3.0) as circle")])
def test_cheap_tricks_are_wrong(name: str) -> None:
    assert share(WRONG[name], name) == 0.0


@pytest.mark.parametrize("name", [n for n in FAIR if n != "squeezed to 95 %"])
def test_fair_pictures_are_right(name: str) -> None:
    assert share(FAIR[name], name) >= 0.9


FOREIGN: dict[str, tuple[Shape, Callable[[], np.ndarray]]] = {
    "squircle of 3.5": ("circle", lambda: superellipse(3.5)),
    "heptagon on its tip": ("diamond", lambda: regular(7)),
    "half a disc": ("dome", half_disc),
    "a moon that looks the other way": ("moon", lambda: turned("moon", 180)),
    "an upright bar": ("bar", lambda: turned("bar", 90)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_outlines_are_wrong(name: str) -> None:
    asked, outline = FOREIGN[name]
    assert share(outlined(lambda rng: outline(), asked), name, 40) <= 0.025


@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("ring", "bar", "moon")])
def test_an_object_of_85_percent_height_is_wrong(shape: Shape) -> None:
    """Of bars and moons that is a pixel of their shorter side; a ring isn't drawn by its outline alone."""
    squeezed = outlined(lambda rng: polygon(shape) * (1, 0.85), shape)
    assert share(squeezed, f"squeezed {shape}", 40) <= 0.1


@pytest.mark.parametrize("size", ["small", "big"])
def test_what_lies_between_the_sizes_is_neither(size: str) -> None:
    assert share(posed(posture(7.0), size=size), size) == 0.0  # type: ignore[arg-type]
    assert share(posed(posture({"small": 5.5, "big": 9.0}[size]), size=size), size) == 1.0  # type: ignore[arg-type]


def test_a_hole_is_wrong_but_in_a_ring() -> None:
    spec = Spec("color", (Object("ring", "red"),))
    ring = one("ring", radius=9.0)
    assert judge(ring, spec).strict
    filled = one("circle", radius=9.0)
    assert not judge(filled, spec).strict
    for y, x in ((16, 16), (9, 16)):  # something in the hole, a hole in the band
        dirty = ring.copy()
        dirty[y : y + 2, x : x + 2] = PALETTE["red"] if (y, x) == (16, 16) else GREY
        assert not judge(dirty, spec).strict


@pytest.mark.parametrize("level", [2, 5])
def test_a_little_noise_is_no_fault(level: int) -> None:
    rng = np.random.default_rng(level)
    some = [pool[i] for pool in OF_KIND.values() for i in rng.integers(0, len(pool), 50)]
    right = [
        judge(np.clip(scene(s, rng) + rng.normal(0, level, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8), s).strict
        for s in some
    ]
    assert np.mean(right) >= 0.98


# ------------------------------------------------------------------------------------------------------------ grading
@settings(max_examples=100, deadline=None)
@given(some_spec, some_spec, seeds, st.floats(0, 60))
def test_graded_is_a_fraction_and_one_exactly_when_strict(drawn: Spec, asked: Spec, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    picture = np.clip(scene(drawn, rng) + rng.normal(0, noise, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    verdict = judge(picture, asked)
    assert 0.0 <= verdict.graded <= 1.0
    assert (verdict.graded == 1.0) == verdict.strict
    assert verdict == judge(picture, asked)


@settings(max_examples=60, deadline=None)
@given(some_spec, seeds, st.randoms(use_true_random=False))
def test_adding_a_missing_object_never_lowers_the_grade(spec: Spec, seed: int, random: Random) -> None:
    objects, shade = compose(spec, np.random.default_rng(seed))
    random.shuffle(objects)
    grades = [judge(draw(objects[:n], (shade, shade, shade)), spec).graded for n in range(len(objects) + 1)]
    assert grades == sorted(grades) and grades[0] == 0.0
    assert grades[-1] > 0.85  # a truth in a thousand is not seen as right


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([k for k in KINDS if k not in ("single", "color")]).flatmap(lambda k: st.sampled_from(OF_KIND[k])),
    seeds,
)
def test_putting_one_object_right_never_lowers_the_grade(spec: Spec, seed: int) -> None:
    """From wrong shapes to right ones, object by object."""
    objects, shade = compose(spec, np.random.default_rng(seed))
    wrong = [replace(o, shape=SHAPES[(SHAPES.index(o.shape) + 1) % len(SHAPES)]) for o in objects]
    states = [objects[:n] + wrong[n:] for n in range(len(objects) + 1)]
    grades = [judge(draw(state, (shade, shade, shade)), spec).graded for state in states]
    if spec.kind == "count":  # elsewhere a wrong shape may be the other object's right one
        assert grades == sorted(grades)
    assert max(grades[:-1]) < grades[-1]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(OF_KIND["color"]), st.sampled_from(COLORS), seeds)
def test_something_more_or_another_colour_costs(spec: Spec, color: Color, seed: int) -> None:
    radius = {"small": 5.5, "big": 9.0, None: 7.0}[spec.objects[0].size]
    placed = Placed(spec.objects[0].shape, spec.objects[0].color or "red", 10.5, 10.5, radius)
    more = draw([placed, Placed(SHAPES[seed % len(SHAPES)], color, 25.5, 25.5, 5)], GREY)
    assert 0 < judge(more, spec).graded < 0.9
    if color != placed.color:
        assert 0 < judge(draw([replace(placed, color=color)], GREY), spec).graded < 0.9


def test_a_wrong_size_or_place_costs_and_both_cost_more() -> None:
    spec = by_prompt()["a small ring on the left"]
    ring = Placed("ring", "cyan", 8, 16, 5.5)
    right, big = draw([ring], GREY), draw([replace(ring, radius=9.0, x=10.5)], GREY)
    middle, both = draw([replace(ring, x=16.0)], GREY), draw([replace(ring, radius=9.0, x=16.0)], GREY)
    assert judge(right, spec).strict
    assert judge(big, spec).graded == pytest.approx(judge(middle, spec).graded, abs=0.03)
    assert 0.4 < judge(both, spec).graded < judge(middle, spec).graded < 0.9


def test_a_relation_that_does_not_hold_costs_and_a_dirty_ground_too() -> None:
    spec = by_prompt()["a circle left of a square"]
    pair = [Placed("circle", "red", 9, 16, 6), Placed("square", "blue", 23, 16, 6)]
    turned = [replace(pair[0], x=23.0), replace(pair[1], x=9.0)]
    assert judge(draw(pair, GREY), spec).strict
    assert 0.4 < judge(draw(turned, GREY), spec).graded < 0.7
    dirty = draw(pair, GREY)
    dirty[2, 2] = PALETTE["red"]
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
