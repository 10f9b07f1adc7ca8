"""Preferences over pairs and groups: written forms, gradients, and what they are indifferent to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from forward_toy import SHAPE, Field, batch, close, gradient, models, on_policy
from torch import Tensor

from tempflow.core.likelihood_proxy import Adaptive
from tempflow.core.objective.leaves import LeafBatch, noised
from tempflow.core.objective.preference import (
    CentredReward,
    GroupPreference,
    OnlinePairs,
    PairBatch,
    PreferencePairs,
    Supervised,
)
from tempflow.core.objective.regularizer import PredictionDistance


def errors(b: LeafBatch) -> dict[str, Tensor]:
    """mean (v−v*)² of every weight set, [B, M]."""
    sets = models()
    at = noised(sets, tuple(sets), b)
    return {n: at.by_sample((v - at.target).square().flatten(1).mean(1)) for n, v in at.velocity.items()}


def pairs() -> PairBatch:
    b = batch()
    return PairBatch(b.x0[:3], b.x0[3:], torch.tensor([4, 5, 6]), b.t[:3], b.noise[:3])


def test_supervised() -> None:
    b = batch()
    close(Supervised()(models(), b).value, errors(b)["policy"].mean())
    close(Supervised()(models(), replace(b, advantage=-b.advantage)).value, errors(b)["policy"].mean())
    assert Supervised().weight_sets == ("policy",)


def test_pairs_share_time_noise_and_condition() -> None:
    both = pairs().leaves()
    assert torch.equal(both.t[:3], both.t[3:]) and torch.equal(both.noise[:3], both.noise[3:])
    assert torch.equal(both.rows, torch.tensor([4, 5, 6] * 2)) and torch.equal(both.group, torch.tensor([0, 1, 2] * 2))
    with pytest.raises(ValueError, match="rejected"):
        replace(pairs(), rejected=torch.zeros(2, *SHAPE).double())


def test_diffusion_dpo() -> None:
    m = errors(pairs().leaves())
    gap = m["policy"] - m["reference"]
    inside = -10 * (gap[:3] - gap[3:])
    head = PreferencePairs(20.0)
    found = head(models(), pairs())
    close(found.value, -inside.sigmoid().log().mean())
    close(found.metrics["accuracy"].double(), (inside > 0).double().mean(1))
    same = models() | {"reference": Field()}
    close(head(same, pairs()).value, torch.tensor(math.log(2), dtype=torch.float64))
    # at the reference the gradient is β/4 · ∇(m_w − m_l)
    grad = gradient(head, same, pairs())  # type: ignore[arg-type]
    signed = pairs().leaves()
    policy = Field()
    at = noised({"policy": policy}, ("policy",), signed)
    error = (at.policy - at.target).square().flatten(1).mean(1)
    (expected,) = torch.autograd.grad(5 * 2 * (at.by_pair(signed.advantage) * error).mean(), policy.theta)
    close(grad, expected)
    swapped = replace(pairs(), chosen=pairs().rejected, rejected=pairs().chosen)
    close(gradient(head, same, swapped), -grad)  # type: ignore[arg-type]
    held = PreferencePairs(20.0, regularizers=(PredictionDistance("ema", 0.5),))
    at = noised(models(), ("policy", "ema"), signed)
    close(held(models(), pairs()).value, found.value + 0.5 * (at.policy - at.velocity["ema"]).square().mean())
    assert held(models(), pairs()).metrics["kl_ema"].shape == (3,)


def test_dgpo_gradient_is_the_published_one() -> None:
    """mean σ(S_g)·A·∇m with S_g = β·mean_g A·(m − m_ref), every pair (t, ε) by itself; a large β keeps σ off ½."""
    b, beta = batch(), 40.0
    m = errors(b)
    order = beta * (b.advantage[:, None] * (m["policy"] - m["reference"])).view(2, 3, 3).mean(1).repeat_interleave(3, 0)
    close(GroupPreference(beta, None)(models(), b).value, order.exp().log1p().mean() / beta)
    assert float((order.detach().sigmoid() - 0.5).abs().max()) > 0.01
    policy = Field()
    at = noised({"policy": policy}, ("policy",), b)
    error = at.by_sample((at.policy - at.target).square().flatten(1).mean(1))
    (expected,) = torch.autograd.grad((order.sigmoid().detach() * b.advantage[:, None] * error).mean(), policy.theta)
    close(gradient(GroupPreference(beta, None), models(), b), expected)


def test_dgpo_clip_and_comparison() -> None:
    b = batch()
    m = errors(b)
    ratio, a = (m["old"] - m["policy"]).exp(), b.advantage[:, None]
    clip = float((ratio.detach() - 1).abs().median())
    out = torch.where(a > 0, ratio > 1 + clip, ratio < 1 - clip)
    assert 0 < float(out.double().mean()) < 1
    head = GroupPreference(40.0, clip)
    found = head(models(), b)
    assert head.weight_sets == ("policy", "reference", "old")
    close(found.metrics["clip_fraction"].double(), out.double().mean(1), 1e-7)
    close(found.value, GroupPreference(40.0, None)(models(), b).value)
    policy = Field()
    at = noised({"policy": policy}, ("policy",), b)
    error = at.by_sample((at.policy - at.target).square().flatten(1).mean(1))
    order = 40 * (a * (m["policy"] - m["reference"])).view(2, 3, 3).mean(1).repeat_interleave(3, 0)
    weight = order.sigmoid().detach() * a * (~out)
    (expected,) = torch.autograd.grad((weight * error).mean(), policy.theta)
    close(gradient(head, models(), b), expected)
    assert GroupPreference(compare_to="old").weight_sets == ("policy", "old")
    # at the set compared with, the weight of every group is ½
    flat = GroupPreference(2000.0, None, "old")(on_policy(), b).metrics["group_weight"]
    close(flat.double(), torch.full((6,), 0.5).double())


def test_crd_written_form() -> None:
    b = batch()
    at = noised(models(), ("policy", "old", "reference"), b)
    form = Adaptive("velocity")
    r = at.by_sample(form(at.policy, at.x0, at.noise, at.t) - form(at.velocity["old"], at.x0, at.noise, at.t))
    a = (b.advantage / 10 + 0.5)[:, None].expand(-1, 3)

    def centred(x: Tensor, p: Tensor) -> Tensor:
        p, x = p.view(2, 3, 3), x.view(2, 3, 3)
        return (x - (p * x).sum(1, keepdim=True)).view(6, 3)

    flat = torch.full((6, 3), 1 / 3).double()
    value = 5 / 2 * (2 * centred(r, flat) - centred(a, flat)).square().mean()
    close(CentredReward(2.0, kl=0)(models(), b).value, value)
    softs = [(s * a / 0.1).view(2, 3, 3).softmax(1).view(6, 3) for s in (1, -1)]
    value = 5 / 2 * sum((2 * centred(r, p) - centred(a, p)).square().mean() for p in softs) / 2
    close(CentredReward(2.0, temperature=0.1, kl=0)(models(), b).value, torch.as_tensor(value))
    gap = at.by_sample((at.policy - at.velocity["reference"]).square().flatten(1).mean(1))
    base = CentredReward(kl=0)(models(), b).value
    for adaptive, share in ((False, torch.ones_like(a)), (True, 1e-3 + (1 - 1e-3) * a)):
        found = CentredReward(kl=0.1, adaptive_kl=adaptive)(models(), b).value
        close(found, base + 0.1 * (share * gap).mean())


def test_crd_hard_selection_and_cross_entropy() -> None:
    """Temperature 0 centres on those above and on those below the middle, each by its own e^a; by hand."""
    b = batch(advantage=torch.tensor([0.9, -0.5, -0.4, 0.6, 0.2, -0.8], dtype=torch.float64))
    at = noised(models(), ("policy", "old"), b)
    form = Adaptive("velocity")
    r = at.by_sample(form(at.policy, at.x0, at.noise, at.t) - form(at.velocity["old"], at.x0, at.noise, at.t))
    a = b.advantage / 2 + 0.5
    mse, bce = [], []
    for rows, high, low in (([0, 1, 2], [0], [1, 2]), ([3, 4, 5], [3, 4], [5])):
        for pool in (high, low):
            p = a[pool].exp() / a[pool].exp().sum()
            given = a[rows] - (p * a[pool]).sum()
            implicit = 2 * (r[rows] - (p[:, None] * r[pool]).sum(0))
            mse.append((implicit - given[:, None]).square())
            y = given.sigmoid()[:, None]
            bce.append(-y * implicit.sigmoid().log() - (1 - y) * (-implicit).sigmoid().log())
    head = CentredReward(2.0, 1.0, 0.0, kl=0)
    close(head(models(), b).value, torch.stack(mse).mean() / 2)
    close(replace(head, form="bce")(models(), b).value, torch.stack(bce).mean() / 2)
    # without anyone above (or below) the middle, that centring is the plain one
    flat = replace(b, advantage=torch.zeros(6).double())
    close(head(models(), flat).value, CentredReward(2.0, 1.0, None, kl=0)(models(), flat).value)
    # a small temperature picks the best alone, where hard selection takes all above the middle
    close(
        gradient(replace(head, temperature=100.0), models(), b),
        gradient(replace(head, temperature=None), models(), b),
        2e-2,
    )


def test_groups_of_different_sizes_are_one_term_each() -> None:
    """So a loss does not depend on which groups share a batch."""
    b = batch().take(torch.tensor([0, 1, 2, 3, 4]))
    for head in (GroupPreference(40.0, regularizers=(PredictionDistance("old", 0.3),)), CentredReward()):
        parts = [gradient(head, models(), b.take(s)) for s in (slice(0, 3), slice(3, 5))]
        close(gradient(head, models(), b), (parts[0] + parts[1]) / 2)


def test_online_pairs_are_the_extremes_of_each_group() -> None:
    couples = PreferencePairs(20.0, regularizers=(PredictionDistance("reference", 0.1),))
    b = batch(advantage=torch.tensor([-0.5, 0.9, -0.4, 0.2, 0.2, -0.8], dtype=torch.float64))
    first = torch.tensor([0, 0, 0, 3, 3, 3])
    b = replace(b, t=b.t[first], noise=b.noise[first])
    high, low = torch.tensor([1, 3]), torch.tensor([0, 5])
    by_hand = PairBatch(b.x0[high], b.x0[low], b.rows[high], b.t[high], b.noise[high])
    head = OnlinePairs(couples)
    found, want = head(models(), b), couples(models(), by_hand)
    close(found.value, want.value)
    assert torch.equal(found.metrics["margin"][torch.tensor([1, 0, 3, 5])], want.metrics["margin"][[0, 0, 1, 1]])
    assert bool((found.metrics["margin"][torch.tensor([2, 4])] == 0).all())
    # a group without two different samples has no pair, but counts
    half = replace(b, advantage=torch.tensor([-0.5, 0.9, -0.4, 0.2, 0.2, 0.2]).double())
    close(head(models(), half).value, couples(models(), by_hand_of(b, 1, 0)).value / 2)
    none = replace(b, advantage=torch.zeros(6).double())
    assert float(gradient(head, models(), none).abs().max()) == 0
    assert list(head(models(), none).metrics) == list(found.metrics)
    with pytest.raises(ValueError, match="a pair's samples differ"):
        head(models(), replace(b, t=batch().t))


def by_hand_of(b: LeafBatch, high: int, low: int) -> PairBatch:
    h, w = slice(high, high + 1), slice(low, low + 1)
    return PairBatch(b.x0[h], b.x0[w], b.rows[h], b.t[h], b.noise[h])


def test_crd_is_indifferent_to_a_constant_of_the_group() -> None:
    """Centring cancels what all samples of a prompt share, in the rewards and in the log-ratio."""
    b, head = batch(), CentredReward(kl=0)
    shifted = replace(b, advantage=b.advantage + torch.tensor([0.7] * 3 + [-0.4] * 3).double())
    close(gradient(head, models(), shifted), gradient(head, models(), b))
    # uniform weights: residuals of a group sum to 0, so the detached mean costs no gradient; at old it is ∝ −ã
    alone = replace(b, advantage=torch.zeros(6).double())
    assert float(gradient(head, on_policy(), alone).abs().max()) < 1e-14
    assert float(gradient(head, on_policy(), b).abs().max()) > 1e-4
    close(gradient(head, on_policy(), replace(b, advantage=-b.advantage)), -gradient(head, on_policy(), b))


def test_groups_may_be_in_any_order_and_are_whole_units() -> None:
    b = batch()
    mixed = b.take(torch.tensor([3, 0, 4, 1, 2, 5]))
    for head in (GroupPreference(40.0), CentredReward(temperature=0.2)):
        assert head.unit == "group"
        whole = gradient(head, models(), b)
        close(gradient(head, models(), mixed), whole)
        close(
            (gradient(head, models(), b.take(slice(0, 3))) + gradient(head, models(), b.take(slice(3, 6)))) / 2, whole
        )


def test_bad_fields_are_refused() -> None:
    for call in (lambda: PreferencePairs(0), lambda: GroupPreference(-1), lambda: GroupPreference(clip=0),
                 lambda: GroupPreference(compare_to="ema"), lambda: CentredReward(0), lambda: CentredReward(kl=-1),
                 lambda: CentredReward(temperature=-1), lambda: CentredReward(form='l1')):  # fmt: skip
        with pytest.raises(ValueError, match=r"beta|clip|compare_to|kl|temperature|form"):
            call()
