"""What an algorithm that trains edges must show in one iteration of the real loop, on the toy of tests/train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, brightness, same, weights
from PIL import Image
from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.core.scores import Scores
from tempflow.rewards import from_function
from tempflow.rewards.protocol import Reward
from tempflow.train.judged import LatentJudge

Images = list[Image.Image]


# --------------------------------------------------------------------------------------------------------- rewards
def constant(images: Images, prompts: list[str]) -> list[float | None]:
    """No picture is better than another."""
    return [0.25] * len(images)


def partly_flat(images: Images, prompts: list[str]) -> list[float | None]:
    """Every second prompt gets equal rewards."""
    flat = set(PROMPTS[::2])
    return [0.5 if p in flat else r for p, r in zip(prompts, brightness(images, prompts), strict=True)]


def two_rewards() -> list[Reward]:
    """Brightness, and how even the picture is, which pulls elsewhere."""

    def even(images: Images, prompts: list[str]) -> list[float | None]:
        return [-float(torch.tensor(list(i.convert("L").tobytes())).float().std()) / 255 for i in images]

    return [from_function(brightness), from_function(even)]


def judging(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LatentJudge:
    """A latent reward for `Context.latent_reward`: (x, sigma, rows) -> a score each; what is not finite has failed."""

    def judge(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = score(x, sigma, rows).float()
        return Scores(value[:, None], value.isfinite()[:, None], ("latent",))

    return LatentJudge(lambda condition: judge)


def bench_of(algorithm: Algorithm, **options: Any) -> Bench:
    """A bench; where the algorithm asks for a judge, it is the latent's mean."""
    score = judging(lambda x, sigma, rows: x.flatten(1).mean(1))
    judged = {} if algorithm.latent_reward is None else {"latent_reward": score}
    return Bench(algorithm=algorithm, **{**judged, **options})


def phased(algorithm: Algorithm, **changes: Any) -> Algorithm:
    """The same with those parts of its one phase."""
    phase: Any
    (phase,) = algorithm.phases
    return replace(algorithm, phases=(replace(phase, **changes),))


# ---------------------------------------------------------------------------------------------------------- checks
def check_counts(algorithm: Algorithm, share: float = 1.0, **options: Any) -> None:
    """Rows counted by a hook are `cost()`'s: rollout, trained edges (a share of them), reference, old."""
    bench = bench_of(algorithm, updates=2, rollout_rows=7, train_rows=5, **options)
    algorithm = bench.context.algorithm  # with the run's seed: where a window is may change what it costs
    for iteration in range(2):
        before = bench.counter.rollout, bench.counter.train, bench.counter.reward_calls
        seen = bench.iterate(iteration)
        cost, counter = algorithm.cost(iteration, len(PROMPTS)), bench.counter
        judged = 0 if algorithm.latent_reward is None else cost.trained_edges
        assert seen["trained_edges"] == share * cost.trained_edges > 0
        assert counter.rollout - before[0] == cost.forwards
        assert counter.train - before[1] == share * cost.trained_edges
        assert counter.reward_calls - before[2] == cost.leaves + judged
        assert counter.reference == counter.train * (len(algorithm.objective.weight_sets) - 1)
        assert counter.old <= (iteration + 1) * algorithm.old_forwards(cost.trained_edges, 2)
        assert sum(bench.model.rows) == counter.forwards


def check_first_ratio(algorithm: Algorithm, **options: Any) -> None:
    """Before any update the ratio is 1, in micro-batches too; and then something moves."""
    bench = bench_of(algorithm, train_rows=5, rollout_rows=11, **options)
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["log_ratio_max"] == 0 and seen["updates"] == 1 and seen["grad_norm"] > 0
    assert seen["clip_fraction"] == 0 and not same(weights(bench.model), before)


def check_batch_sizes(algorithm: Algorithm, **options: Any) -> None:
    """The first gradient does not depend on how rollout and training are cut."""
    want = gradient(algorithm, **options)
    for rows in ((5, 7), (1000, 1)):
        got = gradient(algorithm, rollout_rows=rows[0], train_rows=rows[1], **options)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def check_sound(algorithm: Algorithm) -> None:
    check_counts(algorithm)
    check_first_ratio(algorithm)
    check_batch_sizes(algorithm)


def check_no_spread(algorithm: Algorithm, **options: Any) -> None:
    """Groups of equal rewards bear no gradient: nothing is computed and nothing moves."""
    bench = bench_of(algorithm, **{"reward": constant, **options})
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["updates"] == seen["trained_edges"] == bench.counter.train == 0 and seen["zero_variance"] == 1
    assert same(weights(bench.model), before) and all(math.isfinite(v) for v in seen.values())


def check_learns(algorithm: Algorithm, iterations: int = 12, rise: float = 0.02) -> None:
    """Brightness is rewarded, and rises."""
    bench = bench_of(algorithm, rate=0.05)
    rewards = [bench.iterate(i)["reward/brightness"] for i in range(iterations)]
    assert rewards[-1] > rewards[0] + rise


def refuses(function: Callable[..., Algorithm], arguments: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert message in str(caught.value), (arguments, str(caught.value))


def check_errors(function: Callable[..., Algorithm], cases: list[tuple[dict[str, Any], str]]) -> None:
    for arguments, message in cases:
        refuses(function, arguments, message)


# ------------------------------------------------------------------------------------------------------ comparisons
def gradient(algorithm: Algorithm, **options: Any) -> Tensor:
    """The first update's gradient, unclipped, as one vector."""
    bench = bench_of(algorithm, **{"max_grad_norm": 1e9, **options})
    bench.update(bench.collect())
    return torch.cat([p.grad.flatten() for p in bench.model.network.parameters() if p.grad is not None])


def check_same_gradient(a: Algorithm, b: Algorithm, factor: float = 1.0, rtol: float = 1e-5, **options: Any) -> None:
    """The first is `factor` times the second, up to rounding."""
    mine, other = gradient(a, **options), gradient(b, **options)
    assert float(mine.abs().max()) > 1e-4
    torch.testing.assert_close(mine, other * factor, rtol=rtol, atol=rtol * float(mine.abs().max()))


def second(algorithm: Algorithm, **options: Any) -> Tensor:
    """Weights after two iterations of two updates, in which ratios leave 1 and clips bind."""
    bench = bench_of(algorithm, updates=2, **options)
    assert max(bench.iterate(iteration)["log_ratio_max"] for iteration in range(2)) > 1e-4
    return torch.cat([p.detach().flatten() for p in bench.model.network.parameters()])


def check_same_runs(a: Algorithm, b: Algorithm, **options: Any) -> None:
    """Bit for bit, over two iterations of two updates."""
    assert torch.equal(second(a, **options), second(b, **options))
