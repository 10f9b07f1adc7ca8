"""Leaf lessons: units, batches, ranks' shares, and gradients against the objective on all pairs at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image
from test_state import Countdown, Killed, assert_equal, dies

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.crd import crd
from tempflow.algorithms.dgpo import dgpo
from tempflow.algorithms.diffusion_nft import diffusion_nft
from tempflow.algorithms.lesson import ALL, Batch
from tempflow.algorithms.v_grpo import v_grpo
from tempflow.core.objective.leaves import renoise_leaves
from tempflow.train import trainer
from tempflow.train.experience import credit
from tempflow.train.trainer import train
from tempflow.train.update import predictors

MAKE: dict[str, Any] = {
    "draw": lambda: diffusion_nft(4, 5),
    "leaf": lambda: v_grpo(4, 5, 3),
    "group": lambda: dgpo(4, 5),
    "group, t alone shared": lambda: crd(4, 5, temperature=0.3),
}


def failing(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Two of the first prompt's five pictures, and all of the last's, have no score."""
    values = brightness(images, prompts)
    return [
        None if p == PROMPTS[-1] or (p == PROMPTS[0] and n % 5 < 2) else v
        for n, (p, v) in enumerate(zip(prompts, values, strict=True))
    ]


def taught(algorithm: Algorithm, iteration: int = 0, **options: Any) -> tuple[Bench, Any, Any, Batch]:
    bench = Bench(algorithm=algorithm, reward=options.pop("reward", failing))
    experience = bench.collect(iteration)
    given = credit(bench.context, experience)
    return (
        bench,
        experience,
        given,
        bench.items(experience, given, iteration, **options),
    )


