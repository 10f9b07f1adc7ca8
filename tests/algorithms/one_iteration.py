"""What every algorithm must show in one iteration of the real loop on the analytic toy of tests/train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, brightness, same, weights
from PIL import Image
from torch import Tensor

from tempflow.algorithms import Algorithm

Images = list[Image.Image]


def constant(images: Images, prompts: list[str]) -> list[float | None]:
    """No picture is better than another."""
    return [0.25] * len(images)


def partly_flat(images: Images, prompts: list[str]) -> list[float | None]:
    """Every second prompt gets equal rewards."""
    flat = set(PROMPTS[::2])
    return [0.5 if p in flat else r for p, r in zip(prompts, brightness(images, prompts), strict=True)]


def gradient(algorithm: Algorithm, **setting: Any) -> dict[str, Tensor]:
    """Of the first update, not clipped, by parameter."""
    bench = Bench(algorithm=algorithm, max_grad_norm=1e9, **setting)
    bench.iterate()
    return {n: p.grad.clone() for n, p in bench.model.network.named_parameters() if p.grad is not None}


def assert_same_gradient(a: Algorithm, b: Algorithm, factor: float = 1.0, rtol: float = 1e-5, **setting: Any) -> None:
    """The first is `factor` times the second, up to rounding."""
    mine, other = gradient(a, **setting), gradient(b, **setting)
    assert mine.keys() == other.keys() and max(float(t.abs().max()) for t in mine.values()) > 1e-4
    for name, value in mine.items():
        atol = rtol * float(other[name].abs().max()) * abs(factor)
        torch.testing.assert_close(value, other[name] * factor, rtol=rtol, atol=atol)


def iterated(algorithm: Algorithm, iterations: int = 2, **setting: Any) -> dict[str, Tensor]:
    """The weights after some iterations of two updates each: from the second on, ratios differ from 1."""
    bench = Bench(algorithm=algorithm, updates=2, **setting)
    worst = [bench.iterate(i)["log_ratio_max"] for i in range(iterations)]
    assert max(worst) > 1e-4
    return weights(bench.model)


def assert_bit_equal_runs(a: Algorithm, b: Algorithm, **setting: Any) -> None:
    assert same(iterated(a, **setting), iterated(b, **setting))


def assert_sound(algorithm: Algorithm) -> None:
    """Ratio 1 on the first pass; the network's rows are the counter's and the cost's; batch sizes change nothing."""
    bench = Bench(algorithm=algorithm)
    before = weights(bench.model)
    metrics = bench.iterate()
    cost, others = algorithm.cost(0, len(PROMPTS)), len(algorithm.sets)
    assert metrics["log_ratio_max"] <= 1e-6
    assert metrics["trained_edges"] == cost.trained_edges > 0
    assert sum(bench.model.rows) == bench.counter.forwards == cost.forwards + cost.trained_edges * (1 + others)
    assert bench.counter.reward_calls == cost.leaves
    assert metrics["updates"] == 1 and not same(weights(bench.model), before)
    want = gradient(algorithm)
    for rows in ((5, 7), (1000, 1)):
        got = gradient(algorithm, rollout_rows=rows[0], train_rows=rows[1])
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def assert_still_without_spread(algorithm: Algorithm) -> None:
    """Equal rewards give no gradient, no forward and no update."""
    bench = Bench(algorithm=algorithm, reward=constant)
    before = weights(bench.model)
    metrics = bench.iterate()
    assert metrics["updates"] == metrics["trained_edges"] == bench.counter.train == 0
    assert metrics["zero_variance"] == 1 and same(weights(bench.model), before)


def assert_learns(algorithm: Algorithm, iterations: int = 12, rate: float = 0.05) -> None:
    bench = Bench(algorithm=algorithm, rate=rate)
    rewards = [bench.iterate(i)["reward/brightness"] for i in range(iterations)]
    assert rewards[-1] > rewards[0] + 0.05


def with_credit(algorithm: Algorithm, **changes: Any) -> Algorithm:
    """The algorithm with other fields of its (unwrapped) credit."""
    return replace(algorithm, credit=replace(algorithm.credit, **changes))  # type: ignore[type-var]


def refuses(function: Any, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert message in str(caught.value), caught.value
