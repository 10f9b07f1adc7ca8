"""The metric path and its jumps: Kolmogorov's equation, limits, laws against enumeration, draws against laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tempflow.core import plan
from tempflow.core.corruption import TokenLikelihood
from tempflow.core.distribution import Categorical
from tempflow.core.metric_path import EXACT, MetricJump, MetricPath
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear

V = 6
CODES = torch.randn(V, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PATH = MetricPath(CODES)
JUMP, GRID = MetricJump(PATH), linear(4)
EVERY = torch.arange(V)


def law(t: float, path: MetricPath = PATH) -> Tensor:
    """p_t(x | x0), [x0, x], by the definition, code by code."""
    units = [code / code.norm() for code in CODES]
    beta = path.c * ((1 - t) / t) ** path.alpha
    weights = torch.stack([torch.stack([(-beta * (a - b).square().sum()).exp() for b in units]) for a in units])
    return weights / weights.sum(1, keepdim=True)


def drawn(draw: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Frequencies of `count` draws for each of V tokens, [V, V]."""
    y = draw(Stream(1, "test").uniform([(i,) for i in range(V)], (count,)))
    return torch.nn.functional.one_hot(y, V).double().mean(1)


@pytest.mark.parametrize("t", [0.95, 0.5, 0.08])
def test_rates_solve_kolmogorovs_forward_equation(t: float) -> None:
    step = 1e-5
    change = (law(t - step) - law(t + step)) / (2 * step)  # as s = 1 − t grows
    z, x0 = EVERY.repeat(V), EVERY.repeat_interleave(V)
    rates = PATH.rates(z, x0, torch.full((V * V,), t, dtype=torch.float64)).view(V, V, V)  # [x0, z, x]
    flow = torch.einsum("kz,kzx->kx", law(t), rates) - law(t) * rates.sum(-1)
    torch.testing.assert_close(flow, change, rtol=1e-6, atol=1e-6)
    assert bool((rates >= 0).all()) and float(rates.max()) > 0.1
    assert float(rates[EVERY, EVERY].abs().max()) == 0, "what is clean stays"


def test_the_path_goes_from_uniform_tokens_to_the_clean_one() -> None:
    uniform = drawn(lambda u: PATH.corrupt(EVERY[:, None].expand(V, 4000), u, torch.ones(V)), 4000)
    assert float((uniform - 1 / V).abs().max()) < 0.03
    clean = drawn(lambda u: PATH.corrupt(EVERY[:, None].expand(V, 400), u, torch.full((V,), 1e-5)), 400)
    assert torch.equal(clean, torch.eye(V, dtype=torch.float64))
    at_once = PATH.corrupt(EVERY[:, None], torch.full((V, 1), 0.7, dtype=torch.float64), torch.zeros(V))
    assert torch.equal(at_once, EVERY[:, None])
    middle = drawn(lambda u: PATH.corrupt(EVERY[:, None].expand(V, 20000), u, torch.full((V,), 0.4)), 20000)
    torch.testing.assert_close(middle, law(0.4), rtol=0, atol=0.015)
    assert float(law(0.4).diagonal().max()) > 0.5 > float(law(0.4).min()) > 0
    x0, u, t = EVERY[:3, None].expand(3, 50), Stream(2, "u").uniform([(i,) for i in range(3)], (50,)), torch.rand(3)
    rows = [PATH.corrupt(x0[[i]], u[[i]], t[[i]]) for i in range(3)]
    assert torch.equal(PATH.corrupt(x0, u, t), torch.cat(rows)), "each row by its own time"
    start = PATH.start(Stream(0, "s").uniform([(0,)], (6000,)), GRID)
    assert float((start.flatten().bincount() / 6000 - 1 / V).abs().max()) < 0.02


def kernel(i: int, logits: Tensor) -> Tensor:
    """The law of the ends of all tokens, [z, y], of one row of logits: by enumerating the clean token."""
    t, below = float(GRID.sigmas[i]), float(GRID.sigmas[i + 1])
    p = logits.softmax(-1)
    if below == 0:
        return p.expand(V, V)
    if t == 1:
        return (p @ law(below)).expand(V, V)
    out = torch.zeros(V, V, dtype=torch.float64)
    for z in range(V):
        for k in range(V):
            u = PATH.rates(torch.tensor([z]), torch.tensor([k]), torch.tensor([t], dtype=torch.float64))[0]
            stay = (-(t - below) * u.sum()).exp()
            out[z, z] += p[k] * stay
            if u.sum() > 0:
                out[z] += p[k] * (1 - stay) * u / u.sum()
    return out


