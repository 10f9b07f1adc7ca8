"""Every script and benchmark starts: what it imports is there, and it says how it is used."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = 'if __name__ == "__main__":'
ALL = [p for folder in ("scripts", "benchmarks") for p in sorted((ROOT / folder).glob("*.py"))]
FILES = [p for p in ALL if RUN in p.read_text()]


def test_there_is_something_to_start() -> None:
    names = {p.name for p in FILES}
    assert len(names) > 15 and {"pretrain_shapes.py", "floor.py", "leaderboard.py"} <= names
    imported = {"__init__.py", "catalog.py", "claims.py", "likelihood.py", "pairs.py", "runs.py", "tricks.py"}
    assert {p.name for p in ALL} - names == imported | {"drawn_pipelines.py", "judge_server.py", "served.py"}


@pytest.mark.parametrize("file", FILES, ids=[p.stem for p in FILES])
def test_it_starts_and_says_how_it_is_used(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    for folder in (ROOT, file.parent):  # `python -m benchmarks.…` and `python scripts/…`
        monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code in (0, None) and "usage:" in capsys.readouterr().out
