"""Importance maps: the pipeline against an independent one, what they recover, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise, rendered
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from tempflow.perception import FeatureMaps, HandFeatures, MapProvider
from tempflow.perception.maps import Orient, border_mean, oriented, principal, smoothed, unit_range


@dataclass(frozen=True)
class Fixed:
    """Dense features that are given, whatever the pictures."""

    features: Tensor

    def __call__(self, media: Tensor) -> Tensor:
        return self.features


def blank(count: int) -> Tensor:
    return torch.zeros(count, 4, 4, 3, dtype=torch.uint8)


def maps_of(features: Tensor, size: tuple[int, int] | None = None, **settings: object) -> Tensor:
    provider = FeatureMaps(Fixed(features), **settings)  # type: ignore[arg-type]
    return provider(blank(len(features)), size or (features.shape[1], features.shape[2]))


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def framed(seed: int, rows: int = 7, columns: int = 9) -> Tensor:
    """A mask in [0, 1], both reached, that is 0 on the border."""
    mask = torch.zeros(rows, columns)
    mask[1:-1, 1:-1] = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 1, (rows - 2, columns - 2))).float()
    return mask / mask.max()


# ------------------------------------------------------------------------------------------------- what they recover
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 80), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rank_one_features_give_the_mask_back(seed: int, width: int, scale: float, offset: float) -> None:
    mask, direction = framed(seed), random_features(seed, width)
    features = scale * (mask[..., None] * direction / direction.norm() + offset)[None]
    kept = maps_of(features, orient="none", smooth=0.0)[0]
    assert min(float((kept - mask).abs().max()), float((kept - (1 - mask)).abs().max())) < 1e-3
    # the same up to sign, and never the sign of "none" and of "reverse" at once
    assert torch.allclose(maps_of(features, orient="reverse", smooth=0.0)[0], 1 - kept, atol=1e-6)
    assert torch.allclose(maps_of(features, orient="border", smooth=0.0)[0], mask, atol=1e-3)
    assert torch.allclose(maps_of(-features, orient="border", smooth=0.0)[0], mask, atol=1e-3)


def test_border_takes_the_border_for_background_even_where_it_is_not() -> None:
    mask = 1 - framed(0)
    assert torch.allclose(maps_of((mask[..., None] * random_features(0, 5))[None], smooth=0.0)[0], 1 - mask, atol=1e-5)


def test_border_is_the_outermost_ring() -> None:
    x = torch.arange(20.0).reshape(4, 5)
    assert border_mean(x) == pytest.approx((x.sum() - x[1:3, 1:4].sum()) / 14)


def by_numpy(features: np.ndarray, size: tuple[int, int], components: int, smooth: float, orient: str) -> np.ndarray:
    """The pipeline again, by SVD, SciPy and Pillow; float64 but for Pillow's float32."""
    rows, columns, width = features.shape
    flat = features.reshape(-1, width).astype(float)
    flat = flat - flat.mean(0)
    _, values, directions = np.linalg.svd(flat, full_matrices=False)
    share = values[:components] ** 2 / (values[:components] ** 2).sum()
    inside = np.zeros((rows, columns), bool)
    inside[1:-1, 1:-1] = True
    total = np.zeros((rows, columns))
    for weight, direction in zip(share, directions[:components], strict=True):
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        z = (flat @ direction).reshape(rows, columns)
        turn = orient == "reverse" or (orient == "border" and z[~inside].mean() > z[inside].mean())
        total += weight * ((z.max() - z) if turn else (z - z.min())) / np.ptp(z)
    if smooth:
        blur = {"sigma": smooth, "mode": "constant", "truncate": 50}
        total = gaussian_filter(total, **blur) / gaussian_filter(np.ones_like(total), **blur)
    total = (total - total.min()) / np.ptp(total)
    picture = Image.fromarray(total.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    fine = np.asarray(picture).astype(float)
    return (fine - fine.min()) / np.ptp(fine)


@pytest.mark.parametrize("orient", ["border", "reverse", "none"])
@pytest.mark.parametrize("shape", [(8, 8, 5), (5, 6, 64), (6, 4, 3)])  # more cells than features, fewer, as many as K
@pytest.mark.parametrize(("size", "components", "smooth"), [((8, 12), 3, 1.0), ((4, 3), 2, 0.6), ((16, 16), 1, 0.0)])
def test_the_pipeline_is_the_papers(
    orient: Orient, shape: tuple[int, int, int], size: tuple[int, int], components: int, smooth: float
) -> None:
    features = random_features(7, 3, *shape)
    found = maps_of(features, size, orient=orient, components=components, smooth=smooth)
    for row, one in zip(found, features.numpy(), strict=True):
        assert np.allclose(row.numpy(), by_numpy(one, size, components, smooth, orient), atol=2e-5)


@pytest.mark.parametrize("shape", [(30, 4), (12, 50)])
def test_principal_components_are_those_of_the_covariance(shape: tuple[int, int]) -> None:
    rows = random_features(3, *shape).double()
    projections, share = principal(rows, 3)
    eigen = np.sort(np.linalg.eigvalsh(np.cov(rows.numpy().T)))[::-1][:3]
    assert np.allclose(share.numpy(), eigen / eigen.sum(), rtol=1e-9)
    assert np.allclose(np.corrcoef(projections.numpy()), np.eye(3), atol=1e-9)
    assert np.allclose(projections.var(1).numpy() / float(projections.var(1).sum()), share.numpy(), rtol=1e-9)


def test_rounding_is_no_component() -> None:
    for direction in (random_features(0, 3), random_features(0, 200)):
        projections, share = principal((framed(0).flatten()[:, None] * direction).double(), 3)
        assert share.tolist() == [1.0, 0.0, 0.0] and projections[1:].eq(0).all() and projections[0].std() > 0.1


def test_a_constant_component_is_a_half_everywhere() -> None:
    assert oriented(torch.full((4, 4), 3.0), "border").unique().tolist() == [0.5]
    assert oriented(torch.full((4, 4), 3.0), "reverse").unique().tolist() == [0.5]


# --------------------------------------------------------------------------------------------------------- fallbacks
def test_what_cannot_be_told_counts_alike_everywhere() -> None:
    features = random_features(0, 6, 5, 5, 4)
    features[0] = 0
    features[1] = 0.1  # not a binary number: its mean is off by rounding
    features[2, 3, 1, 0] = float("nan")
    features[3, 0, 0, 2] = float("inf")
    features[4] = 1000 + 1e-5 * features[4]  # float32 cannot hold the difference
    found = maps_of(features, (6, 7))
    assert torch.equal(found[:5], torch.ones(5, 6, 7)) and found.isfinite().all()
    assert torch.equal(found[5:], maps_of(features[5:], (6, 7))) and float(found[5].min()) == 0
    assert torch.equal(maps_of(features, (1, 1)), torch.ones(6, 1, 1))
    assert torch.equal(maps_of(features, (6, 7), normalise="mean_one")[:5], torch.ones(5, 6, 7))


def test_huge_and_tiny_features_are_features() -> None:
    features = random_features(0, 1, 5, 5, 4)
    for scale in (1e30, 1e-30):
        assert torch.allclose(maps_of(features * scale), maps_of(features), atol=1e-4)


def test_unit_range() -> None:
    maps = torch.tensor([[[2.0, 4.0, 3.0]], [[0.5, 0.5 + 1e-7, 0.5]], [[-7.0, -7.0, -7.0]]])
    assert unit_range(maps, constant=0.25).tolist() == [[[0.0, 1.0, 0.5]], [[0.25] * 3], [[0.25] * 3]]


# --------------------------------------------------------------------------------------------------------------- laws
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(1, 20)),
    st.tuples(st.integers(1, 20), st.integers(2, 20)),
    st.sampled_from(["border", "reverse", "none"]),
    st.integers(1, 5),
)
def test_ranges(seed: int, shape: tuple[int, int, int], size: tuple[int, int], orient: Orient, components: int) -> None:
    features = random_features(seed, 2, *shape)
    unit = maps_of(features, size, orient=orient, components=components)
    scaled = maps_of(features, size, orient=orient, components=components, normalise="mean_one")
    assert unit.dtype == scaled.dtype == torch.float32 and unit.shape == scaled.shape == (2, *size)
    assert unit.flatten(1).amin(1).tolist() == [0, 0] and unit.flatten(1).amax(1).tolist() == [1, 1]
    assert scaled.min() >= 0 and torch.allclose(scaled.double().mean((1, 2)), torch.ones(2).double(), atol=1e-6)
    assert torch.allclose(scaled * unit.mean((1, 2), keepdim=True), unit, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.integers(2, 12))
