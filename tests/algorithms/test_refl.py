"""ReFL, DRaFT-K and SRPO's alignment step in the loop: what they cost, what they reach, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, Light, brightness, config, same
from torch import Tensor

import tempflow
from tempflow.algorithms import ALGORITHMS, Algorithm, draft, refl, srpo
from tempflow.algorithms.phase import NoisePhase
from tempflow.core.cost import Cost
from tempflow.core.objective.reward_gradient import KnownNoise, LastSteps, LateStep, RewardGradient
from tempflow.core.scores import Scores
from tempflow.models.protocol import DecodesPixels
from tempflow.models.sd3 import SD3
from tempflow.request import asked
from tempflow.rewards import safe
from tempflow.rewards.around import Renamed, over_frames
from tempflow.rewards.protocol import differentiable_of
from tempflow.train.guards import GuardError
from tempflow.train.update import Scorer

NAMES = ("refl", "draft", "srpo")
SMALL: dict[str, dict[str, Any]] = {
    "refl": {"steps": 4, "late": 2, "noises": 3},
    "draft": {"steps": 4, "last": 2, "noises": 3},
    "srpo": {"steps": 4, "noises": 3, "pairs": 2},
}


def small(name: str, **options: Any) -> Algorithm:
    return ALGORITHMS[name](**{**SMALL[name], **options})


def grads(bench: Bench) -> Tensor:
    return torch.cat([p.grad.flatten() for p in bench.trainable.masters if p.grad is not None])


# ------------------------------------------------------------------------------------------------------- the algorithms
def test_what_they_compose() -> None:
    assert refl().phases == (NoisePhase(RewardGradient(LateStep(10)), 1),) and refl().steps == 40
    assert draft(margin=2.0).phases == (NoisePhase(RewardGradient(LastSteps(1), 2.0), 1),) and draft().steps == 50
    assert srpo(noises=2).phases == (NoisePhase(RewardGradient(KnownNoise(4)), 2),) and srpo().steps == 25
    costs = {"refl": Cost(39, 1, 1), "draft": Cost(49, 1, 1), "srpo": Cost(25, 4, 4)}
    for name, cost in costs.items():
        algorithm = ALGORITHMS[name]()
        assert algorithm.taught_cost(algorithm.first, None) == cost and algorithm.through_rewards


@pytest.mark.parametrize("name", NAMES)
def test_the_reward_rises_and_what_is_counted_is_the_cost(name: str) -> None:
    bench = Bench(algorithm=small(name, turns=2), reward=Light(), rate=0.05)
    first = bench.iterate(0)["reward"]
    counter, algorithm = bench.counter, bench.context.algorithm
    cost = algorithm.taught_cost(algorithm.first, None) * len(PROMPTS)
    assert (counter.train, counter.reference, counter.decodes) == (cost.trained_edges, cost.forwards, cost.leaves)
    assert counter.reward_calls == cost.leaves and counter.rollout == counter.alone == 0
    for iteration in range(1, 6):
        last = bench.iterate(iteration)
    assert last["reward"] > first + 0.1 and last["failed_rewards"] == 0 and last["updates"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_minibatches_are_of_no_account(name: str) -> None:
    ends = list[dict[str, Tensor]]()
    for rows in (64, 3):
        bench = Bench(algorithm=small(name), reward=Light(), train_rows=rows)
        bench.iterate()
        ends.append({n: p.detach().clone() for n, p in bench.model.network.named_parameters()})
    assert all(torch.allclose(ends[0][n], ends[1][n], atol=2e-6) for n in ends[0])


def test_weights_of_rewards_are_theirs_in_the_gradient() -> None:
    """Half of one reward and another's of weight 0, which need not have gradients, is half the gradient."""
    found = list[Tensor]()
    for weights in ({"light": 1.0}, {"light": 0.5, "brightness": 0.0}):
        algorithm = small("draft")
        algorithm = replace(algorithm, credit=algorithm.credit.weighted(weights))
        rewards = [safe(Light()), safe(tempflow.rewards.from_function(brightness))][: len(weights)]
        bench = Bench(algorithm=algorithm, rewards=rewards, max_grad_norm=1e9)
        given = asked(PROMPTS)
        judge = Scorer(bench.context, given, bench.clock)
        x = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        value, ok = judge.through(x, torch.arange(4))
        value.sum().backward()
        assert ok.all() and x.grad is not None
        found.append(x.grad)
    assert torch.equal(found[0] * 0.5, found[1]) and found[0].abs().sum() > 0


