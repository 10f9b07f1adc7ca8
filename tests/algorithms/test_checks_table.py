"""docs/trajectory_checks.md names tests that exist, and leaves no algorithm of its family out."""

from __future__ import annotations

import re
from pathlib import Path

from tempflow.algorithms import ALGORITHMS

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "trajectory_checks.md").read_text(encoding="utf-8")


def test_every_named_test_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 100
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (TESTS / file).read_text("utf-8")]
    assert not missing


def test_every_row_names_a_test_and_every_algorithm_has_rows() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
    assert {name for name, make in ALGORITHMS.items() if "edges" in make().first.keeps} <= sections.keys()
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| check |")]
    assert all("::" in line for line in rows) and all(" | `" in body for body in sections.values())
