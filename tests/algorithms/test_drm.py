"""DRM's Step-GRPO: candidates of one state compared by a reward on noisy latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, brightness, config, same, weights
from loop_checks import gradient, judging
from torch import Tensor

from tempflow.algorithms import tempflow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.drm_grpo import drm_grpo
from tempflow.algorithms.flow_cps import UnscaledRatio
from tempflow.core import plan
from tempflow.core.dynamics import CPS
from tempflow.core.objective.ratio import clipped
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.request import asked
from tempflow.train.experience import credit
from tempflow.train.trainer import train

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench(score: Score = lambda x, sigma, rows: x.flatten(1).mean(1), **options: Any) -> Bench:
    algorithm = drm_grpo(**{"steps": 4, "chains": 2, "candidates": 3, "clip": 0.02, **options})  # type: ignore[arg-type]
    return Bench(algorithm=algorithm, latent_reward=judging(score))


def test_plan_and_cost() -> None:
    grown = plan.candidates(5, 2, 3, "candidate")
    assert grown.cost() == plan.Cost(forwards=2 * 5, leaves=2, trained_edges=2 * 3 * 4)
    goes_on = [grown.child_index[e] for e in range(len(grown.parent)) if grown.roots + e in grown.parent]
    assert sum(grown.stochastic) == 24 and goes_on == [0] * 8
    chain = plan.candidates(5, 2, 2, "candidate")
    only_first = [e for e, n in enumerate(chain.child_index) if n == 0]
    assert len(only_first) == 2 * 5  # what goes on is a plain chain


def test_a_chain_of_first_candidates_is_flow_grpos_chain() -> None:
    """The same noise by identity: the candidates beside it change nothing."""
    ours = bench(carry="candidate").collect()
    from tempflow.algorithms import flow_grpo

    theirs = Bench(algorithm=flow_grpo(steps=4, group=2, clip=0.02, kl=0.0)).collect()
    edges = ours.forest.edges
    first = torch.unique(edges.parent)  # states that went on
    other = theirs.forest
    got = ours.forest.nodes[first]
    want = other.nodes[other.edges.parent]
    assert all(bool((want == state).flatten(1).all(1).any()) for state in got)


def test_with_one_noisy_step_and_the_pictures_reward_it_is_tempflow_grpo() -> None:
    """T = 2: candidates of the first state, each finished by ODE, and judged by what the picture would score."""
    b = bench(steps=2, eps=1e-4)
    sigma = b.context.schedule.sigmas[1]

    def score(x: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        predict = b.model.predictor(b.model.encode(asked(PROMPTS), SIZE), 1.0)
        with torch.no_grad():
            end = x - sigma * predict(x, s, rows)
        return b.model.decode(end, SIZE).pictures()[..., 0].double().mean((1, 2)) / 255

    b.context = replace(b.context, latent_reward=judging(score), max_grad_norm=1e9)
    b.iterate()
    ours = torch.cat([p.grad.flatten() for p in b.model.network.parameters() if p.grad is not None])
    theirs = gradient(tempflow_grpo(2, 2, 3, clip=0.02, kl=0.0))
    assert float(theirs.abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_expected_reward_of_noisy_latents_gives_the_gradients_direction() -> None:
    """R(x, σ) = E[u·x0 | x] on Gaussian data: a step down the gradient moves every prompt's mean along u, and no other
    way than sampling noise."""
    u = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5, -0.5, 0.0, 2.0])
    b = bench(candidates=24, chains=24, steps=4)

    def expected(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        predict = b.model.predictor(b.model.encode(asked(PROMPTS), SIZE), 1.0)
        with torch.no_grad():
            clean = x - sigma.view(-1, 1, 1, 1).to(x) * predict(x, sigma, rows)
        return clean.flatten(1) @ u

    b.context = replace(b.context, latent_reward=judging(expected), max_grad_norm=1e9)
    b.iterate()
    down = -b.model.network.mean.bias.grad
    assert float(torch.nn.functional.cosine_similarity(down, u, 0)) > 0.98


def test_counts_and_first_ratio() -> None:
    b = bench()
    metrics = b.iterate()
    cost = b.context.algorithm.cost(0, len(PROMPTS))
    assert b.counter.rollout == cost.forwards and b.counter.train == cost.trained_edges == metrics["trained_edges"]
    assert sum(b.model.rows) == b.counter.forwards
    assert b.counter.reward_calls == cost.leaves + cost.trained_edges
    assert metrics["log_ratio_max"] <= 1e-6


def test_with_cps_candidates_have_the_noise_their_sigma_says() -> None:
    """Of one known picture: x' − (1 − σ')x0 has the standard deviation σ', which the SDE's has not on a coarse grid."""
    picture = torch.linspace(-1, 1, 4096)

    def noise_over_sigma(algorithm: Algorithm) -> list[float]:
        plan, grid = algorithm.plan(0, 0), shifted(6)
        forest = rollout(
            [plan], algorithm.dynamics, grid, lambda x, s, r: (x - picture) / s.view(-1, 1), Noise(3), shape=(4096,)
        )
        edges, found = forest.edges, list[float]()
        for i in range(5):
            left = forest.nodes[edges.child[edges.step == i]] - (1 - grid.sigmas[i + 1]) * picture
            found.append(float(left.std() / grid.sigmas[i + 1]))
        return found

    assert noise_over_sigma(drm_grpo(steps=6, dynamics="cps")) == pytest.approx([1] * 5, abs=0.02)
    by_sde = noise_over_sigma(drm_grpo(steps=6, noise_level=0.9))
    assert min(by_sde) > 1.05 and by_sde[-1] > 50


def test_with_cps_the_ratio_is_the_unscaled_one() -> None:
    algorithm = drm_grpo(steps=4, dynamics="cps", kl=0.1, kl_form="velocity")
    assert algorithm.dynamics == CPS(0.8)
    assert algorithm.objective == clipped(1e-5, 1e-5, 0.1, "velocity", UnscaledRatio())
    assert drm_grpo(steps=4).objective == clipped(1e-4, 1e-4)
    b = bench(dynamics="cps", noise_level=0.8)
    metrics = b.iterate()
    assert metrics["log_ratio_max"] <= 1e-6 and metrics["grad_norm"] > 0


def test_the_latent_rewards_mean_is_logged() -> None:
    b = bench(lambda x, sigma, rows: torch.where(torch.arange(len(x)) % 3 == 0, math.nan, 2.5))
    assert b.iterate()["latent_reward"] == 2.5


def test_candidates_are_compared_at_one_state_and_one_sigma() -> None:
    """A score that depends on σ and prompt alone makes no difference between siblings."""
    b = bench(lambda x, sigma, rows: sigma + rows)
    before = weights(b.model)
    metrics = b.iterate()
    assert metrics["zero_variance"] == 1 and metrics["updates"] == 0 and same(before, weights(b.model))


def test_advantages_are_the_z_scores_of_siblings() -> None:
    b = bench(eps=0.0)
    experience = b.collect()
    given = credit(b.context, experience)
    whole, forest = experience.whole, experience.forest
    value = forest.nodes[forest.edges.child].flatten(1).mean(1).double()
    for parent in whole.edges.parent.unique():
        of = whole.edges.parent == parent
        z = (value[of] - value[of].mean()) / value[of].std(unbiased=False)
        torch.testing.assert_close(given.advantage.value[of].double(), z, rtol=1e-4, atol=1e-4)


def test_judged_at_the_sigma_that_is_reached() -> None:
    seen: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        seen.append(sigma)
        return x.flatten(1).mean(1)

    b = bench(score)
    experience = b.collect()
    torch.testing.assert_close(torch.cat(seen), experience.schedule.after(experience.forest.edges.step))
    assert float(torch.cat(seen).min()) > 0


def test_failed_scores_are_left_out_and_never_zero() -> None:
    def score(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        value = x.flatten(1).mean(1)
        return torch.where(torch.arange(len(x)) % 3 == 0, math.nan, value)

    b = bench(score)
    experience = b.collect()
    given = credit(b.context, experience)
    failed = ~experience.judged.latent[0].ok[:, 0]
    assert int(failed.sum()) == len(failed) // 3
    assert bool((given.advantage.ok == ~failed).all()) and not bool(given.advantage.value[failed].any())


def test_a_reward_on_latents_raises_the_pictures_brightness() -> None:
    b = bench()
    first = b.iterate(0)["reward/brightness"]
    for iteration in range(1, 12):
        last = b.iterate(iteration)["reward/brightness"]
    assert last > first + 0.05


def test_a_missing_reward_is_said_before_any_work(tmp_path: Path) -> None:
    given = {"name": "drm_grpo", "reward": str(tmp_path / "none"), "steps": 4, "chains": 2, "candidates": 2}
    with pytest.raises(ValueError, match=r"algorithm.reward: .*none' is no folder.*train_latent_reward"):
        train(config(tmp_path / "run", algorithm=given), model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)


def test_another_models_reward_is_said_before_any_work(tmp_path: Path) -> None:
    given = {"name": "drm_grpo", "reward": "shapes", "steps": 4, "chains": 2, "candidates": 2}
    with pytest.raises(ValueError, match=r"algorithm.reward: 'shapes': a latent reward of SD3Tr.* cannot judge"):
        train(config(tmp_path / "run", algorithm=given), model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"chains": 0}, "chains: 0 must be at least 1"),
        ({"candidates": 1}, "candidates: 1 must be at least 2"),
        ({"dynamics": "ddim"}, "dynamics: 'ddim' is not one of 'flow', 'cps'; nearest valid"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0"),
        ({"clip": -1.0}, "clip: -1.0 must be"),
        ({"reward": ""}, "reward: is empty"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drm_grpo(**arguments)  # type: ignore[arg-type]
