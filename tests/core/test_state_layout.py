"""Layouts of states: what counts in a mean, what is held, and streams that do not drown one another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tempflow.core.distribution import Gaussian, drift_kl, velocity_kl
from tempflow.core.state import WHOLE, StateLayout, StateStream, mean_dims, streams_along, times_per_token

SHAPE = (3, 4)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def first_row_held(rows: int = 1, clean: float = 7.0) -> StateLayout:
    free = torch.ones(rows, *SHAPE, dtype=torch.bool)
    free[:, 0] = False
    return StateLayout(free, torch.full((rows, *SHAPE), clean, dtype=torch.float64))


def two(weights: dict[str, float] | None = None) -> StateLayout:
    """Two of the three rows are "video", the last is "sound"."""
    return StateLayout(streams=streams_along(SHAPE, 0, {"video": 2, "sound": 1}, weights))


# ------------------------------------------------------------------------------------------------------------- means
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_whole_state_has_todays_bits(dtype: torch.dtype) -> None:
    t = (randn(5, *SHAPE) * 3).to(dtype)
    one = StateLayout(streams=(StateStream("picture", torch.ones(SHAPE, dtype=torch.bool)),))
    for layout in (WHOLE, one):
        assert layout.whole and torch.equal(layout.mean(t), mean_dims(t))
        assert torch.equal(layout.by_stream(t)[:, 0], mean_dims(t))
        assert torch.equal(layout.over_streams(layout.by_stream(t)), mean_dims(t))
        assert layout.hold(t) is t and layout.silence(t) is t
    assert WHOLE.take(torch.tensor([3])) is WHOLE and WHOLE.effective(t) == 12


def test_held_elements_do_not_count() -> None:
    t = randn(5, *SHAPE)
    layout = first_row_held()
    torch.testing.assert_close(layout.mean(t), t[:, 1:].mean((1, 2)), rtol=1e-15, atol=1e-15)
    assert not torch.allclose(layout.mean(t), mean_dims(t))
    broken = t.clone()
    broken[:, 0] = math.nan
    assert torch.equal(layout.mean(broken), layout.mean(t))


def test_what_is_held_differs_by_condition_row() -> None:
    free = torch.tensor([[True, True, False], [False, True, True], [True, True, True]])
    clean = torch.tensor([[0.0, 0, 5], [6, 0, 0], [0, 0, 0]])
    layout, t = StateLayout(free, clean), torch.tensor([[1.0, 2, 4], [1, 2, 4], [1, 2, 4], [1, 2, 4]])
    own = layout.take(torch.tensor([1, 0, 1, 2]))
    torch.testing.assert_close(own.mean(t), torch.tensor([3, 1.5, 3, 7 / 3]))
    assert own.hold(t).tolist() == [[6, 2, 4], [1, 2, 5], [6, 2, 4], [1, 2, 4]]
    assert own.silence(t).tolist() == [[0, 2, 4], [1, 2, 0], [0, 2, 4], [1, 2, 4]]
    later = StateLayout(free, clean, first=10).take(torch.tensor([11, 10, 11, 12]))
    assert torch.equal(later.hold(t), own.hold(t)) and torch.equal(own.take(slice(1, 3)).hold(t[1:3]), own.hold(t)[1:3])
    alike = StateLayout(free[:1], clean)  # one mask, a picture for each prompt
    assert alike.take(torch.tensor([1, 0])).hold(t[:2]).tolist() == [[1, 2, 0], [1, 2, 5]]
    assert own.hold(t.half()).dtype == torch.float16


def test_a_mean_over_streams_of_their_own_means() -> None:
    t = randn(5, *SHAPE)
    video, sound = t[:, :2].mean((1, 2)), t[:, 2].mean(1)
    torch.testing.assert_close(two().by_stream(t), torch.stack([video, sound], 1))
    torch.testing.assert_close(two().mean(t), (video + sound) / 2)
    torch.testing.assert_close(two({"sound": 3.0}).mean(t), (video + 3 * sound) / 4)
    held = StateLayout(first_row_held().free, first_row_held().clean, two().streams)
    torch.testing.assert_close(held.by_stream(t), torch.stack([t[:, 1].mean(1), sound], 1))


def test_twice_the_elements_of_a_stream_keep_the_balance() -> None:
    """A stream whose elements all come twice has the same part in a mean, and in its gradient."""
    t = randn(5, *SHAPE)
    doubled = torch.cat([t[:, :2], t[:, :2], t[:, 2:]], 1)
    layout = StateLayout(streams=streams_along((5, 4), 0, {"video": 4, "sound": 1}))
    torch.testing.assert_close(layout.mean(doubled), two().mean(t), rtol=1e-14, atol=1e-14)
    assert not torch.allclose(mean_dims(doubled), mean_dims(t))


def test_streams_that_interleave_and_leave_held_elements_out() -> None:
    even = torch.tensor([True, False, True, False, False])
    odd = torch.tensor([False, True, False, True, False])
    free = torch.tensor([[True, True, True, True, False]])
    layout = StateLayout(free, torch.zeros(1, 5), (StateStream("a", even), StateStream("b", odd, 2.0)))
    t = torch.tensor([[1.0, 10, 3, 20, math.inf]])
    assert layout.by_stream(t).tolist() == [[2, 15]]
    torch.testing.assert_close(layout.mean(t), torch.tensor([32 / 3]))
    assert layout.spread(torch.tensor([[5.0, 7.0]]), t).tolist() == [[5, 7, 5, 7, 0]]


def test_no_gradient_comes_from_held_elements_or_crosses_streams() -> None:
    says, layout = randn(2, *SHAPE), first_row_held()
    says[:, 0] = math.nan
    says.requires_grad_()
    layout.mean(layout.silence(says).square()).sum().backward()
    assert says.grad is not None and bool((says.grad[:, 0] == 0).all())
    torch.testing.assert_close(says.grad[:, 1:], 2 * says.detach()[:, 1:] / 8)
    y = randn(2, *SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(two().by_stream(y.square())[:, 0].sum(), y)
    assert bool((gradient[:, 2] == 0).all()) and bool((gradient[:, :2] != 0).all())


def test_effective_elements_are_those_of_the_means_variance() -> None:
    for layout in (first_row_held(), two(), two({"sound": 3.0})):
        t = randn(40_000, *SHAPE)
        size = torch.as_tensor(layout.effective(t))
        torch.testing.assert_close(layout.mean(t).var() * size, torch.ones(1).double(), rtol=0.03, atol=0)
    sizes = two({"sound": 3.0}).effective(randn(2, *SHAPE))
    torch.testing.assert_close(torch.as_tensor(sizes), torch.tensor([1 / (1 / 16 / 8 + 9 / 16 / 4)]).double())


# ------------------------------------------------------------------------------------------------------ distributions
def test_log_probs_and_kls_are_those_of_the_free_elements() -> None:
    mean, other, y = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    std = torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=torch.float64)
    normal = Normal(mean, std.view(-1, 1, 1).expand_as(mean))
    reference = Normal(other, 0.7 * std.view(-1, 1, 1).expand_as(mean))
    broken = mean.clone()
    broken[:, 0] = math.nan
    law, theirs = Gaussian(broken, std, True, first_row_held()), Gaussian(other, 0.7 * std, True, first_row_held())
    torch.testing.assert_close(law.log_prob(y), normal.log_prob(y)[:, 1:].mean((1, 2)))
    torch.testing.assert_close(law.kl(theirs), kl_divergence(normal, reference)[:, 1:].mean((1, 2)))
    torch.testing.assert_close(drift_kl(law, theirs, std), ((mean - other)[:, 1:] ** 2).mean((1, 2)) / (2 * std**2))
    torch.testing.assert_close(velocity_kl(broken, other, first_row_held()), ((mean - other)[:, 1:] ** 2).mean((1, 2)))
    region = torch.rand(3, 4, dtype=torch.float64)
    weighted = (normal.log_prob(y) * region)[:, 1:].sum((1, 2)) / region[1:].sum()
    torch.testing.assert_close(law.log_prob(y, region), weighted)


def test_log_probs_of_streams() -> None:
    mean, y, std = randn(4, *SHAPE), randn(4, *SHAPE, seed=2), torch.ones(4, dtype=torch.float64)
    law, density = Gaussian(mean, std, True, two({"video": 3.0})), Normal(mean, 1.0).log_prob(y)
    streams = torch.stack([density[:, :2].mean((1, 2)), density[:, 2].mean(1)], 1)
    torch.testing.assert_close(law.log_probs(y), streams)
    torch.testing.assert_close(law.log_prob(y), streams @ torch.tensor([0.75, 0.25], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"region: \('video', 'sound'\) have a mean each"):
        law.log_prob(y, torch.ones(SHAPE))


# -------------------------------------------------------------------------------------------------------------- times
def test_times_per_token() -> None:
    free = torch.tensor([[False, True, True], [True, False, True]])
    assert times_per_token(torch.tensor([0.5, 0.25]), free).tolist() == [[0, 0.5, 0.5], [0.25, 0, 0.25]]
    assert times_per_token(torch.tensor([0.5, 0.25]), free[:1]).tolist() == [[0, 0.5, 0.5], [0, 0.25, 0.25]]
    frames = torch.ones(1, 3, 2, dtype=torch.bool)
    frames[:, 0] = False
    assert times_per_token(torch.tensor([0.5]), frames).tolist() == [[[0, 0], [0.5, 0.5], [0.5, 0.5]]]
    with pytest.raises(ValueError, match=r"free: torch.bool \[2, 3\] must be bool \[3, N\] or \[1, N\]"):
        times_per_token(torch.ones(3), free)


# ------------------------------------------------------------------------------------------------------------- faults
FREE, CLEAN = torch.tensor([[True, False, True]]), torch.zeros(1, 3)
A, B = (torch.tensor(bits) for bits in ([True, True, False], [False, False, True]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StateLayout(FREE), "clean: None beside free"),
        (lambda: StateLayout(clean=CLEAN), "free: None beside clean"),
        (lambda: StateLayout(FREE.float(), CLEAN), "free: torch.float32"),
        (lambda: StateLayout(FREE[0], CLEAN), "must be bool"),
        (lambda: StateLayout(FREE, torch.zeros(1, 4)), r"clean: shape \[1, 4\] must be \[1, 3\]"),
        (lambda: StateLayout(FREE.expand(2, 3), torch.zeros(3, 3)), r"clean: shape \[3, 3\] must be \[2, 3\]"),
        (lambda: StateLayout(FREE, CLEAN.long()), "clean: torch.int64"),
        (lambda: StateLayout(torch.cat([FREE, FREE & False]), CLEAN), "row 1 has no free element"),
        (lambda: StateLayout(streams=(StateStream("a", A), StateStream("a", B))), "distinct"),
        (lambda: StateLayout(streams=(StateStream("a", A), StateStream("b", B, 0.0))), "'b' has weight 0.0"),
        (lambda: StateLayout(streams=(StateStream("a", A), StateStream("b", B.float()))), "nearest valid: bool"),
        (lambda: StateLayout(streams=(StateStream("a", A), StateStream("b", ~B))), "3 free elements are in none or in"),
        (lambda: StateLayout(streams=(StateStream("a", A),)), "1 free elements are in none or in"),
        (lambda: StateLayout(FREE[:, :2], CLEAN[:, :2], (StateStream("a", A), StateStream("b", B))), "as the streams"),
        (
            lambda: StateLayout(torch.tensor([[True, True, False]]), CLEAN, (StateStream("a", A), StateStream("b", B))),
            "'b' has a row without a free element",
        ),
        (lambda: streams_along((3, 4), 0, {"a": 1, "b": 1}), "must add up to 3"),
        (lambda: streams_along((3, 4), 0, {"a": 3}, {"b": 1.0}), "weights: 'b' is no stream"),
        (lambda: two().check_advantages(("sound", "video")), r"nearest valid: \('video', 'sound'\)"),
        (lambda: WHOLE.check_advantages(("sound",)), "nearest valid: a joint credit"),
    ],
)
def test_bad_layouts(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_good_advantages() -> None:
    WHOLE.check_advantages(())
    two().check_advantages(())
    two().check_advantages(("video", "sound"))


def test_rows_that_a_layout_has_not() -> None:
    layout = replace(first_row_held(3), first=2)
    assert layout.take(torch.tensor([4, 2])).free is not None
    for row, near in ((0, 2), (5, 4)):
        with pytest.raises(ValueError, match=rf"rows: {row} is outside \[2, 4\], the layout's; nearest valid: {near}"):
            layout.take(torch.tensor([2, row]))
    assert replace(first_row_held(), first=2).take(torch.tensor([7])).free is not None  # all rows alike


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_held_elements_are_finite(value: float) -> None:
    free = torch.tensor([[True, False, True]])
    assert StateLayout(free, torch.tensor([[value, 1.0, value]])).free is free  # what is said of free ones is not read
    for rows in (free, free.expand(2, 3)):
        with pytest.raises(ValueError, match=f"clean: {value} at an element that is not free; nearest valid: a finite"):
            StateLayout(rows, torch.tensor([[0.0, value, 0.0]]))
