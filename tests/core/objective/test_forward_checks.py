"""Checks of the forward-process family that no other file holds (docs/forward_checks.md): closed forms in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from forward_toy import SHAPE, batch, close, gradient, models
from scipy.stats import binom, norm
from torch import Tensor

from tempflow.core import plan
from tempflow.core.credit import GroupZScore
from tempflow.core.draft import Draft, kendall
from tempflow.core.dynamics import ODE
from tempflow.core.forest import Forest
from tempflow.core.likelihood_proxy import (
    Adaptive,
    LikelihoodProxy,
    Matching,
    PathKL,
    corrupt,
    target_velocity,
    velocity_of_noise,
)
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate, PolicyGradient
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear, shifted
from tempflow.core.scores import Scores
from tempflow.core.state import Reduce, mean_dims
from tempflow.core.times import StratifiedGridTimes


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E over a standard normal, exact for polynomials of degree below 2n."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(x), torch.tensor(w / math.sqrt(2 * math.pi))


def legendre(n: int) -> tuple[Tensor, Tensor]:
    x, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor((x + 1) / 2), torch.tensor(w / 2)


# ------------------------------------------------------------------------------------------------------------ AWM
@pytest.mark.parametrize(("s", "t"), [(0.2, 0.5), (0.6, 0.8), (0.35, 0.6)])
def test_targets_from_noisy_states_have_the_same_mean_gradient_and_more_variance(s: float, t: float) -> None:
    """AWM on DDPO. x_t = a·x_s + b·η; its score may be told from ε (clean) or from η alone (what a step's density
    does). With x0 ~ N(0, 1) and v = θ·x_t the gradient's variance is higher by 4·E x_t²·(t/(1−t))²·(1/b² − 1/t²)."""
    nodes, mass = hermite(4)
    x0, e, n = (g.flatten() for g in torch.meshgrid(nodes, nodes, nodes, indexing="ij"))
    weight = torch.einsum("i,j,k->ijk", mass, mass, mass).flatten()
    a = (1 - t) / (1 - s)
    b = math.sqrt(t * t - a * a * s * s)
    assert b < t
    noise = (a * s * e + b * n) / t  # the ε by which x_t comes from x0
    at = torch.full_like(x0, t)
    x = corrupt(x0[:, None], noise[:, None], at)
    close(x[:, 0], a * ((1 - s) * x0 + s * e) + b * n, 1e-13)
    noisy = velocity_of_noise(x, (t * n / b)[:, None], at)
    grads = []
    for target in (target_velocity(x0[:, None], noise[:, None]), noisy):
        theta = torch.full_like(x0, 0.3, requires_grad=True)
        # Matching compares with ε − x0: a target y is given as ε = y, x0 = 0
        loss = -Matching(0)(theta[:, None] * x, torch.zeros_like(x), target, at)
        grads.append(torch.autograd.grad(loss.sum(), theta)[0])
    means = [(weight * g).sum() for g in grads]
    close(means[0], means[1], 1e-12)
    variance = [(weight * (g - m).square()).sum() for g, m in zip(grads, means, strict=True)]
    gap = 4 * ((1 - t) ** 2 + t * t) * (t / (1 - t)) ** 2 * (1 / b**2 - 1 / t**2)
    assert float(variance[1] - variance[0]) == pytest.approx(gap, rel=1e-11) and gap > 0.1


# --------------------------------------------------------------------------------------------------------- V-GRPO
@dataclass(frozen=True)
class Offset:
    """Another surrogate plus a constant for each sample, each in all of its pairs."""

    inner: LikelihoodProxy
    constant: Tensor

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        value = self.inner(velocity, x0, noise, t, mean)
        return value + self.constant.repeat_interleave(len(value) // len(self.constant))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_prompts_additive_constant_leaves_ratio_clip_and_gradient(pooled: bool) -> None:
    """An unknown normaliser of a prompt's likelihood does not matter, off-policy and where the clip binds too."""
    constant = torch.tensor([4.0, 4.0, 4.0, -7.0, -7.0, -7.0], dtype=torch.float64)
    forms = (Adaptive(), Offset(Adaptive(), constant))
    plain, moved = (ClippedLikelihood(2e-3, 3e-3, Estimate(form, pooled)) for form in forms)
    a, b = plain(models(), batch()), moved(models(), batch())
    close(a.value, b.value, 1e-13)
    for name, column in a.metrics.items():
        close(column.double(), b.metrics[name].double(), 1e-13)
    assert float(a.metrics["outside_clip"].mean()) > 0
    close(gradient(plain, models(), batch()), gradient(moved, models(), batch()), 1e-13)
    epg = [PolicyGradient("epg", Estimate(form, pooled))(models(), batch()).value.item() for form in forms]
    assert abs(epg[0] - epg[1]) > 5e-3, "it is there, and a value that is no ratio holds it"


def test_equal_samples_with_shared_pairs_have_no_spread_at_all() -> None:
    """What is left within a group is what the samples differ by; with pairs of their own it is the draws'."""
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3)).double().repeat(8, 1, 1)
    ids = [(0, 4, root) for root in range(8)]

    def spread(share: int | None) -> float:
        t, noise = (a.double() for a in Renoise(StratifiedGridTimes(4), share, share)(7, ids, shifted(8), SHAPE))
        flat, rows = noise.flatten(0, 1), x0.repeat_interleave(4, 0)
        value = Adaptive()(0.3 * corrupt(rows, flat, t.flatten()), rows, flat, t.flatten())
        return float(value.view(8, 4).mean(1).var())

    assert spread(2) == 0.0 and spread(None) > 1e-3