def test_neither_scale_nor_shift_nor_rotation_of_the_features_matters(seed: int, scale: float, width: int) -> None:
    rng = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.05, width)  # eigenvalues apart, so that components are defined
    features = rng.normal(size=(1, 6, 6, width)) * spread
    turn, _ = np.linalg.qr(rng.normal(size=(width, width)))
    moved = scale * (features @ turn + rng.normal(size=width))
    assert torch.allclose(maps_of(torch.from_numpy(moved)), maps_of(torch.from_numpy(features)), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_pictures_turned_and_mirrored_give_maps_turned_and_mirrored(seed: int) -> None:
    features = random_features(seed, 1, 5, 7, 6)
    whole = maps_of(features, (10, 14))
    assert torch.allclose(maps_of(features.flip(1), (10, 14)), whole.flip(1), atol=1e-5)
    assert torch.allclose(maps_of(features.transpose(1, 2), (14, 10)), whole.transpose(1, 2), atol=1e-5)


def test_a_row_depends_on_its_picture_alone() -> None:
    media, _ = rendered(12, seed=5)
    maps = FeatureMaps(HandFeatures())
    whole = maps(media, (8, 8))
    assert len({row.numpy().tobytes() for row in whole}) == 12
    for i in range(12):
        assert torch.equal(maps(media[i : i + 1], (8, 8))[0], whole[i])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(maps(media[order], (8, 8)), whole[order])
    assert maps(media[:0], (8, 6)).shape == (0, 8, 6)
    assert isinstance(maps, MapProvider)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0, 5.0])
