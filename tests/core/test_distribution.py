"""Gaussian against torch.distributions; the one place of reductions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from tempflow.core.distribution import Gaussian, drift_kl, mean_dims, upcast, velocity_kl
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.schedule import shifted

SHAPES = [(7,), (4, 3, 5), (2, 3, 4, 5), ()]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(std: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return std.view(-1, *[1] * len(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_densities_are_those_of_torch(shape: tuple[int, ...]) -> None:
    mean, y, std = draw(0, 3, *shape), draw(1, 3, *shape), torch.tensor([0.03, 0.7, 2.0], dtype=torch.float64)
    ours, truth = Gaussian(mean, std), Normal(mean, column(std, shape))
    torch.testing.assert_close(ours.log_density(y), truth.log_prob(y))
    torch.testing.assert_close(ours.log_prob(y), truth.log_prob(y).reshape(3, -1).mean(1))
    assert ours.log_prob(y).shape == (3,)


@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch(shape: tuple[int, ...]) -> None:
    p_std, q_std = torch.tensor([0.1, 0.7, 2.0]).double(), torch.tensor([0.1, 0.9, 0.5]).double()
    p, q = Gaussian(draw(0, 3, *shape), p_std), Gaussian(draw(1, 3, *shape), q_std)
    truth = kl_divergence(Normal(p.mean, column(p_std, shape)), Normal(q.mean, column(q_std, shape)))
    torch.testing.assert_close(p.kl(q), truth.reshape(3, -1).mean(1))


def test_kl_of_equal_stds_keeps_a_gap_far_below_one() -> None:
    mean, std = torch.ones(2, 64), torch.tensor([0.3, 0.7])
    p, q = Gaussian(mean + 2.0**-20, std), Gaussian(mean, std)
    torch.testing.assert_close(p.kl(q), 2.0**-40 / (2 * std.square()), rtol=1e-6, atol=0)
    assert q.kl(q).tolist() == [0, 0]


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.integers(0, 10**6))
def test_kl_is_never_negative(s: float, t: float, seed: int) -> None:
    p = Gaussian(draw(seed, 1, 6), torch.tensor([s], dtype=torch.float64))
    q = Gaussian(p.mean + draw(seed + 1, 1, 6) * 1e-3, torch.tensor([t], dtype=torch.float64))
    assert float(p.kl(q)) >= -1e-15


def test_sample_is_mean_plus_scaled_noise() -> None:
    mean, noise = draw(0, 2, 3, 4), draw(1, 2, 3, 4)
    got = Gaussian(mean, torch.tensor([0.5, 0.0])).sample(noise)
    torch.testing.assert_close(got[0], mean[0] + 0.5 * noise[0])
    assert torch.equal(got[1], mean[1])


def test_samples_have_the_moments_of_their_law() -> None:
    law = Gaussian(torch.full((2, 40000), 1.5, dtype=torch.float64), torch.tensor([0.3, 2.0]).double())
    y = law.sample(draw(3, 2, 40000))
    torch.testing.assert_close(y.mean(1), torch.tensor([1.5, 1.5]).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(y.std(1), law.std, atol=0, rtol=0.015)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + law.std.log()
    torch.testing.assert_close(-law.log_prob(y), entropy, atol=0.015, rtol=0)


def test_score_is_minus_z_over_std_per_element() -> None:
    mean = draw(0, 1, 5).requires_grad_()
    z = draw(1, 1, 5)
    law = Gaussian(mean, torch.tensor([0.4]).double())
    law.log_prob(law.sample(z).detach()).sum().backward()
    torch.testing.assert_close(mean.grad, z / 0.4 / 5)


def test_an_undetached_sample_has_a_density_that_does_not_depend_on_the_mean() -> None:
    mean = draw(0, 1, 5).requires_grad_()
    law = Gaussian(mean, torch.tensor([0.4]).double())
    law.log_prob(law.sample(draw(1, 1, 5))).sum().backward()
    torch.testing.assert_close(mean.grad, torch.zeros(1, 5).double())


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_region_is_a_weighted_mean(seed: int) -> None:
    law, y = Gaussian(draw(seed, 2, 3, 4), torch.tensor([0.4, 1.1]).double()), draw(seed + 1, 2, 3, 4)
    weights = draw(seed + 2, 2, 1, 4).square()
    truth = (law.log_density(y) * weights).sum((1, 2)) / (3 * weights.sum((1, 2)))
    torch.testing.assert_close(law.log_prob(y, weights), truth)
    torch.testing.assert_close(law.log_prob(y, 7 * weights), truth)


def test_masks() -> None:
    law, y = Gaussian(draw(0, 2, 3, 4), torch.tensor([0.4, 1.1]).double()), draw(1, 2, 3, 4)
    mask = torch.tensor([[True, False, False, True], [False, False, True, False]])[:, None]
    density = law.log_density(y)
    want = torch.stack([density[0, :, [0, 3]].mean(), density[1, :, 2].mean()])
    torch.testing.assert_close(law.log_prob(y, mask), want)
    torch.testing.assert_close(law.log_prob(y, torch.ones(4, dtype=torch.bool)), law.log_prob(y))


def test_what_lies_outside_a_region_cannot_spoil_it() -> None:
    law, y = Gaussian(torch.zeros(1, 3), torch.ones(1)), torch.tensor([[0.5, float("inf"), float("nan")]])
    got = law.log_prob(y, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(got, Normal(0.0, 1.0).log_prob(torch.tensor([0.5])))


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (torch.tensor([[True, True], [False, False]]), "row 1"),
        (torch.zeros(2, 2), "row 0"),
        (torch.tensor([[1.0, -0.5]]), "-0.5"),
        (torch.tensor([[1.0, float("nan")]]), "region"),
        (torch.ones(2, 3), r"\(2, 3\) does not broadcast"),
    ],
)
def test_bad_regions(region: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Gaussian(torch.zeros(2, 2), torch.ones(2)).log_prob(torch.zeros(2, 2), region)


def test_a_point_has_no_density() -> None:
    noisy, point = Gaussian(torch.zeros(2, 3), torch.ones(2)), Gaussian(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
    y = torch.zeros(2, 3)
    for ask in (
        lambda: point.log_prob(y),
        lambda: point.log_density(y),
        lambda: point.kl(noisy),
        lambda: noisy.kl(point),
        lambda: Gaussian(y, torch.ones(2), stochastic=False).log_prob(y),
        lambda: drift_kl(noisy, noisy, torch.tensor([1.0, 0.0])),
    ):
        with pytest.raises(ValueError, match=r"a deterministic \(ODE\) step has no log-probability"):
            ask()


def test_shapes_must_agree() -> None:
    law = Gaussian(torch.zeros(2, 3), torch.ones(2))
    for ask in (
        lambda: law.log_prob(torch.zeros(2, 1)),
        lambda: law.sample(torch.zeros(3)),
        lambda: law.kl(Gaussian(torch.zeros(2, 4), torch.ones(2))),
        lambda: velocity_kl(torch.zeros(2, 3), torch.zeros(1, 3)),
        lambda: Gaussian(torch.zeros(2, 3), torch.ones(3)).sample(torch.zeros(2, 3)),
    ):
        with pytest.raises(ValueError, match="shape"):
            ask()


def test_mean_dims() -> None:
    t = torch.arange(12.0).view(2, 2, 3)
    assert mean_dims(t).tolist() == [2.5, 8.5]
    assert mean_dims(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    # 3000 ones cannot be summed in bfloat16
    assert mean_dims(torch.ones(1, 3000, dtype=torch.bfloat16)).item() == 1.0


def test_upcast() -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    assert [upcast(torch.ones(1, dtype=dtype)).dtype for dtype in dtypes] == [torch.float32] * 3 + [torch.float64]


def test_relations_of_the_three_kls() -> None:
    """velocity KL · B²/(2S²) = exact KL; Flow-GRPO's form = Δ · exact KL."""
    schedule, step = shifted(10).double(), torch.tensor([0, 3, 8])
    for dynamics in (FlowSDE(0.7), DanceSDE(0.3)):
        x, v, v_ref = draw(0, 3, 4, 5), draw(1, 3, 4, 5), draw(2, 3, 4, 5)
        policy = dynamics.transition(x, v, schedule, step)
        reference = dynamics.transition(x, v_ref, schedule, step)
        _, b, s = dynamics.coefficients(schedule, step)
        exact = policy.kl(reference)
        torch.testing.assert_close(velocity_kl(v, v_ref) * b.square() / (2 * s.square()), exact)
        drift = drift_kl(policy, reference, dynamics.rate(schedule, step))
        torch.testing.assert_close(drift, exact * schedule.delta(step))


def test_gradients_of_the_kls_by_finite_differences() -> None:
    schedule, step = shifted(10).double(), torch.tensor([2, 6])
    dynamics = FlowSDE(0.7)
    x, v, v_ref = draw(0, 2, 3), draw(1, 2, 3).requires_grad_(), draw(2, 2, 3)
    reference = dynamics.transition(x, v_ref, schedule, step)
    rate = dynamics.rate(schedule, step)

    assert torch.autograd.gradcheck(lambda v: dynamics.transition(x, v, schedule, step).kl(reference), (v,))
    assert torch.autograd.gradcheck(
        lambda v: drift_kl(dynamics.transition(x, v, schedule, step), reference, rate), (v,)
    )
    assert torch.autograd.gradcheck(lambda v: velocity_kl(v, v_ref), (v,))
    y = draw(4, 2, 3)
    assert torch.autograd.gradcheck(lambda v: dynamics.transition(x, v, schedule, step).log_prob(y), (v,))
