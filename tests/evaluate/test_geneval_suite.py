"""GenEval's and GenEval 2's prompt files, and GenEval's score of made-up pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.evaluate.geneval import read_geneval, read_geneval2, tally
from tempflow.rewards.geneval_rules import TAGS


def written(file: Path, lines: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


BENCH = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
COUNT = {
    "tag": "counting",
    "include": [{"class": "bird", "count": 2}],
    "exclude": [{"class": "bird", "count": 3}],
    "prompt": "a photo of two birds",
}
COWS = {
    "prompt": "three cows",
    "atom_count": 2,
    "vqa_list": [["How many cows are in the image?", "three"]],
    "skills": ["count"],
}


def test_the_score_is_the_mean_over_tags_of_the_mean_over_pictures() -> None:
    pictures: list[tuple[str, float | None]] = [
        ("counting", 1.0),
        ("counting", 0.0),
        ("counting", 0.0),
        ("position", None),
    ]
    pictures += [(tag, 1.0) for tag in TAGS if tag != "counting"]
    got = tally(pictures)
    assert got.by_tag["counting"] == pytest.approx(1 / 3) and tuple(got.by_tag) == TAGS
    assert got.overall == pytest.approx((5 + 1 / 3) / 6)  # not 6/8, the mean over pictures
    assert got.failed == {"position": 1} and got.all["position"] == 1 and got.missing == ()


def test_tags_without_a_score_are_named() -> None:
    got = tally([("counting", 1.0), ("colors", math.nan)])
    assert got.by_tag == {"counting": 1.0} and "colors" in got.missing and len(got.missing) == 5
    with pytest.raises(
        ValueError, match=r"no score of single_object, two_object, colors, position, color_attr; .* 1 of 6"
    ):
        _ = got.overall
    with pytest.raises(ValueError, match="no score of single_object"):
        _ = tally([]).overall
    with pytest.raises(ValueError, match=r"picture 2: tag 'color' is unknown; nearest valid: 'colors'"):
        tally([("colors", 1.0), ("color", 1.0)])
    with pytest.raises(ValueError, match="picture 1: score inf"):
        tally([("colors", math.inf)])


@given(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from([0.0, 1.0])), max_size=40), st.randoms())
def test_the_order_of_pictures_does_not_matter(pictures: list[tuple[str, float]], random: object) -> None:
    every = [*pictures, *[(tag, 1.0) for tag in TAGS]]
    expected = sum(sum(s for t, s in every if t == tag) / sum(t == tag for t, _ in every) for tag in TAGS) / 6
    assert tally(every).overall == pytest.approx(expected)
    assert tally(reversed(every)) == tally(every)


def test_published_files_are_read(tmp_path: Path) -> None:
    prompts = read_geneval(written(tmp_path / "evaluation_metadata.jsonl", [BENCH, COUNT]))
    assert [p.text for p in prompts] == ["a photo of a bench", "a photo of two birds"]
    assert [p.kind for p in prompts] == ["single_object", "counting"] and prompts[1].metadata["exclude"] == COUNT[
        "exclude"
    ]
    cows = read_geneval2(written(tmp_path / "geneval2_data.jsonl", [COWS]))
    assert cows[0].text == "three cows" and cows[0].metadata["skills"] == ["count"]


def test_prompts_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    wrong = {**BENCH, "include": [{"class": "bnech", "count": 1}]}
    with pytest.raises(ValueError, match=r"prompts.jsonl: prompt 2, 'a photo of a bench': include\[0\].class: 'bnech'"):
        read_geneval(written(file, [COUNT, wrong]))
    with pytest.raises(ValueError, match=r"prompt 1, .*: exclude\[0\].count: 2 of 'bird', of which include asks for 2"):
        read_geneval(written(file, [{**COUNT, "exclude": [{"class": "bird", "count": 2}]}]))
    for atoms in ({}, {"vqa_list": []}, {"vqa_list": None}):
        with pytest.raises(ValueError, match=r"prompt 1, 'cows': vqa_list: .*; nearest valid: \[\["):
            read_geneval2(written(file, [{"prompt": "cows", **atoms}]))
