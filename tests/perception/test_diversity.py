"""The feature distance: what it must and must not see."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch import Tensor

from tempflow.perception import diversity
from tempflow.perception.diversity import features, within_groups
from tempflow.shapes.prompts import COLORS, Spec, specs
from tempflow.shapes.render import Placed, draw, scene

GREY = (200, 200, 200)


def picture(shape: str = "circle", color: str = "red", x: float = 16.0, y: float = 16.0, radius: float = 8.0) -> Tensor:
    return torch.from_numpy(draw([Placed(shape, color, x, y, radius)], GREY))  # type: ignore[arg-type]


def apart(a: Tensor, b: Tensor) -> float:
    return float((features(a[None]) - features(b[None])).norm())


def scenes(spec: Spec, count: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    made = [scene(spec, rng) for _ in range(count)]
    return torch.from_numpy(np.stack([m[0] if isinstance(m, tuple) else m for m in made]))


def mean_distance(media: Tensor) -> float:
    return float(within_groups(features(media), torch.zeros(len(media), dtype=torch.long))[1])


# ------------------------------------------------------------------------------------------------------------- scale
def test_equal_pictures_are_0_apart_and_black_and_white_1() -> None:
    base = picture()
    assert apart(base, base) == 0 and mean_distance(base.expand(30, -1, -1, -1)) == 0
    black, white = torch.zeros(32, 32, 3, dtype=torch.uint8), torch.full((32, 32, 3), 255, dtype=torch.uint8)
    assert apart(black, white) == pytest.approx(1, abs=1e-6)
    assert apart(black, torch.full_like(black, 51)) == pytest.approx(0.2, abs=1e-6)


def test_a_shift_by_a_pixel_is_little_beside_another_shape_or_colour() -> None:
    base = picture()
    shift = max(apart(base, picture(x=17)), apart(base, picture(y=15)))
    assert 0 < shift < 0.04
    assert all(apart(base, picture(color=c)) > 5 * shift for c in COLORS if c != "red")
    assert all(apart(base, picture(s)) > 2.5 * shift for s in ("square", "triangle", "cross"))
    assert apart(base, picture(x=22)) > 4 * shift  # another place


def test_direction_of_edges_is_seen_without_colour() -> None:
    """Stripes across and down have the same windows' means; diagonals differ in their second harmonic only."""
    i = torch.arange(32)

    def stripe(phase: Tensor) -> Tensor:
        wave = (torch.sin(phase * 2 * math.pi / 8) * 60 + 128).to(torch.uint8)
        return wave[..., None].expand(-1, -1, 3).contiguous()

    across, down = stripe(i[:, None] + 0 * i), stripe(i[None] + 0 * i[:, None])
    diagonal, mirrored = stripe(i[:, None] + i), stripe(i[:, None] - i)
    for a, b in ((across, down), (diagonal, mirrored), (across, diagonal)):
        assert apart(a, b) > 0.1


def test_size_does_not_matter() -> None:
    small, other = picture(), picture("square", "blue", 12)
    big = [p.repeat_interleave(4, 0).repeat_interleave(4, 1) for p in (small, other)]
    assert apart(small, big[0]) < 1e-5
    assert apart(big[0], big[1]) == pytest.approx(apart(small, other), rel=1e-4)
    for height, width in ((1, 1), (2, 2), (48, 20), (100, 33)):
        grey = torch.full((height, width, 3), 90, dtype=torch.uint8)
        assert apart(grey, torch.full((32, 32, 3), 90, dtype=torch.uint8)) < 1e-6


@pytest.mark.parametrize("kind", ["single", "two", "count"])
def test_distance_falls_on_the_way_to_one_picture(kind: str) -> None:
    media = scenes(next(s for s in specs("test") if s.kind == kind), 10).float()
    means = [mean_distance((media + t * (media[0] - media)).round().to(torch.uint8)) for t in torch.linspace(0, 1, 9)]
    assert all(a > b for a, b in pairwise(means)) and means[-1] == 0


# --------------------------------------------------------------------------------------------------------------- laws
def test_a_row_depends_on_its_picture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    media = torch.randint(0, 256, (70, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = features(media)
    assert whole.dtype == torch.float32 and whole.shape == (70, 128)
    assert torch.equal(torch.cat([features(media[i : i + 1]) for i in range(70)]), whole)
    monkeypatch.setattr(diversity, "PIXELS_AT_ONCE", 3000)
    assert torch.equal(features(media), whole)
    assert features(media[:0]).shape == (0, 128)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=24), st.integers(0, 2**31))
def test_groups_are_those_of_scipy_whatever_the_order(labels: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, group = rng.normal(size=(len(labels), 5)).astype(np.float32), np.array(labels)
    groups, distance = within_groups(torch.from_numpy(rows), torch.from_numpy(group))
    assert groups.tolist() == sorted(set(labels)) and distance.dtype == torch.float64
    for g, d in zip(groups.tolist(), distance.tolist(), strict=True):
        members = rows[group == g].astype(float)
        if len(members) == 1:
            assert math.isnan(d)
        else:
            assert d == pytest.approx(pdist(members).mean(), rel=1e-9)
    order = rng.permutation(len(labels))
    again = within_groups(torch.from_numpy(rows[order]), torch.from_numpy(group[order]))
    np.testing.assert_allclose(again[1].numpy(), distance.numpy(), rtol=1e-12)


def test_wrong_input_is_named() -> None:
    for media in (
        torch.zeros(2, 32, 32, 3),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"nearest valid: torch.uint8 \[N, H, W, 3\]"):
            features(media)
    with pytest.raises(ValueError, match=r"nearest valid: \[N, D\] and \[N\]"):
        within_groups(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
