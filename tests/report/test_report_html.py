"""Pages as a strict parser reads them: well formed, alone, and with hostile texts as texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folder import HOSTILE, make_run
from html_check import Page
from PIL import Image

from tempflow.cli.report import report_verb
from tempflow.cli.suite import SuiteOptions, run_suite

EVIL = f'{HOSTILE} " onload="x" \' --> ]]> <!-- </style></title>\n{{{{ 7*7 }}}} &amp; &notanentity \u2028 🎉'
"""Out of an attribute, a comment, a style, a title; a template; a reference that is none; lines that end."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite that was run, of pictures of two prompts, in a folder with a name that fits."""
    root = tmp_path_factory.mktemp("html") / "<b>'\"&"
    for name in ("0_0", "0_1", "1_0", "1_1"):
        (root / "in").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 5), (int(name[2]) * 90, 0, 0)).save(root / "in" / f"{name}.png")
    lines = [{"prompt": EVIL, "kind": EVIL}, {"prompt": "x" * 10_000}]
    (root / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    what, prompts, output = (str(root / name) for name in ("in", "p.jsonl", "out"))
    return run_suite(SuiteOptions(name="diversity", what=what, prompts=prompts, output=output))[1]


def test_a_suites_page(suite: Path) -> None:
    page = Page(suite.read_text(encoding="utf-8"))
    assert page.faults == []
    shown = [found for tag, found in page.tags if tag == "img"]
    assert [found["alt"] for found in shown] == [EVIL] * 2 + ["x" * 10_000] * 2  # to the letter
    assert EVIL in "".join(page.texts) and "{{ 7*7 }}" in EVIL


@pytest.mark.parametrize("several", [False, True])
def test_a_runs_page_with_a_suite(tmp_path: Path, suite: Path, several: bool) -> None:
    runs = [make_run(tmp_path / "a", name="first", hostile=True)]
    runs += [make_run(tmp_path / "b", name="second", seed=3, hostile=True)] if several else []
    out = tmp_path / "r.html"
    assert report_verb([*map(str, runs), "--suites", str(suite.parent), "--output", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert page.faults == []
    said = "".join(page.texts)
    assert HOSTILE in said and EVIL in said


@pytest.mark.parametrize(
    ("spoiled", "fault"),
    [
        (("</main>", ""), "</body> inside"),
        (("<h1>", "<h1><script>x</script>"), "can run"),
        (("<h1>", "<h1 onclick='x'>"), "can run"),
        (("<h1>", "<h1 id='a'><b id='a'></b>"), "id 'a' 2 times"),
        (("<h1>", "<h1><img src='http://x/y' alt=''>"), "is fetched"),
        (("<h1>", "<h1><img src='data:image/png;base64,AA' alt=''>"), "no picture"),
        (("<h1>", "<h1>&nonsense "), "a bare &"),
        (('class="soft">', 'class="soft"><div></div>'), "closes the <p>"),
        (("</style>", "a{b:url(//x)}</style>"), "fetches"),
        (("<td>", "<b></b></td></tr><td>"), "<td> in <table>"),
        (('<td class="text">', "text<td>"), "text 'text' in"),
        (("<header>", "<header><!-- -->"), "a comment"),
        (("<title>", "<title>x</title><title>"), "2 <title>"),
    ],
)
def test_the_check_sees_faults(suite: Path, spoiled: tuple[str, str], fault: str) -> None:
    text = suite.read_text(encoding="utf-8")
    assert spoiled[0] in text
    page = Page(text.replace(*spoiled, 1))
    assert any(fault in one for one in page.faults), page.faults
