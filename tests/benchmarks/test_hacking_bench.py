"""The bench of hacked scorers: what its table says of runs, and what it runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hacking import config, told


def test_the_table_has_both_judges_before_at_best_and_at_the_end() -> None:
    run = {"shapes_scorer": [0.5, 0.7, 0.9], "shapes": [0.5, 0.6, 0.4], "shapes_strict": [0.1, 0.2, 0.0]}
    rows = told({"refl": [run, {**run, "shapes": [0.5, 0.5, 0.2]}]}).splitlines()
    assert len(rows) == 2 + 3
    assert [cell.strip() for cell in rows[3].strip("|").split("|")] == [
        *("ReFL", "the verifier, graded", "0.500", "0.550", "0.300", "0.400, 0.200")
    ]


def test_runs_are_the_recipes_with_the_verifier_looking_on(tmp_path: Path) -> None:
    run = config("draft", 2, 50, tmp_path)
    assert [reward.name for reward in run.rewards] == ["shapes_scorer"] and run.seed == 2
    assert set(run.evaluation.gold) == {"shapes", "shapes_strict"} and run.evaluation.every == 5
