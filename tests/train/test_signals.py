"""Measurements of leaves against closed forms, and the laws they obey."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempflow.config.guards import GuardsConfig
from tempflow.perception.diversity import features
from tempflow.train import signals as module
from tempflow.train.signals import (
    FIGURES,
    SAMPLE,
    Signals,
    _sample,
    asked,
    grid_period,
    grid_share,
    high_frequency,
    measure,
)

SIDE, PERIOD = 32, 8
INDEX = torch.arange(SIDE)


def picture(gray: Tensor) -> Tensor:
    """[H, W] as one picture."""
    return gray.to(torch.uint8)[None, :, :, None].expand(1, -1, -1, 3).contiguous()


def noise(count: int, side: int = SIDE, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (count, side, side, 3), generator=torch.Generator().manual_seed(seed)).byte()


def leaves(count: int, prompts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    slot = torch.arange(count) % prompts
    return torch.randn(count, 4, 8, 8, generator=g), noise(count, seed=seed), slot, torch.rand(count, generator=g) < 0.8


def same(a: Signals, b: Signals, tolerance: float = 0.0) -> None:
    for x, y in zip(a.columns, b.columns, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------------------------------------------- textures
def test_a_checkerboard_is_all_high_frequency() -> None:
    board = picture((INDEX[:, None] + INDEX) % 2 * 200 + 20)
    assert high_frequency(board).item() == pytest.approx(1, abs=1e-12)
    assert grid_share(board, PERIOD).item() == pytest.approx(1, abs=1e-12)


def test_a_gradient_has_none() -> None:
    ramp = picture(4 * INDEX[:, None] + 3 * INDEX)
    assert high_frequency(ramp).item() == 0
    assert grid_share(ramp, PERIOD).item() == pytest.approx(0, abs=1e-12)


def test_a_smooth_bowl_has_next_to_none() -> None:
    bowl = picture(INDEX * INDEX // 4 + 0 * INDEX[:, None])
    assert high_frequency(bowl).item() < 1e-3
    assert abs(grid_share(bowl, PERIOD).item()) < 1e-3


def test_a_flat_picture_has_none() -> None:
    assert high_frequency(picture(torch.full((SIDE, SIDE), 77))).item() == 0
    assert grid_share(picture(torch.full((SIDE, SIDE), 77)), PERIOD).item() == 0
    nearly = torch.full((SIDE, SIDE), 77)
    nearly[5, 5] = 78
    assert high_frequency(picture(nearly)).item() < 0.01


def test_a_pattern_of_the_grids_period_is_all_grid_and_one_of_another_is_none() -> None:
    tile = torch.randint(0, 256, (PERIOD, PERIOD), generator=torch.Generator().manual_seed(1))
    assert grid_share(picture(tile.repeat(4, 4)), PERIOD).item() == pytest.approx(1, abs=1e-12)
    stripes = (100 * torch.cos(2 * math.pi * INDEX / 5) + 128).round().expand(SIDE, SIDE)
    assert abs(grid_share(picture(stripes), PERIOD).item()) < 0.15
    assert grid_share(picture(stripes), 5).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("down", "right"), [(0, 15), (15, 0), (7, 0), (7, 7), (3, 0), (4, 2), (1, 1)])
def test_a_wave_counts_with_the_stated_gain(down: int, right: int) -> None:
    """Whole waves over the 30 inner pixels, so that sine and cosine do not mix."""
    inner = 30
    f, g = down / inner, right / inner
    wave = 128 + 120 * torch.cos(2 * math.pi * (f * INDEX[:, None] + g * INDEX) + 0.4)
    expected = (1 - math.cos(math.pi * f) ** 2 * math.cos(math.pi * g) ** 2) ** 2
    assert high_frequency(picture(wave.round())).item() == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_grid_share_is_the_energy_at_the_grids_frequencies() -> None:
    """By numpy's FFT: a grid under texture that does not repeat, and the texture alone."""
    side, period = 64, 8
    texture = noise(1, side, low=100, high=156)
    tile = torch.randint(-40, 41, (period, period, 1), generator=torch.Generator().manual_seed(3))
    both = (texture.int() + tile.repeat(side // period, side // period, 1)).byte()
    power = np.abs(np.fft.fft2(both[0].numpy().astype(float), axes=(0, 1))) ** 2
    lattice = power[:: side // period, :: side // period].sum() - power[0, 0].sum()
    rest = power.sum() - power[0, 0].sum()
    chance = (rest - lattice) / (64 * 64 - period * period) * (period * period - 1)  # texture is white
    assert grid_share(both, period).item() == pytest.approx((lattice - chance) / rest, abs=0.01)
    assert abs(grid_share(texture, period).item()) < 0.01


def test_texture_that_does_not_repeat_has_no_grid_on_average() -> None:
    share = grid_share(noise(300), PERIOD)
    assert abs(share.mean().item()) < 4 * share.std().item() / math.sqrt(300)
    assert share.std().item() > 1e-3


def test_coloured_artefacts_count_too() -> None:
    """Equal luminance everywhere is no hiding place."""
    board = (INDEX[:, None] + INDEX) % 2 * 100
    colour = torch.stack([100 + board, 200 - board, torch.full_like(board, 100)], -1).byte()[None]
    assert high_frequency(colour).item() == pytest.approx(1, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 60))
def test_shares_ignore_contrast_and_brightness(seed: int, factor: int, shift: int) -> None:
    base = noise(3, seed=seed, high=48)
    changed = (base.int() * factor + shift).byte()
    for share in (high_frequency, lambda m: grid_share(m, PERIOD)):
        torch.testing.assert_close(share(changed), share(base), rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 40), st.integers(3, 40))
def test_high_frequency_is_a_share(seed: int, height: int, width: int) -> None:
    media = torch.randint(0, 256, (2, height, width, 3), generator=torch.Generator().manual_seed(seed)).byte()
    value = high_frequency(media)
    assert bool((value >= 0).all()) and bool(value.isfinite().all())
    torch.testing.assert_close(high_frequency(media.transpose(1, 2)), value, rtol=1e-12, atol=0)


def test_what_is_too_small_is_not_measured() -> None:
    assert math.isnan(high_frequency(noise(1, 2)).item()) and not math.isnan(high_frequency(noise(1, 3)).item())
    assert math.isnan(grid_share(noise(1, 23), 8).item()) and not math.isnan(grid_share(noise(1, 24), 8).item())
    assert math.isnan(grid_share(noise(1), None).item())


@pytest.mark.parametrize(
    ("latent", "media", "period"),
    [
        ((6, 8, 8, 8), (6, 32, 32, 3), 8),
        ((6, 16, 64, 96), (6, 512, 768, 3), 16),
        ((6, 16, 5, 64, 96), (6, 512, 768, 3), 16),
        ((6, 16, 64, 96), (6, 512, 512, 3), None),
        ((6, 1024, 64), (6, 512, 512, 3), None),
        ((6, 4, 8, 8), (6, 4, 4, 3), None),
    ],
)
def test_the_grids_period_is_two_latent_cells(
    latent: tuple[int, ...], media: tuple[int, ...], period: int | None
) -> None:
    assert grid_period(latent, media) == period


# --------------------------------------------------------------------------------------------------------- leaves
def test_figures_of_a_slot() -> None:
    board, ramp = picture((INDEX[:, None] + INDEX) % 2 * 200), picture(7 * INDEX.expand(SIDE, -1))
    media = torch.cat([board, ramp, board, ramp, ramp])
    slot = torch.tensor([7, 2, 7, 2, 9])
    x0 = torch.stack([torch.full((4, 8, 8), v) for v in (3.0, 1.0, -4.0, 1.0, 0.0)])
    signals = measure(x0, media, slot, torch.tensor([True, False, True, True, False]))
    assert signals.prompt.tolist() == [2, 7, 9] and signals.leaves.tolist() == [2, 2, 1]
    assert signals.latent_rms.tolist() == pytest.approx([1, math.sqrt(12.5), 0])
    assert signals.diversity[:2].tolist() == [0, 0] and math.isnan(signals.diversity[2].item())
    assert signals.high_frequency.tolist() == pytest.approx([0, 1, 0])
    assert signals.grid.tolist() == pytest.approx(grid_share(media[[1, 0, 4]], PERIOD).tolist())
    assert signals.failed.tolist() == [0.5, 0, 1]
    metrics = signals.metrics()
    assert set(metrics) == {"latent_rms", "diversity", "high_frequency", "grid", "reward_failures"}
    assert metrics["latent_rms"] == pytest.approx((1 + math.sqrt(12.5)) / 3)
    assert metrics["diversity"] == 0 and metrics["high_frequency"] == pytest.approx(1 / 3)
    assert metrics["reward_failures"] == pytest.approx(2 / 5)


def test_pictures_that_differ_are_far_apart() -> None:
    x0, media, slot, ok = leaves(8, 2)
    media[slot == 1] = media[1].clone()
    low, high = measure(x0, media, slot, ok).diversity[[1, 0]].tolist()
    assert low == 0 and high > 0.01


def test_unsaid_failures_are_not_zero() -> None:
    x0, media, slot, _ = leaves(4, 2)
    assert math.isnan(measure(x0, media, slot).metrics()["reward_failures"])


def test_latents_that_are_not_finite_show() -> None:
    x0, media, slot, ok = leaves(4, 2)
    x0[1, 0, 0, 0] = math.nan
    assert math.isnan(measure(x0, media, slot, ok).metrics()["latent_rms"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 5), st.integers(5, 2 * SAMPLE))
def test_the_order_of_leaves_that_are_all_looked_at_does_not_matter(seed: int, prompts: int, count: int) -> None:
    x0, media, slot, ok = leaves(count, prompts, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    same(measure(x0[order], media[order], slot[order], ok[order]), measure(x0, media, slot, ok), 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(4)), st.integers(1, 3))
def test_chunks_of_whole_prompts_give_the_same_bits(seed: int, order: list[int], cut: int) -> None:
    x0, media, slot, ok = leaves(14, 4, seed)
    chunks = [torch.isin(slot, torch.tensor(part)) for part in (order[:cut], order[cut:])]
    parts = [measure(x0[rows], media[rows], slot[rows], ok[rows]) for rows in chunks]
    same(Signals.cat(parts), measure(x0, media, slot, ok))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_the_rms_scales_with_latents_and_nothing_else_does(seed: int, scale: float) -> None:
    x0, media, slot, ok = leaves(6, 2, seed)
    base, scaled = measure(x0, media, slot, ok), measure(x0 * scale, media, slot, ok)
    torch.testing.assert_close(scaled.latent_rms, base.latent_rms * scale, rtol=1e-5, atol=0)
    same(replace(scaled, latent_rms=base.latent_rms), base)


def test_half_precision_latents_are_measured_in_float32() -> None:
    x0, media, slot, ok = leaves(4, 2)
    same(measure(x0.bfloat16(), media, slot, ok), measure(x0.bfloat16().float(), media, slot, ok))
    big = torch.full((1, 4, 8, 8), 1000.0, dtype=torch.float16)  # its square is beyond float16
    assert measure(big, media[:1], slot[:1]).latent_rms.item() == pytest.approx(1000)


def test_bad_input_is_named() -> None:
    x0, media, slot, ok = leaves(4, 2)
    with pytest.raises(ValueError, match="prompt: 3 rows; nearest valid: 4"):
        measure(x0, media, slot[:3], ok)
    with pytest.raises(ValueError, match="ok: 5 rows; nearest valid: 4"):
        measure(x0, media, slot, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="media: 0 rows"):
        measure(x0[:0], media[:0], slot[:0])
    with pytest.raises(ValueError, match=r"parts = \[\]"):
        Signals.cat([])
    with pytest.raises(ValueError, match="slot 1 is in two parts"):
        Signals.cat([measure(x0, media, slot), measure(x0[slot == 1], media[slot == 1], slot[slot == 1])])


# --------------------------------------------------------------------------------------------------------- sample
def test_the_sample_is_spread_evenly_over_a_slots_leaves() -> None:
    slot = torch.arange(3).repeat_interleave(torch.tensor([20, 3, SAMPLE]))
    rows, there = _sample(slot, torch.bincount(slot))
    assert rows[0].tolist() == [0, 2, 5, 7, 10, 12, 15, 17] and there.sum(1).tolist() == [SAMPLE, 3, SAMPLE]
    assert rows[1][there[1]].tolist() == [20, 21, 22] and rows[2].tolist() == list(range(23, 31))
    shuffled = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    again, _ = _sample(slot[shuffled], torch.bincount(slot))
    assert torch.equal(slot[shuffled][again[there]], slot[rows[there]])


def test_figures_of_a_large_slot_are_those_of_its_sample() -> None:
    x0, media, slot, ok = leaves(100, 2)
    signals = measure(x0, media, slot, ok)
    for place in range(2):
        mine = (slot == place).nonzero()[:, 0]
        seen = mine[torch.arange(SAMPLE) * 50 // SAMPLE]
        assert signals.high_frequency[place].item() == pytest.approx(high_frequency(media[seen]).mean().item())
        assert signals.grid[place].item() == pytest.approx(grid_share(media[seen], PERIOD).mean().item())
        want = torch.nn.functional.pdist(features(media[seen]).double()).mean().item()
        assert signals.diversity[place].item() == pytest.approx(want)
        assert signals.latent_rms[place].item() == pytest.approx(x0[mine].square().mean().sqrt().item())
        assert signals.failed[place].item() == pytest.approx((~ok[mine]).double().mean().item())
    blind = media.clone()  # the others are not looked at
    rows, _ = _sample(slot, torch.bincount(slot))
    blind[~torch.isin(torch.arange(100), rows)] = 0
    same(measure(x0, blind, slot, ok), signals)


@pytest.mark.parametrize("figure", sorted(FIGURES))
def test_what_is_not_asked_for_is_not_measured(figure: str) -> None:
    x0, media, slot, ok = leaves(8, 2)
    everything = measure(x0, media, slot, ok)
    one = measure(x0, media, slot, ok, {figure})
    for name, value in vars(one).items():
        if name in FIGURES - {figure}:
            assert value.isnan().all()
        else:
            assert torch.equal(value, getattr(everything, name))


def test_guards_that_are_off_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError

    for name in ("features", "high_frequency", "grid_share", "_rms"):
        monkeypatch.setattr(module, name, refuse)
    off = {"action": "off"}
    guards = GuardsConfig.model_validate({"latent_norm": off, "diversity": off, "artefacts": off})
    x0, media, slot, ok = leaves(8, 2)
    measured = measure(x0, media, slot, ok, asked(guards))
    assert measured.failed.isfinite().all() and measured.diversity.isnan().all()
    assert asked(GuardsConfig()) == FIGURES
    assert asked(GuardsConfig.model_validate({"artefacts": off})) == {"latent_rms", "diversity"}


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_does() -> None:
    x0, media, slot, ok = leaves(50, 3)
    same(measure(x0.cuda(), media, slot, ok), measure(x0, media, slot, ok), 1e-6)
