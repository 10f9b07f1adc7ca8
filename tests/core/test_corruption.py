"""Forward processes, and jumps of tokens that undo one: laws, marginals against closed forms, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from tempflow.core import plan
from tempflow.core.corruption import GAUSSIAN_PATH, MixturePath, TokenLikelihood
from tempflow.core.dynamics import FlowSDE, MixtureJump, gradient_scale
from tempflow.core.likelihood_proxy import corrupt
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear

V = 3
PATH, JUMP = MixturePath(V), MixtureJump(V)
DATA = torch.tensor([[0.30, 0.05, 0.05], [0.10, 0.02, 0.18], [0.05, 0.15, 0.10]], dtype=torch.float64)
"""A joint law of two tokens that depend on each other."""


def forward(t: float) -> Tensor:
    """q(x_t = j | x0 = i) of one token, [V, V]."""
    return (1 - t) * torch.eye(V, dtype=torch.float64) + t / V


def at(t: float, data: Tensor = DATA) -> Tensor:
    """The path's law of both tokens at t."""
    return forward(t).T @ data @ forward(t)


def posterior(t: float) -> Tensor:
    """Of each token given both at t, [V, V, 2, V]."""
    joint = torch.einsum("ab,ai,bj->ijab", DATA, forward(t), forward(t))
    joint = joint / joint.sum((2, 3), keepdim=True)
    return torch.stack([joint.sum(3), joint.sum(2)], 2)


def kernel(t: float, step: Schedule, i: int) -> Tensor:
    """The jump's law from each pair of tokens to each, [V, V, V, V]."""
    x = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    law = JUMP.transition(x, posterior(t).view(V * V, 2, V).log(), step, torch.full((V * V,), i))
    p = law.logits.softmax(-1)
    return (p[:, 0, :, None] * p[:, 1, None, :]).view(V, V, V, V)


