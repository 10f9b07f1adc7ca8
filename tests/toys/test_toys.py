"""The toys are right: what untrained models draw, what rewards say, and that chance teaches nothing."""

from __future__ import annotations

import line
import pytest
import torch
from mixture import (
    MEANS,
    PROMPTS,
    RANGE,
    REACH,
    SHAPE,
    SIZE,
    SPREAD,
    WEIGHTS,
    Chance,
    Closeness,
    Mixture,
    base_reward,
    bench,
    drawn,
    expected_reward,
    gap_closed,
    mean_reward,
    painted,
    posterior_velocity,
    samples,
    seen,
    train,
)
from settings import build, toy

from tempflow.algorithms import flow_grpo, tempflow_grpo
from tempflow.core.scores import Scores
from tempflow.models.protocol import Model
from tempflow.request import asked
from tempflow.rewards.protocol import Reward


def test_they_fit_the_protocols() -> None:
    models: list[Model] = [Mixture(), line.Line()]
    assert [m.noise_shape(SIZE) for m in models] == [SHAPE, (1, 1, 1)]
    assert all(isinstance(r, Reward) for r in (Closeness(), Chance(), line.Height()))


# --------------------------------------------------------------------------------------------------- the closed forms
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9, 1.0])
def test_posterior_velocity_is_the_score_of_the_path(sigma: float) -> None:
    """v = −(x + σ·∇log p_σ)/(1 − σ) … derived apart from it, by autograd of the density, in float64."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    away = (x[:, None] - (1 - sigma) * MEANS.double()).square().sum(-1)
    density = (WEIGHTS.double() * torch.exp(-away / (2 * variance))).sum(1).log().sum()
    (score,) = torch.autograd.grad(density, x)
    noise = -sigma * score  # E[ε | x], by Tweedie's formula
    v = posterior_velocity(x.detach(), torch.full((64,), sigma).double())
    # x = (1 − σ)·x0 + σ·ε and v = ε − x0 give (1 − σ)·v = ε − x
    torch.testing.assert_close((1 - sigma) * v, noise - x.detach(), rtol=1e-5, atol=1e-6)


def test_base_reward_is_that_of_the_mixture() -> None:
    points = drawn(40_000, torch.Generator().manual_seed(3))
    values = [torch.exp(-(points - goal).square().sum(1) / (2 * REACH**2)) for goal in MEANS]
    error = torch.stack([v.var() / len(v) for v in values]).sum().sqrt().item() / len(values)
    assert torch.stack(values).mean().item() == pytest.approx(base_reward(), abs=4 * error)
    assert error < 0.002


@pytest.mark.parametrize("sigma", [0.2, 0.8])
def test_expected_reward_is_that_of_drawn_points(sigma: float) -> None:
    """By weights: of points drawn from the mixture, those that lead to x count with its density."""
    x0, x, goal = (
        drawn(40_000, torch.Generator().manual_seed(3)).double(),
        torch.tensor([[0.4, -0.3]]).double(),
        MEANS[:1].double(),
    )
    weight = torch.exp(-(x - (1 - sigma) * x0).square().sum(1) / (2 * sigma**2))
    reward = torch.exp(-(x0 - goal).square().sum(1) / (2 * REACH**2))
    found = expected_reward(x, torch.full((1,), sigma).double(), goal).item()
    assert found == pytest.approx((weight * reward).sum().item() / weight.sum().item(), rel=0.05)


def test_best_reward_is_one() -> None:
    media = painted(MEANS)
    assert Closeness().score(media, PROMPTS, [{}] * 4).value.min().item() > 1 - 1e-6
    assert Closeness().score(media, PROMPTS[1:] + PROMPTS[:1], [{}] * 4).value.max().item() < 0.2


# ----------------------------------------------------------------------------------------------- pictures and sampling
def test_pictures_carry_the_points() -> None:
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) * 2 * RANGE - RANGE
    media = painted(points)
    assert media.shape == (200, 8, 16, 3)
    assert media.dtype == torch.uint8
    torch.testing.assert_close(seen(media).float(), points, rtol=0, atol=1e-4)
    assert seen(painted(torch.tensor([[9.0, -9.0]]))).tolist() == [[RANGE, -RANGE]]
    assert seen(painted(torch.tensor([[0.7]]))).item() == pytest.approx(0.7, abs=1e-4)


def test_pretrained_model_draws_the_mixture_whatever_the_prompt() -> None:
    x, prompts = samples(Mixture(), 2048, steps=40)
    points = x[:2048]
    for other in x.view(4, 2048, 2):
        torch.testing.assert_close(other, points)
    assert prompts[::2048] == list(PROMPTS)
    mode = torch.cdist(points, MEANS).argmin(1)
    share = torch.bincount(mode, minlength=4) / len(mode)
    torch.testing.assert_close(share, WEIGHTS, rtol=0, atol=0.04)  # 4 standard errors are 0.04
    for number, mean in enumerate(MEANS):
        part = points[mode == number]
        torch.testing.assert_close(part.mean(0), mean, rtol=0, atol=0.1)
        torch.testing.assert_close(part.std(0), torch.full((2,), SPREAD), rtol=0, atol=0.06)


def test_pretrained_models_reward_is_the_closed_form() -> None:
    assert mean_reward(Mixture(), 2048, steps=40) == pytest.approx(base_reward(), abs=0.02)
    assert mean_reward(Mixture()) == pytest.approx(base_reward(), abs=0.03)  # as the algorithms are measured


def test_models_do_not_share_weights() -> None:
    one, other = Mixture(), Mixture()
    with torch.no_grad():
        one.network.body[4].bias += 1
    assert not torch.equal(one.network.body[4].bias, other.network.body[4].bias)


def test_line_draws_its_means() -> None:
    model = line.Line()
    with torch.no_grad():
        model.network.mean.weight.copy_(torch.tensor([[0.5, -0.25]]))
    predict = model.predictor(model.encode(asked(line.PROMPTS), SIZE), 1.0)
    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(4))
    rows = torch.arange(4000) % 2
    schedule = model.schedule(50, SIZE)
    for i in range(50):
        step = torch.full((4000,), i)
        x = x - schedule.delta(step).view(-1, 1, 1, 1) * predict(x, schedule.at(step), rows)
    assert x[rows == 0].mean().item() == pytest.approx(0.5, abs=0.05)
    assert x[rows == 1].mean().item() == pytest.approx(-0.25, abs=0.05)
    assert x[rows == 0].std().item() == pytest.approx(line.SPREAD, abs=0.05)


# ---------------------------------------------------------------------------------------------- what cannot be learnt
@pytest.mark.parametrize("function", [flow_grpo, tempflow_grpo], ids=lambda f: f.__name__)
def test_rewards_by_chance_close_no_gap(function) -> None:
    """One-sided: Adam takes full steps on noise too, so the weights wander, and wandering takes points off the corners
    (gaps of 0.1 to −0.3 over seeds); it must not bring them nearer."""
    settings = toy(function.__name__)
    before = mean_reward(Mixture())
    run = bench(build(function, settings), reward=Chance())
    train(run, settings.iterations, settings.repeat, settings.rate)
    assert gap_closed(before, mean_reward(run.model)) < 0.15


def test_equal_rewards_change_nothing() -> None:
    class Same(Closeness):
        def score(self, media, prompts, metadata):
            scores = super().score(media, prompts, metadata)
            return Scores(torch.full_like(scores.value, 0.5), scores.ok, scores.names)

    run = bench(build(flow_grpo, toy("flow_grpo")), reward=Same())
    train(run, 2)
    assert mean_reward(run.model) == mean_reward(Mixture())


def test_rewards_of_the_wrong_prompt_widen_the_gap() -> None:
    class Elsewhere(Closeness):
        def score(self, media, prompts, metadata):
            return super().score(media, [PROMPTS[PROMPTS.index(p) - 2] for p in prompts], metadata)

    settings = toy("flow_grpo")
    before = mean_reward(Mixture())
    run = bench(build(flow_grpo, settings), reward=Elsewhere())
    train(run, settings.iterations, settings.repeat, settings.rate)
    assert gap_closed(before, mean_reward(run.model)) < -0.2
