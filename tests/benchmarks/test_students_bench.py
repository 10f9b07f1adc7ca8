"""The figure of students and their teacher, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks.students as bench_of
from benchmarks.runs import draw_scatters, packed
from benchmarks.students import Bench, page, rows_of
from tempflow.report.walks import diversity_figure, steps_figure
from tempflow.request import Prompt


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Two teachers, two seeds of one method, and a run that a guard stopped; twelve pictures of four prompts."""
    prompts = [Prompt(f"{i // 3} circles", {"kind": "count"}) for i in range(12)]
    monkeypatch.setattr(bench_of, "tested", lambda config: prompts)
    results = {
        "teacher_10_steps": (5, [0.18, 0.17, 0.19]),
        "teacher_10_steps_guided": (8, [0.17, 0.16, 0.18]),
        "match-0": (3, [0.16, 0.15, 0.17]),
        "match-1": (6, [0.14, 0.13, 0.15]),
        "dmd2-0": (9, [0.1, 0.1, 0.1]),
    }
    for name, (right, spread) in results.items():
        told = {"after": right / 12, "after_bits": packed(np.arange(12) < right), "pictures": 12, "graded": 0.5}
        told |= {"spread": spread, "cost": {"forward_equivalents": 100}}
        told["stopped"] = "collapse at iteration 3" if name == "dmd2-0" else None
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    return Bench("base", results=tmp_path)


def test_rows_are_means_over_seeds_beside_the_teachers(bench: Bench) -> None:
    rows = rows_of(bench, [0, 1, 2], lambda grid, steps: steps - (grid == "scheduler"))
    assert [(r.name, r.reference, r.grid, r.steps, r.useful, r.guidance) for r in rows] == [
        ("teacher", True, "scheduler", 10, 9, 1.0),
        ("teacher", True, "scheduler", 10, 9, 1.5),
        ("match", False, "useful", 4, 4, 1.0),
    ]
    assert [r.score for r in rows] == pytest.approx([5 / 12, 8 / 12, 4.5 / 12])
    assert rows[2].diversity == pytest.approx(0.15) and rows[2].spread == pytest.approx((0.14, 0.16))
    assert all(r.interval is not None and r.score is not None and r.interval[0] < r.score for r in rows)


def test_the_table_has_the_same_rows(bench: Bench) -> None:
    lines = page(bench, [0, 1, 2]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| teacher, 10 steps",
        "| teacher, 10 steps, guided",
        "| match",
    ]
    assert "0.250, 0.500 | 0.375 [" in lines[4] and "| 0.150 | 100 |" in lines[4]


def test_both_figures_are_drawn_one_beneath_the_other(bench: Bench, tmp_path: Path) -> None:
    rows = rows_of(bench, [0], lambda grid, steps: steps)
    figures = [figure for figure in (steps_figure(rows, "strict"), diversity_figure(rows, "strict")) if figure]
    assert [[mark.label for mark in figure.marks] for figure in figures] == [
        ["teacher, guidance 1", "teacher, guidance 1.5", "match"]
    ] * 2
    for count in (1, 2):
        draw_scatters(figures[:count], tmp_path / "new" / f"{count}.png")
    one, two = (Image.open(tmp_path / "new" / f"{count}.png") for count in (1, 2))
    assert one.width == two.width and two.height == 2 * one.height and len(np.unique(np.asarray(two.convert("L")))) > 20
