"""A chunk of rollouts on disk: the same bits back, or one line that says why not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake import Bench, same, weights
from kinds import KINDS, bench_of, parts_of, same_bits
from safetensors.torch import load_file, save_file

from tempflow.core.schedule import Schedule
from tempflow.train.checkpoint import sha256
from tempflow.train.experience import experience_of
from tempflow.train.rollouts import FACTS, TENSORS, RolloutFileError, Rollouts, read, write

every = pytest.mark.parametrize("kind", KINDS)


@every
def test_every_kind_comes_back_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    for number, part in enumerate(parts_of(bench, prompts)):
        folder = tmp_path / f"chunk-{number}"
        write(part, folder)
        assert {file.name for file in folder.iterdir()} == {FACTS, TENSORS}
        same_bits(read(folder), part)


@every
def test_training_on_what_was_read_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    bench, prompts = bench_of(kind, tmp_path)
    metrics = bench.update(bench.collect(prompts=prompts))
    again, _ = bench_of(kind, tmp_path)
    for part in parts_of(again, prompts, lambda chunks: chunks[::-1]):
        write(part, tmp_path / "chunks" / str(part.slots[0]))
    found = Rollouts.join([read(folder) for folder in (tmp_path / "chunks").iterdir()])
    plans = again.context.algorithm.plans(0, len(prompts))
    assert repr(again.update(experience_of(again.context, prompts, plans, found))) == repr(metrics)
    assert same(weights(again.model), weights(bench.model))


@pytest.fixture
def chunk() -> Rollouts:
    bench = Bench(rollout_leaves=40)
    return parts_of(bench, [*bench.collect().prompts])[1]


@pytest.fixture
def folder(chunk: Rollouts, tmp_path: Path) -> Path:
    write(chunk, tmp_path / "chunk")
    return tmp_path / "chunk"


def test_odd_numbers_and_dtypes_come_back(chunk: Rollouts, tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, -0.0, math.inf, 5e-324], dtype=torch.float64)
    odd = torch.cat([odd, (odd[:1].view(torch.int64) + 77).view(torch.float64)])  # a NaN with a payload
    edges, leaves = len(chunk.forest.edges), len(chunk.forest.leaves)
    forest = replace(
        chunk.forest,
        nodes=chunk.forest.nodes.bfloat16(),
        edges=replace(
            chunk.forest.edges, traits={"a/b ü": odd.repeat(edges)[:edges], "half": torch.ones(edges, 2).half()}
        ),
        leaves=replace(chunk.forest.leaves, traits={"a/b ü": odd.repeat(leaves)[:leaves]}),
    )
    grid = Schedule(chunk.schedule.sigmas * 0.9 + 0.02, spread=0.9, gain=1.1)
    made = replace(chunk, forest=forest, schedule=grid)
    write(made, tmp_path / "odd")
    same_bits(read(tmp_path / "odd"), made)


def test_tokens_come_back(chunk: Rollouts, tmp_path: Path) -> None:
    forest = chunk.forest
    tokens = torch.arange(forest.nodes.numel()).view_as(forest.nodes) + 2**40
    made = replace(chunk, forest=replace(forest, nodes=tokens, edges=replace(forest.edges, mean=None)))
    write(made, tmp_path / "tokens")
    found = read(tmp_path / "tokens")
    same_bits(found, made)
    same_bits(Rollouts.join([found]), made)


def test_tensors_that_share_memory_are_written_apart(chunk: Rollouts, tmp_path: Path) -> None:
    signals = replace(chunk.signals, grid=chunk.signals.diversity, high_frequency=chunk.signals.diversity)
    made = replace(chunk, signals=signals)
    write(made, tmp_path / "shared")
    same_bits(read(tmp_path / "shared"), made)


def test_nothing_is_written_over(folder: Path, chunk: Rollouts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: .* has 'rollouts\.\w+'; nearest valid: a new or empty folder"):
        write(chunk, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"has 'notes.txt'"):
        write(chunk, tmp_path / "mine")


def changed(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        facts[key] = value
        (folder / FACTS).write_text(json.dumps(facts))

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        del facts[key]
        (folder / FACTS).write_text(json.dumps(facts))

    return change


def retold(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors, with a sum that is right: a file that somebody made."""

    def write_anew(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)
        changed("bytes", (folder / TENSORS).stat().st_size)(folder)
        changed("sha256", sha256(folder / TENSORS))(folder)

    return write_anew


def cut(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-8])


def flipped(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-5] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


