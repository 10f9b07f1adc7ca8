"""The trajectory family where things go wrong or are very small: failed scores, broken latents, one prompt, T = 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, same, weights
from family import FAMILY
from loop_checks import Images, bench_of, check_counts, check_first_ratio, judging
from torch import Tensor, nn

from tempflow.algorithms.lesson import POLICY
from tempflow.core.rng import NoiseKind
from tempflow.core.rollout import Noise
from tempflow.train.experience import Experience, check_scored, credit, rollout_metrics
from tempflow.train.guards import GuardError
from tempflow.train.update import _Teaching, predictors

by_name = pytest.mark.parametrize("name", FAMILY)
Value = float | None


def failing(which: Callable[[int, int], bool], failure: Value = None) -> Any:
    """Brightness; of the first prompt's n pictures those fail whose place `which(place, n)` names."""

    def reward(images: Images, prompts: list[str]) -> list[Value]:
        mine = [k for k, p in enumerate(prompts) if p == PROMPTS[0]]
        gone = {k for place, k in enumerate(mine) if which(place, len(mine))}
        return [failure if k in gone else r for k, r in enumerate(brightness(images, prompts))]

    return reward


FAILURES: dict[str, Any] = {
    "one": failing(lambda place, n: place == 1),
    "one is NaN": failing(lambda place, n: place == 1, math.nan),
    "all but one": failing(lambda place, n: place != 1),
    "all": failing(lambda place, n: True),
}


def without_a_score(experience: Experience) -> Tensor:
    """Edges of which no leaf has a score (or which have none themselves), by the plain definition."""
    scores, forest = experience.credited
    edge, leaf = forest.descent
    valid = torch.zeros(len(forest.edges)).index_add(0, edge, scores.ok[:, 0].float()[leaf])
    return valid == 0


def sound(bench: Bench, seen: dict[str, float]) -> None:
    assert seen["updates"] == 1 and seen["grad_norm"] > 0
    assert all(math.isfinite(seen[key]) for key in ("loss", "grad_norm", "log_ratio_max", "zero_variance"))
    assert all(bool(w.isfinite().all()) for w in weights(bench.model).values())


