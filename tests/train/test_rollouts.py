"""Rollouts are data: chunks can be made in any order, by themselves, and joined by slot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config, same, tempflow, weights
from kinds import KINDS, bench_of, parts, parts_of, same_bits
from torch import Tensor

from tempflow.core.plan import ode
from tempflow.train.experience import experience_of
from tempflow.train.judged import ByLatents
from tempflow.train.parallel import World
from tempflow.train.rollouts import Rollouts
from tempflow.train.source import chunks_of, source_of
from tempflow.train.trainer import train

every = pytest.mark.parametrize("kind", KINDS)


def joined(bench: Bench, prompts: list, some: list[Rollouts]):
    algorithm = bench.context.algorithm
    plans = algorithm.plans(0, len(prompts))
    return experience_of(bench.context, prompts, plans, Rollouts.join(some)).of(algorithm.first)


@every
def test_they_hold_tensors_and_plain_values_alone(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    experience = bench.collect(prompts=prompts)
    for item in (*parts_of(bench, prompts), experience):
        held = parts(item)
        wrong = {k: v for k, v in held.items() if not isinstance(v, Tensor | int | float | str | type(None))}
        assert wrong == {} and sum(isinstance(v, Tensor) for v in held.values()) > 20


@every
def test_what_a_kind_is_meant_to_show_is_there(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    some = parts_of(bench, prompts)
    one = some[0]
    assert len(some) > 1 and {slot for part in some for slot in part.slots} == set(range(6))
    assert ("leaf latents" if "leaves" in bench.context.algorithm.keeps else "edges") == (
        "leaf latents" if len(one.forest.edges) == 0 and bool((one.forest.leaves.node >= 0).all()) else "edges"
    )
    assert bool(one.forest.edges.traits) == (kind == "edge traits")
    assert bool(one.forest.leaves.traits) == (kind == "leaf traits")
    assert (one.forest.edges.mean is not None) == (kind == "means")
    assert bool(len(one.drafts)) == bool(one.fidelity.isfinite().any()) == (kind == "drafts")
    assert bool(one.judged.latent) == isinstance(one.judged, ByLatents) == (kind == "latent scores")
    if kind != "offline":
        assert not all(bool(part.scores.ok.all()) for part in some), "some scores fail"


@every
def test_chunks_in_another_order_joined_by_slot_are_the_same_bits(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    want = bench.collect(prompts=prompts)
    again, _ = bench_of(kind, tmp_path)
    backwards = parts_of(again, prompts, lambda chunks: chunks[::-1])
    same_bits(joined(again, prompts, backwards), want)
    source = source_of(again.context, prompts, 0, again.clock)
    alone = [source.roll_out([part.slots])[0] for part in backwards]
    same_bits(joined(again, prompts, alone[1:] + alone[:1]), want)


@every
def test_training_on_joined_chunks_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    start = weights(bench.model)
    metrics = bench.update(bench.collect(prompts=prompts))
    again, _ = bench_of(kind, tmp_path)
    experience = joined(again, prompts, parts_of(again, prompts, lambda chunks: chunks[::-1]))
    found = again.update(experience)
    assert found.keys() == metrics.keys() and repr(found) == repr(metrics)
    assert same(weights(again.model), weights(bench.model)) and not same(weights(bench.model), start)


@every
def test_without_overlap_the_bits_are_the_same(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    again, _ = bench_of(kind, tmp_path, overlap=False)
    same_bits(again.collect(prompts=prompts), bench.collect(prompts=prompts))
    assert again.counter == bench.counter and again.model.rows == bench.model.rows


def test_no_forward_is_added_by_binding_where_learning_happens() -> None:
    bench = Bench(algorithm=tempflow(kl=0.1), rollout_leaves=40)
    experience = bench.collect()
    assert sum(bench.model.rows) == bench.counter.rollout == bench.context.algorithm.cost(0, 6).forwards
    bench.update(experience)
    assert sum(bench.model.rows) == bench.counter.forwards


# ---------------------------------------------------------------------------------------------------------- chunks
def test_chunks_are_whole_prompts_within_the_number_of_leaves() -> None:
    plans = [ode(2, n) for n in (3, 4, 5, 20, 1, 1)]
    assert chunks_of(plans, 8, range(6)) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert chunks_of(plans, 1, range(6)) == [range(n, n + 1) for n in range(6)]
    assert chunks_of(plans, 1024, range(6)) == [range(6)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_change_only_the_chunks_that_a_block_cuts(ranks: int) -> None:
    plans = [ode(2, 3)] * 24
    alone = chunks_of(plans, 12, range(24))
    assert [len(chunk) for chunk in alone] == [4] * 6
    blocks = [World(rank, ranks).block(24) for rank in range(ranks)]
    found = [chunk for block in blocks for chunk in chunks_of(plans, 12, block)]
    assert [slot for chunk in found for slot in chunk] == list(range(24))
    starts = {block.start for block in blocks} - {0}
    whole = [chunk for chunk in alone if not starts & set(range(chunk.start + 1, chunk.stop))]
    assert set(whole) <= set(found) and (ranks == 4 or found == alone)


def go(folder: Path, leaves: int, resume: bool = False, iterations: int = 2, **options: Any) -> Path:
    settings = config(folder, iterations=iterations, rollout_leaves=leaves, **options)
    return train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=resume).folder


def test_a_run_advances_in_its_chunks_and_its_files_are_those_of_one_without_overlap(tmp_path: Path) -> None:
    chunked, serial = go(tmp_path / "a", 20), go(tmp_path / "b", 20, overlap=False)
    for file in ("metrics.jsonl", "evaluation.jsonl", "steps.jsonl", "model/model.safetensors"):
        assert (chunked / file).read_bytes() == (serial / file).read_bytes()
    assert "rollout_leaves: 20" in (chunked / "config.yaml").read_text()


def test_a_resumed_run_has_the_chunks_that_it_began_with(tmp_path: Path) -> None:
    folder = go(tmp_path / "run", 20)
    with pytest.raises(ValueError, match=r"rollout_leaves: 20 → 40"):
        go(folder, 40, resume=True, iterations=2)


# ---------------------------------------------------------------------------------------------------------- faults
def test_what_cannot_be_joined_is_refused() -> None:
    bench = Bench(rollout_leaves=40)
    a, b, c = parts_of(bench, [*bench.collect().prompts])
    with pytest.raises(ValueError, match=r"parts = \[\]: nothing to join"):
        Rollouts.join([])
    with pytest.raises(ValueError, match=r"slots: 0 comes after 1; nearest valid: parts of neighbouring slots"):
        Rollouts.join([a, b, a])
    with pytest.raises(ValueError, match=r"iteration: 3 in one part; nearest valid: 0"):
        Rollouts.join([replace(c, iteration=3), a])
    other = replace(b.schedule, sigmas=b.schedule.sigmas * 0.5)
    with pytest.raises(ValueError, match=r"schedule: parts walked different grids"):
        Rollouts.join([a, replace(b, schedule=other)])
    with pytest.raises(ValueError, match=r"drafts: parts have pools of several sizes"):
        Rollouts.join([a, replace(b, drafts=torch.zeros(4, dtype=torch.long))])
    with pytest.raises(ValueError, match=r"scores: 18 rows; nearest valid: 36"):
        replace(a, scores=a.scores.select(torch.arange(18)))
    with pytest.raises(ValueError, match=r"slots: \[1, 0\] must ascend"):
        replace(a, slots=(1, 0))


def test_a_missing_chunk_is_told() -> None:
    bench = Bench(rollout_leaves=40)
    prompts = [*bench.collect().prompts]
    a, b, c = parts_of(bench, prompts)
    with pytest.raises(ValueError, match=r"slots: \[0, 1, 4, 5\] of rank 0; nearest valid: range\(0, 6\)"):
        joined(bench, prompts, [c, a])
    joined(bench, prompts, [c, a, b])
