"""UniGenBench on shapes: the suite's tally over HTTP is the verifier's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import unigen_shapes as bench
from tempflow.evaluate.suites.readers import read_unigenbench
from tempflow.shapes.prompts import balanced, by_prompt
from tempflow.shapes.render import Placed, draw

GROUND = (28, 28, 28)


def test_checkpoints_are_about_what_they_say() -> None:
    ring = Placed("ring", "blue", 16.0, 25.0, 5.0)
    picture = draw([Placed("circle", "red", 16.0, 7.0, 5.0), ring], GROUND)
    wrong = draw([Placed("circle", "green", 16.0, 25.0, 5.0), Placed("ring", "blue", 16.0, 7.0, 5.0)], GROUND)
    colored, above = by_prompt()["a red circle and a blue ring"], by_prompt()["a circle above a ring"]
    names = (bench.SHAPE, bench.COLOR, bench.MATCHING)
    assert [bench.met(picture, colored, name) for name in names] == [1, 1, 1]
    assert [bench.met(wrong, colored, name) for name in names] == [1, 0, 0]
    names = (bench.SHAPE, bench.LAYOUT, bench.MATCHING)
    assert [bench.met(picture, above, name) for name in names] == [1, 1, 1]
    assert [bench.met(wrong, above, name) for name in names] == [1, 0, 0]
    two = by_prompt()["two red circles"]
    assert bench.met(picture, two, bench.QUANTITY) == 1 and bench.met(np.zeros_like(picture), two, bench.QUANTITY) == 0


def test_the_file_is_one_that_the_suite_reads(tmp_path: Path) -> None:
    specs = balanced("test", 12)
    prompts = read_unigenbench(str(bench.write_csv(tmp_path / "u.csv", specs)))
    assert [p.text for p in prompts] == [spec.prompt for spec in specs]
    said = {point["dimension"] for p in prompts for point in p.metadata["points"]}  # type: ignore[attr-defined]
    assert said == {bench.COLOR, bench.SHAPE, bench.QUANTITY, bench.LAYOUT, bench.MATCHING}


@pytest.mark.slow
def test_drawn_judged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--prompts", "6", "--samples", "2", "--failures", "0.3", "--output", str(tmp_path / "out")])
    assert "UniGenBench" in capsys.readouterr().out
