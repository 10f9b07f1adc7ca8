"""Figures over steps and diversity: of runs' own tests and of evaluations, the reference beside the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from folder import HOSTILE, make_run
from html_check import Page

from tempflow.cli.report import report_verb
from tempflow.report import write_report
from tempflow.report.runs import read_evaluation, read_runs
from tempflow.report.walks import Row, diversity_figure, rows_of, steps_figure, walks_of


def figures_of(mean: float, steps: int, grid: str = "useful", guidance: float = 1.0, spread: float = 0.0) -> Any:
    """A report as `tempflow eval` and runs write it; the scheduler's last step changes nothing."""
    told: dict[str, Any] = {"steps": steps, "guidance": guidance, "count": 60, "samples_per_prompt": 2, "prompts": 30}
    told["walk"] = {"grid": grid, "useful": steps - (grid == "scheduler"), "forwards": steps}
    told |= {"seed": 1234, "mean": {"strict": mean}, "interval": {"strict": [mean - 0.03, mean + 0.03]}}
    return told | ({"diversity": {"mean": spread, "interval": [spread - 0.01, spread + 0.01]}} if spread else {})


def student(folder: Path, steps: int = 4, **options: Any) -> Path:
    """A run that took those steps in its test."""
    make_run(folder, **options)
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    for when in ("before", "after"):
        told = figures_of(summary[when]["mean"]["strict"], steps)
        told |= {"count": 30, "samples_per_prompt": 1, "mean": summary[when]["mean"]}
        summary[when] |= told
    file.write_text(json.dumps(summary))
    return folder


def written(file: Path, first: Any, *others: Any) -> Path:
    told = {"generator": "tempflow", "prompts_from": "shapes:test", "height": 32, "width": 32}
    rows = {"rows": [first, *others]} if others else {}
    file.write_text(json.dumps({**told, **first, **rows}))
    return file


def beside(file: Path, run: Path) -> Path:
    """The student, and its teacher on two grids and by two guidances."""
    return written(
        file,
        {"what": str(run), **figures_of(0.6, 4, spread=0.15)},
        {"what": "shapes", **figures_of(0.3, 4, spread=0.2)},
        {"what": "shapes", **figures_of(0.4, 10, "scheduler", spread=0.21)},
        {"what": "shapes", **figures_of(0.5, 10, "scheduler", 1.5, spread=0.19)},
        {"what": "shapes", **figures_of(0.45, 20, "scheduler")},
    )


def test_the_teacher_stands_beside_the_student(tmp_path: Path) -> None:
    run = student(tmp_path / "run", name="pupil")
    walks = walks_of(read_runs([run]), [read_evaluation(beside(tmp_path / "e.json", run))], "strict")
    assert walks is not None and walks.steps is not None and walks.diversity is not None and walks.same_test
    marks = {mark.title.split(":")[0]: mark for mark in walks.steps.marks}
    assert {title: mark.hollow for title, mark in marks.items()} == {
        "shapes (reference), 4 steps, guidance 1": True,
        "shapes (reference), 10 steps (9 useful), guidance 1": True,
        "shapes (reference), 20 steps (19 useful), guidance 1": True,
        "shapes (reference), 10 steps (9 useful), guidance 1.5": True,
        "pupil, 4 steps, guidance 1": False,
    }
    assert [mark.label for mark in walks.steps.marks if mark.label] == [
        "shapes (reference), guidance 1",
        "shapes (reference), guidance 1.5",
        "pupil",
    ]
    (line,) = walks.steps.lines  # one guidance of the teacher, by ascending steps; a single marker is not joined
    joined = [mark for mark in walks.steps.marks if "reference" in mark.title and "guidance 1:" in mark.title]
    assert line.hollow and line.corners == [(mark.x, mark.y) for mark in joined] and len(joined) == 3
    assert [tick.label for tick in walks.steps.x_ticks] == ["4", "9", "19"]
    # what was drawn once a prompt has no diversity, and is not in the second figure
    assert [mark.label for mark in walks.diversity.marks] == [
        "4 steps",
        "shapes (reference), guidance 1, 10 steps",
        "shapes (reference), guidance 1.5, 10 steps",
        "pupil",
    ]
    pupil = walks.diversity.marks[-1]
    assert pupil.left is not None and pupil.right is not None and pupil.left < pupil.x < pupil.right


