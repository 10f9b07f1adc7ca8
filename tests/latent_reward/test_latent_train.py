"""Bradley–Terry on noisy pairs: the loss, who makes a pair, equal runs, a known direction, and eight pairs by heart."""

from __future__ import annotations

import math
from dataclasses import replace

import latent_world as world
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tempflow.core.times import UniformTimes
from tempflow.latent_reward import (
    LatentReward,
    Rated,
    RewardTraining,
    accuracy,
    bind,
    bradley_terry,
    fit,
    pairs_of,
    train_latent_reward,
)
from tempflow.media import Size
from tempflow.request import asked

SIZE = Size(32, 32)

SIGMA = torch.tensor([0.2, 0.5, 1.0])


# --------------------------------------------------------------------------------------------------------------- loss
def test_equal_scores_cost_log_two() -> None:
    s = torch.tensor([-3.0, 0.0, 40.0], dtype=torch.float64)
    want = torch.full((3,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(s, s, SIGMA, SIGMA), want, rtol=1e-14, atol=0)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_loss_is_the_negative_log_likelihood_of_the_winner(win: float, lose: float) -> None:
    a, b = torch.tensor([win], dtype=torch.float64), torch.tensor([lose], dtype=torch.float64)
    one = torch.ones(1)
    loss, other = float(bradley_terry(a, b, one, one)), float(bradley_terry(b, a, one, one))
    assert loss == pytest.approx(math.log(1 + math.exp(lose - win)), rel=1e-9, abs=1e-12)
    assert math.exp(-loss) + math.exp(-other) == pytest.approx(1)  # one of the two wins


def test_loss_stays_finite_and_its_gradient_is_the_chance_of_being_wrong() -> None:
    win = torch.tensor([-200.0, 0.5], dtype=torch.float64, requires_grad=True)
    lose = torch.tensor([200.0, 0.0], dtype=torch.float64)
    loss = bradley_terry(win, lose, torch.ones(2), torch.ones(2))
    loss.sum().backward()
    assert float(loss[0].detach()) == pytest.approx(400)
    assert win.grad is not None and win.grad.tolist() == pytest.approx([-1, -1 / (1 + math.exp(0.5))])


def test_scores_of_different_noise_cannot_be_compared() -> None:
    s, other = torch.zeros(3), torch.tensor([0.2, 0.5001, 1.0])
    with pytest.raises(ValueError, match=r"pair 1 was scored at 0.5 and 0.5001; .* nearest valid: 0.5 for both"):
        bradley_terry(s, s, SIGMA, other)
    with pytest.raises(ValueError, match=r"lose: shape \[2\] beside \[3\]"):
        bradley_terry(s, s[:2], SIGMA, SIGMA)


# -------------------------------------------------------------------------------------------------------------- pairs
def brute(scores: list[float], rows: list[int], margin: float) -> set[tuple[int, int]]:
    n = range(len(scores))
    return {(i, j) for i in n for j in n if rows[i] == rows[j] and scores[i] - scores[j] > margin}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), st.integers(0, 2)), max_size=9))
def test_pairs_are_all_of_one_prompt_that_differ_enough(made: list[tuple[float, int]]) -> None:
    scores, rows = [s for s, _ in made], [r for _, r in made]
    rated = Rated(
        torch.zeros(len(made), 1), torch.tensor(scores), torch.tensor(rows, dtype=torch.long), ("a", "b", "c")
    )
    for margin in (0.0, 0.25, 0.6):
        found = [(int(i), int(j)) for i, j in pairs_of(rated, margin)]
        assert len(set(found)) == len(found) and set(found) == brute(scores, rows, margin)


def test_failed_scores_make_no_pair() -> None:
    rated = Rated(torch.zeros(3, 1), torch.tensor([0.0, math.nan, 1.0]), torch.zeros(3, dtype=torch.long), ("a",))
    assert pairs_of(rated).tolist() == [[2, 0]]


