"""Grids against diffusers' own scheduler, numpy and the published SD3.5 table."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from tempflow.core.schedule import Schedule, explicit, linear, refined, shifted, token_shifted


@pytest.mark.parametrize("shift", [1.0, 2.3, 3.0, 5.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 16, 28, 40, 1000])
def test_sd3_has_the_bits_of_diffusers(steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    assert torch.equal(shifted(steps, shift).sigmas, theirs.sigmas)


def test_sd3_never_starts_above_one() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=0.2)
    theirs.set_timesteps(5)
    assert theirs.sigmas[0] > 1
    assert torch.equal(shifted(5, 0.2).sigmas, theirs.sigmas.clamp(max=1))


def test_sd3_with_another_training_length() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=250, shift=3.0)
    theirs.set_timesteps(7)
    assert torch.equal(shifted(7, train_timesteps=250).sigmas, theirs.sigmas)


@pytest.mark.parametrize("tokens", [100, 256, 1024, 4096, 5000])
@pytest.mark.parametrize("steps", [1, 4, 6, 10, 28, 50])
def test_flux_has_the_bits_of_diffusers(steps: int, tokens: int) -> None:
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = token_shifted(steps, tokens).sigmas
    if tokens in (256, 4096):
        assert torch.equal(ours, theirs.sigmas)
    torch.testing.assert_close(ours, theirs.sigmas, rtol=2e-7, atol=0)


def test_flux_follows_the_pipelines_own_shift() -> None:
    pipeline = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    for tokens in (300, 1024, 3999):
        theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 10, 10), mu=pipeline.calculate_shift(tokens))
        assert torch.equal(token_shifted(10, tokens).sigmas, theirs.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 8, 16, 25, 50])
def test_linear_is_a_shifted_even_grid(steps: int, shift: float) -> None:
    u = np.linspace(1, 0, steps + 1)
    want = shift * u / (1 + (shift - 1) * u)
    sigmas = linear(steps, shift).sigmas
    np.testing.assert_allclose(sigmas.numpy(), want, rtol=3e-7, atol=1e-7)
    assert sigmas[0] == 1
    assert float(sigmas[-2]) == pytest.approx(shift / (steps + shift - 1), rel=1e-6)


def test_sd35_table() -> None:
    want = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert [round(float(sigma), 4) for sigma in shifted(10).sigmas] == want


def test_danceGRPOs_own_grid_has_a_large_last_sigma() -> None:
    assert float(linear(16, 3.0).sigmas[-2]) == pytest.approx(1 / 6, abs=1e-6)


def test_look_ups() -> None:
    schedule = Schedule(torch.tensor([1.0, 0.75, 0.25, 0.0]))
    step = torch.tensor([2, 0, 1, 2])
    assert schedule.steps == 3
    assert schedule.at(step).tolist() == [0.25, 1.0, 0.75, 0.25]
    assert schedule.after(step).tolist() == [0.0, 0.75, 0.25, 0.0]
    assert schedule.delta(step).tolist() == [0.25, 0.25, 0.5, 0.25]
    assert schedule.at(torch.tensor([3])).tolist() == [0.0]
    assert schedule.at(torch.tensor([], dtype=torch.int64)).shape == (0,)


def test_double_keeps_the_values() -> None:
    schedule = shifted(10)
    wide = schedule.double()
    assert wide.sigmas.dtype == torch.float64
    assert torch.equal(wide.sigmas.float(), schedule.sigmas)
    assert wide.delta(torch.tensor([3])).dtype == torch.float64


@given(st.integers(1, 200), st.floats(0.2, 12.0))
def test_every_grid_descends_from_one_to_zero_by_its_deltas(steps: int, shift: float) -> None:
    for schedule in (shifted(steps, shift), linear(steps, shift), token_shifted(steps, 200 + 17 * steps)):
        every = torch.arange(steps)
        assert schedule.steps == steps
        assert float(schedule.sigmas[0]) == pytest.approx(1.0, abs=1e-6)
        assert bool((schedule.delta(every) > 0).all())
        assert math.fsum(schedule.double().delta(every).tolist()) == pytest.approx(float(schedule.sigmas[0]), abs=1e-12)


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        (torch.tensor([1.0, 0.5, 0.0], dtype=torch.float16), "float16"),
        (torch.tensor([1, 0]), "int64"),
        (torch.tensor([0.0]), "shape"),
        (torch.zeros(2, 2), "shape"),
        (torch.tensor([1.2, 0.5, 0.0]), "nearest valid value is 1.0"),
        (torch.tensor([1.0, 0.5, -0.1]), "nearest valid value is 0.0"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"sigmas\[2\]"),
        (torch.tensor([1.0, 0.2, 0.5, 0.0]), r"sigmas\[2\]"),
        (torch.tensor([1.0, float("nan"), 0.0]), "not finite"),
    ],
)
def test_bad_grids(sigmas: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(sigmas)


def test_bad_steps() -> None:
    schedule = linear(4)
    with pytest.raises(ValueError, match=r"step: 5 is outside \[0, 4\]; the nearest valid value is 4"):
        schedule.at(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"step: 4 is outside \[0, 3\]"):
        schedule.after(torch.tensor([4]))
    with pytest.raises(ValueError, match="nearest valid value is 0"):
        schedule.delta(torch.tensor([-1]))
    with pytest.raises(ValueError, match="float32"):
        schedule.at(torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: shifted(0), "steps: 0"),
        (lambda: shifted(10, shift=0.0), "shift: 0.0"),
        (lambda: shifted(10, train_timesteps=0), "train_timesteps: 0"),
        (lambda: linear(10, shift=float("nan")), "shift: nan"),
        (lambda: linear(-1), "steps: -1"),
        (lambda: token_shifted(0, 4096), "steps: 0"),
        (lambda: token_shifted(10, 0), "tokens: 0"),
        (lambda: token_shifted(10, 64, base_tokens=256, max_tokens=256), "nearest valid value is 257"),
        (lambda: token_shifted(10, 64, max_shift=float("inf")), "give no shift"),
    ],
)
def test_bad_arguments(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("shift", [1.0, 2.3, 3.0, 5.0, 0.5])
@pytest.mark.parametrize("u", [(1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25), (0.97, 0.61, 0.3, 0.123, 0.01)])
def test_explicit_grids_have_the_bits_of_diffusers(u: tuple[float, ...], shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=list(u))
    assert torch.equal(explicit(u, shift).sigmas, theirs.sigmas)
    by_count = FlowMatchEulerDiscreteScheduler(shift=shift)
    by_count.set_timesteps(len(u), sigmas=list(u))
    assert torch.equal(explicit(u, shift).sigmas, by_count.sigmas)


def test_the_four_step_grid_and_its_useful_steps() -> None:
    grid = explicit((1, 0.75, 0.5, 0.25), 3.0)
    assert grid.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-7)
    assert grid.steps == grid.useful == 4
    # SD3's own grid of N steps ends with one from .0089 to 0
    assert [shifted(n).useful for n in (2, 4, 10, 28)] == [1, 3, 9, 27]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("grid", [explicit((1, 0.75, 0.5, 0.25), 3.0), shifted(4), linear(3, 5.0).double()], ids=repr)
def test_a_refined_grid_keeps_its_nodes_to_the_last_bit(grid: Schedule, shift: float) -> None:
    for parts in (1, 2, 5):
        fine = refined(grid, parts, shift)
        assert fine.steps == parts * grid.steps and torch.equal(fine.sigmas[::parts], grid.sigmas)
        assert fine.sigmas.dtype == grid.sigmas.dtype
    u = [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    halves = refined(explicit((1, 0.75, 0.5, 0.25), 3.0), 2, 3.0)
    torch.testing.assert_close(halves.sigmas, explicit(u, 3.0).sigmas, rtol=2e-7, atol=0)
    kept = refined(Schedule(torch.tensor([0.9, 0.1]), spread=0.9, gain=1.1), 3)
    assert (kept.spread, kept.gain) == (0.9, 1.1) and kept.steps == 3


@pytest.mark.parametrize(
    ("u", "match"),
    [
        ((), r"u: \(\) has no point; the smallest grid is \(1,\)"),
        ((1.2, 0.5), r"u\[0\]: 1.2 must be above 0, .* at most 1"),
        ((1, 0.5, 0.5), r"u\[2\]: 0.5 must be above 0, .* below 0.5"),
        ((1, 0.5, 0), r"u\[2\]: 0 must be above 0, as a final 0 is appended"),
        ((float("nan"),), r"u\[0\]: nan must be"),
    ],
)
def test_points_that_make_no_grid_are_refused(u: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        explicit(u)
    with pytest.raises(ValueError, match=r"parts: 0 is too small; the nearest valid value is 1"):
        refined(linear(2), 0)