def elsewhere(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "outside.safetensors")
    (folder / TENSORS).symlink_to(folder.parent / "outside.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no facts": (lambda f: (f / FACTS).unlink(), r"rollouts.json is not there as a file"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), r"rollouts.safetensors is not there as a file"),
    "half written": (lambda f: (f / FACTS).write_text('{"kind": "temp'), r"Unterminated string"),
    "no JSON": (lambda f: (f / FACTS).write_bytes(b"\xff\xfe\x00"), r"can't decode"),
    "deep": (lambda f: (f / FACTS).write_text("[" * 200_000), r"recursion"),
    "a list": (lambda f: (f / FACTS).write_text("[1, 2]"), r"kind is 'None'; nearest valid: 'tempflow rollouts'"),
    "foreign": (changed("kind", "something else"), r"kind is 'something else'; nearest valid: 'tempflow rollouts'"),
    "newer": (changed("format", 4), r"format is 4; nearest valid: 3"),
    "no slots": (without("slots"), r"'slots' is missing"),
    "slots that are none": (changed("slots", ["../x"]), r"slots has '../x'; nearest valid: 0"),
    "other slots": (changed("slots", [4, 5]), r"prompt: names a slot that is none of \[4, 5\]"),
    "a negative number": (changed("iteration", -1), r"iteration has '-1'; nearest valid: 0"),
    "cut": (cut, r"is not the file that was written \(\d+ of \d+ bytes\)"),
    "a flipped bit": (flipped, r"is not the file that was written"),
    "a link out of the folder": (elsewhere, r"rollouts.safetensors is not there as a file"),
    "no safetensors": (retold(lambda t: t.pop("broken")), r"'broken' is missing"),
    "too much": (retold(lambda t: t.update(extra=torch.ones(1))), r"has 'extra', which is no part of rollouts"),
    "another dtype": (
        retold(lambda t: t.update({"forest/edges/step": t["forest/edges/step"].int()})),
        r"forest/edges/step is torch.int32; nearest valid: torch.int64",
    ),
    "out of the forest": (
        retold(lambda t: t["forest/edges/parent"].fill_(10**6)),
        r"edges.parent has 1000000; nearest valid: -1 to",
    ),
    "a forest of fewer steps": (changed("steps", 1), r"steps is 1, but the schedule has 4; nearest valid: 4"),
    "a forest of more steps": (changed("steps", 9), r"steps is 9, but the schedule has 4; nearest valid: 4"),
    "a forest of no steps": (changed("steps", 0), r"steps is 0, but the schedule has 4; nearest valid: 4"),
    "a step beyond the grid": (
        retold(lambda t: t["forest/edges/step"].fill_(4)),
        r"edges.step has 4; nearest valid: 0 to 3",
    ),
    "whole log-probs": (
        retold(lambda t: t.update({"forest/edges/log_prob": torch.zeros_like(t["forest/edges/step"])})),
        r"forest/edges/log_prob is torch.int64; nearest valid: torch.float32",
    ),
    "whole scales": (
        retold(lambda t: t.update({"forest/edges/scale": t["forest/edges/scale"].int()})),
        r"forest/edges/scale is torch.int32; nearest valid: torch.float32",
    ),
    "nodes that are flags": (
        retold(lambda t: t.update({"forest/nodes": t["forest/nodes"] > 0})),
        r"forest/nodes is torch.bool; nearest valid: torch.float32",
    ),
    "nodes of short integers": (
        retold(lambda t: t.update({"forest/nodes": t["forest/nodes"].int()})),
        r"forest/nodes is torch.int32; nearest valid: torch.float32, or torch.int64 for tokens",
    ),
    "negative tokens": (
        retold(lambda t: t.update({"forest/nodes": t["forest/nodes"].long().clamp(max=0) - 3})),
        r"forest/nodes has the token -\d+; nearest valid: 0",
    ),
    "tokens with means": (
        retold(
            lambda t: t.update(
                {
                    "forest/nodes": t["forest/nodes"].long().abs(),
                    "forest/edges/mean": torch.zeros(len(t["forest/edges/step"]), *t["forest/nodes"].shape[1:]),
                }
            )
        ),
        r"forest/edges/mean: steps of tokens have none; nearest valid: without it",
    ),
    "a table of scales": (
        retold(lambda t: t.update({"forest/edges/scale": t["forest/edges/scale"][:, None].repeat(1, 2)})),
        r"forest/edges/scale has shape \[\d+, 2\]; nearest valid: one dimension",
    ),
    "means of another shape": (
        retold(lambda t: t.update({"forest/edges/mean": torch.zeros(len(t["forest/edges/step"]), 3)})),
        r"edges.mean has shape \[\d+, 3\]; nearest valid: \[\d+, 2, 2, 2\]",
    ),
    "an unknown fault": (retold(lambda t: t["broken"].fill_(7)), r"broken has 7; nearest valid: 0 to 3"),
    "a fault below all": (retold(lambda t: t["broken"][:1].fill_(-1)), r"broken has -1; nearest valid: 0 to 3"),
    "drafts' unknown faults": (
        retold(lambda t: t.update(drafts=torch.full_like(t["signals/prompt"], 4))),
        r"drafts has 4; nearest valid: 0 to 3",
    ),
    "another length": (
        retold(lambda t: t.update({"forest/edges/depth": t["forest/edges/depth"][:-1].clone()})),
        r"edges.depth has shape",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_one_line(fault: str, folder: Path) -> None:
    spoil, told = FAULTS[fault]
    spoil(folder)
    with pytest.raises(RolloutFileError, match=told) as seen:
        read(folder)
    assert "\n" not in str(seen.value) and str(folder) in str(seen.value) and len(str(seen.value)) < 500


def test_what_is_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RolloutFileError, match=r"rollouts.safetensors has \d+ bytes; nearest valid: 100"):
        read(folder, most=100)
    monkeypatch.setattr("tempflow.train.rollouts.MAX_FACTS", 10)
    with pytest.raises(RolloutFileError, match=r"rollouts.json has \d+ bytes; nearest valid: 10"):
        read(folder)