# --------------------------------------------------------------------------------------------------- a linear scorer
class Linear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.sigmas: list[Tensor] = []
        self.states: list[Tensor] = []

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.sigmas.append(sigma.clone())
        self.states.append(x.clone())
        return x @ self.weight


DIRECTION = torch.tensor([3.0, -2.0, 0.0, 1.0, 0.0, 0.0])


def linear_rated(count: int = 240) -> Rated:
    x = world.normal("toy", count, (6,))
    return Rated(x, x @ DIRECTION, torch.arange(count) % 12, tuple("abcdefghijkl"))


def test_a_linear_reward_finds_the_direction() -> None:
    """E[u·x0 | x_σ] is along u·x_σ for white data, so Bradley–Terry's optimum points along u at every σ."""
    toy, rated = Linear(6), linear_rated()
    config = RewardTraining(steps=300, pairs=64, lr=0.03, weight_decay=0.0)
    fit(toy, toy, rated, pairs_of(rated), config)
    assert float(torch.cosine_similarity(toy.weight, DIRECTION, dim=0)) > 0.97
    held = accuracy(toy, rated, pairs_of(rated, 3.0)[::20], buckets=4)
    assert held[0].accuracy > 0.95 and held[0].accuracy > held[3].accuracy + 0.1


def test_both_of_a_pair_are_at_one_noise_level_of_their_own_noise() -> None:
    rated = linear_rated()
    couple = torch.tensor([[5, 17], [3, 15]])
    for share in (False, True):
        toy = Linear(6)
        fit(toy, toy, rated, couple, RewardTraining(steps=1, pairs=8, share_noise=share))
        sigma, x = toy.sigmas[0], toy.states[0]
        assert torch.equal(sigma[0::2], sigma[1::2]) and len(sigma[0::2].unique()) == 8
        # take the clean part away: what is left over is σ·ε
        names = {tuple(rated.latents[i].tolist()) for pair in couple for i in pair}
        gaps = [
            min(
                (x[k] - (1 - sigma[k]) * rated.latents[w] - x[k + 1] + (1 - sigma[k]) * rated.latents[lose]).abs().max()
                for w, lose in couple.tolist()
            )
            for k in range(0, 16, 2)
        ]
        assert len(names) == 4
        assert (max(gaps) < 1e-5) if share else (min(gaps) > 1e-3)


def test_the_law_of_noise_is_the_one_asked_for() -> None:
    toy, rated = Linear(6), linear_rated()
    fit(toy, toy, rated, pairs_of(rated), RewardTraining(steps=4, pairs=50, times=UniformTimes(low=0.6, high=0.7)))
    seen = torch.cat(toy.sigmas)
    assert 0.6 <= float(seen.min()) < 0.61 and 0.69 < float(seen.max()) <= 0.7


def test_accuracy_looks_in_every_bucket_and_counts_ties_half() -> None:
    rated = linear_rated()
    pairs = pairs_of(rated)[:300]
    seen: list[Tensor] = []

    def level(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        seen.append(sigma)
        return sigma  # knows nothing but the noise, which is the same for both

    buckets = accuracy(level, rated, pairs, buckets=5)
    assert [b.low for b in buckets] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert [b.high for b in buckets] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert all(b.accuracy == 0.5 and b.pairs == 300 for b in buckets)
    for k in range(5):
        part = torch.cat(seen[k::5])
        assert k / 5 <= float(part.min()) and float(part.max()) <= (k + 1) / 5 and len(part) == 600
    best = accuracy(lambda x, s, r: -x @ DIRECTION, rated, pairs, buckets=5)
    assert best[0].accuracy < 0.2  # a reward upside down is wrong, not merely unsure
    broken = accuracy(lambda x, s, r: torch.full((len(x),), math.nan), rated, pairs, buckets=1)
    assert broken[0].accuracy == 0


# ------------------------------------------------------------------------------------------------------ the real thing
def test_eight_pairs_are_learnt_by_heart() -> None:
    """At low noise: near σ = 1 a pair cannot be told apart, whoever looks."""
    model = world.adapter()
    latents = world.normal("latents", 16)
    rows = torch.arange(16) // 2 % 2
    rated = Rated(latents, torch.arange(16) % 2.0, rows, world.PROMPTS)
    eight = torch.tensor([[2 * k + 1, 2 * k] for k in range(8)])
    reward = LatentReward.from_transformer(model.network, width=32)
    losses: list[float] = []
    config = RewardTraining(steps=60, pairs=16, lr=2e-3, times=UniformTimes(high=0.3))
    score = bind(model, reward, model.encode(asked(world.PROMPTS), SIZE))
    fit(reward, score, rated, eight, config, lambda _s, loss, _a: losses.append(loss))
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert sum(losses[-5:]) / 5 < 0.1
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())
    assert not any(p.requires_grad for p in model.network.parameters())


