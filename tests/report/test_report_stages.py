"""The page that lists stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from folder import HOSTILE, make_run
from html_check import Page

from tempflow.report import stage_folders, write_stages


def home_of(tmp_path: Path, names: tuple[str, ...], begun: int) -> Path:
    """A folder of stages, of which some were begun; the last of these is not finished, unless all were."""
    home = tmp_path / "home"
    for number, name in enumerate(names[:begun], 1):
        make_run(home / f"{number}-{name}", name=name, finished=number < begun or begun == len(names))
    home.mkdir(parents=True, exist_ok=True)
    (home / ".tempflow.json").write_text(json.dumps({"tempflow": "stages"}))
    told = {"name": "all" + HOSTILE, "stages": [{"name": name} for name in names]}
    (home / "config.yaml").write_text(yaml.safe_dump(told))
    return home


def test_it_links_the_stages_pages_and_spans_all(tmp_path: Path) -> None:
    home = home_of(tmp_path, ("warm", "nft"), begun=2)
    page = Page(write_stages(home, tmp_path / "elsewhere" / "all.html").read_text())
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    pages = [home / stage / "report.html" for stage in ("1-warm", "2-nft")]
    assert [(tmp_path / "elsewhere" / link).resolve() for link in links] == pages and all(p.is_file() for p in pages)
    assert [fault for fault in page.faults if "<a href" not in fault] == []  # a link is followed by hand
    text = " ".join(" ".join(page.texts).split())
    for word in ("2 stages", "0.490 → 0.670", "before the first stage and after the last", "148,140", HOSTILE):
        assert word in text, word


def test_the_list_shows_evaluations_and_the_stages_pages_do_not(tmp_path: Path) -> None:
    home = home_of(tmp_path, ("warm", "nft"), begun=2)
    row = {"what": "shapes", "steps": 4, "guidance": 1.0, "count": 8, "samples_per_prompt": 1, "mean": {"strict": 0.5}}
    row["walk"] = {"grid": "useful", "useful": 4, "forwards": 4}
    (tmp_path / "e.json").write_text(json.dumps(row))
    page = write_stages(home, home / "report.html", evaluations=[tmp_path / "e.json"]).read_text()
    assert 'aria-label="strict over useful steps. shapes (reference), 4 steps, guidance 1: 0.500"' in page
    assert "Steps and diversity" not in (home / "1-warm" / "report.html").read_text()


def test_what_is_not_there_yet(tmp_path: Path) -> None:
    home = home_of(tmp_path, ("warm", "distil", "nft"), begun=2)
    text = write_stages(home, home / "report.html").read_text()
    assert "3-nft" in text and "not begun" in text and "after the last" not in text
    assert not (home / "3-nft").exists() and (home / "2-distil" / "report.html").is_file()
    with pytest.raises(ValueError, match=r"no stage in .* was begun"):
        write_stages(home_of(tmp_path / "other", ("warm",), begun=0), tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"output: .* is a page"):
        write_stages(home, tmp_path / "x.txt")


def test_stages_are_told_by_their_folders_mark(tmp_path: Path) -> None:
    assert stage_folders(make_run(tmp_path / "run")) == [] == stage_folders(tmp_path / "none")
    home = home_of(tmp_path, ("../../evil", "b"), begun=0)
    assert [folder.parent for folder in stage_folders(home)] == [home, home]