@pytest.mark.parametrize(
    "name,kind", [*((name, "one") for name in FAMILY), *(("tempflow_grpo", kind) for kind in FAILURES if kind != "one")]
)
def test_a_failed_score_takes_its_edges_out_and_nothing_else(name: str, kind: str) -> None:
    """Their states do not matter any more: spoilt, they change nothing."""
    gradients: list[Tensor] = []
    for spoil in (False, True):
        bench = bench_of(FAMILY[name](4), reward=FAILURES[kind], max_grad_norm=1e9)
        experience = bench.collect()
        given, gone = credit(bench.context, experience).advantage, without_a_score(experience)
        assert torch.equal(given.ok, ~gone) or name.startswith("dapo")
        assert not bool(given.ok[gone].any()) and bool((given.value[gone] == 0).all())
        assert bool(given.value.isfinite().all())
        if spoil:
            experience.forest.nodes[experience.forest.edges.child[gone]] = math.nan
        sound(bench, bench.update(experience))
        gradients.append(torch.cat([p.grad.flatten() for p in bench.model.network.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@by_name
def test_when_all_fail_nothing_moves_and_it_is_said(name: str) -> None:
    judge = {"latent_reward": judging(lambda x, sigma, rows: sigma * math.nan)} if name.startswith("drm_grpo") else {}
    bench = bench_of(FAMILY[name](4), reward=lambda images, prompts: [None] * len(images), **judge)
    before = weights(bench.model)
    with pytest.raises(GuardError, match="rewards failed, so there is nothing to learn from"):
        bench.iterate()
    assert same(before, weights(bench.model))


def test_a_judge_needs_none_of_the_rewards_that_only_look() -> None:
    bench = bench_of(FAMILY["drm_grpo"](4), reward=lambda images, prompts: [None] * len(images))
    experience = bench.collect()
    check_scored(bench.context, experience, 1)
    assert "reward_failures" not in rollout_metrics(experience, credit(bench.context, experience).advantage)
    seen = bench.iterate()
    sound(bench, seen)
    assert seen["trained_edges"] == bench.context.algorithm.cost(0, len(PROMPTS)).trained_edges
    blind = bench_of(FAMILY["drm_grpo"](4), latent_reward=judging(lambda x, sigma, rows: sigma * math.nan))
    with pytest.raises(GuardError, match=r"iteration 1: all \d+ rewards failed.*: the latent reward gave NaN"):
        check_scored(blind.context, blind.collect(), 1)


@by_name
def test_a_broken_latent_breaks_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt's first path gets NaN for noise, and all that descends from it."""
    draw = Noise.edge

    def broken(self: Noise, ids: Sequence[tuple[int, ...]], shape: Sequence[int], kind: NoiseKind) -> Tensor:
        bad = torch.tensor([slot == root == 0 and not any(path[:-1]) for slot, root, *path in ids])
        return torch.where(bad.view(-1, 1, 1, 1), math.nan, draw(self, ids, shape, kind))

    monkeypatch.setattr(Noise, "edge", broken)
    bench = bench_of(FAMILY[name](4))
    experience = bench.collect()
    assert bool(experience.forest.nodes.isnan().any())
    assert bool(without_a_score(experience).any())
    sound(bench, bench.update(experience))


@by_name
def test_one_prompt_is_enough(name: str) -> None:
    bench = bench_of(FAMILY[name](4))
    experience = bench.collect(prompts=PROMPTS[1:2])
    seen = bench.update(experience)
    sound(bench, seen)
    assert seen["trained_edges"] == bench.context.algorithm.cost(0, 1).trained_edges


@by_name
def test_two_steps_are_enough(name: str) -> None:
    check_counts(FAMILY[name](2))
    check_first_ratio(FAMILY[name](2))


KINDS = {(type(made.objective), type(made.dynamics)): n for n, made in ((n, FAMILY[n](4)) for n in FAMILY)}
"""One algorithm for each objective with each transition."""


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_guidance_is_in_rollout_and_training_alike(name: str) -> None:
    seen = [bench_of(FAMILY[name](4), guidance=g, rollout_rows=1, train_rows=1).iterate() for g in (1.0, 2.5)]
    assert seen[1]["log_ratio_max"] <= 1e-7 and seen[1]["grad_norm"] != seen[0]["grad_norm"]
    sound(bench_of(FAMILY[name](4)), seen[1])


class Adapted(nn.Module):
    """A frozen layer with a LoRA of rank 1 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(2, 1, bias=False), nn.Linear(1, 8, bias=False)
        base.requires_grad_(False)
        nn.init.constant_(self.down.weight, 0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, condition: Tensor) -> Tensor:
        return self.base(condition) + self.up(self.down(condition))


def adapted() -> Fake:
    model = Fake()
    model.network.mean = Adapted(model.network.mean)  # type: ignore[assignment]
    return model


@by_name
def test_a_lora_is_all_that_moves(name: str) -> None:
    bench = bench_of(FAMILY[name](4), model=adapted())
    before = weights(bench.model)
    first = bench.iterate(0)
    sound(bench, first)
    assert first["log_ratio_max"] <= 1e-6
    bench.iterate(1)
    moved = {n for n, w in weights(bench.model).items() if not torch.equal(w, before[n])}
    assert moved == {"mean.down.weight", "mean.up.weight"}


@pytest.mark.parametrize("name", ["gcpo", "gcpo, adaptive", "gspo"])
def test_two_updates_share_chunks_and_split_none(name: str) -> None:
    bench = bench_of(FAMILY[name](5), reward=FAILURES["one"], updates=2, train_rows=3)
    experience = bench.collect()
    given = credit(bench.context, experience)
    algorithm = bench.context.algorithm
    unit = algorithm.first.units(experience.whole, 0)
    taught = bench.items(experience, given)
    seen: list[int] = []
    for part in taught.updates(2):
        for batch in part.minibatches(3):
            for chunk in unit[batch.row].unique():
                assert torch.equal(batch.row[unit[batch.row] == chunk].sort().values, (unit == chunk).nonzero()[:, 0])
                seen.append(int(chunk))
    ok = unit[experience.whole.edges.trained & given.advantage.ok]
    assert sorted(seen) == ok.unique().tolist() and taught.valid == len(seen)
    assert bench.update(experience)["updates"] == 2


@by_name
def test_a_rank_without_an_item_adds_exactly_nothing(name: str) -> None:
    bench = bench_of(FAMILY[name](4))
    experience = bench.collect()
    given = credit(bench.context, experience)
    taught = bench.items(experience, given)
    lesson, models = bench.lesson(experience, given), predictors(bench.context, experience.prompts)
    teaching = _Teaching(bench.context, bench.context.algorithm.first, models, lesson, bench.trainable, POLICY)
    wanted = teaching.accumulate(taught, 1.0, may_pause=False).metrics
    bench.trainable.zero_grad()
    others = taught.where(torch.zeros(len(taught.row), dtype=torch.bool))  # this rank owns none of them
    experience.forest.nodes.fill_(math.nan)
    learnt: list[Tensor] = []  # states whose gradients reach the weights: times 0, NaN would stay NaN

    def listen(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: learnt.append(given[0]))

    bench.model.network.register_forward_hook(listen)
    sums = teaching.accumulate(others, 1.0, may_pause=False)
    assert sums.loss == 0 and not any(sums.largest.values())
    assert len(learnt) == 1 and bool(learnt[0].isfinite().all())
    assert list(sums.metrics) == list(wanted) and set(sums.metrics.values()) == {(0, 0)}
    for master in bench.trainable.masters:
        assert master.grad is not None and bool((master.grad == 0).all())
