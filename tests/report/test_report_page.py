"""The page: what stands on it, what must not, and that a browser shows it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from folder import HOSTILE, make_run

from tempflow.cli.report import report_verb
from tempflow.report import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Tags(HTMLParser):
    """All elements with their attributes, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self._open = list[tuple[str, dict[str, Any]]](), "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._open != "style" else ""


def page_of(tmp_path: Path, *folders: Path) -> str:
    return write_report(folders, tmp_path / "page.html").read_text()


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def test_a_finished_run(tmp_path: Path) -> None:
    text = words(page_of(tmp_path, make_run(tmp_path / "run", prompts=True)))
    for told in ("0.490 → 0.670", "+0.180", "30 test pictures", "74,070", "finished", "6 / 6", "best weights at 4"):
        assert told in text, told
    for section in ("Learning", "Training", "Held-out test by task", "Credit by step", "Time and cost", "9.9.9"):
        assert section in text, section
    assert "Gained most 1 circles" not in text and "1 circles" in text
    assert "KL to the starting model" in text and "zero-variance" in text and "clip fraction" in text


def test_a_half_finished_run_reports_what_there_is(tmp_path: Path) -> None:
    text = words(page_of(tmp_path, make_run(tmp_path / "run", iterations=3, finished=False, steps=False)))
    assert "still running" in text and "3 / 6" in text and "0.300 → 0.380" in text and "so far" in text
    assert "by task" not in text and "Credit by step" not in text and "Pictures" not in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: begun\niterations: 5\n")
    text = words(page_of(tmp_path, folder))
    assert "no score yet" in text and "0 / 5" in text


def test_several_runs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", name="first"), make_run(tmp_path / "b", name="second", seed=3)]
    folders += [make_run(tmp_path / "c", name="third", iterations=2, finished=False)]
    page = page_of(tmp_path, *folders)
    text = words(page)
    assert "3 runs, judged by strict" in text and "against first" in text and "Where the configurations differ" in text
    assert "+0.180" in text and "+0.330" in text and "+0.150" in text  # each one's change, and second against first
    assert "not tested on the same pictures" not in text
    assert (
        "second: 0.460 at forward-equivalents 49,380" in text and "third: 0.380 at forward-equivalents 24,690" in text
    )  # overlaid
    ids = [a["id"] for _, a in Tags(page).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_runs_with_other_test_pictures_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", name="a"), make_run(tmp_path / "b", name="b", noise=5)]
    assert "not tested on the same pictures" in words(page_of(tmp_path, *folders))


def test_texts_of_a_run_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", hostile=True, prompts=True)
    b = make_run(tmp_path / "b", name="other", hostile=True, prompts=True)
    for folders in ((a,), (a, b)):
        page = page_of(tmp_path, *folders)
        assert HOSTILE in Tags(page).text and "evil.example" in page  # it is there, as text
        for tag, attributes in Tags(page).tags:
            assert tag not in ("script", "iframe", "object", "embed", "form", "base"), tag
            assert not any(name.startswith("on") for name in attributes), attributes
            if tag == "img":
                assert attributes["src"].startswith("data:image/png;base64,")
            assert "evil" not in str(attributes.get("src")) + str(attributes.get("style"))


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_run(tmp_path / "a"))
    for tag, attributes in Tags(page).tags:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "@import" not in page and "url(" not in page and "<script" not in page
    assert "default-src 'none'" in page


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_run(tmp_path / "a", name="a"), make_run(tmp_path / "b", name="b")
    assert report_verb([str(a)]) == 0
    assert (a / "report.html").is_file() and str(a / "report.html") in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert report_verb([str(a), str(b)]) == 0 and (tmp_path / "report.html").is_file()
    assert report_verb([str(a), "--output", str(tmp_path / "new" / "x.html")]) == 0
    assert (tmp_path / "new" / "x.html").is_file()
    with pytest.raises(ValueError, match=r"output: .*nearest valid: '.*metrics\.html'"):
        report_verb([str(a), "--output", str(a / "metrics.jsonl")])
    with pytest.raises(ValueError, match="none given"):
        report_verb([])


def test_without_jinja_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'tempflow\[report\]'"):
        write_report([make_run(tmp_path / "a")], tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="no driver: pip install playwright")
    with driver.sync_playwright() as play:
        profile = tmp_path_factory.mktemp("profile")
        context = play.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1100, "height": 900}
        )
        yield context
        context.close()


@pytest.mark.parametrize("several", [False, True])
def test_a_browser_shows_it(tmp_path: Path, browser: Any, several: bool) -> None:
    folders = [make_run(tmp_path / "a", name="first", prompts=True, hostile=True)]
    folders += [make_run(tmp_path / "b", name="second", seed=3)] if several else []
    file = write_report(folders, tmp_path / "page.html")
    page = browser.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert said == []
    for told in ("0.490 → 0.670",) if not several else ("Where the configurations differ", "against first"):
        assert page.get_by_text(re.compile(re.escape(told))).first.is_visible(), told
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    clipped = "all => all.filter(box => box.scrollWidth > box.clientWidth).map(box => box.innerText)"
    assert page.locator(".scroll").evaluate_all(clipped) == []
    over = [page.get_by_role("img", name=f"validation over {axis}") for axis in ("forward-equivalents", "reward calls")]
    assert [chart.is_visible() for chart in over] == [True, False]
    page.get_by_text("reward calls", exact=True).first.click()
    assert [chart.is_visible() for chart in over] == [False, True]
    sheet = page.locator("img.sheet").first
    assert sheet.evaluate("image => image.complete && image.naturalWidth") == 120
    box = page.locator("svg circle:visible").first.bounding_box()
    assert box is not None and box["width"] > 0
    shot = tmp_path / "page.png"
    page.screenshot(path=str(shot))
    if keep := os.environ.get("TEMPFLOW_SCREENSHOTS"):
        shutil.copy(shot, Path(keep) / f"report-{'several' if several else 'one'}.png")
    assert shot.stat().st_size > 30_000
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
