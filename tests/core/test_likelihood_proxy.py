"""Surrogates against their written forms, autograd and the exact likelihood of a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from tempflow.core.likelihood_proxy import (
    FLOOR,
    Adaptive,
    GeneralHuber,
    Huber,
    LikelihoodProxy,
    Matching,
    PathKL,
    adaptive_error,
    adaptive_scale,
    corrupt,
    noise_of_velocity,
    proxy_of,
    square_error,
    target_velocity,
    velocity_of_noise,
    velocity_of_x0,
    x0_of_velocity,
)

FORMS: tuple[LikelihoodProxy, ...] = (
    Adaptive(), Adaptive("velocity"), Matching(0), Matching(1), Matching(2), Huber(), GeneralHuber(), PathKL(),
)  # fmt: skip


def draw(seed: int = 0, shape: tuple[int, ...] = (5, 2, 3, 4), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """v (near the target), x0, noise, t."""
    g = torch.Generator().manual_seed(seed)
    x0, noise, gap = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    t = 0.05 + 0.9 * torch.rand(shape[0], generator=g, dtype=torch.float64)
    return [(noise - x0 + 0.3 * gap).to(dtype), x0.to(dtype), noise.to(dtype), t.to(dtype)]


def mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def gradient(form: LikelihoodProxy, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    v = v.clone().requires_grad_()
    return torch.autograd.grad(form(v, x0, noise, t).sum(), v)[0]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_conversions_invert_one_another_and_know_the_endpoints(seed: int) -> None:
    v, x0, noise, t = draw(seed)
    x, close = corrupt(x0, noise, t), {"rtol": 1e-11, "atol": 1e-11}
    true = target_velocity(x0, noise)
    torch.testing.assert_close(x0_of_velocity(x, true, t), x0, **close)
    torch.testing.assert_close(noise_of_velocity(x, true, t), noise, **close)
    torch.testing.assert_close(velocity_of_x0(x, x0_of_velocity(x, v, t), t), v, **close)
    torch.testing.assert_close(velocity_of_noise(x, noise_of_velocity(x, v, t), t), v, **close)
    s = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(x0_of_velocity(x, v, t) - x0, -s * (v - true), **close)
    torch.testing.assert_close(noise_of_velocity(x, v, t) - noise, (1 - s) * (v - true), **close)
    assert torch.equal(corrupt(x0, noise, torch.ones(5)), noise)


def test_adaptive_in_velocity_space() -> None:
    """ℓ = t·mean (v−v*)² / mean |v−v*|; the velocity form lacks the t."""
    v, x0, noise, t = draw()
    gap = v - (noise - x0)
    expected = mean(gap.square()) / mean(gap.abs())
    torch.testing.assert_close(Adaptive()(v, x0, noise, t), -t * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(Adaptive("velocity")(v, x0, noise, t), -expected, rtol=1e-12, atol=0)


def test_adaptive_weight_is_detached() -> None:
    """The gradient is that of the square over a constant; with the weight in it, it would turn and shrink."""
    v, x0, noise, t = draw(3, (1, 50))
    x = corrupt(x0, noise, t)
    f = x0_of_velocity(x, v, t).requires_grad_()
    (kept,) = torch.autograd.grad(adaptive_error(f, x0).sum(), f)
    gap = (f - x0).detach()
    torch.testing.assert_close(kept, 2 * gap / 50 / gap.abs().mean(), rtol=1e-12, atol=0)
    (through,) = torch.autograd.grad((mean((f - x0).square()) / mean((f - x0).abs())).sum(), f)
    assert torch.cosine_similarity(kept.flatten(), through.flatten(), 0) < 0.95
    assert through.norm() < 0.8 * kept.norm()


def test_adaptive_floor_and_dtypes() -> None:
    x0 = torch.zeros(2, 3)
    assert adaptive_scale(x0, x0).tolist() == pytest.approx([FLOOR, FLOOR])
    assert adaptive_error(x0, x0).tolist() == [0, 0]
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float64)
    assert adaptive_error(tiny, 0 * tiny).item() == pytest.approx(1e-14 / 1e-5)
    for form in FORMS:
        assert form(*draw(dtype=torch.float64)).dtype == torch.float64
        low = form(*draw(dtype=torch.bfloat16))
        assert low.dtype == torch.float32
        v, x0, noise, t = (a.float() for a in draw(dtype=torch.bfloat16))
        assert torch.equal(low, form(v, x0, noise, t)), "half precision is widened before any arithmetic"


def test_written_forms() -> None:
    v, x0, noise, t = draw(1)
    m = mean((v - noise + x0).square())
    expected = {
        "uniform": -m, "t": -t * m, "t2": -t * t * m, "huber": -t * ((m + 1e-10).sqrt() - 1e-5),
        "ghuber": -4 * t * ((m + 1e-10) ** 0.25 - 1e-10**0.25), "exact": -(1 - t) / (t + 1e-3) * m,
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(proxy_of(name)(v, x0, noise, t), value, rtol=1e-12, atol=0)  # type: ignore[arg-type]
    x = corrupt(x0, noise, t)
    torch.testing.assert_close(Matching(2)(v, x0, noise, t), -square_error(x0_of_velocity(x, v, t), x0))
    torch.testing.assert_close(GeneralHuber(1)(v, x0, noise, t), Matching(1)(v, x0, noise, t))
    torch.testing.assert_close(GeneralHuber(0.5)(v, x0, noise, t), 2 * Huber()(v, x0, noise, t), rtol=1e-12, atol=0)
    assert all(bool((form(v, x0, noise, t) < 0).all()) for form in FORMS)
    assert all(bool((form(noise - x0, x0, noise, t).abs() < 1e-7).all()) for form in FORMS)


def test_general_huber_gradient() -> None:
    """∇ = −t·m^(p−1)·∇m."""
    v, x0, noise, t = draw(2)
    m = mean((v - noise + x0).square())
    for p in (0.25, 0.5, 1.0):
        expected = gradient(Matching(0), v, x0, noise, t) * (t * m ** (p - 1)).view(-1, 1, 1, 1)
        torch.testing.assert_close(gradient(GeneralHuber(p), v, x0, noise, t), expected, rtol=1e-7, atol=1e-12)
    finite = gradient(GeneralHuber(), noise - x0, x0, noise, t)
    assert bool(finite.isfinite().all()), "a perfect prediction has a finite gradient"


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_surrogates_do_not_grow_with_the_number_of_elements(form: LikelihoodProxy) -> None:
    """A sum instead of a mean would multiply the log ratio by 64 here, and by 65 536 for a picture."""
    v, x0, noise, t = draw(4, (3, 2, 2))
    wide = [a.repeat(1, 8, 8) for a in (v, x0, noise)]
    torch.testing.assert_close(form(*wide, t), form(v, x0, noise, t), rtol=1e-12, atol=0)
    ratio = (form(0.98 * v, x0, noise, t) - form(v, x0, noise, t)).exp()
    assert bool(((ratio - 1).abs() < 0.2).all())


def test_path_weight_is_the_exact_likelihood_of_a_gaussian() -> None:
    """log p_m(x0) − log p_k(x0) = the difference of E over t ~ U(0,1) and ε of the surrogates of the exact velocities.

    Holds point by point (the I-MMSE identity); expectations by Gauss quadrature.
    """
    nodes, weights = (torch.tensor(a, dtype=torch.float64) for a in _gauss_legendre(200))
    eps, mass = (torch.tensor(a, dtype=torch.float64) for a in _gauss_hermite(20))
    t, e = nodes.repeat_interleave(len(eps)), eps.repeat(len(nodes))
    w = weights.repeat_interleave(len(eps)) * mass.repeat(len(nodes))
    for point in (-0.7, 0.4, 1.9):
        x0 = torch.full_like(t, point)[:, None]
        bound = []
        for m, s in ((0.3, 0.8), (-0.5, 1.4)):
            x = corrupt(x0, e[:, None], t)[:, 0]
            gain = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
            denoised = m + gain * (x - (1 - t) * m)
            v = ((x - denoised) / t)[:, None]
            bound.append((w * PathKL(0.0)(v, x0, e[:, None], t)).sum())
        exact = [Normal(torch.tensor(m, dtype=torch.float64), s).log_prob(torch.tensor(point, dtype=torch.float64))
                 for m, s in ((0.3, 0.8), (-0.5, 1.4))]  # fmt: skip
        assert float(bound[0] - bound[1]) == pytest.approx(float(exact[0] - exact[1]), abs=1e-9)


def _gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    import numpy as np

    x, w = np.polynomial.legendre.leggauss(n)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()


def _gauss_hermite(n: int) -> tuple[list[float], list[float]]:
    import numpy as np

    x, w = np.polynomial.hermite_e.hermegauss(n)
    return x.tolist(), (w / math.sqrt(2 * math.pi)).tolist()


def test_bad_input_is_refused() -> None:
    v, x0, noise, t = draw()
    with pytest.raises(ValueError, match="shape"):
        square_error(v, x0[:, :1])
    with pytest.raises(ValueError, match="shape"):
        corrupt(x0, noise[:1], t)
    with pytest.raises(ValueError, match="per-row"):
        Matching(1)(v, x0, noise, t[:1])
    for call in (lambda: Matching(-1), lambda: GeneralHuber(0), lambda: GeneralHuber(1.5), lambda: PathKL(-1),
                 lambda: Adaptive("noise"), lambda: proxy_of("l1")):  # type: ignore[arg-type]  # fmt: skip
        with pytest.raises(ValueError, match=r"power|offset|space|likelihood"):
            call()
