"""Step-wise credit against a forest whose figures are counted by hand, and against a real iteration."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from fake import Bench, brightness, tempflow
from torch import Tensor

from tempflow.core.credit import Advantage, group_index
from tempflow.core.forest import Edges, Forest, Leaves
from tempflow.train import records
from tempflow.train.identity import Identity
from tempflow.train.records import Records, by_step


def forest(steps: list[int], trained: list[bool]) -> Forest:
    """Edges with those steps; nothing else of them matters here."""
    zero, one = torch.zeros(len(steps), dtype=torch.long), torch.ones(len(steps))
    edges = Edges(zero, zero, torch.tensor(steps), zero, zero, zero, one, one, one > 0, torch.tensor(trained))
    empty = torch.zeros(0, dtype=torch.long)
    return Forest(torch.zeros(1, 1), edges, Leaves(empty, empty, empty), (empty, empty), 4)


def test_by_hand() -> None:
    nan = math.nan
    grown = forest([2, 0, 0, 0, 0, 1, 3], [True, True, True, True, True, True, False])
    ok = torch.tensor([True, True, True, True, False, False, True])
    live = torch.tensor([True, True, True, False, False, False, True])
    advantage = Advantage(torch.tensor([-2.0, 1.0, -0.5, 0.0, 0.0, 0.0, 9.0]), ok, live)
    weight = torch.tensor([0.5, 2.0, 2.0, 2.0, 2.0, 1.0, 7.0])
    value = torch.tensor([1.0, 1.0, 3.0, 4.0, nan, nan, 9.0])
    group = torch.tensor([0, 1, 1, 2, 1, 3, 4])
    lines = by_step(grown, advantage, weight, value, group)
    nothing = dict.fromkeys(("live", "advantage", "spread", "weight", "credit"))
    assert lines == [
        {"step": 0, "edges": 3, "failed": 1, "live": pytest.approx(2 / 3), "advantage": 0.5,
         "spread": pytest.approx(2 / 3), "weight": 2.0, "credit": 1.0},
        {"step": 1, "edges": 0, "failed": 1, **nothing},
        {"step": 2, "edges": 1, "failed": 0, "live": 1.0, "advantage": 2.0, "spread": 0.0, "weight": 0.5,
         "credit": 1.0},
    ]  # fmt: skip
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines
    assert all("spread" not in line for line in by_step(grown, advantage, weight))


def test_agrees_with_an_iteration_of_a_run() -> None:
    def sometimes(images: list, prompts: list[str]) -> list[float | None]:
        return [None if i % 7 == 0 else score for i, score in enumerate(brightness(images, prompts))]

    bench = Bench(algorithm=tempflow(), reward=sometimes)
    grown = bench.collect()
    algorithm, trees, scores = bench.context.algorithm, grown.forest, grown.scores
    advantage = algorithm.credit(scores, trees)
    weight: Tensor = algorithm.first.weigh(trees, bench.context.schedule, algorithm.dynamics)
    value, _ = trees.backup(*scores.total(None))
    lines = by_step(trees, advantage, weight, value, group_index(trees.edges, ("prompt", "root", "step")))
    count = sum(line["edges"] for line in lines)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert count == int((trees.edges.trained & advantage.ok).sum())
    assert count + sum(line["failed"] for line in lines) == int(trees.edges.trained.sum())
    dead = sum(line["edges"] * (1 - line["live"]) for line in lines) / count
    assert dead == pytest.approx(1 - int((trees.edges.trained & advantage.live).sum()) / count)
    live = trees.edges.trained & advantage.live
    whole = (advantage.value.abs() * weight)[live].double().sum().item()
    assert sum(line["edges"] * line["credit"] for line in lines) == pytest.approx(whole)
    assert all(line["spread"] > 0 for line in lines)


def test_a_run_that_began_and_ended_meanwhile_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked at the folder while nothing was there."""
    claim = records.claim

    def late(folder: Path, kind: str) -> Path:
        monkeypatch.setattr(records, "claim", claim)
        Records(folder, "name: first", Identity({}, {})).close()
        return claim(folder, kind)

    monkeypatch.setattr(records, "claim", late)
    for _ in range(2):  # the one that was refused let go of the folder
        with pytest.raises(ValueError, match="already holds a run"):
            Records(tmp_path / "run", "name: second", Identity({}, {}))
    assert (tmp_path / "run" / "config.yaml").read_text() == "name: first"