def test_two_runs_are_equal_and_another_seed_is_not() -> None:
    model, rated = world.adapter(), world.rated()
    config = RewardTraining(steps=3, pairs=4, lr=1e-3)
    first, again, other = (
        train_latent_reward(model, rated, c, SIZE) for c in (config, config, replace(config, seed=1))
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.trunk.context_embedder.weight, other.trunk.context_embedder.weight)
    assert first.spec.licence == "apache-2.0" and first.spec.kept == 2
    base = model.network.get_parameter("context_embedder.weight")
    assert not torch.equal(first.trunk.context_embedder.weight, base)  # the blocks learn, not the head alone


def test_a_reward_that_is_given_is_trained_further() -> None:
    model, rated = world.adapter(), world.rated()
    reward = LatentReward.from_transformer(model.network, drop=1, width=8)
    done = train_latent_reward(model, rated, RewardTraining(steps=2, pairs=2, lr=1e-3), SIZE, reward=reward)
    assert done is reward and bool(reward.head.out.weight.abs().sum() > 0)


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps: -1 is too small; nearest valid: 0"),
        ({"pairs": 0}, "pairs: 0 is too small; nearest valid: 1"),
        ({"lr": 0.0}, "lr: 0.0 must be finite and above 0; 1e-05 is usual"),
        ({"max_grad_norm": math.inf}, "max_grad_norm: inf must be finite"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0 must be finite and >= 0"),
        ({"margin": math.nan}, "margin: nan must be finite"),
        ({"times": UniformTimes(strata=2)}, "times.strata: 2, but a pair has one σ; nearest valid: 1"),
    ],
)
def test_a_bad_configuration_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardTraining(**fields)  # type: ignore[arg-type]


def test_rated_latents_must_fit_together() -> None:
    x, s, rows = torch.zeros(3, 2), torch.zeros(3), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=r"scores: shape \[2\] must be \[3\]"):
        Rated(x, s[:2], rows, ("a", "b"))
    with pytest.raises(ValueError, match="rows: 1 names no prompt; nearest valid: 0"):
        Rated(x, s, rows, ("a",))
    with pytest.raises(ValueError, match="rows: dtype"):
        Rated(x, s, rows.int(), ("a", "b"))


def test_training_without_a_pair_or_on_broken_latents_says_so() -> None:
    toy, rated = Linear(6), linear_rated()
    with pytest.raises(ValueError, match=r"pairs: no two latents of a prompt differ by more than 1000\.0; lower"):
        fit(toy, toy, rated, pairs_of(rated, 1000.0), RewardTraining(margin=1000.0))
    with pytest.raises(ValueError, match="pairs: none to measure on"):
        accuracy(toy, rated, pairs_of(rated, 1000.0))
    broken = replace(rated, latents=rated.latents * math.nan)
    with pytest.raises(ValueError, match="loss: nan at step 0; lower lr = 1e-05"):
        fit(toy, toy, broken, pairs_of(rated), RewardTraining())
