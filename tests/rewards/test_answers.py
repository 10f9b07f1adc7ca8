"""A judge's answer is read for certain or not at all."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator

import pytest

from tempflow.rewards import answers
from tempflow.rewards.answers import Unreadable
from tempflow.rewards.template import Answer, load

AXES = ("Alignment", "Coherence", "Style")


def final(text: str) -> float:
    return answers.final_score(text, 1, 5)


def thrice(text: str) -> float:
    return sum(answers.named_scores(text, AXES, 1, 5)) / 3


def tagged(text: str) -> float:
    return answers.tagged_score(text, 1, 5)


def edited(text: str) -> float:
    return min(answers.json_scores(text, 2, 0, 25))


def shares(text: str) -> float:
    return answers.pair_scores(text, AXES)


THREE = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 2\n"
SHARED = "Alignment:\nImage 1: 0.6\nImage 2: 0.4\nCoherence:\nImage 1: .5\nImage 2: .5\n".replace(" .", " 0.")
SHARED += "Style:\nImage 1: 0.7\nImage 2: 0.3\n"
THOUGHT = "<think>Image 1 is better in colour, Image 2 is better in form.</think>\n"


def flex(winner: object = "Image 1", x: object = 6, y: object = 4) -> str:
    axes = [{"name": "count", "score_1": x, "score_2": y}, {"name": "light", "score_1": 5, "score_2": 5}]
    return json.dumps({"categories": [{"name": "truth", "dimensions": axes, "winner": "Image 2"}], "winner": winner})


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (final, "It is good.\nFinal Score: 4", 4.0),
        (final, "Final Score: 4.25\n", 4.25),
        (final, "a Final Score: 2 at first\nthen\n**Final Score:** 3", 3.0),  # the last counts
        (final, "```\nfinal score : 5\n```", 5.0),
        (final, "Final Score: 1\r\n", 1.0),
        (thrice, THREE, (4 + 3.5 + 2) / 3),
        (thrice, "**Style Score:** 1\n- Coherence Score (1-5): 1.0\nAlignment Score: 1", 1.0),
        (tagged, "<Thought>a <Score>1</Score> would be harsh</Thought><Score>4</Score>", 4.0),
        (tagged, "<Score> 3 </Score>", 3.0),
        (edited, '{"reasoning": "ok", "score": [20, 11.5]}', 11.5),
        (edited, '```json\n{"score": [0, 25]}\n```\n', 0.0),
        (answers.better, "Image 1 is better.", 1.0),
        (answers.better, "The second is blurred.\n\nimage 2 is better", 0.0),
        (answers.better, "Verdict: **Both images are equally good.**", 0.5),
        (answers.better, "Image 1 is better. Image 1 is better.", 1.0),
        (answers.answered, THOUGHT + "<answer>Image 2 is better</answer>", 0.0),
        (answers.answered, THOUGHT + "<answer>\nBoth images are equally good.\n</answer>\n", 0.5),
        (answers.answered, "<answer>Image 2 is better</answer><answer>Image 1 is better.</answer>", 1.0),
        (shares, SHARED, 1.0),
        (shares, SHARED.replace("0.6", "0.1").replace("0.4", "0.9"), 0.0),
        (shares, SHARED.replace("0.7", "0.4").replace("0.3", "0.6"), 0.5),
        (shares, SHARED.replace("Style:", "**Style Score (0-1):**").replace("0.7", "0.69"), 1.0),
        (answers.json_winner, flex(), 1.0),
        (answers.json_winner, "```json\n" + flex("Image 2", 2, 8) + "\n```", 0.0),
    ],
)
def test_what_is_asked_for_is_read(read: Callable[[str], float], text: str, value: float) -> None:
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (final, ""),
        (final, "4"),
        (final, "Final Score:"),
        (final, "Final Score: 4/5"),
        (final, "Final Score: 4,5"),
        (final, "Final Score: 4."),  # perhaps cut
        (final, "Final Score: 3 or 4"),
        (final, "Final Score: -3"),
        (final, "Final Score: 4e0"),
        (final, "Final Score: 7"),
        (final, "Final Score: 0.99"),
        (final, "Final Score: 4\nFinal Score: 9"),  # the last is wrong, and no other is taken in its place
        (final, "Final Score: 4\nFinal Score"),
        (final, "Final Score: ４"),
        (final, "Final Score: ٤"),
        (final, "Final Score: four"),
        (final, "Endnote: 4"),
        (thrice, THREE.replace("Style", "Stil")),
        (thrice, THREE + THREE),
        (thrice, THREE.replace("3.5", "3.5/5")),
        (thrice, THREE.replace("4\n", "6\n")),
        (thrice, THREE[: THREE.index("2")]),
        (tagged, "<Thought>good <Score>4</Score>"),
        (tagged, "<Score>4</Score><Score>2</Score>"),
        (tagged, "<Score>4"),
        (tagged, "<Score>4/5</Score>"),
        (tagged, "<Score>0</Score>"),
        (tagged, "<Thought>x</Thought>4"),
        (edited, '{"score": [20]}'),
        (edited, '{"score": [20, 26]}'),
        (edited, '{"score": [20, "11"]}'),
        (edited, '{"score": [true, 11]}'),
        (edited, '{"score": [20, NaN]}'),
        (edited, '{"score": [20, 1e999]}'),
        (edited, '{"score": [20, 1' + "0" * 400 + "]}"),
        (edited, '{"score": [20, 11], "score": [1, 1]}'),
        (edited, '{"score": [20, 11]} and more'),
        (edited, '{"score": [20, 11]'),
        (edited, "[20, 11]"),
        (edited, "[" * 100_000),
        (edited, '{"score":' + "[" * 900 + "]" * 900 + "}"),
        (answers.better, ""),
        (answers.better, "Image 1 is better. Image 2 is better."),
        (answers.better, "I do not say that Image 1 is better."),
        (answers.better, "Image 1 is better than Image 2 in colour"),
        (answers.better, "Image 1 is better.5"),
        (answers.better, 'The claim "Image 1 is better." is wrong.'),
        (answers.better, "Image 12 is better."),
        (answers.better, "Image 1 is not better."),
        (answers.better, "Image 1"),
        (answers.better, "Bild 1 ist besser."),
        (answers.answered, "Image 1 is better."),
        (answers.answered, "<think><answer>Image 1 is better</answer>"),
        (answers.answered, THOUGHT + "<answer>Image 1 is better"),
        (answers.answered, "<answer>Image 1 is better</answer><answer>Image 2"),
        (answers.answered, "<answer>Image 1 is better, Image 2 is better</answer>"),
        (answers.answered, "<answer>1</answer>"),
        (shares, SHARED.replace("0.6", "0.7")),
        (shares, SHARED.replace("0.6", "6").replace("0.4", "-5")),
        (shares, SHARED.replace("Style:\n", "")),
        (shares, SHARED + "Image 1: 0.2\n"),
        (shares, SHARED + SHARED),
        (shares, SHARED[: SHARED.rindex("Image 2")]),
        (answers.json_winner, flex("Image 3")),
        (answers.json_winner, flex(["Image 1"])),
        (answers.json_winner, flex("both")),
        (answers.json_winner, flex(x=7)),
        (answers.json_winner, flex(x="6")),
        (answers.json_winner, flex("Image 2").replace('"score_1": 5, "score_2": 5', '"score_1": 9, "score_2": 1')),
        (answers.json_winner, '{"winner": "Image 1"}'),
        (answers.json_winner, flex()[:-1]),
    ],
)
def test_what_is_not_certain_is_refused(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(Unreadable) as told:
        read(text)
    assert len(str(told.value)) < 160 and "\n" not in str(told.value)


def test_shares_may_miss_their_sum_by_rounding_and_no_more() -> None:
    one = "Alignment\nImage 1: 0.6\nImage 2: {}"
    assert answers.pair_scores(one.format("0.42"), ["Alignment"]) == 1.0
    with pytest.raises(Unreadable, match="is not 1"):
        answers.pair_scores(one.format("0.421"), ["Alignment"])


# ------------------------------------------------------------------------------------------------- first tokens
def test_yes_and_no_share_what_they_have() -> None:
    top = {"Yes": 0.4, " yes": 0.2, "No": 0.2, "Maybe": 0.1}
    assert answers.yes_share(top) == pytest.approx(0.75)
    assert answers.yes_share({"yes": 0.3}) == 1.0
    for none in ({"Maybe": 0.9}, {}, {"yes": math.nan}, {"yes": 0.9, "no": 0.9}, {"yes": -0.1}):
        with pytest.raises(Unreadable):
            answers.yes_share(none)


def test_the_forms_of_an_answer_are_summed() -> None:
    top = {"Two": 0.5, "2": 0.2, " two": 0.1, "Three": 0.1, "twofold": 0.05}
    assert answers.answer_probability(top, "two") == pytest.approx(0.8)
    assert answers.answer_probability({"No": 0.7}, "yes") == 0.0  # a lower bound: the list says so much for certain
    with pytest.raises(Unreadable):
        answers.answer_probability({}, "yes")


def test_beginnings_of_an_answer_are_no_answer() -> None:
    """A tokenizer that splits "yellow" has its first piece in common with other answers."""
    assert answers.answer_probability({"yellow": 0.9, "yell": 0.04}, "yellow") == 0.9
    for piece in ("yell", "Y", " ", ""):
        with pytest.raises(Unreadable, match="begin"):
            answers.answer_probability({"red": 0.4, piece: 0.5}, "yellow")


# --------------------------------------------------------------------------------------------------------------- fuzz
KINDS = ["unified_1", "unified_2", "unified_2_video", "unified_1_pairs", "unified_2_pairs", "think_pairs"]
KINDS += ["flex_pairs", "edit_pairs", "edit_success", "edit_quality", "aesthetic", "json_score", "hp_scorer"]
SAID = {
    "final_score": "Some words about it.\nFinal Score: 4.5",
    "named_scores": THREE + "Physics Score (1-5): 2",
    "tagged_score": "<Thought>fine</Thought><Score>3</Score>",
    "json_scores": '{"reasoning": "x", "score": [20, 11]}',
    "better": "Image 2 is better.",
    "answered": THOUGHT + "<answer>Image 1 is better</answer>",
    "pair_scores": SHARED,
    "json_winner": flex(),
}
NEEDS = {
    "final_score": "final",
    "named_scores": "score",
    "tagged_score": "</score>",
    "json_scores": '"score"',
    "better": "image",
    "answered": "</answer>",
    "pair_scores": "image 2",
    "json_winner": '"winner"',
}
"""What an answer of that form cannot be without; nothing that lacks it may have a score."""
PIECES = [*SAID.values(), "Final Score: ", "4/5", "7", "-1", "4", "0.5", "1.0", "４", "٣", "NaN", "1e309", "\n", "```"]
PIECES += ["```json\n", "Image 1: ", "Image 2: 0.4\n", "Image 1 is better", " is better.", "<answer>", "</answer>"]
PIECES += ["</think>", "<think>", "<Score>", "</Score>", "</Thought>", '"score": ', "[", "]", "{", "}", "优秀"]
PIECES += ["评分：4", "Note: 4 von 5", "\x00", "\ud800", "🎉", "\u2028", "**", "Style Score (1-5): ", "not ", ", "]
PIECES += [". ", "\r"]


def garbled(seed: int, count: int) -> Iterator[str]:
    """Answers cut, doubled, fenced, with numbers and words replaced, and soups of their pieces."""
    draw = random.Random(seed)
    whole = list(SAID.values())
    for n in range(count):
        text = draw.choice(whole)
        kind = n % 8
        if kind == 0:
            text = text[: draw.randrange(len(text) + 1)]
        elif kind == 1:
            text = text + draw.choice(["", " ", "\n"]) + draw.choice(whole)
        elif kind == 2:
            text = f"```{draw.choice(['', 'json', 'python'])}\n{text}\n{draw.choice(['```', '``', ''])}"
        elif kind == 3:
            for digit in "12345":
                text = text.replace(digit, draw.choice(["4/5", "99", "-1", "５", "", digit, "1e9", "NaN"]))
        elif kind == 4:
            at = draw.randrange(len(text) + 1)
            text = text[:at] + draw.choice(PIECES) + text[at + draw.randrange(4) :]
        elif kind == 5:
            text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(12)))
        elif kind == 6:
            text = "".join(chr(draw.choice((draw.randrange(128), draw.randrange(0x11000)))) for _ in range(40))
        else:
            text = text[draw.randrange(len(text)) :]
        yield text


def fuzz(seed: int, count: int) -> int:
    """Reads so many garbled answers, each by every template of words; how many had a value."""
    forms = [load(name) for name in KINDS]
    read = 0
    for text in garbled(seed, count):
        for form in forms:
            try:
                value = form.read(Answer(text, {}))
            except Unreadable:
                continue
            assert 0 <= value <= 1, (form.about, text)
            assert not form.compares or value in (0.0, 0.5, 1.0), (form.about, text)
            assert NEEDS[form.parser] in text.lower(), (form.about, text)
            if form.parser in ("final_score", "tagged_score") and form.to_unit == "divide":
                assert any(abs(value * form.range[1] - n) < 1e-9 for n in plain_numbers(text)), (form.about, text)
            read += 1
    return read


def plain_numbers(text: str) -> list[float]:
    """Numbers in ASCII digits that are no part of a fraction, a word or a larger number."""
    words = re.split(r"[^0-9A-Za-z/.,+\-\u0600-\uffff]+|\s+", text)
    return [float(word) for word in words if re.fullmatch(r"[0-9]+(\.[0-9]+)?", word)]


def test_garbled_answers_crash_nothing() -> None:
    assert fuzz(seed=1, count=1000) > 100


@pytest.mark.slow
def test_a_hundred_thousand_garbled_answers_crash_nothing() -> None:
    assert fuzz(seed=2, count=120_000) > 1000


@pytest.mark.parametrize("junk", ["<Score>", "\n", "*", "Final Score", "<answer>", "Image 1: ", "```\n", "[", '"'])
def test_no_answer_takes_long(junk: str) -> None:
    """A search that is quadratic in the answer would not end here within the suite's time."""
    for name in KINDS:
        for text in (junk * 100_000, f"{junk * 50_000} unless Image 1 is better, {junk * 50_000}"):
            with pytest.raises(Unreadable):
                load(name).read(Answer(text, {}))


