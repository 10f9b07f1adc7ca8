"""Policy gradients on likelihood surrogates: identities, the fixed point of the proximal form, and the clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from forward_toy import Field, batch, close, gradient, models, on_policy
from torch import Tensor, nn

from tempflow.core.likelihood_proxy import Adaptive, GeneralHuber, Matching
from tempflow.core.objective.leaves import LeafBatch, noised
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate, PolicyGradient, soft_clip
from tempflow.core.objective.regularizer import PredictionDistance
from tempflow.core.state import Reduce, mean_dims


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("ratio", [False, True])
def test_pepg_and_par_have_one_gradient(pooled: bool, ratio: bool) -> None:
    pair = [PolicyGradient(kind, Estimate(pooled=pooled), ratio) for kind in ("pepg", "par")]  # type: ignore[arg-type]
    left, right = (gradient(o, models(), batch()) for o in pair)
    close(left, right, 1e-12)
    assert float((left - gradient(PolicyGradient("epg", pair[0].estimate, ratio), models(), batch())).norm()) > 1e-5


def test_written_forms() -> None:
    b = batch()
    at = noised(models(), ("policy", "old"), b)
    e, f = (at.by_sample(Adaptive()(at.velocity[n], at.x0, at.noise, at.t)) for n in ("policy", "old"))
    a, rho = b.advantage[:, None], (e - f).exp()
    assert (rho - 1).abs().max().item() > 1e-2
    close(PolicyGradient("epg")(models(), b).value, -(rho * a * e).mean())
    close(PolicyGradient("epg", ratio=False)(models(), b).value, -(a * e).mean())
    close(PolicyGradient("pepg")(models(), b).value, -(rho * (a - e + f) * e).mean())
    close(PolicyGradient("par")(models(), b).value, (rho * (a - e + f) ** 2).mean() / 2)
    clip = torch.maximum(-a * rho, -a * rho.clamp(0.98, 1.03))
    close(ClippedLikelihood(0.02, 0.03)(models(), b).value, clip.mean())
    pooled = (e.mean(1) - f.mean(1)).exp()
    value = torch.maximum(-b.advantage * pooled, -b.advantage * pooled.clamp(0.98, 1.03)).mean()
    found = ClippedLikelihood(0.02, 0.03, Estimate(pooled=True))(models(), b)
    close(found.value, value)
    assert abs((found.value - clip.mean()).item()) > 1e-6, "mean then exp is not exp then mean off-policy"
    assert Estimate(pooled=True).unit == "leaf" and Estimate().unit == "pair"


def test_a_pooled_ratio_bears_the_mean_penalty_of_all_pairs() -> None:
    at = noised(models(), ("policy", "ema"), batch())
    pooled = Estimate(pooled=True)
    held = ClippedLikelihood(estimate=pooled, regularizers=(PredictionDistance("ema", 0.5),))
    pull = (at.policy - at.velocity["ema"]).square().mean()
    close(held(models(), batch()).value, ClippedLikelihood(estimate=pooled)(models(), batch()).value + 0.5 * pull)


def test_noratio_equals_ratio_at_one_and_on_policy_needs_no_old() -> None:
    for kind in ("epg", "pepg", "par"):
        both = [gradient(PolicyGradient(kind, ratio=r), on_policy(), batch()) for r in (True, False)]  # type: ignore[arg-type]
        close(*both)
        alone = PolicyGradient(kind, Estimate(on_policy=True))  # type: ignore[arg-type]
        assert alone.weight_sets == ("policy",)
        close(gradient(alone, {"policy": Field()}, batch()), both[0])


def test_awm_on_policy_gradient() -> None:
    """A·t·m^(p−1)·∇m for the general Huber form."""
    b = batch()
    head = ClippedLikelihood(1, 1, Estimate(GeneralHuber(0.25), on_policy=True))
    policy = Field()
    at = noised({"policy": policy}, ("policy",), b)
    m = (at.policy - at.target).square().flatten(1).mean(1)
    scale = at.by_pair(b.advantage) * at.t * m.detach() ** -0.75
    (expected,) = torch.autograd.grad((scale * m).mean(), policy.theta)
    close(gradient(head, {"policy": policy}, b), expected, 1e-7)
    assert float(head({"policy": policy}, b).metrics["clip_fraction"].max()) == 0


def test_clip_stops_the_gradient_on_the_far_side_only() -> None:
    """One sample at a time: ρ beyond the clip with A pushing further out has no gradient; pulling back has."""
    b = batch(3, 1)
    for k in range(3):
        one = b.take(slice(k, k + 1))
        log_ratio = float(PolicyGradient()(models(), one).metrics["log_ratio_abs"])
        at = noised(models(), ("policy", "old"), one)
        up = bool(Adaptive()(at.policy, at.x0, at.noise, at.t) > Adaptive()(at.velocity["old"], at.x0, at.noise, at.t))
        tight = ClippedLikelihood(log_ratio / 4, log_ratio / 4)
        for sign in (1.0, -1.0):
            signed = replace(one, advantage=torch.tensor([sign], dtype=torch.float64))
            stopped = float(gradient(tight, models(), signed).norm()) == 0
            assert stopped == (up == (sign > 0))
            assert float(tight(models(), signed).metrics["clip_fraction"]) == float(stopped)


def test_soft_clip() -> None:
    a = torch.linspace(-50, 50, 1001).double().requires_grad_()
    found = soft_clip(a, 3.0)
    assert found.abs().max().item() <= 3
    (slope,) = torch.autograd.grad(found.sum(), a)
    assert float(slope[500]) == pytest.approx(1) and float(slope.min()) >= 0
    b = batch()
    soft = gradient(ClippedLikelihood(soft_clip=0.3), on_policy(), b)
    close(soft, gradient(ClippedLikelihood(), on_policy(), replace(b, advantage=soft_clip(b.advantage, 0.3))))


def test_ratio_ignores_what_policy_and_old_have_in_common() -> None:
    @dataclass(frozen=True)
    class Shifted:
        def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
            return Matching()(velocity, x0, noise, t, mean) + 5 * mean(x0)

    for kind in (ClippedLikelihood(estimate=Estimate(Shifted())), ClippedLikelihood(estimate=Estimate(Matching()))):
        close(
            gradient(kind, models(), batch()),
            gradient(ClippedLikelihood(estimate=Estimate(Matching())), models(), batch()),
        )


@dataclass(frozen=True)
class Table:
    """A finite set: the "velocity" of every item is its log-probability."""

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        return mean(velocity)


class Categorical(nn.Module):
    def __init__(self, log_prob: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(log_prob.clone())

    def forward(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self.theta.log_softmax(0)[rows].view(-1, 1)


@pytest.mark.parametrize("kind", ["pepg", "par"])
def test_proximal_fixed_point_is_the_tilted_distribution(kind: str) -> None:
    """The population gradient vanishes at π ∝ π_old·e^A, and only there: all items, as often as π_old has them."""
    items = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    old = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    reward = torch.tensor([0.5, -0.3, 0.2, -0.1]).double()
    zero = torch.zeros(10).long()
    b = LeafBatch(torch.zeros(10, 1).double(), reward[items], items, zero, torch.full((10, 1), 0.5).double(),
                  torch.zeros(10, 1, 1).double())  # fmt: skip
    head = PolicyGradient(kind, Estimate(Table()))  # type: ignore[arg-type]

    def norm(log_prob: Tensor) -> float:
        return float(gradient(head, {"policy": Categorical(log_prob), "old": Categorical(old)}, b).norm())

    assert norm(old + reward) < 1e-14
    assert norm(old) > 1e-2 and norm(old + 0.9 * reward) > 1e-3 and norm(old + 1.1 * reward) > 1e-3


def test_bad_fields_are_refused() -> None:
    for call in (lambda: PolicyGradient("reinforce"), lambda: ClippedLikelihood(0), lambda: ClippedLikelihood(1.5),  # type: ignore[arg-type]
                 lambda: ClippedLikelihood(soft_clip=0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"kind|clip"):
            call()
