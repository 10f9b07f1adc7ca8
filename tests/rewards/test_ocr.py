"""OCR: which text a prompt asks for, how well two texts agree, and what becomes of rows that cannot be judged."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from tempflow.cli import main
from tempflow.rewards.ocr import OCR, agreement, asked, ocr, plain

NONE: dict[str, object] = {}


def distance(a: str, b: str) -> int:
    """Levenshtein's, by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


# ------------------------------------------------------------------------------------------------ what is asked for
@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says “OPEN”", "OPEN"),
        ("ein Schild mit „OFFEN“ darauf", "OFFEN"),
        ("une enseigne « OUVERT »", " OUVERT "),
        ("招牌上写着「营业中」", "营业中"),
        ("a sign that says ＂ＯＰＥＮ＂", "OPEN"),
        ('a sign that says "DON\'T STOP"', "DON'T STOP"),
        ("the shop's sign says “DON’T STOP”", "DON'T STOP"),
        ('"one two\nthree" on a wall', "one two\nthree"),
    ],
)
def test_the_text_between_double_quotes_is_asked_for(prompt: str, want: str) -> None:
    assert asked(prompt, NONE) == want


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("a cat", r"no text in double quotes; nearest"),
        ("", r"no text in double quotes; nearest"),
        ("a sign that says 'OPEN'", r"no text in double quotes \(single ones are apostrophes\)"),
        ("the dog's sign says ‘OPEN’ here", r"no text in double quotes \(single ones are apostrophes\)"),
        ("the dog's and the cat's bowl", r"no text in double quotes; nearest"),
        ('a 5" screen', r"a double quote without its partner"),
        ('a 5" screen that says "HI"', r"a double quote without its partner"),
        ('"OPEN" beside “CLOSED”', r"2 texts in double quotes"),
        ('a sign that says ""', r"nothing between its double quotes"),
        ('a sign that says " \u200b"', r"nothing between its double quotes"),
    ],
)
def test_prompts_that_ask_for_no_one_text_are_named_when_they_are_read(prompt: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^prompts: .* has {fault}") as error:
        OCR().check_prompts(['a sign that says "FINE"', prompt], [NONE, NONE])
    assert "\n" not in str(
        error.value
    ) and 'nearest valid: one text in double quotes, as in a sign that says "OPEN"' in str(error.value)


def test_a_line_may_name_its_target() -> None:
    for prompt in ("a cat", 'a 5" screen', '"A" and "B"'):
        OCR().check_prompts([prompt], [{"target": "MEOW"}])
        assert asked(prompt, {"target": "MEOW"}) == "MEOW"
    assert asked('say "A"', {"target": ""}) == asked('say "A"', {"target": None}) == "A"
    for wrong in (3, ["A"], " "):
        with pytest.raises(ValueError, match=r"^prompts: 'say \"A\"' has .* as its 'target'; nearest valid: a text$"):
            asked('say "A"', {"target": wrong})


def test_a_long_prompt_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError) as error:
        OCR().check_prompts(["x" * 10_000], [NONE])
    assert len(str(error.value)) < 300


# -------------------------------------------------------------------------------------------------------- agreement
@pytest.mark.parametrize(
    ("recognised", "target", "loose", "exact"),
    [
        ("OPEN", "OPEN", 1, 1),
        ("o p e n", "OPEN", 1, 1),
        ("ＯＰＥＮ", "open", 1, 1),
        ("DON’TSTOP", "Don't stop", 1, 1),
        ("“hi”", '"hi"', 1, 1),
        ("OPEN24HOURS", "OPEN", 1, 0),
        ("OPENOPEN", "OPEN", 1, 0),
        ("wide open", "open", 1, 0),
        ("OPEM", "OPEN", 0.75, 0.75),
        ("OPE", "OPEN", 0.75, 0.75),
        ("OEPN", "OPEN", 0.5, 0.5),
        ("", "OPEN", 0, 0),
        ("xyzw", "OPEN", 0, 0),
        ("a long text about something else", "OPEN", 0, 0),
        ("ﬁne", "fine", 1, 1),
        ("café", "cafe\u0301", 1, 1),
        ("🙂", "🙂", 1, 1),
    ],
)
def test_agreement_golden_values(recognised: str, target: str, loose: float, exact: float) -> None:
    assert agreement(recognised, target) == pytest.approx(loose)
    assert agreement(recognised, target, exact=True) == pytest.approx(exact)


def test_agreement_is_one_minus_the_distance_over_the_length() -> None:
    draw = random.Random(0)
    for _ in range(300):
        read, target = ("".join(draw.choices("abc", k=draw.randint(low, 9))) for low in (0, 1))
        want = 1 - min(distance(read, target), len(target)) / len(target)
        assert agreement(read, target, exact=True) == pytest.approx(want)
        assert agreement(read, target) == pytest.approx(1 if target in read else want)


