"""RATS in the real loop: what it is made of, what it costs, prompts that stay together, its teacher, and refusals."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, TokenFake, brightness, config, same
from kinds import patchy

from tempflow.algorithms import rats
from tempflow.algorithms.lesson import Batch
from tempflow.core.objective.matching import NegativeAware
from tempflow.core.objective.shaping import GatedShaping
from tempflow.train.trainer import train


def bench_of(model: Fake | None = None, reward: Any = brightness, rows: int = 64, **options: Any) -> Bench:
    return Bench(model, rats(**{"noises": 3, "parts": 2, **options}), reward, train_rows=rows, rate=0.05)


def test_arguments_become_its_loss_and_its_weight_sets() -> None:
    made = rats(weight=0.5, square=2.0, temperature=0.3, parts=4, shift=1.0, teacher_guidance=2.0, mix=0.7)
    assert made.objective == GatedShaping(0.5, 2.0, 0.3, 4, 1.0, 2.0, NegativeAware(0.7))
    assert made.sets == ("teacher", "old") and made.first.together and not made.rolls_out  # type: ignore[attr-defined]
    assert [made.rule("teacher").decay(n) for n in (1, 2, 500)] == [0.99] * 3, "no warm-up"
    assert rats(reward_term="none").sets == ("teacher",) and rats(reward_term="none").objective.reward is None


@pytest.mark.parametrize("kind", [Fake, TokenFake])
@pytest.mark.parametrize("term", ["nft", "none"])
def test_rows_and_scores_are_the_costs(term: str, kind: type[Fake]) -> None:
    bench = bench_of(kind(), reward_term=term, turns=2, teacher_guidance=2.0)
    bench.model.rows.clear()
    before = bench.trainable.state()
    seen = bench.iterate()
    counter, trained = bench.counter, 8 if term == "nft" else 4
    assert counter.train == bench.context.algorithm.cost(0, 6).trained_edges == 6 * 3 * 2 * trained
    assert counter.alone == 6 * 3 * 2 * 16 and counter.decodes == counter.reward_calls == 6 * 3 * 2 * 2
    assert sum(bench.model.rows) == counter.train + counter.alone + counter.reference
    assert seen["updates"] == 2 and 0 < seen["gate"] < 1 and not same(before, bench.trainable.state())
    assert next(iter(seen)) == "reward" and ("optimality" in seen) == (term == "nft")


def test_a_prompt_s_samples_stay_in_one_minibatch_and_no_batch_changes_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, ends, split = list[set[int]](), list[Any](), Batch.minibatches

    def watched(batch: Batch, rows: int) -> list[Batch]:
        found = split(batch, rows)
        for part in found:
            groups.append(set((part.row // 3).tolist()))
            assert len(part.row) == 3 * part.units == 3 * len(groups[-1])
        return found

    monkeypatch.setattr(Batch, "minibatches", watched)
    for rows in (1000, 50, 1):
        groups.clear()
        bench = bench_of(rows=rows, reward=patchy)
        for iteration in range(2):  # in the second one the spread is known
            bench.iterate(iteration)
        ends.append(bench.trainable.state())
        assert len(groups) == 2 * {1000: 1, 50: 3, 1: 6}[rows]
    for end in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(value, end[name], rtol=1e-4, atol=1e-5)


def test_the_teacher_is_a_slow_average_of_the_student() -> None:
    bench = bench_of(teacher_decay=0.75)
    want = {name: value.clone() for name, value in bench.trainable.named().items()}
    for iteration in range(2):
        bench.iterate(iteration)
        want = {name: 0.75 * want[name] + 0.25 * value for name, value in bench.trainable.named().items()}
    for name, value in bench.weight_sets.sets["teacher"].named().items():
        torch.testing.assert_close(value, want[name])
    now = dict(bench.trainable.named())
    assert same(dict(bench.weight_sets.sets["old"].named()), now), "and old is the student as an iteration begins"


def test_without_a_spread_the_first_iteration_shapes_alone() -> None:
    first = bench_of(turns=1)
    assert first.iterate()["optimality"] == 0.5 and first.counter.spread is not None
    assert first.iterate(1)["optimality"] == pytest.approx(0.5) and first.counter.scores == 2 * 6 * 3 * 2


def test_a_run_from_its_configuration(tmp_path: Path) -> None:
    made = config(tmp_path / "rats", algorithm={"name": "rats", "steps": 3, "noises": 4, "parts": 2}, iterations=3)
    run = train(made, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(
        {"reward", "teacher_reward", "gate", "failed_rewards"} <= line.keys() for line in lines
    )


BAD: dict[str, Any] = {
    "steps": 0,
    "noises": 0,
    "teacher_guidance": float("inf"),
    "teacher_decay": 1.0,
    "parts": 0,
    "shift": 0.0,
    "weight": -1.0,
    "square": -1.0,
    "temperature": 0.0,
    "reward_term": "grpo",
    "mix": 0.0,
    "turns": 0,
}


@pytest.mark.parametrize("argument", BAD)
def test_a_bad_argument_is_named_in_one_line(argument: str) -> None:
    assert BAD.keys() == inspect.signature(rats).parameters.keys()
    with pytest.raises(ValueError) as caught:
        rats(**{argument: BAD[argument]})
    assert str(caught.value).startswith(f"{argument}: ") and "\n" not in str(caught.value)


def test_nothing_to_teach_is_refused() -> None:
    with pytest.raises(ValueError, match="weight: 0 beside no reward's term teaches nothing"):
        rats(weight=0.0, reward_term="none")
    assert replace(rats(weight=0.0).objective, weight=0.5) == rats(weight=0.5).objective
