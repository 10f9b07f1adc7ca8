"""States of tokens through the loop: rollout, scores, credit, updates of both kinds of phases, rollouts on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake import Bench, Fake, same, weights
from PIL import Image
from torch import Tensor, nn

from tempflow.algorithms import Algorithm
from tempflow.algorithms.phase import EdgePhase, LeafPhase
from tempflow.core import plan
from tempflow.core.corruption import TokenLikelihood
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import MixtureJump
from tempflow.core.objective.preference import Supervised
from tempflow.core.objective.ratio import clipped
from tempflow.core.renoise import Renoise
from tempflow.core.times import UniformTimes
from tempflow.media import Media, Size
from tempflow.models.guidance import Guidance
from tempflow.models.protocol import Conditioning, Predict

VOCABULARY, LENGTH = 4, 4


class Logits(nn.Module):
    """Logits of the clean tokens, [B, L, V], by the tokens there are, σ and the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(2, LENGTH * VOCABULARY)
        self.own = nn.Embedding(VOCABULARY, VOCABULARY)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        nn.init.zeros_(self.own.weight)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return self.mean(condition).view(-1, LENGTH, VOCABULARY) + (1 - sigma.float()).view(-1, 1, 1) * self.own(x)


class Strings(Fake):
    """A picture is four grey levels, one for each token."""

    name, shape = "strings", (LENGTH,)

    def __init__(self) -> None:
        super().__init__()
        self.network = Logits()

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        module, tokens = self.network if network is None else network, condition.tensors["embeds"][:, 0]
        return lambda x, sigma, rows: module(x, sigma, tokens[rows])

    def decode(self, x: Tensor, size: Size) -> Media:
        assert x.dtype == torch.long
        return Media.of((x * 80).to(torch.uint8).view(-1, 2, 2, 1).expand(-1, -1, -1, 3).contiguous())


def bright(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [sum(image.convert("L").tobytes()) / (4 * 240) for image in images]


def edges() -> Algorithm:
    return Algorithm(
        name="token edges",
        steps=4,
        plan=lambda iteration, slot: plan.chain(4, 12, train=range(4), stochastic=range(4)),
        dynamics=MixtureJump(VOCABULARY),
        credit=GroupZScore(by=("prompt", "step")),
        phases=(EdgePhase(clipped(0.2, 0.2, 0.01)),),
    )


def leaves() -> Algorithm:
    best = GroupZScore(by=("prompt",))
    return Algorithm(
        name="clean tokens",
        steps=4,
        plan=lambda iteration, slot: plan.chain(4, 12, train=(), stochastic=range(4)),
        dynamics=MixtureJump(VOCABULARY),
        credit=best,
        phases=(LeafPhase(Supervised(TokenLikelihood()), Renoise(UniformTimes(2))),),
    )


@pytest.mark.parametrize("make", [edges, leaves])
def test_an_iteration_trains_tokens(make: Callable[[], Algorithm], tmp_path: Path) -> None:
    bench = Bench(Strings(), make(), bright, rate=0.05, updates=2, train_rows=20)
    before = weights(bench.model)
    experience = bench.collect()
    assert experience.forest.nodes.dtype == torch.long and experience.forest.nodes.shape[1:] == (LENGTH,)
    metrics = bench.update(experience)
    assert metrics["updates"] == 2 and not same(before, weights(bench.model))
    if make is edges:
        assert metrics["rollout_gap_max"] < 1 and metrics["log_ratio_max"] > 0
        for iteration in range(1, 15):
            metrics = bench.iterate(iteration)
        assert metrics["reward/bright"] > 0.8, "from .5; 1 is the largest"


def test_two_roles_may_share_a_rollout_of_tokens() -> None:
    both = replace(edges(), phases=(*edges().phases, *leaves().phases))
    metrics = Bench(Strings(), both, bright, rate=0.05).iterate()
    assert metrics["updates"] == 1 == metrics["policy.2/updates"]
