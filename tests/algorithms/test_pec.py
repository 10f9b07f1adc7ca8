"""Perceptual entropy: the bonus in the real loop, no bonus is Flow-GRPO, and why an entropy bonus would not do."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fake import Bench
from loop_checks import (
    check_learns,
    check_same_runs,
    check_sound,
    constant,
    refuses,
    second,
)
from torch import Tensor

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.perceptual_entropy import Embedded, perceptual_entropy
from tempflow.core.credit import GroupZScore, PathLogProb, Surprisal
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.plan import Cost
from tempflow.core.schedule import shifted
from tempflow.media import Media, Size
from tempflow.perception import HandEmbedding
from tempflow.train.experience import credit


def toy(**changes: Any) -> Algorithm:
    return perceptual_entropy(**{"steps": 4, "group": 6, "clip": 0.02, "kl": 0.0, **changes})


@dataclass(frozen=True)
class Blind:
    """An embedding in which all pictures are alike."""

    name = "embedding"
    of = "leaf"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        return torch.full((len(media), 3), 0.1)


@pytest.mark.parametrize("changes", [{}, {"kind": "pcvae"}, {"train_steps": 2, "kl": 0.1, "std": "group"}])
def test_first_pass_counts_and_batch_sizes(changes: dict[str, Any]) -> None:
    check_sound(toy(**changes))


@pytest.mark.parametrize("kind", ["pec", "pcvae"])
def test_rewards_rise(kind: str) -> None:
    check_learns(toy(kind=kind), rise=0.05)


def test_what_the_defaults_compose() -> None:
    a, base = perceptual_entropy(), flow_grpo(kl=0.0)
    assert (a.name, a.dynamics, a.objective, a.plan(0, 0)) == (
        "perceptual_entropy",
        base.dynamics,
        base.objective,
        base.plan(0, 0),
    )
    assert a.credit == Surprisal(GroupZScore(scale="global"), "embedding", 0.05, 1.0, latent=False)
    assert a.plan(0, 0).cost() == Cost(240, 24, 216) and a.observe == (Embedded("hand"),)
    b = perceptual_entropy(kind="pcvae", bonus=0.03, scale=2.0)
    assert b.credit == Surprisal(GroupZScore(scale="global"), "embedding", 0.03, 2.0, latent=True)
    assert b.observe == (Embedded("hand"), PathLogProb())


def test_no_bonus_is_flow_grpo_bitwise() -> None:
    check_same_runs(toy(bonus=0.0), flow_grpo(steps=4, group=6, clip=0.02, kl=0.0))
    check_same_runs(toy(bonus=0.0, kind="pcvae"), flow_grpo(steps=4, group=6, clip=0.02, kl=0.0))
    a, b = second(toy(bonus=5.0)), second(toy(bonus=0.0))
    assert not torch.equal(a, b)


def test_equal_rewards_and_equal_pictures_teach_nothing_different_pictures_do() -> None:
    same = Bench(algorithm=replace(toy(), observe=(Blind(),)), reward=constant)
    assert same.iterate()["trained_edges"] == 0 and same.counter.train == 0
    other = Bench(algorithm=toy(), reward=constant)
    assert other.iterate()["trained_edges"] == 108  # the bonus is a reward


def test_the_bonus_is_the_embeddings_distance_from_the_groups_mean() -> None:
    """R + bonus·|φ − φ̄|²/(2·scale²), then Flow-GRPO's advantage, from the pictures themselves."""
    bench = Bench(algorithm=toy(bonus=0.7, scale=0.5))
    pictures: list[Tensor] = []
    decode = bench.model.decode

    def kept(x: Tensor, size: Size) -> Media:
        media = decode(x, size)
        pictures.append(media.pictures())
        return media

    bench.model.decode = kept  # type: ignore[method-assign]
    experience = bench.collect()
    assert sum(len(p) for p in pictures) == 36
    phi = HandEmbedding()(torch.cat(pictures)).double().view(6, 6, -1)
    bonus = (phi - phi.mean(1, keepdim=True)).square().sum(2) / (2 * 0.5**2)
    total = experience.scores.value[:, 0].double().view(6, 6) + 0.7 * bonus
    want = ((total - total.mean(1, keepdim=True)) / (total.std(unbiased=False) + 1e-4)).view(-1)
    got = credit(bench.context, experience).advantage.value
    edge, leaf = experience.whole.descent
    torch.testing.assert_close(got[edge], want[leaf].float(), rtol=1e-4, atol=1e-5)
    assert float((0.7 * bonus).std()) > 0.02 * float(experience.scores.value.std())


def test_pcvae_takes_the_latent_policys_surprise_away() -> None:
    """With an embedding that sees nothing, what is left is bonus·log p of the path."""
    algorithm = replace(toy(kind="pcvae", bonus=2.0), observe=(Blind(), PathLogProb()))
    bench = Bench(algorithm=algorithm, reward=constant)
    experience = bench.collect()
    given = credit(bench.context, experience).advantage.value
    edges, (edge, leaf) = experience.forest.edges, experience.whole.descent
    log_p = torch.zeros(36, dtype=torch.float64).index_add(0, leaf, edges.log_prob.double()[edge]).view(6, 6) / 4
    total = 2.0 * log_p
    want = ((total - total.mean(1, keepdim=True)) / (total.std(unbiased=False) + 1e-4)).view(-1)
    assert float(total.std()) > 0.1
    torch.testing.assert_close(given[edge], want[leaf].float(), rtol=1e-3, atol=1e-4)


def test_a_steps_entropy_does_not_depend_on_the_weights() -> None:
    """Why an entropy bonus cannot help: N(μ_θ, S²I) has the entropy of S for every θ."""
    schedule, step = shifted(6), torch.arange(5)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    laws = [FlowSDE(0.7).transition(x, slope * x, schedule, step) for slope in (0.2, 0.9)]
    for a, b in itertools.pairwise(laws):
        assert not torch.allclose(a.mean, b.mean) and torch.equal(a.std, b.std)
        entropies = [torch.distributions.Normal(q.mean, q.std[:, None]).entropy().mean(1) for q in (a, b)]
        assert torch.equal(*entropies)
    torch.testing.assert_close(entropies[0], laws[0].std.log() + 0.5 * math.log(2 * math.pi * math.e))


def test_reward_weights_reach_the_reward_and_not_the_bonus() -> None:
    algorithm = toy(bonus=0.5)
    bench = Bench(algorithm=algorithm)
    experience = bench.collect()
    name = experience.scores.names[0]
    off = algorithm.credit.weighted({name: 1e-9})
    alone = off(experience.scores, experience.whole).value
    zero = replace(experience.scores, value=torch.zeros_like(experience.scores.value))
    torch.testing.assert_close(alone, algorithm.credit(zero, experience.whole).value, rtol=1e-3, atol=1e-3)
    assert float(alone.abs().max()) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2"),
        ({"kind": "kl"}, "kind: 'kl' is not one of 'pec', 'pcvae'; nearest valid: 'pec'"),
        ({"bonus": -0.1}, "bonus: -0.1 must be finite and at least 0; 0.05 is usual"),
        ({"bonus": math.nan}, "bonus: nan must be finite"),
        ({"scale": 0.0}, "scale: 0.0 must be finite and above 0; 1.0 is usual"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0"),
        ({"std": "batch"}, "std: 'batch' is not one of 'global', 'group'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    refuses(perceptual_entropy, arguments, message)