@pytest.mark.parametrize("i", range(4))
def test_a_jumps_law_sums_to_one_and_is_what_is_drawn(i: int) -> None:
    logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 2
    step, x = torch.full((V,), i), EVERY[:, None]
    ends = JUMP.transition(x, logits.expand(V, 1, V), GRID, step)
    got = torch.stack([ends.log_density(torch.full((V, 1), y))[:, 0] for y in range(V)], 1).exp()
    torch.testing.assert_close(got.sum(1), torch.ones(V, dtype=torch.float64))
    torch.testing.assert_close(got, kernel(i, logits), rtol=1e-6, atol=1e-7)
    many = JUMP.transition(x.expand(V, 20000), logits.expand(V, 20000, V), GRID, step)
    torch.testing.assert_close(drawn(many.sample, 20000), got, rtol=0, atol=0.015)


def test_rows_of_several_steps_and_gradients_of_a_log_prob() -> None:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 2, V, dtype=torch.float64, generator=g, requires_grad=True)
    x, y = torch.randint(V, (2, 4, 2), generator=g)
    together = JUMP.transition(x, logits, GRID, torch.arange(4))
    alone = [JUMP.transition(x[i : i + 1], logits[i : i + 1], GRID, torch.tensor([i])) for i in range(4)]
    torch.testing.assert_close(together.log_density(y), torch.cat([a.log_density(y[[i]]) for i, a in enumerate(alone)]))
    u = torch.rand(4, 2, dtype=torch.float64, generator=g)
    assert torch.equal(together.sample(u), torch.cat([a.sample(u[[i]]) for i, a in enumerate(alone)]))
    (by_logits,) = torch.autograd.grad(together.log_prob(y).sum(), logits)
    assert bool(by_logits.isfinite().all()) and float(by_logits.abs().max()) > 0.01

    def again(said: Tensor) -> Tensor:
        return JUMP.transition(x, said, GRID, torch.arange(4)).log_prob(y)

    assert torch.autograd.gradcheck(again, logits)


def test_with_the_true_posterior_two_tokens_that_depend_on_each_other_come_out_as_the_data() -> None:
    """V² pairs, enumerated: a sampler with many steps ends at the data's law, with few nearby."""
    codes = MetricPath(CODES[:3])
    data = torch.tensor([[0.30, 0.05, 0.05], [0.10, 0.02, 0.18], [0.05, 0.15, 0.10]], dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    far: list[float] = []
    for steps in (4, 16, 64):
        grid = Schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        joint = torch.full((9,), 1 / 9, dtype=torch.float64)
        for i in range(steps):
            t = float(grid.sigmas[i])
            path = torch.softmax(-codes.beta(torch.tensor(t)).double() * codes.distances(torch.arange(3)), -1)
            both = torch.einsum("ab,ai,bj->ijab", data, path, path)
            both = both / both.sum((2, 3), keepdim=True)
            posterior = torch.stack([both.sum(3), both.sum(2)], 2).view(9, 2, 3)
            ends = MetricJump(codes).transition(pairs, posterior.log(), grid, torch.full((9,), i))
            each = torch.stack([ends.log_density(torch.full((9, 2), y)) for y in range(3)], -1).exp()
            joint = joint @ (each[:, 0, :, None] * each[:, 1, None, :]).view(9, 9)
        far.append(float((joint.view(3, 3) - data).abs().sum()))
    assert far[0] > 1.5 * far[1] > 4 * far[2] and far[2] < 0.05, far


def test_the_kl_is_that_of_the_clean_tokens_and_bounds_the_ends() -> None:
    g = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 1, 1, V, dtype=torch.float64, generator=g)
    x, step = torch.tensor([[2]]), torch.tensor([2])
    first, second = (JUMP.transition(x, logits, GRID, step) for logits in (p, q))
    ends = [torch.stack([law.log_density(torch.tensor([[y]])) for y in range(V)], -1) for law in (first, second)]
    exact = (ends[0].exp() * (ends[0] - ends[1])).sum()
    assert 0 < float(exact) < float(first.kl(second)) == float(Categorical(p).kl(Categorical(q)))
    assert float(first.kl(first)) == 0