def test_smoothing_keeps_constants_and_stays_between_the_extremes(sigma: float) -> None:
    assert torch.allclose(smoothed(torch.full((2, 7), 0.3).double(), sigma), torch.full((2, 7), 0.3).double())
    x = random_features(0, 6, 5).double()
    y = smoothed(x, sigma)
    assert (y.max() < x.max() and y.min() > x.min()) if sigma else torch.equal(y, x)


# ------------------------------------------------------------------------------------------------- on the shapes world
def higher_on_shapes(maps: MapProvider, media: Tensor, mask: Tensor) -> float:
    """Share of pictures whose map is on average larger on the shapes' pixels than on the ground's."""
    found = maps(media, (32, 32))
    on, off = [(found * m).sum((1, 2)) / m.sum((1, 2)) for m in (mask, ~mask)]
    return float((on > off).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_border_finds_the_shapes_on_dark_and_on_light_ground(seed: int) -> None:
    media, mask = rendered(120, seed)
    assert 0.03 < float(mask.float().mean()) < 0.5
    maps = FeatureMaps(HandFeatures())
    assert higher_on_shapes(maps, media, mask) >= 0.95
    assert higher_on_shapes(maps, 255 - media, mask) >= 0.95
    # Without the rule the sign follows brightness: right on one ground and wrong on the other.
    assert higher_on_shapes(FeatureMaps(HandFeatures(), orient="none"), 255 - media, mask) < 0.5
    assert higher_on_shapes(FeatureMaps(HandFeatures(), orient="reverse"), media, mask) < 0.5


# ------------------------------------------------------------------------------------------------------ hand features
def test_hand_features_are_what_they_say() -> None:
    media = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    media[0, :, :8, 0] = 255  # the left half red
    media[0, :4, 0:2, 0] = 0  # of the first cell the right half alone
    found = HandFeatures(4)(media)
    assert found.shape == (1, 4, 4, 5) and found.dtype == torch.float32
    assert found[0, 0, 0, :3].tolist() == [0.5, 0, 0] and found[0, 2, 3, :3].tolist() == [0, 0, 0]
    assert found[0, 0, 0, 3] == pytest.approx((0.25 / 3) ** 0.5)  # of values half 0 and half 1, in one colour of three
    assert found[0, 2, 0].tolist() == [1, 0, 0, 0, 0]
    # an edge of height 1 between columns 7 and 8 has gradient 1/2 on either side: one column of four in each cell
    assert found[0, 2, 1:3, 4].tolist() == pytest.approx([0.5 * (1 / 3) ** 0.5 / 4] * 2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (33, 20)])