def test_the_jumps_law_is_the_mixture_of_staying_and_the_posterior() -> None:
    grid = Schedule(torch.tensor([1.0, 0.6, 0.15, 0.0], dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    x = torch.randint(5, (3, 4), generator=g)
    logits = torch.randn(3, 4, 5, generator=g).double() * 2 + 7
    law = MixtureJump(5).transition(x, logits, grid, torch.arange(3))
    share = ((grid.sigmas[:-1] - grid.sigmas[1:]) / grid.sigmas[:-1]).view(3, 1, 1)
    want = (1 - share) * torch.nn.functional.one_hot(x, 5) + share * logits.softmax(-1)
    torch.testing.assert_close(law.logits.softmax(-1), want)
    torch.testing.assert_close(law.log_density(x), want.gather(-1, x[..., None])[..., 0].log())
    assert torch.equal(law.logits[2], logits[2]), "into σ = 0 it is the posterior, to the last bit"
    assert bool(JUMP.spreads(grid, torch.arange(3)).all())


def test_gradients_of_the_jumps_law_by_finite_differences() -> None:
    grid = Schedule(torch.tensor([1.0, 0.6, 0.0], dtype=torch.float64))
    g = torch.Generator().manual_seed(1)
    x, y = torch.randint(4, (2, 3), generator=g), torch.randint(4, (2, 3), generator=g)
    bar = torch.zeros(2, 3, 4, dtype=torch.float64)
    bar[0, 1, int(x[0, 1])] = -math.inf  # where it cannot be by the posterior, it may stay all the same
    y[0, 1] = x[0, 1]
    logits = torch.randn(2, 3, 4, generator=g).double().requires_grad_()

    def log_prob(logits: Tensor) -> Tensor:
        return MixtureJump(4).transition(x, logits + bar, grid, torch.arange(2)).log_prob(y)

    assert float(log_prob(logits.detach())[0]) > -math.inf and torch.autograd.gradcheck(log_prob, (logits,))


def test_a_jump_takes_the_paths_law_to_the_paths_law_for_a_fixed_x0() -> None:
    """Kolmogorov: exactly, at any length of step; and two steps are one."""
    for i in range(V):
        x0, delta = torch.eye(V, dtype=torch.float64)[i], torch.eye(V, dtype=torch.float64)
        for high, low in ((1.0, 0.3), (0.7, 0.69), (0.4, 0.0)):
            share = (high - low) / high
            step = (1 - share) * delta + share * x0
            torch.testing.assert_close((x0 @ forward(high)) @ step, x0 @ forward(low))


def test_each_tokens_law_stays_the_paths_with_the_true_posterior() -> None:
    """From the path's joint law one step is exact for each token, however long it is."""
    for high, low in ((1.0, 0.0), (1.0, 0.4), (0.5, 0.1)):
        grid = Schedule(torch.tensor([high, low], dtype=torch.float64))
        reached = torch.einsum("ij,ijab->ab", at(high), kernel(high, grid, 0))
        for dim in (0, 1):
            torch.testing.assert_close(reached.sum(dim), at(low).sum(dim))


def test_the_joint_law_goes_to_the_datas_with_shorter_steps() -> None:
    error = list[float]()
    for steps in (1, 8, 16, 32):
        grid = Schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        law = at(1.0)
        for i in range(steps):
            law = torch.einsum("ij,ijab->ab", law, kernel(float(grid.sigmas[i]), grid, i))
        error.append(float((law - DATA).abs().sum()))
    assert error[0] > 0.3 and error[3] < 0.03
    assert error[1] / error[2] == pytest.approx(2, abs=0.3), "of first order"


def test_samples_of_a_rollout_have_the_datas_law() -> None:
    """One token, so exact at three steps."""
    marginal = DATA.sum(1)

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        like = forward(float(sigma[0]))  # q(x_t = j | x0 = i)
        return (marginal[:, None] * like).T[x].log()

    forest = rollout([plan.chain(3, 4000)], JUMP, linear(3), predict, Noise(2), shape=(1,))
    seen = torch.bincount(forest.nodes[forest.leaves.node].flatten(), minlength=V)
    assert stats.chisquare(seen, (marginal * 4000).numpy()).pvalue > 1e-3


def test_corrupted_tokens_have_the_paths_law() -> None:
    u = Stream(1, "u").uniform([(k,) for k in range(3)], (3000,))
    x0, t = torch.full((3, 3000), 1), torch.tensor([0.1, 0.6, 1.0])
    x = PATH.corrupt(x0, u, t)
    for row, level in zip(x, t.tolist(), strict=True):
        assert stats.chisquare(torch.bincount(row, minlength=V), (forward(level)[1] * 3000).numpy()).pvalue > 1e-3
    assert torch.equal(x[:1], PATH.corrupt(x0[:1], u[:1], t[:1])) and x.dtype == torch.int64
    same = u[:1].expand(3, -1)
    moved = PATH.corrupt(torch.full_like(x0, 0), same, t) != PATH.corrupt(torch.full_like(x0, 1), same, t)
    kept = [set(row.nonzero()[:, 0].tolist()) for row in moved]
    assert kept[0] > kept[1] > kept[2] == set(), "what is drawn anew stays so at larger t"
    high = PATH.corrupt(x0[:1], torch.ones(1, 3000), torch.ones(1))
    assert bool((high == V - 1).all()), "noise that was rounded to 1"


def test_starts() -> None:
    u = Stream(1, "u").uniform([(0,)], (3000,))
    start = PATH.start(u, linear(3))
    assert start.dtype == torch.int64 and stats.chisquare(torch.bincount(start[0], minlength=V)).pvalue > 1e-3
    z, grid = torch.randn(2, 3), Schedule(torch.tensor([0.9, 0.0]), spread=0.8)
    assert torch.equal(GAUSSIAN_PATH.start(z, grid), grid.start(z))
    t = torch.tensor([0.2, 0.7])
    assert torch.equal(GAUSSIAN_PATH.corrupt(z, z + 1, t), corrupt(z, z + 1, t))
    assert FlowSDE().corruption is GAUSSIAN_PATH and FlowSDE().noise == "normal"


def test_the_proxy_is_minus_the_cross_entropy() -> None:
    logits, x0 = torch.randn(2, 4, V), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    want = -torch.nn.functional.cross_entropy(logits.mT, x0, reduction="none").mean(1)
    torch.testing.assert_close(TokenLikelihood()(logits, x0, torch.zeros(2, 4), torch.ones(2)), want)


GRID, STEP = linear(2), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: MixturePath(1), "vocabulary: 1 is too small; nearest valid: 2"),
        (lambda: MixtureJump(0), "vocabulary: 0 is too small"),
        (lambda: JUMP.coefficients(GRID, STEP), "moves tokens, which have no mean and no std"),
        (lambda: gradient_scale(JUMP, GRID, STEP), "moves tokens"),
        (lambda: JUMP.transition(torch.full((2, 4), 3), torch.zeros(2, 4, V), GRID, STEP), "x: token 3 is outside"),
        (lambda: JUMP.transition(torch.zeros(2, 4), torch.zeros(2, 4, V), GRID, STEP), "x: torch.float32"),
        (
            lambda: JUMP.transition(torch.zeros(2, 4).long(), torch.zeros(2, 4, 7), GRID, STEP),
            r"logits \[2, 4, 7\] where the states are \[2, 4\]; nearest valid: \[2, 4, 3\]",
        ),
        (lambda: JUMP.transition(torch.zeros(2, 4).long(), torch.zeros(2, 4, V), GRID, STEP, 0.5), "scale: 0.5"),
        (
            lambda: JUMP.transition(torch.zeros(2, 4).long(), torch.zeros(2, 4, V), GRID, STEP, torch.tensor([1, 2.0])),
            "scale: 2.0",
        ),
        (lambda: PATH.corrupt(torch.full((2, 4), 9), torch.zeros(2, 4), torch.ones(2)), "x0: token 9"),
        (lambda: PATH.corrupt(torch.zeros(2, 4).long(), torch.zeros(2, 5), torch.ones(2)), r"int64 \[2, 5\]"),
        (lambda: Stream(0, "a").noise("gumbel", [(0,)], (1,)), "noise: 'gumbel' is not one of normal, uniform"),  # type: ignore[arg-type]
    ],
)
def test_bad_questions(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()