@pytest.mark.parametrize("kind", MAKE)
def test_every_valid_pair_is_taught_once(kind: str) -> None:
    algorithm = MAKE[kind]()
    _, _, given, all_of = taught(algorithm)
    leaves = [r for r in range(30) if r >= 2 and r < 25]
    pairs = algorithm.first.renoise.times.count(4)
    assert given.advantage.ok.nonzero()[:, 0].tolist() == leaves
    found = sorted(zip(all_of.row.tolist(), all_of.pair.tolist(), strict=True))
    if kind == "leaf":
        assert found == [(r, ALL) for r in leaves] and (all_of.pairs, all_of.units) == (pairs, 23)
    else:
        assert found == [(r, d) for r in leaves for d in range(pairs)] and all_of.pairs == 1
        assert all_of.units == (23 if kind == "draw" else 5) * pairs
    assert all_of.valid == all_of.units and all_of.forwards == 23 * pairs
    assert bool((all_of.unit.diff() >= 0).all()), "those of a unit are neighbours"
    if kind.startswith("group"):
        members: dict[int, set[tuple[int, int]]] = {}
        for row, draw, unit in zip(all_of.row.tolist(), all_of.pair.tolist(), all_of.unit.tolist(), strict=True):
            members.setdefault(unit, set()).add((row // 5, draw))
        assert all(len(m) == 1 for m in members.values()), "a unit is one prompt at one pair"
    _, _, _, other = taught(algorithm, iteration=1)
    assert not torch.equal(other.row, all_of.row), "in another order each iteration"
    _, _, _, fewer = taught(algorithm, skip=(1, 3))
    assert set((fewer.row // 5).tolist()) == {0, 2, 4} and fewer.valid == fewer.units


@drawn(rows=st.integers(1, 40), updates=st.integers(1, 7), kind=st.sampled_from(list(MAKE)), data=st.data())
@settings(max_examples=40, deadline=None)
def test_parts_and_batches_split_units_never(rows: int, updates: int, kind: str, data: st.DataObject) -> None:
    all_of = CACHED[kind]
    per_unit = torch.bincount(all_of.unit)
    seen: list[tuple[int, int]] = []
    for part in all_of.updates(updates):
        for batch in part.minibatches(rows):
            seen += zip(batch.row.tolist(), batch.pair.tolist(), strict=True)
            sizes = torch.bincount(batch.unit).tolist()
            assert batch.units == len(sizes) and set(sizes) <= set(per_unit.tolist())
            assert batch.forwards <= rows or batch.units == 1
    assert seen == list(zip(all_of.row.tolist(), all_of.pair.tolist(), strict=True))
    cut = data.draw(st.integers(0, 6)) * 5  # a rank has whole prompts
    mine, theirs = all_of.where(all_of.row < cut), all_of.where(all_of.row >= cut)
    assert mine.units + theirs.units == all_of.units and mine.valid == theirs.valid == all_of.valid
    assert len(mine.row) + len(theirs.row) == len(all_of.row)


CACHED = {kind: taught(make())[3] for kind, make in MAKE.items()}


def reference_gradient(bench: Bench, experience: Any, given: Any) -> dict[str, torch.Tensor]:
    """The objective of each prompt's valid samples with all their pairs, averaged over what the unit is."""
    algorithm = bench.context.algorithm
    forest, ok = experience.forest, given.advantage.ok
    x0 = forest.nodes[forest.leaves.node]
    slot = forest.leaves.prompt
    ids = [(experience.iteration, int(s), n % 5) for n, s in enumerate(slot)]
    bench.trainable.zero_grad()
    prompts = [(slot == s) & ok for s in range(6) if bool(((slot == s) & ok).any())]
    for mask in prompts:
        rows = mask.nonzero()[:, 0]
        batch = renoise_leaves(
            x0[rows],
            given.advantage.value[rows],
            slot[rows],
            [ids[int(r)] for r in rows],
            algorithm.first.renoise,
            bench.context.seed,
            experience.schedule,
        )
        share = 1 / len(prompts) if algorithm.objective.unit == "group" else len(rows) / int(ok.sum())
        (algorithm.objective(predictors(bench.context, experience.prompts), batch).value * share).backward()
    return {n: p.grad.clone() for n, p in bench.model.network.named_parameters()}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("rows", [1000, 13])
def test_the_loop_has_the_gradient_of_all_pairs_at_once(kind: str, rows: int) -> None:
    """Pairs drawn one by one equal those drawn together; groups of any size are one term each."""
    bench = Bench(algorithm=MAKE[kind](), reward=failing, train_rows=rows, max_grad_norm=1e9)
    with torch.no_grad():  # away from old, where heads have more than one term
        bench.model.network.mean.bias.add_(0.05)
    experience = bench.collect()
    want = reference_gradient(bench, experience, credit(bench.context, experience))
    bench.update(experience)
    for name, parameter in bench.model.network.named_parameters():
        size = float(want[name].abs().max())
        assert parameter.grad is not None and size > 1e-5
        assert float((parameter.grad - want[name]).abs().max()) <= 2e-5 * size, name


def test_a_group_in_a_batch_is_one_prompt_at_one_pair() -> None:
    bench, experience, given, all_of = taught(dgpo(4, 5), reward=brightness)
    batch = bench.batch(experience, given, all_of)
    for number in batch.group.unique():
        here = batch.group == number
        assert int(here.sum()) == 5 and len(batch.rows[here].unique()) == 1
        assert len(batch.t[here].unique()) == 1 and len(batch.noise[here].flatten(1).unique(dim=0)) == 1
    assert len(batch.group.unique()) == 6 * 2
    bench, *rest = taught(diffusion_nft(4, 5), reward=brightness)
    batch = bench.batch(*rest)
    assert torch.equal(batch.group, batch.rows) and len(batch.noise.flatten(1).unique(dim=0)) == len(batch)


@pytest.mark.parametrize("kind", MAKE)
def test_a_rank_without_items_can_compute_one(kind: str) -> None:
    bench, experience, given, all_of = taught(MAKE[kind](), reward=brightness)
    alone = all_of.one(7)
    batch = bench.batch(experience, given, alone)
    loss = bench.context.algorithm.objective(predictors(bench.context, experience.prompts), batch)
    many = bench.context.algorithm.objective(
        predictors(bench.context, experience.prompts), bench.batch(experience, given, all_of)
    )
    assert list(loss.metrics) == list(many.metrics), "ranks exchange metrics by place"
    (loss.value * 0).backward()


def test_several_updates_move_off_policy_and_old_stays_for_the_iteration() -> None:
    bench = Bench(algorithm=v_grpo(4, 5, 3, clip=0.5, soft_clip=None), updates=4)
    first, second = bench.iterate(0), bench.iterate(1)
    assert first["updates"] == 4 and first["log_ratio_max"] > 1e-4 and second["log_ratio_max"] > 1e-4
    one = Bench(algorithm=v_grpo(4, 5, 3, clip=0.5, soft_clip=None), updates=1)
    assert max(one.iterate(i)["log_ratio_max"] for i in range(3)) <= 1e-6, "Copy() is the policy that sampled"


# ------------------------------------------------------------------------------------------------------------- resume
def go(folder: Path, name: str, resume: bool = False) -> Path:
    lag = {"lag": "type1"} if name == "diffusion_nft" else {}
    options: dict[str, Any] = {
        "iterations": 5,
        "algorithm": {"name": name, "steps": 4, "group": 4, **lag},
        "optimizer": {"updates_per_iteration": 2, "ema_decay": 0.7},
        "checkpoint": {"every": 2},
    }
    settings = config(folder, **options)
    return train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=resume).folder


@pytest.mark.parametrize("name", ["diffusion_nft", "crd"])
def test_a_killed_run_with_lagged_sets_resumes_bitwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(tmp_path / "whole" / "toy", name)
    for left in (4, 9, 13):
        folder = tmp_path / str(left) / "toy"
        countdown = Countdown(left, dies)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Records, "_append", countdown.wrap(trainer.Records._append))
            with pytest.raises(Killed):
                go(folder, name)
        assert_equal(whole, go(folder, name, resume=True))
