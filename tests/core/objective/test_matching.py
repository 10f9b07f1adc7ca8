"""Negative-aware fine-tuning and signed least squares: their identities and optima, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forward_toy import Field, batch, close, gradient, models, on_policy
from torch import Tensor, nn

from tempflow.core.likelihood_proxy import Adaptive, Matching, velocity_of_x0
from tempflow.core.objective.leaves import LeafBatch, group_mean, noised, renoise_leaves
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate, PolicyGradient
from tempflow.core.objective.matching import NegativeAware, SignedLeastSquares, optimality
from tempflow.core.objective.preference import Supervised
from tempflow.core.objective.regularizer import LikelihoodKL, PredictionDistance, kl_estimate
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import shifted
from tempflow.core.times import GridTimes

HEADS = {
    "nft": NegativeAware(1.0), "nft .1": NegativeAware(0.1), "nft M1": NegativeAware(0.5, 1.0),
    "lsq": SignedLeastSquares(reference=0, form="sum", adaptive=True),
    "target": SignedLeastSquares(reference=0, adaptive=True),
    "balanced": SignedLeastSquares(1.3, "balanced", 0, adaptive=True),
    "epg": PolicyGradient("epg"), "pepg": PolicyGradient("pepg"), "par": PolicyGradient("par"),
    "epg, no ratio": PolicyGradient("epg", ratio=False),
    "clip": ClippedLikelihood(), "pooled": ClippedLikelihood(estimate=Estimate(pooled=True)),
    "clip, self": ClippedLikelihood(estimate=Estimate(on_policy=True)),
}  # fmt: skip
FREE = SignedLeastSquares(1.1, reference=0)


class Weighted(Supervised):
    """mean A·ℓ, written plainly."""

    def __call__(self, models, batch):  # type: ignore[no-untyped-def]
        at = noised(models, ("policy",), batch)
        error = -Adaptive()(at.policy, at.x0, at.noise, at.t)
        return type(Supervised()(models, batch))((at.by_pair(batch.advantage) * error).mean())


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_all_heads_agree_on_policy(head) -> None:  # type: ignore[no-untyped-def]
    """Where the policy is old, every gradient is that of mean A·ℓ."""
    close(gradient(head, on_policy(), batch()), gradient(Weighted(), on_policy(), batch()))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_gradient_flips_with_the_advantage_on_policy(head) -> None:  # type: ignore[no-untyped-def]
    b = batch()
    close(gradient(head, on_policy(), replace(b, advantage=-b.advantage)), -gradient(head, on_policy(), b))


def test_heads_differ_off_policy() -> None:
    names = ("nft", "nft .1", "lsq", "epg", "pepg", "clip")
    found = [gradient(HEADS[name], models(), batch()) for name in names]
    for i, a in enumerate(found):
        assert all(float((a - b).norm()) > 1e-4 * float(a.norm()) for b in found[:i]), names[i]


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("maximum", [1.0, 5.0])
def test_nft_without_weights_is_least_squares_with_a_balanced_anchor(beta: float, maximum: float) -> None:
    """Everywhere, not only on-policy: M·(A'·‖v−v*‖² + (β−A')·‖v−v_old‖²) + const, A' = A/M, each with its t²."""
    b = batch()
    left = gradient(NegativeAware(beta, maximum, adaptive=False), models(), b)
    scaled = replace(b, advantage=b.advantage / maximum)
    right = gradient(SignedLeastSquares(beta, "balanced", 0, form="sum"), models(), scaled)
    close(left, maximum * right, 1e-12)


def test_nft_limits() -> None:
    nothing = replace(batch(), advantage=torch.zeros(6).double())
    assert float(gradient(NegativeAware(), on_policy(), nothing).abs().max()) < 1e-14, "r = ½ at old"
    assert float(gradient(NegativeAware(), models(), nothing).abs().max()) > 1e-4, "r = ½ pulls to old"
    sure = replace(batch(), advantage=torch.full((6,), 5.0).double())
    sft = Supervised(Adaptive())
    close(gradient(NegativeAware(1.0), models(), sure), 5 * gradient(sft, models(), sure))


