"""A suite's page and its tables on a run's page, from a folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folder import HOSTILE, make_run
from PIL import Image

from tempflow.cli.report import report_verb
from tempflow.report.suites import write_suite


def suite(folder: Path) -> Path:
    """Every text holds HTML; one row has no value, one picture is not there."""
    folder.mkdir()
    Image.new("RGB", (300, 200)).save(folder / "0.png")
    row = {"label": HOSTILE, "mean": 0.25, "low": 0.1, "high": 0.4, "prompts": 2, "count": 3, "failed": 1}
    none = {**row, "label": "none", "mean": None, "low": None, "high": None}
    pictures = [{"files": ["0.png"], "value": [1.0, 0.0]}, {"files": ["gone.png"], "value": None}]
    told = {
        "suite": "drawbench",
        "about": HOSTILE,
        "judge": HOSTILE,
        "settings": {"what": {"model": HOSTILE, "lora": None}, "options": {"a": HOSTILE}},
        "prompts": 2,
        "pictures": 4,
        "failed": 1,
        "missing": HOSTILE,
        "tables": [{"title": HOSTILE, "about": HOSTILE, "rows": [row, none]}],
        "shown": [{"number": 0, "prompt": HOSTILE, "pictures": pictures}],
    }
    (folder / "summary.json").write_text(json.dumps(told))
    return folder


def test_the_page_has_figures_and_pictures_and_escapes_texts(tmp_path: Path) -> None:
    page = write_suite(suite(tmp_path / "suite")).read_text()
    assert "<script" not in page and "http://evil" in page and "<img src=http" not in page
    assert "0.2500" in page and "0.1000 … 0.4000" in page and "<td>–</td>" in page and "1 0" in page
    assert page.count("data:image/png;base64,") == 1 and "not there" in page and "failed" in page


def test_a_runs_page_shows_suites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, told = make_run(tmp_path / "run"), suite(tmp_path / "suite")
    assert report_verb([str(run), "--suites", str(told), "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<h2>Suites</h2>" in page and "0.2500" in page and "<script" not in page
    assert report_verb([str(run), "--output", str(tmp_path / "r.html")]) == 0
    assert "<h2>Suites</h2>" not in (tmp_path / "r.html").read_text()
    with pytest.raises(ValueError, match=r"suites: '.*run' holds no finished suite"):
        report_verb([str(run), "--suites", str(run)])
