"""The memory benchmark at tiny widths: it starts, and prints a line a case."""

from __future__ import annotations

import pytest

from benchmarks import memory


@pytest.mark.slow
@pytest.mark.parametrize("case", memory.CASES)
def test_a_case_is_measured(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--tiny", "--cases", case, "--sides", "64"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"| {case} | 64 | none |") and line.count("|") == 10
