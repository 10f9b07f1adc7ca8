"""UniGenBench's scorer on made-up verdicts, and against a plain re-count of the official rule."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.evaluate.unigenbench import read_verdicts, tally

COLOR, SHAPE, STYLE = "Attribute - Color", "Attribute - Shape", "Style"


def written(file: Path, rows: list[tuple[str, str]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(["index", "prompt", "testpoint", "output", "result_json", "img_path"])
        for n, (points, verdict) in enumerate(rows):
            out.writerow([n, 'a, "b"\nc', points, "text", verdict, f"{n}_0.png"])
    return file


def judged(points: list[str], scores: object) -> tuple[str, str]:
    return str(points), json.dumps({"prompt": "p", "testpoint": points, "score": scores}, indent=4)


def test_scores_are_pooled_over_pictures_and_primaries_over_dimensions(tmp_path: Path) -> None:
    rows = [
        judged([COLOR, SHAPE, STYLE], [1, 0, 1]),
        judged([COLOR, COLOR], [1, 1]),
        judged([COLOR, STYLE], [0, 0]),
    ]
    got = read_verdicts(written(tmp_path / "r.csv", rows))
    assert got.dimensions == {COLOR: 3 / 4, SHAPE: 0.0, STYLE: 1 / 2}
    assert got.primary == {"Attribute": 3 / 5, "Style": 1 / 2}  # not the mean of 3/4 and 0
    assert got.overall == pytest.approx((3 / 5 + 1 / 2) / 2) and not got.skipped


def test_the_primary_is_before_the_first_dash_only() -> None:
    got = tally([(["Action - Full-body (Character/Anthropomorphic)", "Action - Non-contact Interaction "], [1, 0])])
    assert got.primary == {"Action": 0.5}
    assert set(got.dimensions) == {"Action - Full-body (Character/Anthropomorphic)", "Action - Non-contact Interaction"}


def test_rows_that_do_not_answer_are_told_and_are_no_zeros(tmp_path: Path) -> None:
    good = judged([COLOR], [1])
    bad = [
        judged([COLOR, SHAPE], [1]),
        judged([COLOR], [2]),
        judged([COLOR], [True]),
        judged([COLOR], ["1"]),
        ("[broken", '{"score": [1]}'),
        (str([COLOR]), "not json"),
        (str([COLOR]), "[1]"),
        (str([COLOR]), '{"score": 1}'),
        ("[1]", '{"score": [1]}'),
        ("__import__('os').system('true')", '{"score": [1]}'),
    ]
    got = read_verdicts(written(tmp_path / "r.csv", [good, *bad]))
    assert got.dimensions == {COLOR: 1.0} and sorted(got.skipped) == list(range(2, 12))
    assert got.skipped[2] == "1 verdicts for 2 checkpoints" and got.skipped[3] == "verdict 2 is neither 0 nor 1"


def test_a_file_without_verdicts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no verdict: all 1 rows were left out"):
        _ = read_verdicts(written(tmp_path / "r.csv", [judged([COLOR], [])])).overall
    with pytest.raises(ValueError, match=r"r.csv, line \d+: field larger than field limit"):
        read_verdicts(written(tmp_path / "r.csv", [("x" * 200_000, "")]))
    (tmp_path / "other.csv").write_text("index,prompt\n")
    with pytest.raises(ValueError, match="no column 'testpoint'; it has index, prompt"):
        read_verdicts(tmp_path / "other.csv")


@given(st.lists(st.lists(st.tuples(st.sampled_from([COLOR, SHAPE, STYLE]), st.integers(0, 1)), max_size=4), max_size=9))
def test_as_the_official_rule_counts(pictures: list[list[tuple[str, int]]]) -> None:
    got = tally([([p for p, _ in picture], [s for _, s in picture]) for picture in pictures])
    every = [pair for picture in pictures for pair in picture]
    for primary in {p.split("-")[0].strip() for p, _ in every}:
        mine = [s for p, s in every if p.startswith(primary)]
        assert got.primary[primary] == pytest.approx(sum(mine) / len(mine))
    assert len(got.skipped) == sum(not picture for picture in pictures)
    twice = tally([([p for p, _ in picture], [s for _, s in picture]) for picture in [*reversed(pictures), *pictures]])
    assert twice.dimensions == got.dimensions
