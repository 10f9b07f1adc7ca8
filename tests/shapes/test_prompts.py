"""The world's prompts: what they are, how they are dealt, and that splits share no meaning."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tempflow.data.prompts import load_prompts
from tempflow.evaluate.suite import fixed_prompts
from tempflow.shapes.prompts import COLORS, KINDS, SHAPES, SPLITS, Object, Spec, Split, balanced, by_prompt, specs

STANDARD = 1008  # pictures of a reported figure
NUMBER = {"two": 2, "three": 3, "four": 4}
WHERE = {"at the top": "top", "at the bottom": "bottom", "on the left": "left", "on the right": "right"}


def meaning(prompt: str) -> tuple[object, ...]:
    """What a caption asks for, read from its words alone: the same for every wording of one content."""
    for relation, mirrored in ((" left of ", False), (" right of ", True), (" above ", False), (" below ", True)):
        if relation in prompt:
            first, second = prompt.split(relation)
            axis = "across" if relation in (" left of ", " right of ") else "down"
            pair = (thing(second), thing(first)) if mirrored else (thing(first), thing(second))
            return (axis, *pair)
    if " and " in prompt:
        return ("and", *sorted(thing(part) for part in prompt.split(" and ")))
    first, *rest = prompt.split(" ", 1)
    if first in NUMBER:
        *color, plural = rest[0].split()
        singular = plural.removesuffix("es") if plural == "crosses" else plural.removesuffix("s")
        return (NUMBER[first], thing(" ".join(["a", *color, singular])))
    return ("one", thing(prompt))


def thing(phrase: str) -> tuple[str, str, str, str]:
    place = next((short for long, short in WHERE.items() if phrase.endswith(long)), "")
    words = next((phrase.removesuffix(long) for long in WHERE if phrase.endswith(long)), phrase).split()
    assert words.pop(0) == "a"
    size = words.pop(0) if words[0] in ("small", "big") else ""
    color = words.pop(0) if words[0] in COLORS else ""
    (shape,) = words
    assert shape in SHAPES
    return shape, color, size, place


def test_captions_are_distinct_short_and_in_plain_words() -> None:
    assert len(by_prompt()) == len(specs())
    assert max(len(p.split()) for p in by_prompt()) == 7
    assert {
        "a small circle", "a big moon on the left", "a ring at the top", "a red cross", "a small white bar",
        "two circles", "four red crosses", "a circle and a square", "a square above a triangle",
        "a red circle and a blue dome",
    } <= by_prompt().keys()  # fmt: skip
    assert by_prompt()["a square above a triangle"] == Spec("position", (Object("square"), Object("triangle")), "above")
    assert by_prompt()["a big moon on the left"].objects == (Object("moon", size="big", place="on the left"),)


def test_each_kind_has_its_number_of_prompts() -> None:
    assert Counter(s.kind for s in specs()) == {
        "single": 9 * (2 + 4 + 2 * 4),  # a size, a place, both
        "two": 9 * 8,
        "count": 9 * 3 * (1 + 7),  # two, three, four; of any colour or of one
        "color": 9 * 7 * 3,  # small, big, any size
        "position": 9 * 8 * 4,
        "attribution": 9 * 8 * 7 * 6,
    }


def test_no_two_captions_of_a_split_pair_mean_the_same() -> None:
    """Read from the captions, so that a fault in the world's own notion of content shows."""
    meanings = {split: {meaning(s.prompt) for s in specs(split)} for split in SPLITS}
    assert not meanings["test"] & meanings["train"]
    assert not meanings["test"] & meanings["validation"]
    assert not meanings["validation"] & meanings["train"]
    assert set().union(*meanings.values()) == {meaning(s.prompt) for s in specs()}
    assert sum(len(specs(split)) for split in SPLITS) == len(specs())


def test_the_reader_of_meanings_sees_what_is_the_same_and_what_is_not() -> None:
    same = [
        ("a ring and a bar", "a bar and a ring"),
        ("a red ring and a blue bar", "a blue bar and a red ring"),
        ("a ring left of a bar", "a bar right of a ring"),
        ("a ring above a bar", "a bar below a ring"),
    ]
    assert all(meaning(a) == meaning(b) for a, b in same)
    other = [
        ("a red ring and a blue bar", "a blue ring and a red bar"),
        ("a ring left of a bar", "a bar left of a ring"),
        ("a ring left of a bar", "a ring above a bar"),
        ("two rings", "two red rings"),
        ("a small ring", "a small ring at the top"),
        ("a small ring", "a small red ring"),
    ]
    assert all(meaning(a) != meaning(b) for a, b in other)


def test_every_content_is_dealt_whole() -> None:
    """All wordings of a content stand together, and two objects have two wordings."""
    for split in SPLITS:
        wordings = Counter(meaning(s.prompt) for s in specs(split))
        kind_of = {meaning(s.prompt): s.kind for s in specs(split)}
        assert all(n == (2 if kind_of[m] in ("two", "position", "attribution") else 1) for m, n in wordings.items())


@pytest.mark.parametrize("kind", KINDS)
def test_test_prompts_are_many_and_each_is_drawn_at_most_twenty_times(kind: str) -> None:
    prompts = [s.prompt for s in specs("test") if s.kind == kind]
    assert len(prompts) >= 24
    assert len({meaning(p) for p in prompts}) >= 12
    for split in ("test", "validation"):
        drawn = Counter(s.prompt for s in balanced(split, STANDARD) if s.kind == kind)
        assert sum(drawn.values()) == STANDARD // 6 and max(drawn.values()) <= 20


def test_words_are_about_as_frequent_in_test_as_their_rivals() -> None:
    for kind in KINDS:
        for words in (SHAPES, COLORS):
            seen = Counter(
                w
                for s in specs("test")
                if s.kind == kind
                for o in s.objects[: 1 if kind == "count" else 2]
                for w in (o.shape, o.color)
                if w in words
            )
            assert not seen or (len(seen) == len(words) and max(seen.values()) <= 1.7 * min(seen.values())), (
                kind,
                seen,
            )


def test_pretraining_draws_no_test_content() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pretrain_shapes.py"))
    drawn = {s.prompt for s in script["captions"](24_000, np.random.default_rng(0))}
    assert not {meaning(p) for p in drawn} & {meaning(s.prompt) for s in specs("test")}
    seen = [s for s in (*specs("train"), *specs("validation")) if s.kind != "attribution"]
    assert {s.prompt for s in seen} <= drawn


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"split: 'tset' is not one of train, validation, test"):
        specs("tset")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_balanced_takes_the_kinds_in_equal_parts_and_is_a_prefix_of_longer_lists(split: Split) -> None:
    chosen = balanced(split, 60)
    assert set(Counter(s.kind for s in chosen).values()) == {10}
    assert set(chosen) <= set(specs(split))
    assert balanced(split, 120)[:60] == chosen
    assert [s.prompt for s in chosen] == [p.text for p in fixed_prompts(load_prompts(f"shapes:{split}"), 60)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_short_list_has_every_content_once_before_a_second_wording(split: Split) -> None:
    for kind in ("two", "position", "attribution"):
        prompts = [s.prompt for s in specs(split) if s.kind == kind]
        assert len({meaning(p) for p in prompts[: len(prompts) // 2]}) == len(prompts) // 2
