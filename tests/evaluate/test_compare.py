"""Rows of `tempflow eval`: what is asked for, and that all rows see the same prompts and noises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempflow.cli.judge import EvalOptions, asked_rows, beside_of, eval_verb
from tempflow.cli.options import parse
from tempflow.core.scores import Scores
from tempflow.evaluate.compare import Row, table
from tempflow.evaluate.figures import Report, Walk
from tempflow.models import load
from tempflow.report.runs import read_evaluation
from tempflow.report.walks import walks_of
from tempflow.strict import ConfigError


def asked(*words: str) -> list[tuple[object, ...]]:
    rows = asked_rows(parse(EvalOptions, "eval", ["shapes", *words]))
    assert len({(row.how.prompts, row.how.seed, row.how.count, row.how.size) for row in rows}) == 1
    return [(row.what, row.how.grid, row.how.steps, row.how.guidance) for row in rows]


def test_rows_are_every_grid_in_every_number_of_steps_then_what_stands_beside() -> None:
    few = (1.0, 0.75, 0.5, 0.25)
    assert asked() == [("shapes", "own", 10, 1.0)]
    assert asked("--grid", "useful", "--steps", "4", "10") == [
        ("shapes", "useful", 4, 1.0),
        ("shapes", "useful", 10, 1.0),
    ]
    assert asked("--grid", "1", ".75", ".5", ".25") == asked("--grid", "[1, .75, .5, .25]") == [("shapes", few, 4, 1.0)]
    assert asked("--grid", "useful", "[1, .75, .5, .25]", "--steps", "4", "--guidance", "1", "2") == [
        ("shapes", grid, 4, guidance) for grid in ("useful", few) for guidance in (1.0, 2.0)
    ]
    beside = ("shapes:steps=10,guidance=2", "shapes:grid=[1,.75,.5,.25]", "shapes")
    assert asked("--steps", "4", "--seed", "3", "--beside", *beside) == [
        ("shapes", "own", 4, 1.0),
        ("shapes", "own", 10, 2.0),
        ("shapes", few, 4, 1.0),
        ("shapes", "own", 10, 1.0),
    ]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--steps", "0"), "steps: 0 must be ≥ 1; nearest valid: 1"),
        (("--guidance", "1", "0.5"), "guidance: 0.5 must be ≥ 1; nearest valid: 1"),
        (("--grid", "useful", "even"), "grid: 'even' is none of own, scheduler, useful, nor a list of points; .*"),
        (("--grid", "1", "0"), "grid: point 1 is 0, and must be above 0 and below the 1 before it; .*"),
        (("--beside", "shapes:step=4"), "beside: shapes:step=4: step: unknown field; did you mean 'steps'?"),
        (("--beside", "shapes:grid=[2]"), r"beside: shapes:grid=\[2\]: grid: point 0 is 2, .*; nearest valid: 1"),
    ],
)
def test_a_row_that_cannot_be_is_one_line(words: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as error:
        asked(*words)
    assert "\n" not in str(error.value)


def test_a_place_may_have_a_colon() -> None:
    assert beside_of("a:b")[0] == "a:b" and beside_of("a:b:steps=4")[0] == "a:b"


def test_points_that_do_not_fit_the_steps_are_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempflow.evaluate.source.load_source", None)
    with pytest.raises(
        ValueError, match=r"^steps: 10 steps, and the grid \(1, 0.5\) has 2 points.*; nearest valid: 2$"
    ):
        eval_verb(["shapes", "--count", "1", "--beside", "shapes:steps=10,grid=[1,.5]"])


def test_one_table_of_a_student_its_base_and_a_guided_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = load("shapes")
    student.train_fully()
    with torch.no_grad():
        next(iter(student.network.parameters())).mul_(0.5)
    student.save(str(tmp_path / "student"))
    words = [str(tmp_path / "student"), "--count", "2", "--samples-per-prompt", "2", "--grid", "useful", "--steps", "2"]
    words += ["--rewards", "jpeg_compressibility", "--output", str(tmp_path / "rows.json")]
    beside = ["shapes:grid=[1,.5]", "shapes:grid=useful,steps=2", "shapes:steps=2,guidance=2", "shapes:steps=3"]
    assert eval_verb([*words, "--beside", *beside]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "model",
        "grid",
        "steps",
        "useful",
        "guidance",
        "forwards",
        "ms",
        "jpeg_compressibility",
        "diversity",
    ]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["walk"]["grid"], row["walk"]["useful"], row["walk"]["forwards"]) for row in rows] == [
        ("useful", 2, 2), ("(1, 0.5)", 2, 2), ("useful", 2, 2), ("scheduler", 1, 4), ("scheduler", 2, 3),
    ]  # fmt: skip
    means = [row["mean"]["jpeg_compressibility"] for row in rows]
    assert means[1] == means[2] and len(set(means)) == 4  # the same model, noise and grid, and nothing else is alike
    assert all(row["seconds_per_picture"] > 0 and row["diversity"]["mean"] > 0 for row in rows)
    drawn = walks_of([], [read_evaluation(tmp_path / "rows.json")], "jpeg_compressibility")
    assert drawn is not None and drawn.steps is not None and drawn.diversity is not None
    assert [(row.grid, row.useful, row.score) for row in drawn.rows] == [
        (row["walk"]["grid"], row["walk"]["useful"], row["mean"]["jpeg_compressibility"]) for row in rows
    ]
    assert {row.test for row in drawn.rows} == {("shapes:test", "32", "32", "2", "2", "1234")}


def test_what_failed_is_told_by_row() -> None:
    scores = Scores(torch.tensor([[1.0], [0.0]]), torch.tensor([[True], [False]]), ("s",))
    report = Report(scores, ("a", "b"), ("", ""), 4, 2.0, 1, walk=Walk("useful", 4, 8))
    text = table([Row("x", report), Row("y", Report(scores, ("a", "b"), ("", ""), 4, 2.0, 1))])
    assert "row 2: 1 scores of s failed, and are in no mean" in text and "1.000 [" in text
    assert text.splitlines()[1].split()[:7] == ["x", "useful", "4", "4", "2", "8", "?"]
    assert text.splitlines()[2].split()[:7] == ["y", "?", "4", "?", "2", "?", "?"]
