"""What an edge algorithm must show in one iteration of the real loop, on the toy of tests/train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, brightness, same, weights
from torch import Tensor

from tempflow.algorithms.base import Algorithm

ALGORITHMS = Path(__file__).parents[2] / "src" / "tempflow" / "algorithms"


def check_counts(algorithm: Algorithm, share: float = 1.0) -> dict[str, float]:
    """Forwards counted by a hook on the network are `cost()`'s: rollout, trained edges (a share of them), reference."""
    bench = Bench(algorithm=algorithm, updates=2, rollout_rows=7, train_rows=5)
    seen: dict[str, float] = {}
    for iteration in range(2):
        seen = bench.iterate(iteration)
        cost, counter = algorithm.cost(iteration, len(PROMPTS)), bench.counter
        others = len(algorithm.objective.weight_sets) - 1
        assert seen["trained_edges"] == share * cost.trained_edges
        assert counter.rollout == (iteration + 1) * cost.forwards
        assert counter.train == (iteration + 1) * share * cost.trained_edges
        assert counter.reference == counter.train * others
        assert sum(bench.model.rows) == counter.forwards
    return seen


def check_first_ratio(algorithm: Algorithm) -> None:
    """Before any update the ratio is 1, in micro-batches too; and then something moves."""
    bench = Bench(algorithm=algorithm, train_rows=5, rollout_rows=11)
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["log_ratio_max"] <= 1e-6 and seen["updates"] == 1 and seen["grad_norm"] > 0
    assert seen["clip_fraction"] == 0 and not same(weights(bench.model), before)


def check_no_spread(algorithm: Algorithm) -> None:
    """Groups of equal rewards bear no gradient: nothing is computed and nothing moves."""
    bench = Bench(algorithm=algorithm, reward=lambda images, prompts: [0.25] * len(images))
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["updates"] == seen["trained_edges"] == bench.counter.train == 0
    assert same(weights(bench.model), before) and all(math.isfinite(v) for v in seen.values())


def check_learns(algorithm: Algorithm, iterations: int = 12) -> None:
    """Brightness is rewarded, and rises."""
    bench = Bench(algorithm=algorithm, rate=0.05)
    rewards = [bench.iterate(i)["reward/brightness"] for i in range(iterations)]
    assert rewards[-1] > rewards[0] + 0.02


def check_size(name: str) -> None:
    assert len((ALGORITHMS / f"{name}.py").read_text().splitlines()) <= 150


def check_errors(function: Callable[..., Algorithm], cases: list[tuple[dict[str, Any], str]]) -> None:
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            function(**arguments)
        assert message in str(caught.value), (arguments, str(caught.value))


def gradient(algorithm: Algorithm, **options: Any) -> Tensor:
    """The first update's gradient, unclipped, as one vector."""
    bench = Bench(algorithm=algorithm, **options)
    bench.setting = replace(bench.setting, max_grad_norm=1e9)
    bench.update(bench.collect())
    return torch.cat([p.grad.flatten() for p in bench.model.network.parameters() if p.grad is not None])


def second(algorithm: Algorithm, **options: Any) -> Tensor:
    """Weights after two iterations of two updates, in which ratios leave 1 and clips bind."""
    bench = Bench(algorithm=algorithm, updates=2, **options)
    for iteration in range(2):
        bench.iterate(iteration)
    return torch.cat([p.detach().flatten() for p in bench.model.network.parameters()])


def two_rewards() -> list[Any]:
    """Brightness, and how even the picture is, which pulls elsewhere."""
    from tempflow.rewards import from_function

    def even(images: list[Any], prompts: list[str]) -> list[float | None]:
        return [-float(torch.tensor(list(i.convert("L").tobytes())).float().std()) / 255 for i in images]

    return [from_function(brightness), from_function(even)]
