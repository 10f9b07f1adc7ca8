"""The renderer: fixed pictures (the shipped model was pretrained on them), exact areas, layouts as promised."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tempflow.shapes.prompts import SHAPES, Shape, specs
from tempflow.shapes.render import (
    ASIDE,
    GAP,
    HOLE,
    PALETTE,
    RADII,
    SIZE,
    SIZED,
    Placed,
    aside,
    compose,
    draw,
    polygon,
    scene,
)
from tempflow.shapes.verify import LARGEST_SMALL, MIN_ASIDE, SMALLEST_BIG

WORLD = specs()


def test_scenes_are_the_ones_that_the_shipped_model_has_seen() -> None:
    digest, rng = hashlib.sha256(), np.random.default_rng(3)
    for spec in WORLD[::5]:
        objects, shade = compose(spec, rng)
        digest.update(
            repr([(o.shape, o.color, round(o.x, 6), round(o.y, 6), round(o.radius, 6)) for o in objects]).encode()
        )
        digest.update(bytes([shade]))
    assert digest.hexdigest() == "8befdb48c25d3292fac8d1bd85c275f98fbf79ad992cb471cc17f74e525616f7"


def test_scene_draws_what_compose_lays_out() -> None:
    for seed, spec in enumerate(WORLD[::40]):
        objects, shade = compose(spec, np.random.default_rng(seed))
        assert np.array_equal(scene(spec, np.random.default_rng(seed)), draw(objects, (shade, shade, shade)))


@pytest.mark.parametrize("shape", SHAPES)
def test_painted_area_is_the_polygons(shape: Shape) -> None:
    ground = (30, 30, 30)
    picture = draw([Placed(shape, "red", 15.3, 16.1, 9.0)], ground).astype(float)
    share = (picture[..., 0] - 30) / (PALETTE["red"][0] - 30)
    x, y = (polygon(shape, 400) * 9.0).T
    shoelace = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    around = np.hypot(np.diff(x, append=x[0]), np.diff(y, append=y[0])).sum()
    if shape == "ring":
        shoelace, around = shoelace * (1 - HOLE**2), around * (1 + HOLE)
    # OpenCV paints the outline too, half an oversampled pixel (an eighth of a pixel) beyond the area
    assert share.sum() == pytest.approx(shoelace + around / 8, rel=0.025)
    assert picture.shape == (SIZE, SIZE, 3) and tuple(picture[0, 0]) == ground


def test_objects_keep_their_distance_from_each_other_and_from_the_border() -> None:
    rng = np.random.default_rng(0)
    for spec in WORLD[::9]:
        objects, shade = compose(spec, rng)
        assert [o.shape for o in objects] == [o.shape for o in spec.objects]
        assert all(w.color in (None, o.color) for o, w in zip(objects, spec.objects, strict=True))
        low, high = SIZED[size] if (size := spec.objects[0].size) else RADII[len(objects)]
        assert all(low <= o.radius <= high for o in objects)
        assert 14 <= shade < 44
        for i, a in enumerate(objects):
            assert min(a.x, a.y, SIZE - a.x, SIZE - a.y) >= a.radius + 1 - 1e-9
            for b in objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP - 1e-9


def test_relations_hold_by_a_wide_margin() -> None:
    rng = np.random.default_rng(1)
    for spec in WORLD:
        if spec.kind == "position":
            assert spec.relation is not None
            (a, b), _ = compose(spec, rng)
            dx, dy = b.x - a.x, b.y - a.y
            wide = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[spec.relation]
            across = dy if spec.relation in ("left of", "right of") else dx
            assert wide >= 10 and abs(across) <= 5


def test_places_hold_by_a_wide_margin_and_sizes_are_unmistakable() -> None:
    rng = np.random.default_rng(2)
    for spec in WORLD:
        wanted = spec.objects[0]
        if wanted.place is None and wanted.size is None:
            continue
        (placed,), _ = compose(spec, rng)
        if wanted.place is not None:
            along, across = aside(placed.x, placed.y, wanted.place)
            assert along >= ASIDE > MIN_ASIDE + 1 and abs(across) <= along - 2
        longer = placed.radius * abs(polygon(placed.shape)).max()
        assert wanted.size != "small" or longer < LARGEST_SMALL - 0.7
        assert wanted.size != "big" or longer > SMALLEST_BIG + 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_box_and_stand_in_its_middle(shape: Shape) -> None:
    low, high = polygon(shape).min(0), polygon(shape).max(0)
    assert low == pytest.approx(-high, abs=0.06)
    assert max(high) == pytest.approx(0.92 if shape == "square" else 1.0, abs=0.01)


def test_a_ring_has_a_hole_of_the_ground() -> None:
    picture = draw([Placed("ring", "white", 16, 16, 9)], (30, 30, 30))
    assert (picture[14:18, 14:18] == 30).all()
    assert (picture[16, [9, 22]] == PALETTE["white"]).all()
