"""The reward's own gradient: a sample is decoded and scored with gradients, and these go back into the policy.

Three ways from a starting noise to a sample through which they go: one late prediction (ReFL, arXiv 2304.05977), the
last predictions of the walk (DRaFT-K, 2309.17400), or one prediction at a re-noised sample of the policy, which the
known noise makes a sample again (the alignment step of SRPO, 2509.06942). All else bears no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.likelihood_proxy import corrupt
from tempflow.core.objective.distill import NONE
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.state import to_rows, upcast
from tempflow.core.unroll import stop_nodes, unroll


class Path(Protocol):
    """How samples come from a starting noise, and through which predictions gradients go."""

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most."""
        ...

    def __call__(self, predict: Predict, batch: NoiseBatch) -> Tensor:
        """Clean samples [k·B, *S], in float32 at least: k of each row, side by side."""
        ...


@dataclass(frozen=True)
class LateStep:
    """x̂0 = x − σ·v at a node that is drawn for each row, among the last `late` of those before the end; gradients go
    through that v alone. Raises ValueError for `late` below 1."""

    late: int = 10

    def __post_init__(self) -> None:
        _at_least_one("late", self.late)

    def cost(self, steps: int) -> Cost:
        return Cost(steps - 1, 1, 1)

    def __call__(self, predict: Predict, batch: NoiseBatch) -> Tensor:
        steps = batch.schedule.steps
        stop = stop_nodes(batch.seed, batch.ids, steps, max(0, steps - self.late))
        return unroll(batch.x, batch.schedule, predict, batch.rows, stop=stop, last=1, layout=batch.layout).x0()


@dataclass(frozen=True)
class LastSteps:
    """The sample at the end of the walk; gradients go through its last `count` steps, at most all. `checkpointed`: keep
    no activations of these, and compute them again. Raises ValueError for a count below 1."""

    count: int = 1
    checkpointed: bool = False

    def __post_init__(self) -> None:
        _at_least_one("count", self.count)

    def cost(self, steps: int) -> Cost:
        through = min(self.count, steps)
        return Cost(steps - through, 1, through)

    def __call__(self, predict: Predict, batch: NoiseBatch) -> Tensor:
        return unroll(
            batch.x,
            batch.schedule,
            predict,
            batch.rows,
            last=self.count,
            checkpointed=self.checkpointed,
            layout=batch.layout,
        ).x0()


@dataclass(frozen=True)
class KnownNoise:
    """The policy's own sample x, which bears no gradient, is noised to a node's σ by an ε that is known, and makes the
    one step to the next node's σ': x̂0 = (x_σ + (σ' − σ)·v − σ'·ε) / (1 − σ'). That is x where v = ε − x.

    `pairs`: how often a node, any of the grid's, and an ε are drawn for each row. Raises ValueError for less than 1.
    """

    pairs: int = 1

    def __post_init__(self) -> None:
        _at_least_one("pairs", self.pairs)

    def cost(self, steps: int) -> Cost:
        return Cost(steps, self.pairs, self.pairs)

    def __call__(self, predict: Predict, batch: NoiseBatch) -> Tensor:
        grid = batch.schedule
        walk = unroll(batch.x, grid, predict, batch.rows, last=0, layout=batch.layout)
        x, rows = (of.repeat_interleave(self.pairs, 0) for of in (walk.x0(), batch.rows))
        layout = batch.layout.take(torch.arange(len(batch)).repeat_interleave(self.pairs))
        ids = [(*id, pair) for id in batch.ids for pair in range(self.pairs)]
        node = stop_nodes(batch.seed, ids, grid.steps)
        here, there = (grid.at(at).to(x) for at in (node, node + 1))
        noise = Stream(batch.seed, "aligned.noise").normal(ids, x.shape[1:]).to(x)
        at = layout.hold(corrupt(x, noise, here))
        velocity = layout.silence(upcast(predict(at, here, rows)))
        step, after = to_rows(there - here, x), to_rows(there, x)
        return layout.hold((at + step * velocity - after * noise) / (1 - after))


@dataclass(frozen=True)
class RewardGradient:
    """−mean r(x̂0), or mean max(0, margin − r(x̂0)), with r the run's weighted sum of rewards, in its own gradient.

    margin  what a reward has to reach to teach no more; None: there is no such bound

    A sample whose score failed gives no gradient; it is counted.
    """

    path: Path
    margin: float | None = None

    weight_sets = ("policy",)
    guidance = NONE
    through_rewards = True

    def cost(self, steps: int) -> Cost:
        """Of one noise on a grid of so many steps, at most."""
        return self.path.cost(steps)

    def __call__(self, models: Mapping[str, Predict], batch: NoiseBatch) -> Loss:
        """The loss of one micro-batch; gradients flow through `models["policy"]` only."""
        if "policy" not in models:
            raise ValueError("models: 'policy' is missing; nearest valid: {'policy': predict}")
        value, ok = batch.scored_through(self.path(models["policy"], batch))
        missing = -value if self.margin is None else (self.margin - value).clamp(min=0)
        loss = torch.where(ok, missing, torch.zeros_like(missing)).mean()
        valid = ok.view(len(batch), -1).to(value)
        count = valid.sum(1)
        reward = (value.detach().view_as(valid) * valid).sum(1) / count  # what failed is worth 0 here
        return Loss(loss, {"reward": reward, "failed_rewards": 1 - valid.mean(1)}, {"reward": count})


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {value} must be at least 1; nearest valid: 1")