# ------------------------------------------------------------------------------------------------------- ELBO forms
@pytest.mark.parametrize("point", [-0.7, 0.4, 1.9])
def test_the_bounds_gap_is_constant_in_theta(point: float) -> None:
    """For x0 ~ N(m, s²) and its exact velocity the surrogate's gradient in m and log s is that of log p itself."""
    t, mass = legendre(200)
    e, weight = hermite(20)
    t, noise = t.repeat_interleave(len(e)), e.repeat(len(t))
    w = mass.repeat_interleave(len(e)) * weight.repeat(len(mass))
    m, log_s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, -0.2))
    s = log_s.exp()
    x0 = torch.full_like(t, point)[:, None]
    x = corrupt(x0, noise[:, None], t)[:, 0]
    gain = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
    v = (x - m - gain * (x - (1 - t) * m)) / t
    bound = (w * PathKL(0.0)(v[:, None], x0, noise[:, None], t)).sum()
    exact = -((point - m) ** 2) / (2 * s**2) - log_s
    found, want = (torch.autograd.grad(value, (m, log_s), retain_graph=True) for value in (bound, exact))
    for a, b in zip(found, want, strict=True):
        close(a, b, 1e-9)
    (other,) = torch.autograd.grad((w * Matching(0)(v[:, None], x0, noise[:, None], t)).sum(), m)
    assert abs(float(other - want[0])) > 0.02, "an unweighted error has another gradient"


# ------------------------------------------------------------------------------------------------ advantage scalings
REWARDS = torch.tensor([[0.1, 0.5, 0.9, 0.5], [2.0, 2.0, 2.0, 2.0], [-1.0, 3.0, math.nan, 1.0]], dtype=torch.float64)


def advantages(rewards: Tensor, **fields: object) -> Tensor:
    """[L, K] by the family's credit on ODE leaves; NaN marks a failed score."""
    prompts, group = rewards.shape
    found = rollout(
        [plan.ode(2, group)] * prompts, ODE(), linear(2), lambda x, sigma, rows: 0 * x, Noise(0), shape=(1,)
    )
    forest: Forest = found.as_leaves()
    value = rewards.flatten().float()[:, None]
    credit = GroupZScore(by=("prompt",), **fields)  # type: ignore[arg-type]
    return credit(Scores(value, value.isfinite(), ("r",)), forest).value.view(prompts, group).double()


def test_the_four_scalings_by_hand() -> None:
    """(R − mean) over: the group's deviation; all raw scores'; the pooled centred root mean square; nothing."""
    valid = REWARDS.isfinite()
    raw = REWARDS[valid]
    centred = REWARDS - torch.stack([r[r.isfinite()].mean() for r in REWARDS])[:, None]
    pooled = centred[valid].square().mean().sqrt()
    group = torch.stack([r[r.isfinite()].std(unbiased=False) for r in REWARDS])[:, None]
    wanted = {
        "group": centred / (group + 1e-4),
        "global": centred / (raw.std(unbiased=False) + 1e-4),
        "pooled": centred / (pooled + 1e-4),
        "none": centred,
    }
    for scale, want in wanted.items():
        got = advantages(REWARDS, scale=scale, eps=1e-4, clip=None)
        torch.testing.assert_close(got[valid], want[valid], rtol=2e-6, atol=2e-6)
        assert bool((got[1] == 0).all()), "a group without spread has exactly no advantage"
        assert float(got[2, 2]) == 0, "a failed score has none"
    assert float(wanted["global"][0, 2]) < 0.9 * float(wanted["pooled"][0, 2]), "raw spread holds that between prompts"
    close(advantages(REWARDS, scale="none", gain=0.1, clip=None)[0], 0.1 * centred[0], 1e-6)


def test_one_prompt_has_one_spread() -> None:
    """Its group's, all raw scores' and the pooled one are the same; other prompts move only the last two."""
    alone = [advantages(REWARDS[:1], scale=scale, eps=0.0, clip=None) for scale in ("group", "global", "pooled")]
    close(alone[0], alone[1], 1e-6)
    close(alone[0], alone[2], 1e-6)
    close(advantages(REWARDS, scale="group", eps=0.0, clip=None)[:1], alone[0], 1e-6)
    for scale in ("global", "pooled"):
        assert float((advantages(REWARDS, scale=scale, eps=0.0, clip=None)[:1] - alone[0]).abs().max()) > 0.1