def test_optimality_modes() -> None:
    a = torch.tensor([-9.0, -2.5, 0.0, 2.5, 9.0])
    assert optimality(a, 5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert optimality(a, 5, "positive_only").tolist() == [0.5, 0.5, 0.5, 0.75, 1]
    assert optimality(a, 5, "negative_only").tolist() == [0, 0.25, 0.5, 0.5, 0.5]
    assert optimality(a, 5, "one_only").tolist() == pytest.approx([0.5, 0.5, 0.5, 0.6, 0.6])
    assert optimality(a, 5, "binary").tolist() == pytest.approx([0.4, 0.4, 0.5, 0.6, 0.6])


@pytest.mark.parametrize("anchor", ["constant", "balanced"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_completed_square_has_the_gradient_of_the_sum(anchor: str, adaptive: bool) -> None:
    for reference in (0.0, 0.3):
        both = [SignedLeastSquares(1.2, anchor, reference, form=form, adaptive=adaptive) for form in ("sum", "target")]  # type: ignore[arg-type]
        left, right = (gradient(o, models(), batch()) for o in both)
        close(left, right, 1e-12)
        assert both[1](models(), batch()).value.item() >= 0


def test_curvature_is_guarded() -> None:
    with pytest.raises(ValueError, match=r"nearest valid: above 0\.999"):
        SignedLeastSquares(0.9)
    SignedLeastSquares(0.9, "balanced")
    with pytest.raises(ValueError, match="nearest valid: 1"):
        SignedLeastSquares()(models(), replace(batch(), advantage=torch.full((6,), -1.2).double()))


def test_a_strong_anchor_stops_the_update() -> None:
    """The minimiser's distance from old falls as 1/γ."""
    moves = [_minimum(SignedLeastSquares(gamma, reference=0), 0.4)[1].abs().max() for gamma in (10.0, 1000.0)]
    assert float(moves[1]) < 0.02 * float(moves[0])


class Constant(nn.Module):
    """One velocity for every state: a free function at a single (x_t, t)."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(value.clone())

    def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self.theta.expand_as(x)


SUPPORT = torch.tensor([-1.5, -0.2, 0.7, 2.0], dtype=torch.float64)
PRIOR = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([0.8, -0.6, 0.1, -0.9], dtype=torch.float64)


def _posterior(x: float, t: float, prior: Tensor) -> Tensor:
    return torch.softmax(prior.log() - (x - (1 - t) * SUPPORT).square() / (2 * t * t), 0)


def _minimum(objective, x: float, t: float = 0.6) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The population's v at one (x_t, t), its distance from old, the targets and their posterior under old.

    The expected gradient is affine in v, so its root follows from two values.
    """
    post = _posterior(x, t, PRIOR)
    noise = (x - (1 - t) * SUPPORT) / t
    target = noise - SUPPORT
    old = Constant((post * target).sum()[None])

    def slope(v: Tensor) -> Tensor:
        total = torch.zeros(1, dtype=torch.float64)
        for k in range(4):
            one = LeafBatch(SUPPORT[k].view(1, 1), REWARD[k : k + 1], torch.zeros(1).long(), torch.zeros(1).long(),
                            torch.full((1, 1), t).double(), noise[k].view(1, 1, 1))  # fmt: skip
            total = total + post[k] * gradient(objective, {"policy": Constant(v), "old": old}, one)
        return total

    at_zero, at_one = slope(torch.zeros(1).double()), slope(torch.ones(1).double())
    best = at_zero / (at_zero - at_one)
    return best, best - old.theta.detach(), target, post


@pytest.mark.parametrize("t", [0.25, 0.6, 0.95])
@pytest.mark.parametrize("x", [-1.0, 0.1, 0.9])
def test_free_function_optima(x: float, t: float) -> None:
    """SLQ: v_old + Cov(A, v*)/(γ + E A), the exact velocity of q ∝ (γ + A)·π_old; NFT: v_old + Cov(A', v*)/β."""
    best, move, target, post = _minimum(FREE, x, t)
    mean = (post * REWARD).sum()
    covariance = (post * (REWARD - mean) * target).sum()
    close(move, (covariance / (1.1 + mean))[None])
    q = (1.1 + REWARD) * PRIOR
    close(best, (_posterior(x, t, q / q.sum()) * target).sum()[None])
    gain = (q / q.sum() * REWARD).sum() - (PRIOR * REWARD).sum()
    spread = (PRIOR * REWARD.square()).sum() - (PRIOR * REWARD).sum().square()
    close(gain, spread / (1.1 + (PRIOR * REWARD).sum()))
    close(_minimum(NegativeAware(0.7, 1.0, adaptive=False), x, t)[1], covariance[None] / 0.7)
    balanced = SignedLeastSquares(1.3, "balanced", 0)  # γ(A) = 1.3 − A: the same curvature for all
    close(_minimum(balanced, x, t)[1], covariance[None] / 1.3)


def test_two_modes_the_rewarded_one_grows() -> None:
    """1-D mixture of two narrow modes whose weight is trained: exact velocity, samples from the policy itself."""

    class Mixture(nn.Module):
        def __init__(self, logit: float) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([logit], dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            t = t.view(-1, 1)
            var = (1 - t) ** 2 * 0.04 + t**2
            w = torch.sigmoid(self.theta + 2 * (1 - t) * x / var)
            up, low = (m + (1 - t) * 0.04 / var * (x - (1 - t) * m) for m in (1.0, -1.0))
            return (x - w * up - (1 - w) * low) / t

    logit, seen = -1.0, []
    for step in range(12):
        g = torch.Generator().manual_seed(step)
        p = torch.sigmoid(torch.tensor(logit)).item()
        top = torch.rand(400, generator=g).double() < p
        x0 = torch.where(top, 1.0, -1.0).double() + 0.2 * torch.randn(400, generator=g).double()
        b = LeafBatch(x0[:, None], (top.double() - p) * 2, torch.zeros(400).long(), torch.zeros(400).long(),
                      0.2 + 0.7 * torch.rand(400, 1, generator=g).double(),
                      torch.randn(400, 1, 1, generator=g).double())  # fmt: skip
        step_by = gradient(NegativeAware(), {"policy": Mixture(logit), "old": Mixture(logit)}, b)
        logit -= 5 * float(step_by)
        seen.append(logit)
    assert seen == sorted(seen) and seen[-1] > seen[0] + 0.3


def test_penalties() -> None:
    at = noised(models(), ("policy", "reference", "ema"), batch())
    gap = (at.policy - at.velocity["reference"]).square().flatten(1).mean(1)
    t = at.t
    close(PredictionDistance("reference", 1)(at), gap)
    x0 = [
        velocity_of_x0(at.x, at.x0, t) * 0 + at.x - t.view(-1, 1, 1) * at.velocity[n] for n in ("policy", "reference")
    ]
    close(PredictionDistance("reference", 1, "x0")(at), (x0[0] - x0[1]).square().flatten(1).mean(1))
    sigma = 0.7 * (t / (1 - t.clamp(max=0.99))).sqrt()
    close(PredictionDistance("reference", 1, "path")(at), gap / (2 * sigma**2))
    d = Matching()(at.policy, at.x0, at.noise, t) - Matching()(at.velocity["reference"], at.x0, at.noise, t)
    for form, value in {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "k3_reversed": d.exp() - 1 - d}.items():
        close(LikelihoodKL("reference", 1, form, Matching())(at), value)  # type: ignore[arg-type]
    held = Supervised(regularizers=(PredictionDistance("ema", 0.5), PredictionDistance("reference", 0)))
    assert held.weight_sets == ("policy", "ema")
    whole, bare = held(models(), batch()), Supervised()(models(), batch())
    pull = (at.policy - at.velocity["ema"]).square().mean()
    close(whole.value, bare.value + 0.5 * pull)
    close(whole.metrics["kl_ema"].mean(), pull.detach())


def test_a_penalty_pulls_harder_the_further_the_policy_is() -> None:
    only = Supervised(regularizers=(PredictionDistance("ema", 1.0),))
    pulls = []
    for drift in (0.0, 0.1, 0.2):
        sets = models(Field(0.41 + drift, -0.1, 0.02))
        pulls.append(float((gradient(only, sets, batch()) - gradient(Supervised(), sets, batch())).norm()))
    assert pulls[0] < 1e-12 and pulls[2] == pytest.approx(2 * pulls[1], rel=1e-9)


def test_kl_estimates() -> None:
    """Samples of N(0, 1) against N(.1, 1): KL .005; k1 is unbiased and loud, k2 and k3 are quiet; k3 ≥ 0."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    d = -(x.square() - (x - 0.1).square()) / 2
    found = {form: kl_estimate(d, form) for form in ("k1", "k2", "k3")}  # type: ignore[arg-type]
    assert float(found["k1"].std()) == pytest.approx(0.1, rel=0.01)
    assert float(found["k2"].std()) == pytest.approx(0.0071, rel=0.02)
    assert all(float(found[form].mean()) == pytest.approx(0.005, abs=5e-4 if form == "k1" else 5e-5) for form in found)
    assert float(found["k3"].min()) >= 0 and float(kl_estimate(torch.zeros(1), "k3")) == 0


def test_draw_leaves_and_slices() -> None:
    ids = [(0, slot, root) for slot in range(2) for root in range(3)]
    x0 = torch.randn(6, 2, 3).to(torch.bfloat16)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    b = renoise_leaves(x0, torch.ones(6), rows, ids, Renoise(GridTimes()), 3, shifted(10))
    assert (len(b), b.pairs) == (6, 9) and b.x0.dtype == b.t.dtype == b.noise.dtype == torch.float32
    assert torch.equal(b.group, rows)
    part = renoise_leaves(
        x0[3:], torch.ones(3), rows[3:], ids[3:], Renoise(GridTimes()), 3, shifted(10), only=range(2, 4)
    )
    assert torch.equal(part.noise, b.take(slice(3, 6)).only(slice(2, 4)).noise)
    with pytest.raises(ValueError, match="t: 0"):
        replace(b, t=torch.zeros(6, 9))
    with pytest.raises(ValueError, match="advantage"):
        replace(b, advantage=torch.ones(6, 1))
    with pytest.raises(ValueError, match="noise"):
        replace(b, noise=b.noise[:, :2])


def test_splitting_draws_and_samples_gives_the_same_gradient() -> None:
    b = batch()
    for head in (NegativeAware(), FREE, PolicyGradient("par"), ClippedLikelihood()):
        assert head.unit == "pair"
        whole = gradient(head, models(), b)
        close(sum((gradient(head, models(), b.only(slice(m, m + 1))) for m in range(3)), 0 * whole) / 3, whole)
        close(sum((gradient(head, models(), b.take(slice(k, k + 2))) for k in (0, 2, 4)), 0 * whole) / 3, whole)


def test_group_mean() -> None:
    values, group = torch.randn(5, 2).double(), torch.tensor([7, 2, 7, 2, 7])
    found = group_mean(values, group)
    close(found[0], values[[0, 2, 4]].mean(0))
    close(found[1], values[[1, 3]].mean(0))
    weight = torch.rand(5, 2).double()
    close(group_mean(values, group, weight)[3], (weight * values)[[1, 3]].sum(0) / weight[[1, 3]].sum(0))


def test_bad_models_are_refused() -> None:
    with pytest.raises(ValueError, match="'old' is missing"):
        NegativeAware()({"policy": Field()}, batch())
    with pytest.raises(ValueError, match="policy: predicts"):
        Supervised()({"policy": lambda x, t, rows: x[:, :1]}, batch())