def test_the_gradients_score_is_the_plain_one_but_for_rounding() -> None:
    bench = Bench(algorithm=small("refl"), reward=Light())
    judge = Scorer(bench.context, asked(PROMPTS), bench.clock)
    x = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1)) * 2
    plain, through = judge(x, torch.arange(6))[0], judge.through(x, torch.arange(6))[0]
    assert torch.allclose(plain, through, atol=0.5 / 255 + 1e-6) and not torch.equal(plain, through)


def test_a_failed_score_and_a_broken_sample_give_exactly_no_gradient() -> None:
    bench = Bench(algorithm=small("draft"), reward=Light(dark=(PROMPTS[1],)))
    judge = Scorer(bench.context, asked(PROMPTS), bench.clock)
    x = torch.zeros(4, 2, 2, 2)
    x[2, 0, 0, 0] = math.inf
    x.requires_grad_(True)
    value, ok = judge.through(x, torch.arange(4))
    value.sum().backward()
    assert ok.tolist() == [True, False, False, True] and value[1] == value[2] == 0
    assert x.grad is not None and not x.grad[1:3].any() and x.grad[[0, 3]].abs().sum() > 0
    told = bench.iterate()
    assert told["failed_rewards"] == pytest.approx(1 / 6) and math.isfinite(told["reward"])
    with pytest.raises(GuardError, match="iteration 1: all rewards failed"):
        Bench(algorithm=small("draft"), reward=Light(dark=PROMPTS)).iterate()


def test_a_reward_that_raises_has_failed_and_one_that_answers_wrongly_is_refused() -> None:
    class Raises(Light):
        def differentiable(
            self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
        ) -> Tensor:
            raise RuntimeError("out of ideas")

    class Wrong(Light):
        def differentiable(
            self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
        ) -> Tensor:
            return pixels.mean()

    pixels = torch.rand(3, 1, 3, 2, 2)
    score = differentiable_of(safe(Raises()))
    assert score is not None and score(pixels, ["a"] * 3, [{}] * 3).isnan().all()
    score = differentiable_of(safe(Wrong()))
    assert score is not None
    with pytest.raises(tempflow.rewards.RewardError, match=r"returned \[\] with gradients; expected a Tensor \[3\]"):
        score(pixels, ["a"] * 3, [{}] * 3)


def test_rewards_around_a_reward_have_its_gradients() -> None:
    clips = torch.rand(2, 9, 3, 2, 2, dtype=torch.float64)
    score = differentiable_of(safe(Renamed(over_frames(Light(), 3), "taste")))
    assert score is not None
    assert torch.allclose(score(clips, ["a", "b"], [{}, {}]), clips[:, [0, 4, 8]].mean((1, 2, 3, 4)))
    assert differentiable_of(safe(tempflow.rewards.from_function(brightness))) is None
    assert differentiable_of(Renamed(tempflow.rewards.from_function(brightness), "taste")) is None


# ---------------------------------------------------------------------------------------------------------- whole runs
def test_a_run_learns_and_is_the_same_again(tmp_path: Path) -> None:
    models = [Fake(), Fake()]
    for number, model in enumerate(models):
        settings = config(tmp_path / str(number), iterations=3, algorithm={"name": "refl", **SMALL["refl"]})
        run = tempflow.train(settings, model=model, reward=Light(), prompts=PROMPTS, quiet=True)
    weights = [{n: p.detach() for n, p in model.network.named_parameters()} for model in models]
    assert same(*weights) and run.folder.exists()


