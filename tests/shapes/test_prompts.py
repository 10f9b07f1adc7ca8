"""The world's prompts: what they are, and that splits share no content."""

from __future__ import annotations

from collections import Counter

import pytest

from tempflow.shapes.prompts import KINDS, SPLITS, Object, Spec, balanced, by_prompt, specs


def content(spec: Spec) -> tuple[object, ...]:
    """What a prompt means whatever the order it is said in."""
    flipped = {"right of": "left of", "below": "above"}
    objects = spec.objects[::-1] if spec.relation in flipped else spec.objects
    if spec.relation is None:
        objects = tuple(sorted(objects, key=repr))
    return spec.kind, objects, flipped.get(spec.relation or "", spec.relation)


def test_captions_are_distinct_short_and_in_plain_words() -> None:
    assert len(by_prompt()) == len(specs())
    assert max(len(p.split()) for p in by_prompt()) <= 8
    assert {
        "a circle", "a red cross", "two circles", "four crosses", "a circle and a square", "a square above a triangle",
        "a red circle and a blue square",
    } <= by_prompt().keys()  # fmt: skip
    assert by_prompt()["a square above a triangle"] == Spec("position", (Object("square"), Object("triangle")), "above")


def test_each_kind_has_its_number_of_prompts() -> None:
    assert Counter(s.kind for s in specs()) == {
        "single": 4,  # shapes
        "two": 4 * 3,
        "count": 4 * 3,  # two, three, four
        "color": 4 * 6,
        "position": 4 * 3 * 4,
        "attribution": 4 * 3 * 6 * 5,
    }


def test_splits_cover_the_world_and_share_no_content_but_the_single_objects() -> None:
    parts = {split: {content(s) for s in specs(split) if s.kind != "single"} for split in SPLITS}
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not parts[a] & parts[b]
    assert set().union(*parts.values()) == {content(s) for s in specs() if s.kind != "single"}
    for split in SPLITS:
        assert {s.kind for s in specs(split)} == set(KINDS)
        assert len(set(specs(split))) == len(specs(split))


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"split: 'tset' is not one of train, validation, test"):
        specs("tset")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_balanced_takes_the_kinds_in_equal_parts_and_is_a_prefix_of_longer_lists(split: str) -> None:
    chosen = balanced(split, 60)  # type: ignore[arg-type]
    assert set(Counter(s.kind for s in chosen).values()) == {10}
    assert set(chosen) <= set(specs(split))  # type: ignore[arg-type]
    assert balanced(split, 120)[:60] == chosen  # type: ignore[arg-type]