def test_hand_features_of_any_size(height: int, width: int) -> None:
    flat = HandFeatures()(torch.full((2, height, width, 3), 100, dtype=torch.uint8))
    assert flat.shape == (2, 8, 8, 5) and torch.allclose(flat[..., :3], torch.tensor(100 / 255))
    assert float(flat[..., 3:].abs().max()) < 1e-3
    media = noise(5, height, width)
    assert torch.equal(torch.cat([HandFeatures()(media[i : i + 1]) for i in range(5)]), HandFeatures()(media))
    assert HandFeatures()(media[:0]).shape == (0, 8, 8, 5)


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureMaps(HandFeatures(), components=0), "components: 0 must be at least 1; 3 is usual"),
        (lambda: FeatureMaps(HandFeatures(), smooth=-1.0), "smooth: -1.0 must be finite"),
        (lambda: FeatureMaps(HandFeatures(), smooth=float("nan")), "smooth: nan must be finite"),
        (lambda: FeatureMaps(HandFeatures(), orient="up"), "orient: 'up' is not one of border, reverse, none"),  # type: ignore[arg-type]
        (lambda: FeatureMaps(HandFeatures(), normalise="sum"), "normalise: 'sum' is not one of minmax, mean_one"),  # type: ignore[arg-type]
        (lambda: HandFeatures(0), "grid: 0 must be at least 1; 8 is usual"),
        (lambda: FeatureMaps(HandFeatures())(blank(2), (0, 4)), "size: "),
        (lambda: FeatureMaps(HandFeatures())(blank(2).float(), (4, 4)), "media is torch.float32"),
        (lambda: FeatureMaps(HandFeatures())(blank(2).movedim(-1, 1), (4, 4)), "media is torch.uint8 "),
        (lambda: FeatureMaps(HandFeatures(2))(blank(2), (4, 4)), "no inside in a grid of 2×2; nearest valid"),
        (lambda: FeatureMaps(Fixed(torch.zeros(2, 3, 3)))(blank(2), (4, 4)), "features is torch.float32"),
        (lambda: FeatureMaps(Fixed(torch.zeros(3, 3, 3, 4)))(blank(2), (4, 4)), "for 2 pictures"),
        (lambda: FeatureMaps(Fixed(torch.zeros(2, 3, 3, 4).long()))(blank(2), (4, 4)), "features is torch.int64"),
    ],
)
def test_what_is_wrong_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_without_the_border_rule_a_small_grid_will_do() -> None:
    media = noise(2, 8, 8)
    assert FeatureMaps(HandFeatures(2), orient="none")(media, (4, 4)).shape == (2, 4, 4)