@pytest.mark.parametrize(
    ("changes", "given", "told"),
    [
        (
            {"rewards": [{"name": "jpeg_compressibility"}]},
            {},
            r"^rewards\.0\.name: 'jpeg_compressibility' is not differentiable, and refl learns by the rewards' "
            r"gradients; nearest valid: '\w+' of aesthetic, clipscore, .*shapes_scorer$",
        ),
        ({}, {"reward": brightness}, "^reward: 'brightness' is not differentiable, and refl "),
        (
            {"rewards": [{"name": "shapes_scorer"}, {"name": "own", "kind": "shapes"}]},
            {},
            r"^rewards\.1\.name: 'own' is not differentiable.*nearest valid: 'shapes_scorer' of",
        ),
        ({"composition": {"how": "product"}}, {"reward": Light()}, r"^composition\.how: 'product', and refl takes the"),
        (
            {"composition": {"drop_above": 0.5}},
            {"reward": Light()},
            r"^composition\.drop_above: 0\.5, and refl .*: 1\.0$",
        ),
        (
            {"rewards": [{"name": "shapes_scorer", "at_least": 0.5}]},
            {},
            r"^rewards\.0\.at_least: 0\.5, and refl takes the gradient of a sum by weight; nearest valid: null$",
        ),
    ],
)
def test_what_has_no_gradients_is_one_line_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], told: str
) -> None:
    settings = config(tmp_path / "run", algorithm={"name": "refl", **SMALL["refl"]}, **changes)
    prompts = ["a circle and a ring"] * 3 if "rewards" in changes else PROMPTS
    with pytest.raises(ValueError, match=told) as error:
        tempflow.train(settings, model=Fake(), prompts=prompts, quiet=True, **given)
    assert "\n" not in str(error.value)


def test_a_decoder_without_gradients_is_refused(tmp_path: Path) -> None:
    class Plain(Fake):
        decode_pixels = property()

    settings = config(tmp_path / "run", algorithm={"name": "draft", **SMALL["draft"]})
    with pytest.raises(ValueError, match=r"^model: 'fake' decodes without gradients, and draft learns through the dec"):
        tempflow.train(settings, model=Plain(), reward=Light(), prompts=PROMPTS, quiet=True)
    assert isinstance(Fake(), DecodesPixels) and hasattr(SD3, "decode_pixels")
    offloaded = config(tmp_path / "run", algorithm={"name": "draft", **SMALL["draft"]}, model={"offload": True})
    with pytest.raises(ValueError, match=r"model\.offload: "):
        tempflow.train(offloaded, reward=Light(), prompts=PROMPTS, quiet=True)


def test_a_reward_of_weight_0_looks_on(tmp_path: Path) -> None:
    class Judge(Light):
        """It has no gradients."""

        differentiable = None  # type: ignore[assignment]

        def score(self, media: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
            return Light("seen").score(media, prompts, metadata)

    from tempflow.train.gradients import check_gradients

    rewards = [{"name": "shapes_scorer"}, {"name": "shapes", "weight": 0.0}]
    made = config(tmp_path / "run", algorithm={"name": "srpo", **SMALL["srpo"]}, rewards=rewards)
    check_gradients(made, small("srpo"), Fake(), [safe(Light("shapes_scorer")), safe(Judge("shapes"))], own=True)
    with pytest.raises(ValueError, match=r"^reward: 'shapes' is not differentiable"):
        check_gradients(made, small("srpo"), Fake(), [safe(Light("shapes_scorer")), safe(Judge("shapes"))], own=False)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: refl(late=41), "late: 41 of 40 steps; nearest valid: 40"),
        (lambda: refl(late=0), "late: 0 of 40 steps; nearest valid: 1"),
        (lambda: draft(last=51), "last: 51 of 50 steps; nearest valid: 50"),
        (lambda: srpo(pairs=0), "pairs: 0 must be at least 1; nearest valid: 1"),
        (lambda: srpo(noises=0), "noises: 0 must be at least 1; nearest valid: 1"),
        (lambda: draft(steps=0), "steps: 0 must be at least 1; nearest valid: 1"),
        (lambda: refl(margin=math.nan), "margin: nan must be finite; nearest valid: None, for none"),
        (lambda: refl(turns=0), "turns: 0 must be at least 1; nearest valid: 1"),
    ],
)
def test_arguments_are_checked(make: Any, told: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == told


def test_sizes_that_are_not_the_run_s_are_refused() -> None:
    class Odd(Fake):
        def decode_pixels(self, x: Tensor, size: Any) -> Tensor:
            return super().decode_pixels(x, size)[:, 0]

    bench = Bench(Odd(), small("draft"), Light())
    with pytest.raises(ValueError, match=r"fake decoded frames \[18, 3, 2, 2\]; nearest valid: \[18, F, 3, 2, 2\]"):
        bench.iterate()
    assert bench.context.size == SIZE
