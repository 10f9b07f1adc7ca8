"""The renderer: fixed pictures (the shipped model was pretrained on them), exact areas, layouts as promised."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tempflow.shapes.prompts import SHAPES, Shape, specs
from tempflow.shapes.render import GAP, PALETTE, SIZE, Placed, compose, draw, polygon, scene


def test_scenes_are_the_ones_that_the_shipped_model_has_seen() -> None:
    digest, rng = hashlib.sha256(), np.random.default_rng(3)
    for spec in specs():
        objects, shade = compose(spec, rng)
        digest.update(
            repr([(o.shape, o.color, round(o.x, 6), round(o.y, 6), round(o.radius, 6)) for o in objects]).encode()
        )
        digest.update(bytes([shade]))
    assert digest.hexdigest() == "4dd361093786356ae0d2077aaba03abbda1d69bfaa416f9b0ddf85153c208db8"


def test_scene_draws_what_compose_lays_out() -> None:
    for seed, spec in enumerate(specs()[::7]):
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
    # OpenCV paints the outline too, half an oversampled pixel (an eighth of a pixel) beyond the area
    assert share.sum() == pytest.approx(shoelace + around / 8, rel=0.01)
    assert picture.shape == (SIZE, SIZE, 3) and tuple(picture[0, 0]) == ground


def test_objects_keep_their_distance_from_each_other_and_from_the_border() -> None:
    rng = np.random.default_rng(0)
    for spec in specs()[::3]:
        objects, shade = compose(spec, rng)
        assert [o.shape for o in objects] == [o.shape for o in spec.objects]
        assert all(w.color in (None, o.color) for o, w in zip(objects, spec.objects, strict=True))
        assert 14 <= shade < 44
        for i, a in enumerate(objects):
            assert min(a.x, a.y, SIZE - a.x, SIZE - a.y) >= a.radius + 1 - 1e-9
            for b in objects[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + GAP - 1e-9


def test_relations_hold_by_a_wide_margin() -> None:
    rng = np.random.default_rng(1)
    for spec in specs():
        if spec.relation is not None:
            (a, b), _ = compose(spec, rng)
            dx, dy = b.x - a.x, b.y - a.y
            wide = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[spec.relation]
            across = dy if spec.relation in ("left of", "right of") else dx
            assert wide >= 10 and abs(across) <= 5