def test_a_target_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(ValueError, match="target: '' has no characters; nearest valid: a text"):
        agreement("x", " \n")


def test_plain_is_its_own_plain() -> None:
    for text in ("İstanbul “ǅ” ﬀ ½ ＡＢＣ", "a´b‘c’", "″x″"):
        assert plain(plain(text)) == plain(text)


# ---------------------------------------------------------------------------------------------------------- scoring
def reading(*lines: Any) -> OCR:
    """A reward whose reader says these in turn; an exception is raised."""
    reward, said = OCR(), iter(lines)

    def read(picture: object) -> object:
        assert isinstance(picture, Image.Image) and picture.mode == "RGB"
        line = next(said)
        if isinstance(line, Exception):
            raise line
        return line

    reward._reader = read
    return reward


def test_lines_are_joined_and_blank_pictures_have_zero() -> None:
    pictures = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    blank = (
        SimpleNamespace(txts=None),
        SimpleNamespace(boxes=[1]),
        SimpleNamespace(txts=("OP", "EN")),
        SimpleNamespace(txts=()),
    )
    scores = reading(*blank).score(pictures, ['say "open"'] * 4, [NONE] * 4)
    assert scores.ok.all() and scores.names == ("ocr",)
    assert scores.value[:, 0].tolist() == [0, 0, 1, 0]


def test_what_cannot_be_judged_is_failed_and_never_zero(caplog: pytest.LogCaptureFixture) -> None:
    pictures = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    reward = reading(SimpleNamespace(txts=("OPEN",)), RuntimeError("resize"))
    with caplog.at_level(logging.WARNING):
        scores = reward.score(pictures, ['say "open"', "say nothing", 'say "open"'], [NONE] * 3)
    assert scores.ok[:, 0].tolist() == [True, False, False] and scores.value[0] == 1
    assert len(caplog.records) == 1 and "a score is failed: ValueError: prompts: 'say nothing'" in caplog.text


@pytest.mark.parametrize("library", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_without_a_library_the_message_says_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("tempflow.rewards.scorer.find_spec", lambda name: None if name == library else found("sys"))
    with pytest.raises(ImportError, match=rf"this reward needs {library}: pip install 'tempflow\[ocr\]'"):
        ocr()


@pytest.mark.slow
def test_it_reads(capfd: pytest.CaptureFixture[str]) -> None:
    """Real pictures through the real engine, which says nothing meanwhile."""
    reward = ocr(threads=1)
    reward.prepare()
    picture = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(picture).text((20, 30), "HELLO", fill="navy", font=ImageFont.load_default(size=48))
    drawn = np.asarray(picture)
    media = torch.from_numpy(np.stack([drawn, np.full_like(drawn, 255), drawn]))
    scores = reward.score(media, ['say "Hello"', 'say "Hello"', 'say "xyzzy"'], [NONE] * 3)
    assert scores.ok.all() and scores.value[:, 0].tolist() == [1, 0, 0]
    odd = [torch.zeros(1, *sides, 3, dtype=torch.uint8) for sides in ((1, 1), (16, 4096), (4096, 16))]
    assert [bool(reward.score(p, ['say "a"'], [NONE]).value.nan_to_num().sum()) for p in odd] == [False] * 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_suite_reads(tmp_path: Path) -> None:
    """`tempflow suite ocr` on a folder of pictures, by the real engine."""
    lines = [
        {"prompt": 'a sign that says "HELLO"', "kind": "short"},
        {"prompt": 'a sign that says "WORLD"', "kind": "other"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "in").mkdir()
    for name, text in {"0_0": "HELLO", "0_1": "HELP", "1_0": "", "1_1": "WORLD"}.items():
        picture = Image.new("RGB", (192, 64), "white")
        ImageDraw.Draw(picture).text((12, 8), text, fill="black", font=ImageFont.load_default(size=40))
        picture.save(tmp_path / "in" / f"{name}.png")
    words = ["suite", "ocr", str(tmp_path / "in"), "--prompts", str(tmp_path / "p.jsonl"), "--options.threads", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    told = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    values = {(line["number"], line["sample"]): line["value"] for line in told}
    assert values == {(0, 0): 1.0, (0, 1): pytest.approx(0.6), (1, 0): 0.0, (1, 1): 1.0}  # HELP: two edits of five
    tables = json.loads((tmp_path / "out" / "summary.json").read_text())["tables"]
    assert tables[0]["rows"][0]["mean"] == pytest.approx(0.65)
    assert {row["label"]: row["mean"] for row in tables[1]["rows"]} == pytest.approx({"short": 0.8, "other": 0.5})