def test_lists_of_verdicts_have_the_right_length_and_nothing_but_0_and_1() -> None:
    assert answers.json_verdicts('{"remarks": ["a", "b"], "score": [1, 0]}', 2) == (1, 0)
    assert answers.json_verdicts('```json\n{"score": [0]}\n```', 1) == (0,)
    wrong = ("1", "[1]", "[1, 0, 1]", "[1, 2]", "[1, true]", "[1, 0.0]", '[1, "0"]', "[1, null]", "null")
    for score in wrong:
        with pytest.raises(Unreadable):
            answers.json_verdicts(f'{{"score": {score}}}', 2)
    for text in (
        "",
        "score: [1, 0]",
        '{"scores": [1, 0]}',
        '{"score": [1, 0]} {}',
        '{"score": [1, 0], "score": [1, 1]}',
    ):
        with pytest.raises(Unreadable):
            answers.json_verdicts(text, 2)


def test_garbled_lists_of_verdicts_are_lists_of_verdicts_or_nothing() -> None:
    draw, whole, read = random.Random(5), '{"remarks": ["a", "b"], "score": [1, 0]}', 0
    for _ in range(2000):
        at = draw.randrange(len(whole) + 1)
        text = whole[:at] + draw.choice([*PIECES, "2", "true", ", 1", "", ""]) + whole[at + draw.randrange(3) :]
        try:
            value = answers.json_verdicts(text, 2)
        except Unreadable:
            continue
        assert re.search(r'"score"\s*:\s*\[\s*' + r"\s*,\s*".join(map(str, value)) + r"\s*\]", text), text
        read += 1
    assert 50 < read < 1950
