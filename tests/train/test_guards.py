"""Nothing that is wrong moves a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fake import Bench, Fake, brightness, flow, same, tempflow, weights
from torch import Tensor, nn

from tempflow.rewards import from_function
from tempflow.train import guards
from tempflow.train.guards import GuardError


def poison(model: Fake) -> None:
    """From now on one row of every forward is NaN."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        mask = torch.zeros_like(out)
        mask[-1] = math.nan
        return out + mask

    model.network.register_forward_hook(hook)


def test_nan_in_the_models_output_stops_before_weights_move() -> None:
    bench = Bench()
    experience = bench.collect()
    before = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match=r"iteration 0: the loss is nan. No weight was changed"):
        bench.update(experience)
    assert same(weights(bench.model), before) and not bench.optimizer.state


def test_nan_during_the_rollout_stops_too() -> None:
    bench = Bench()
    before = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match="the loss is nan"):
        bench.iterate()
    assert same(weights(bench.model), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_weights_move(bad: float) -> None:
    """The loss itself is finite here; of many micro-batches only the last one's gradient is bad."""
    bench = Bench(train_rows=20)
    experience = bench.collect()
    before = weights(bench.model)
    calls = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * bad if len(calls) == 5 else gradient

    bench.model.network.mean.bias.register_hook(spoil)
    with pytest.raises(GuardError, match=r"iteration 0: the gradient norm is (nan|inf). No weight was changed"):
        bench.update(experience)
    assert same(weights(bench.model), before) and len(calls) > 1


def test_a_later_update_stops_at_the_weights_of_the_last_good_one() -> None:
    bench = Bench(updates=2)
    bench.iterate(0)
    good = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match="iteration 1: the loss is nan"):
        bench.iterate(1)
    assert same(weights(bench.model), good)


@pytest.mark.parametrize("answer", [math.nan, None, math.inf])
def test_rewards_that_all_failed_stop_the_run(answer: float | None) -> None:
    bench = Bench(reward=lambda images, prompts: [answer] * len(images))
    before = weights(bench.model)
    with pytest.raises(GuardError, match=r"iteration 0: all 108 rewards failed"):
        bench.iterate()
    assert same(weights(bench.model), before)


def test_a_reward_of_weight_zero_may_fail() -> None:
    """It is only looked at; nothing is learnt from it, so it stops nothing."""
    algorithm = tempflow()
    credit = replace(algorithm.credit, reward_weights={"brightness": 1.0, "broken": 0.0})
    broken = from_function(lambda images, prompts: [None] * len(images), name="broken")
    rewards = [from_function(brightness), broken]
    metrics = Bench(algorithm=replace(algorithm, credit=credit), rewards=rewards).iterate()
    assert metrics["updates"] == 1 and metrics["failed_rewards"] == 108
    assert math.isnan(metrics["reward/broken"]) and metrics["zero_variance"] < 1


def test_one_nan_reward_is_dropped_and_harmless() -> None:
    def reward(images: list, prompts: list[str]) -> list[float | None]:  # type: ignore[type-arg]
        return [math.nan, *brightness(images, prompts)[1:]]

    bench = Bench(reward=reward)
    metrics = bench.iterate()
    assert metrics["failed_rewards"] == 1 and math.isfinite(metrics["loss"])
    assert all(bool(t.isfinite().all()) for t in weights(bench.model).values())


def guidance_changes(bench: Bench) -> Callable[[], object]:
    experience = bench.collect()
    condition = bench.model.encode([str(n) * (n + 1) for n in range(6)])
    models = {"policy": bench.model.predictor(condition, 1.5)}
    changed = type(experience)(experience.forest, experience.scores, models)
    return lambda: bench.update(changed)


@pytest.mark.parametrize("algorithm", [tempflow(), flow()], ids=["tempflow", "flow"])
def test_dropout_trips_the_first_ratio_guard(algorithm) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(Fake(dropout=0.5), algorithm)
    before = weights(bench.model)
    with pytest.raises(GuardError, match=r"first update: \|log ratio\| is .* above a tenth of the clip.*dropout"):
        bench.iterate()
    assert same(weights(bench.model), before)
    bench.model.network.eval()
    assert bench.iterate()["log_ratio_max"] < 1e-5


def test_changed_guidance_trips_the_first_ratio_guard() -> None:
    bench = Bench()
    before = weights(bench.model)
    with pytest.raises(GuardError, match="guidance"):
        guidance_changes(bench)()
    assert same(weights(bench.model), before)


def test_the_first_ratio_is_checked_at_the_first_update_whenever_that_is() -> None:
    """An iteration without spread has no update; the check waits for the one that has."""
    flat = {"on": True}

    def reward(images: list, prompts: list[str]) -> list[float | None]:  # type: ignore[type-arg]
        return [0.5] * len(images) if flat["on"] else brightness(images, prompts)

    bench = Bench(Fake(dropout=0.5), reward=reward)
    assert bench.iterate(0)["updates"] == 0
    flat["on"] = False
    with pytest.raises(GuardError, match="first update"):
        bench.iterate(1)


def test_later_updates_may_leave_the_first_ratios_bound() -> None:
    bench = Bench(updates=4, rate=0.2)
    assert bench.iterate()["log_ratio_max"] > 0.1 * 0.02


def test_the_bound_is_a_tenth_of_the_tighter_clip() -> None:
    guards.check_first_ratio(0.99e-4, 1e-3)
    for value in (1.01e-4, math.nan, math.inf):
        with pytest.raises(GuardError, match="first update"):
            guards.check_first_ratio(value, 1e-3)


def test_clip_gradients_clips_and_returns_the_norm_before() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert guards.clip_gradients([p], 1.0, 0) == pytest.approx(5.0)
    assert float(p.grad.norm()) == pytest.approx(1.0, abs=1e-5)
    assert guards.clip_gradients([p], 2.0, 0) == pytest.approx(1.0, abs=1e-5)
    assert float(p.grad.norm()) == pytest.approx(1.0, abs=1e-5)