def test_the_page_shows_both_figures_in_words_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = student(tmp_path / "run", name="pupil", hostile=True)
    file = beside(tmp_path / "e.json", run)
    told = json.loads(file.read_text())
    told["rows"].append({"what": HOSTILE, **figures_of(0.2, 3, HOSTILE, spread=0.1)})
    file.write_text(json.dumps(told))
    out = tmp_path / "r.html"
    assert report_verb([str(run), "--evaluations", str(file), "--output", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.faults == []
    shown = [str(found["aria-label"]) for tag, found in page.tags if str(found.get("aria-label")).startswith("strict")]
    assert [label.split(".")[0] for label in shown] == ["strict over useful steps", "strict over diversity"]
    assert all("4 steps, guidance 1: 0.600 (0.570 … 0.630), diversity 0.150 (0.140 … 0.160)" in s for s in shown)
    text = " ".join(" ".join(page.texts).split())
    assert "Steps and diversity" in text and "compare only roughly" not in text


def test_without_evaluations_runs_of_several_steps_are_drawn_and_others_have_no_heading(tmp_path: Path) -> None:
    two, four = student(tmp_path / "a", 2, name="two"), student(tmp_path / "b", 4, name="four", seed=1)
    page = write_report([two, four], tmp_path / "p.html").read_text()
    assert page.count('class="chart wide scatter"') == 1 and "<h3>strict over useful steps</h3>" in page
    assert "over diversity" not in page and "two, 2 steps, guidance 1: 0.670" in page
    for folders in ([four], [make_run(tmp_path / "old", name="old")]):
        page = write_report(folders, tmp_path / "p.html").read_text()
        assert "Steps and diversity" not in page and 'class="chart wide scatter"' not in page


def test_of_two_rows_alike_the_one_with_diversity_then_the_one_of_more_pictures_counts(tmp_path: Path) -> None:
    run = student(tmp_path / "run", name="pupil")
    few = written(tmp_path / "few.json", {"what": f"{run}/.", **figures_of(0.6, 4), "count": 6})
    rows = rows_of(read_runs([run]), [read_evaluation(few)], "strict")
    assert [(row.name, row.score, row.pictures) for row in rows] == [
        ("shapes (reference)", pytest.approx(0.49), 30),  # what the run started from
        ("pupil", pytest.approx(0.67), 30),
    ]
    diverse = written(tmp_path / "d.json", {"what": str(run), **figures_of(0.61, 4, spread=0.1), "count": 6})
    rows = rows_of(read_runs([run]), [read_evaluation(few), read_evaluation(diverse)], "strict")
    assert [row.score for row in rows if row.name == "pupil"] == [0.61]


def test_the_reference_may_be_another_run_and_other_pictures_are_told(tmp_path: Path) -> None:
    strong, run = student(tmp_path / "strong", name="strong"), student(tmp_path / "run", name="pupil")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"reference": str(strong), "start": str(strong / "model")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    file = written(tmp_path / "e.json", {"what": str(strong), **figures_of(0.7, 8), "seed": 5})
    walks = walks_of(read_runs([run]), [read_evaluation(file)], "strict")
    assert walks is not None and not walks.same_test and walks.diversity is None
    # before the run was its start, which here is the reference itself
    assert [(row.reference, row.steps, row.score) for row in walks.rows] == [
        (True, 4, pytest.approx(0.49)),
        (True, 8, 0.7),
        (False, 4, pytest.approx(0.67)),
    ]
    assert "compare only roughly" in write_report([run], tmp_path / "p.html", evaluations=[file]).read_text()


def test_a_number_of_steps_on_two_grids_makes_two_lines() -> None:
    def row(grid: str, steps: int) -> Row:
        return Row("m", "m", 0, False, grid, steps, steps - (grid == "scheduler"), 1.0, steps / 40, None, 0.1)

    apart = [row(grid, steps) for grid in ("scheduler", "useful") for steps in (4, 10)]
    figure = steps_figure(apart, "s")
    assert figure is not None and len(figure.lines) == 2
    assert [mark.label for mark in figure.marks] == ["", "m, grid scheduler", "", "m, grid useful"]
    mixed = diversity_figure([row("useful", 4), row("scheduler", 10)], "s")
    assert (
        mixed is not None
        and len(mixed.lines) == 1
        and [mark.label for mark in mixed.marks]
        == [
            "4 steps",
            "m, 10 steps",
        ]
    )


def test_all_failed_is_a_row_without_a_marker(tmp_path: Path) -> None:
    lost = {**figures_of(0.0, 8), "mean": {"strict": None}, "interval": {"strict": 5}}
    file = written(tmp_path / "e.json", {"what": "shapes", **lost}, {"what": "shapes", **figures_of(0.2, 4)})
    walks = walks_of([], [read_evaluation(file)], "strict")
    assert walks is not None and walks.steps is not None
    assert len(walks.rows) == 2 and len(walks.steps.marks) == 1 and walks.diversity is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "no file is there"),
        ("{", "is not JSON"),
        ("[]", "not an object"),
        ("{}", "'steps' is missing"),
        ('{"rows": 5}', "not iterable"),
        ('{"rows": []}', "rows is empty"),
        ('{"rows": ["x"]}', ""),
        (json.dumps({"what": "a", **figures_of(0.1, 4), "walk": None}), ""),
        (json.dumps({"what": "a", **figures_of(0.1, 4), "steps": "four"}), "steps is 'four', no whole number from 1"),
        (json.dumps({"what": "a", **figures_of(0.1, 1, "scheduler")}), "useful is '0', no whole number from 1"),
        (json.dumps({"what": "a", **figures_of(0.1, 4), "guidance": "x" * 999}), "guidance is 'xx"),
        (json.dumps({"what": "a", **figures_of(0.1, 4), "mean": 0.5}), "mean is '0.5', no object"),
        (json.dumps({"what": "a", **figures_of(0.1, 4), "prompts": "shapes"}), "prompts is 'shapes', no whole"),
        (json.dumps({"what": 3, **figures_of(0.1, 4)}), "what and grid are texts"),
    ],
)
def test_a_file_that_is_no_evaluation_is_one_line(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "e.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"^evaluations: '.*e\.json' holds no evaluation \(.*nearest valid: ") as error:
        read_evaluation(file)
    assert why in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_evaluation_by_other_rewards_is_told(tmp_path: Path) -> None:
    run = student(tmp_path / "run")
    told = {"what": "shapes", **figures_of(0.1, 4), "mean": {"graded": 0.1, "other": 1.0}}
    with pytest.raises(ValueError, match=r"evaluations: .* has no score 'strict'.*graded, other; .* --rewards strict"):
        write_report([run], tmp_path / "p.html", evaluations=[written(tmp_path / "e.json", told)])
    assert not (tmp_path / "p.html").exists()