def test_pooled_scale_knows_no_order() -> None:
    """AdvantageFlow's Z is one number of the whole iteration: prompts and samples may come in any order."""
    plain = advantages(REWARDS, scale="pooled", eps=1e-8, clip=1.0)
    prompts, samples = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    close(
        advantages(REWARDS[prompts][:, samples], scale="pooled", eps=1e-8, clip=1.0), plain[prompts][:, samples], 1e-6
    )


# ----------------------------------------------------------------------------------------------------------- Sol-RL
def contrast(pool: int, keep: int = 24, pools: int = 240) -> tuple[float, float]:
    """Mean |R − mean| and deviation of what `Draft` keeps of normal rewards."""
    values = torch.randn(pools, pool, generator=torch.Generator().manual_seed(pool)).double()
    ok, stream = torch.ones(pool, dtype=torch.bool), Stream(0, "contrast")
    kept = torch.stack([row[list(Draft(pool, 1).choose(row, ok, keep, stream, (0,)))] for row in values])
    return float((kept - kept.mean(1, keepdim=True)).abs().mean()), float(kept.square().mean().sqrt())


def mean_of_best(keep: int, pool: int) -> float:
    """E of the mean of the `keep` largest of `pool` standard normals, by quadrature of order statistics."""
    x = np.linspace(-8, 8, 20001)
    density = norm.pdf(x) * binom.cdf(keep - 1, pool - 1, norm.sf(x)) * pool / keep
    return float(np.trapezoid(x * density, x))


@pytest.mark.parametrize(
    ("pool", "size", "deviation"), [(24, 0.78, 0.97), (48, 1.25, 1.32), (72, 1.48, 1.54), (96, 1.63, 1.68)]
)
def test_the_contrast_that_a_larger_pool_buys(pool: int, size: float, deviation: float) -> None:
    """.78, 1.25, 1.48 and 1.63 of the rewards' deviation for pools of 24 to 96, by order statistics and by choosing."""
    found, spread = contrast(pool)
    assert mean_of_best(12, pool) == pytest.approx(size, abs=0.02)
    assert found == pytest.approx(mean_of_best(12, pool), abs=0.03)
    assert spread == pytest.approx(deviation, abs=0.05)


@pytest.mark.parametrize("fidelity", [0.5, 0.927, 0.99])
def test_rank_fidelity_of_a_noisy_draft(fidelity: float) -> None:
    """Draft scores of correlation ρ with the real ones: Kendall's τ is 2/π·asin ρ, and choices agree the more."""
    g = torch.Generator().manual_seed(1)
    real, noise = torch.randn(40, 96, generator=g).double(), torch.randn(40, 96, generator=g).double()
    draft = fidelity * real + math.sqrt(1 - fidelity**2) * noise
    tau = sum(kendall(a, b) for a, b in zip(real, draft, strict=True)) / 40
    assert tau == pytest.approx(2 / math.pi * math.asin(fidelity), abs=0.03)
    hits = [_hits(real, f * real + math.sqrt(1 - f**2) * noise) for f in (0.0, fidelity, 1.0)]
    assert hits[0] < hits[1] < hits[2] == 1


def _hits(real: Tensor, draft: Tensor) -> float:
    """The share of the 24 choices by real scores that a draft makes too."""
    ok, stream, draws = torch.ones(96, dtype=torch.bool), Stream(0, "hits"), Draft(96, 1)
    both = [(set(draws.choose(a, ok, 24, stream, (0,))), set(draws.choose(b, ok, 24, stream, (0,))))
            for a, b in zip(real, draft, strict=True)]  # fmt: skip
    return sum(len(a & b) for a, b in both) / (24 * len(both))


def test_a_batchs_pairs_are_no_function_of_who_else_is_in_it() -> None:
    """V-GRPO on several ranks: each draws for its own prompts, and all agree bit for bit on a prompt they share."""
    draws = Renoise(StratifiedGridTimes(4), 2, 2)
    ids = [(9, slot, root) for slot in range(4) for root in range(3)]
    whole = draws(5, ids, shifted(10), SHAPE)
    for rank in (ids[:6], ids[6:], ids[3:9:2]):
        place = [ids.index(i) for i in rank]
        assert all(torch.equal(a, b[place]) for a, b in zip(draws(5, rank, shifted(10), SHAPE), whole, strict=True))
    own = replace(draws, share_noise=None)(5, ids, shifted(10), SHAPE)
    assert torch.equal(own[0], whole[0]) and not torch.equal(own[1], whole[1])