def test_a_rollout_is_a_function_of_its_identities_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))

    def grow(rows: int | None) -> Tensor:
        forest = rollout(
            [plan.chain(4, 3)] * 2, JUMP, GRID, lambda x, s, r: table[x], Noise(3), shape=(2, 3), max_rows=rows
        )
        assert bool(forest.edges.log_prob.isfinite().all()) and forest.nodes.dtype == torch.int64
        return forest.nodes

    whole = grow(None)
    assert torch.equal(grow(2), whole)
    monkeypatch.setattr("tempflow.core.metric_path.AT_ONCE", 4 * V)
    assert torch.equal(grow(None), whole)
    x0, u = whole[:4], Stream(0, "u").uniform([(i,) for i in range(4)], (2, 3))
    monkeypatch.undo()
    once = PATH.corrupt(x0, u, torch.full((4,), 0.5))
    monkeypatch.setattr("tempflow.core.metric_path.AT_ONCE", 5)
    assert torch.equal(PATH.corrupt(x0, u, torch.full((4,), 0.5)), once) and not torch.equal(once, x0)


def test_log_probs_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(50, (3, 7), generator=g)
    for dtype, close in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        logits = (torch.randn(3, 7, 50, generator=g) * 3).to(dtype)
        logits[0, 0, :3] = -torch.inf
        found: list[tuple[Tensor, Tensor]] = []
        for at_once in (1 << 24, 120):
            monkeypatch.setattr("tempflow.core.distribution.AT_ONCE", at_once)
            leaf = logits.clone().requires_grad_()
            value = TokenLikelihood()(leaf, y, y.double(), torch.ones(3))
            (value * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
            assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
            found.append((value.detach(), leaf.grad))
        assert found[0][0].dtype == found[1][0].dtype
        torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1][1], found[0][1], rtol=close, atol=close / 10)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: MetricPath(torch.ones(3)), r"codes: torch.float32 \[3\] must be finite floats \[V, d\]"),
        (lambda: MetricPath(CODES * torch.nan), "codes: torch.float64"),
        (lambda: MetricPath(CODES[:1]), "vocabulary: 1 is too small"),
        (lambda: MetricPath(CODES, c=0.0), "c: 0.0 must be"),
        (lambda: PATH.corrupt(torch.tensor([[V]]), torch.rand(1, 1), torch.ones(1)), "x0: token 6 is outside 0 … 5"),
        (lambda: JUMP.coefficients(GRID, torch.tensor([0])), "MetricPath.6 codes.* moves tokens"),
        (lambda: JUMP.spreads(GRID, torch.tensor([0]), 0.5), "scale: 0.5, but jumps"),
        (lambda: JUMP.transition(EVERY[:, None], torch.zeros(V, 1, 5), GRID, torch.zeros(V).long()), "logits: pred"),
        (lambda: JUMP.transition(EVERY[:, None], torch.zeros(V, 1, V), GRID, torch.zeros(V).long()).mode, "mode: "),
        (
            lambda: JUMP.transition(EVERY[:, None], torch.full((V, 1, V), torch.nan), GRID, torch.ones(V).long())
            .sample(torch.rand(V, 1)),
            "logits: row 0 has a token",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()


def test_a_large_codebook_has_no_log_prob_and_still_jumps() -> None:
    wide = MetricJump(MetricPath(torch.randn(EXACT + 1, 2, generator=torch.Generator().manual_seed(0))))
    x, u = torch.tensor([[3]]), torch.tensor([[0.3]], dtype=torch.float64)
    assert not bool(wide.spreads(GRID, torch.tensor([1]))[0]) and bool(JUMP.spreads(GRID, torch.tensor([1]))[0])
    ends = wide.transition(x, torch.zeros(1, 1, EXACT + 1), GRID, torch.tensor([1]))
    assert 0 <= int(ends.sample(u)) <= EXACT
    with pytest.raises(ValueError, match="codes: 2049 are too many for a jump's log-prob"):
        ends.log_prob(x)
