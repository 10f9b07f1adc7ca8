"""Categorical against torch.distributions; impossible tokens; draws as functions of their own noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical as Truth
from torch.distributions import kl_divergence

from tempflow.core import distribution
from tempflow.core.distribution import Categorical, Gaussian, gaussian
from tempflow.core.rng import Stream
from tempflow.core.state import StateLayout, streams_along

SHAPES = [(), (7,), (4, 3)]
NEVER = -math.inf


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed: int, *shape: int, vocabulary: int = 5) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_kl_are_those_of_torch(shape: tuple[int, ...]) -> None:
    p, q, y = 3 * draw(0, 3, *shape, 5), draw(1, 3, *shape, 5), tokens(2, 3, *shape)
    truth = Truth(logits=p).log_prob(y)
    torch.testing.assert_close(Categorical(p).log_density(y), truth)
    torch.testing.assert_close(Categorical(p + 100).log_prob(y), truth.reshape(3, -1).mean(1))
    torch.testing.assert_close(Categorical(p).log_probs(y), truth.reshape(3, -1).mean(1)[:, None])
    divergence = kl_divergence(Truth(logits=p), Truth(logits=q)).reshape(3, -1).mean(1)
    torch.testing.assert_close(Categorical(p).kl(Categorical(q)), divergence)
    assert torch.equal(Categorical(p).mode, p.argmax(-1))
    assert float(Categorical(p).kl(Categorical(p)).abs().max()) == 0


def test_dtypes() -> None:
    y = tokens(0, 2, 3)
    for given, want in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        law = Categorical(draw(0, 2, 3, 5).to(given))
        assert law.log_prob(y).dtype == law.kl(law).dtype == want
        assert law.sample(torch.full((2, 3), 0.5)).dtype == law.mode.dtype == torch.int64


def test_what_is_held_and_streams_count_as_the_layout_says() -> None:
    p, q, y = draw(0, 2, 4, 5), draw(3, 2, 4, 5), tokens(1, 2, 4)
    free = torch.tensor([[True, True, False, True]])
    layout = StateLayout(free, torch.zeros(1, 4), streams_along((4,), 0, {"a": 1, "b": 3}, {"b": 3.0}))
    law, each = Categorical(p, layout), Truth(logits=p).log_prob(y)
    want = torch.stack([each[:, 0], each[:, [1, 3]].mean(1)], 1)
    torch.testing.assert_close(law.log_probs(y), want)
    torch.testing.assert_close(law.log_prob(y), want @ torch.tensor([0.25, 0.75]).double())
    torch.testing.assert_close(Categorical(p).counted_by(layout).log_prob(y), law.log_prob(y))
    divergence = kl_divergence(Truth(logits=p), Truth(logits=q))
    want = 0.25 * divergence[:, 0] + 0.75 * divergence[:, [1, 3]].mean(1)
    torch.testing.assert_close(law.kl(Categorical(q)), want)
    region = torch.tensor([True, False, True, True])
    torch.testing.assert_close(Categorical(p, replace(layout, streams=())).log_prob(y, region), each[:, [0, 3]].mean(1))
    with pytest.raises(ValueError, match="have a mean each"):
        law.log_prob(y, region)
    impossible = p.clone()
    impossible[:, 2] = NEVER  # held, so nobody asks
    assert bool(Categorical(impossible, layout).log_prob(y).isfinite().all())


def test_gradients_by_finite_differences_also_beside_tokens_that_cannot_be() -> None:
    y, bars = tokens(0, 2, 3), torch.zeros(2, 3, 5, dtype=torch.float64)
    y[0, 0] = 1
    bars[0, 0, [0, 3]] = NEVER
    for bar in (torch.zeros_like(bars), bars):
        p, q = draw(1, 2, 3, 5).requires_grad_(), (draw(2, 2, 3, 5) + bar).requires_grad_()
        assert torch.autograd.gradcheck(lambda p, bar=bar: Categorical(p + bar).log_prob(y), (p,))
        assert torch.autograd.gradcheck(lambda p, q=q, bar=bar: Categorical(p + bar).kl(Categorical(q.detach())), (p,))
        r = draw(3, 2, 3, 5).requires_grad_()
        assert torch.autograd.gradcheck(lambda r, p=p, bar=bar: Categorical(p.detach() + bar).kl(Categorical(r)), (r,))


def test_tokens_that_cannot_be() -> None:
    logits = torch.tensor([[[0.0, NEVER, 1.0]], [[NEVER, 2.0, NEVER]]], requires_grad=True)
    law = Categorical(logits)
    assert law.log_prob(torch.tensor([[0], [1]])).isfinite().all()
    log_prob = law.log_prob(torch.tensor([[1], [1]]))
    assert log_prob.tolist() == [NEVER, 0.0]
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    assert bool(gradient.isfinite().all())
    even = Categorical(torch.zeros(2, 1, 3))
    assert bool(law.kl(even).isfinite().all()) and even.kl(law).tolist() == [math.inf, math.inf]
    assert law.kl(law).tolist() == [0, 0]
    u = Stream(0, "u").uniform([(k,) for k in range(200)], (1,))
    some = Categorical(logits.detach()[:1].expand(200, 1, 3)).sample(u)
    assert some.unique().tolist() == [0, 2]


@pytest.mark.parametrize("bad", [NEVER, math.nan, math.inf])
def test_where_there_is_no_law_draws_raise_and_log_probs_are_nan(bad: float) -> None:
    logits = torch.zeros(2, 2, 3)
    logits[1, 1] = bad
    law, y = Categorical(logits), torch.zeros(2, 2, dtype=torch.long)
    assert (
        law.log_prob(y).isnan().tolist() == law.kl(Categorical(torch.zeros(2, 2, 3))).isnan().tolist() == [False, True]
    )
    for ask in (lambda: law.sample(torch.full((2, 2), 0.5)), lambda: law.mode):
        with pytest.raises(ValueError, match="logits: row 1 has a token whose largest logit is"):
            ask()


def test_draws_have_their_probabilities_and_depend_on_their_own_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, -0.5, NEVER]).expand(40, 100, 5)
    u = Stream(3, "u").uniform([(k,) for k in range(40)], (100,))
    drawn = Categorical(logits).sample(u)
    seen = torch.bincount(drawn.flatten(), minlength=5)
    want = logits[0, 0].double().softmax(0) * 4000
    assert seen[4] == 0 and stats.chisquare(seen[:4], want[:4].numpy()).pvalue > 1e-3
    parts = [Categorical(logits[k : k + 1]).sample(u[k : k + 1]) for k in range(40)]
    assert torch.equal(torch.cat(parts), drawn)
    monkeypatch.setattr(distribution, "AT_ONCE", 37)
    assert torch.equal(Categorical(logits).sample(u), drawn), "in chunks as at once"


def test_draws_at_the_ends_of_the_noise_and_of_a_large_codebook() -> None:
    ends = torch.tensor([[2.0**-53, 1 - 2.0**-53, 1.0]], dtype=torch.float64)
    assert Categorical(torch.tensor([NEVER, 0.0, 0.0, NEVER]).expand(1, 3, 4)).sample(ends).tolist() == [[1, 2, 2]]
    logits = draw(0, 1, 2, 100_000).float()
    cumulated = logits.double().softmax(-1).cumsum(-1)
    u = torch.tensor([[0.123, 0.987]], dtype=torch.float64)
    want = (cumulated < u[..., None]).sum(-1)
    assert torch.equal(Categorical(logits).sample(u), want)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: Categorical(torch.zeros(3)), r"logits: torch.float32 \[3\] must be float"),
        (lambda: Categorical(torch.zeros(2, 3).long()), "logits: torch.int64"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).log_prob(torch.zeros(2, 3)), "y: torch.float32"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).log_prob(torch.zeros(2, 4).long()), r"int64 \[2, 3\]"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).log_prob(torch.full((2, 3), 4)), r"token 4 .* nearest: 3"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).log_prob(torch.full((2, 3), -1)), r"token -1 .* nearest: 0"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).sample(torch.zeros(2, 3, 4)), "noise: shape"),
        (lambda: Categorical(torch.zeros(2, 3, 4)).kl(Categorical(torch.zeros(2, 3, 5))), "other.logits: shape"),
        (lambda: Categorical(torch.zeros(2, 3)).kl(Gaussian(torch.zeros(2), torch.ones(2))), "law: a Gaussian"),  # type: ignore[arg-type]
        (lambda: Gaussian(torch.zeros(2), torch.ones(2)).kl(Categorical(torch.zeros(2, 3))), "law: a Categorical"),  # type: ignore[arg-type]
        (lambda: gaussian(Categorical(torch.zeros(2, 3))), "law: a Categorical is of another kind"),
    ],
)
def test_bad_questions(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()


def test_the_mode_of_a_gaussian_is_its_mean() -> None:
    law = Gaussian(draw(0, 2, 3), torch.ones(2))
    assert law.mode is law.mean and (law.noise, Categorical(torch.zeros(2, 3)).noise) == ("normal", "uniform")
