"""GenEval's rules on hand-made detections: a table written apart from the code, laws, and what metadata are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.rewards.geneval_rules import (
    CLASSES,
    COCO,
    COLOURS,
    RELATIONS,
    TAGS,
    Box,
    Detection,
    Exclude,
    Include,
    Limits,
    Task,
    check_possible,
    coloured,
    counted,
    flow_grpo,
    flow_grpo_strict,
    graded,
    official,
    relations,
    task_of,
)

# ------------------------------------------------------------------------------------------------------------ table
CASES = json.loads((Path(__file__).parent / "geneval_cases.json").read_text())["cases"]
"""Written from a description of the logic by somebody who had not seen the code; null where that left it open."""

RULES = {"official": official, "flowgrpo_graded": flow_grpo, "flowgrpo_strict": flow_grpo_strict}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_table(case: dict[str, Any]) -> None:
    objects = [(name, one) for name, ones in case["detections"].items() for one in ones]
    detections = [Detection(name, one["score"], tuple(one["box"]), one.get("color")) for name, one in objects]
    task = task_of(case["metadata"])
    found = counted(task, detections)
    got = {name: rule(task, found) for name, rule in RULES.items() if case["expected"][name] is not None}
    assert got == pytest.approx({name: case["expected"][name] for name in got}), case["why"]
    assert (graded(task, found) == 1) == (official(task, found) == 1)


def test_the_table_has_every_kind_of_case() -> None:
    answers = {(case["metadata"]["tag"], case["expected"]["official"]) for case in CASES}
    assert len(CASES) >= 60 and answers == {(tag, right) for tag in TAGS for right in (0, 1)}


# ------------------------------------------------------------------------------------------------------------- laws
WHOLE = st.integers(-200, 200)
BOXES = st.tuples(WHOLE, WHOLE, st.integers(0, 150), st.integers(0, 150)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TURNED = {"left of": "above", "above": "right of", "right of": "below", "below": "left of"}


def by_formula(a: Box, b: Box) -> set[str]:
    """The published formula, step by step."""
    d = [(a[k] + a[k + 2]) / 2 - (b[k] + b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    kept = [math.copysign(max(abs(d[k]) - 0.1 * sizes[k], 0), d[k]) for k in (0, 1)]
    if kept == [0, 0]:
        return set()
    x, y = (v / math.hypot(*d) for v in kept)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


@given(BOXES, BOXES)
def test_relations_are_the_formulas(a: Box, b: Box) -> None:
    """Off the borders, where the formula's own rounding decides nothing."""
    d = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    norm = math.hypot(*d)
    near = any(abs(abs(d[k]) - 0.1 * sizes[k] - 0.5 * norm) < 1e-9 * (1 + norm) for k in (0, 1))
    if not near:
        assert relations(a, b) == by_formula(a, b)


@given(BOXES, BOXES)
def test_relations_are_opposite_seen_from_the_other(a: Box, b: Box) -> None:
    assert {OPPOSITE[r] for r in relations(a, b)} == relations(b, a)
    assert len(relations(a, b)) <= 2 and not any(OPPOSITE[r] in relations(a, b) for r in relations(a, b))


@given(BOXES, BOXES, st.sampled_from([0.25, 0.5, 3.0, 1024.0]), WHOLE, WHOLE)
def test_relations_keep_under_scale_and_shift(a: Box, b: Box, scale: float, x: int, y: int) -> None:
    def moved(box: Box) -> Box:
        return tuple(scale * side + shift for side, shift in zip(box, (x, y, x, y), strict=True))

    assert relations(moved(a), moved(b)) == relations(a, b)


@given(BOXES, BOXES)
def test_relations_turn_with_the_picture(a: Box, b: Box) -> None:
    def turned(box: Box) -> Box:  # a quarter, clockwise
        return (-box[3], box[0], -box[1], box[2])

    assert relations(turned(a), turned(b)) == {TURNED[r] for r in relations(a, b)}


@pytest.mark.parametrize(
    ("a", "b", "held"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),  # the same place
        ((0, 0, 0, 0), (0, 0, 0, 0), set()),  # no area, no offset
        ((0, 0, 0, 0), (1, 0, 1, 0), {"left of"}),  # points
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # |d| = 2 = 0.1·(10 + 10)
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),  # (4 − 2) ÷ 4 = ½, which is not more
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),  # (5 − 2) ÷ 5
        ((0, 0, 0, 0), (3, 4, 3, 4), {"left of", "above"}),  # .6 and .8
        ((0, 0, 0, 0), (1, 10, 1, 10), {"above"}),
        ((0, 0, 10, 10), (30, 40, 40, 50), {"left of", "above"}),  # (30 − 2) ÷ 50, (40 − 2) ÷ 50
        ((0, 0, 25, 10), (30, 40, 55, 50), {"above"}),  # (30 − 5) ÷ 50 = ½
        ((0, 0, 5000, 10), (2000, 0, 7000, 10), set()),  # (2000 − 1000) ÷ 2000 = ½
        ((0, 0, 5000, 10), (2001, 0, 7001, 10), {"left of"}),
        ((0, 0, 24, 10), (30, 40, 54, 50), {"left of", "above"}),
        ((0, 0, 3, 3), (1.25, 0, 4.25, 3), {"left of"}),  # (1.25 − .6) ÷ 1.25 = .52
    ],
)
def test_relations_at_their_borders(a: Box, b: Box, held: set[str]) -> None:
    assert relations(a, b) == held and relations(b, a) == {OPPOSITE[r] for r in held}


# ------------------------------------------------------------------------------------------------------------ rules
NAMES = st.sampled_from(["dog", "bench", "cat"])
DETECTIONS = st.lists(
    st.builds(Detection, NAMES, st.sampled_from([0.2, 0.3, 0.5, 0.9, 0.95]), BOXES, st.sampled_from(COLOURS[:3])),
    max_size=8,
)
COUNTS = st.integers(1, 3)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Any that metadata can ask for, the contradictory ones too."""
    include: list[Include] = []
    for place in range(draw(st.integers(1, 3))):
        colour = draw(st.none() | st.sampled_from(COLOURS[:3]))
        earlier = st.tuples(st.sampled_from(RELATIONS), st.integers(0, place - 1)) if place else st.none()
        include.append(Include(draw(NAMES), draw(COUNTS), colour, draw(st.none() | earlier)))
    exclude = draw(st.lists(st.builds(Exclude, NAMES, COUNTS), max_size=2))
    return Task(draw(st.sampled_from(TAGS)), tuple(include), tuple(exclude))


@given(tasks(), DETECTIONS, st.randoms())
def test_rules_keep_their_laws(task: Task, detections: list[Detection], random: Any) -> None:
    found = counted(task, detections)
    strict, part = official(task, found), graded(task, found)
    assert strict in (0.0, 1.0) and 0 <= part <= 1 and flow_grpo(task, found) <= 1
    assert (part == 1) == (strict == 1)
    if flow_grpo_strict(task, found):
        assert flow_grpo(task, found) == 1 and official(replace(task, exclude=()), found) == 1
    shuffled = random.sample(detections, len(detections))
    assert [rule(task, counted(task, shuffled)) for rule in (official, graded, flow_grpo)] == [
        strict,
        part,
        flow_grpo(task, found),
    ]
    others = [*detections, Detection("zebra", 0.99, (0, 0, 1, 1)), Detection("dog", 0.1, (0, 0, 9, 9))]
    assert graded(task, counted(task, others)) == part  # neither asked for, nor sure enough


@given(tasks(), DETECTIONS)
def test_colours_are_looked_at_of_those_that_are_taken(task: Task, detections: list[Detection]) -> None:
    """A classifier that is asked for these alone decides as one that is asked for all."""
    found = counted(task, detections)
    asked = {id(one) for one in coloured(task, found)}
    known = {n: [one if id(one) in asked else replace(one, colour=None) for one in ones] for n, ones in found.items()}
    for rule in (official, graded, flow_grpo, flow_grpo_strict):
        assert rule(task, known) == rule(task, found)
    blank = {n: [replace(one, colour=None) for one in ones] for n, ones in found.items()}
    if asked:
        with pytest.raises(ValueError, match="has no colour, and"):
            graded(task, blank)


def many(name: str, count: int, confidence: float = 0.95, colour: str | None = None) -> list[Detection]:
    return [Detection(name, confidence - k / 1000, (k, 0, k + 1, 1), colour) for k in range(count)]


def scores(task: Task, detections: list[Detection], limits: Limits | None = None) -> tuple[float, float, float]:
    found = counted(task, detections, limits or Limits())
    return official(task, found), graded(task, found), flow_grpo(task, found)


def test_detections_that_count() -> None:
    one = Task("single_object", (Include("dog", 1),))
    assert scores(one, many("dog", 1, 0.3))[0] == 0 and scores(one, many("dog", 1, 0.3000001))[0] == 1
    count = Task("counting", (Include("dog", 1),), (Exclude("dog", 2),))
    assert scores(count, many("dog", 1, 0.9))[0] == 0 and scores(count, many("dog", 1, 0.9000001))[0] == 1
    assert len(counted(one, many("dog", 40, 0.9))["dog"]) == 16
    assert scores(one, many("dog", 1, 0.6), Limits(threshold=0.7))[0] == 0
    assert [len(counted(one, many("dog", 9), Limits(most=n))["dog"]) for n in (1, 4)] == [1, 4]


@pytest.mark.parametrize(("there", "expected"), [(0, 0), (1, 1 / 3), (3, 1), (4, 2 / 3), (5, 1 / 3), (6, 0), (9, 0)])
def test_graded_counting_falls_on_both_sides(there: int, expected: float) -> None:
    task = Task("counting", (Include("dog", 3),), (Exclude("dog", 4),))
    assert scores(task, many("dog", there))[1] == pytest.approx(expected)


def test_what_flow_grpo_gives_otherwise() -> None:
    far, dog = Detection("bench", 0.9, (90, 0, 91, 1)), many("dog", 1)
    one = Task("single_object", (Include("dog", 1),))
    assert scores(one, many("dog", 4)) == (1, 1, -2)  # more objects than asked for, and a negative part
    wrong = Task("position", (Include("dog", 1), Include("bench", 1, None, ("left of", 0))))
    assert scores(wrong, [*dog, far]) == (0, 2 / 3, 3 / 4)  # parts 1, 1, 0; and 1, 1, 0, 1
    ruled = Task("single_object", (Include("dog", 1),), (Exclude("cat", 1),))
    assert scores(ruled, [*dog, *many("cat", 1)]) == (0, 1 / 2, 1)  # excludes play no part
    red = Task("colors", (Include("dog", 2, "red"),))
    assert scores(red, many("dog", 1, colour="red")) == (0, 1 / 2, 1 / 4)  # ½ and ½; ½ and 0
    assert scores(red, [*many("dog", 1, colour="red"), *many("dog", 1, 0.5, "blue")]) == (0, 3 / 4, 3 / 4)
    lost = Task("color_attr", (Include("dog", 1, "red"), Include("bench", 1, None, ("right of", 0))))
    assert scores(lost, [*many("dog", 1, colour="blue"), far]) == (0, 3 / 4, 1 / 2)  # 1, 0, 1, 1; and 1, 0, 1, 0


# ------------------------------------------------------------------------------------------------------- what is read
def asked(**changes: object) -> dict[str, object]:
    return {"tag": "position", "include": [{"class": "dog", "count": 1}], **changes}


def test_published_metadata_are_read() -> None:
    include = [
        {"class": "tv remote", "count": 1, "color": "red"},
        {"class": "cow", "count": 2, "position": ["above", 0]},
    ]
    found = task_of(asked(include=include, exclude=[{"class": "cow", "count": 3}], prompt="…", note=1))
    expected = (Include("tv remote", 1, "red"), Include("cow", 2, None, ("above", 0)))
    assert found == Task("position", expected, (Exclude("cow", 3),))
    empty = [{"class": "dog", "count": 1, "color": None, "position": None}]  # as tables leave cells empty
    assert task_of(asked(include=empty, exclude=None)) == Task("position", (Include("dog", 1),))
    assert len(CLASSES) == len(set(CLASSES)) == len(COCO) == 80 and len(set(CLASSES) - set(COCO)) == 3


def second(**changes: object) -> dict[str, object]:
    item = {"class": "cow", "count": 1, "position": ["above", 0], **changes}
    return asked(include=[{"class": "dog", "count": 1}, item])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"tag: is missing; nearest valid: 'single_object'"),
        (asked(tag="Counting"), r"tag: 'Counting' is not valid; nearest valid: 'counting'"),
        (asked(tag=["counting"]), r"tag: \['counting'\] is not valid; nearest valid: 'counting'"),
        ({"tag": "colors"}, r"include: is missing; nearest valid: \[\{"),
        (asked(include=[]), r"include: \[\] is not valid; nearest valid: \[\{"),
        (asked(include="dog"), r"include: 'dog' is no list"),
        (asked(include={"class": "dog"}), r"include: .* is no list"),
        (asked(include=["dog"]), r"include\[0\]: 'dog' is no object; nearest valid: \{\"class\""),
        (second(colour="red"), r"include\[1\]: 'colour' is unknown; nearest valid: 'color'"),
        (asked(exclude=[{"class": "dog", "count": 1, "color": "red"}]), r"exclude\[0\]: 'color' is unknown"),
        (second(**{"class": "mouse"}), r"include\[1\].class: 'mouse' is not valid; nearest valid: 'computer mouse'"),
        (second(**{"class": "Sofa"}), r"class: 'Sofa' is not valid; nearest valid: 'couch'"),
        (second(**{"class": "dgo"}), r"class: 'dgo' is not valid; nearest valid: 'dog'"),
        (second(**{"class": 3}), r"class: 3 is not valid; nearest valid: "),
        (asked(include=[{"count": 1}]), r"include\[0\].class: is missing"),
        (asked(exclude=[{"class": "cart", "count": 1}]), r"exclude\[0\].class: 'cart' is not valid; .* 'ca[rt]'"),
        (second(color="gray"), r"include\[1\].color: 'gray' is no colour; nearest valid: '(green|orange)'"),
        (second(color=["red"]), r"include\[1\].color: \['red'\] is no colour; nearest valid: 'red'"),
        (second(count=0), r"include\[1\].count: 0 is not valid; nearest valid: 1"),
        (second(count=-3), r"count: -3 is not valid; nearest valid: 1"),
        (second(count=2.0), r"count: 2.0 is not valid; nearest valid: 2"),
        (second(count=True), r"count: True is not valid; nearest valid: 1"),
        (second(count="2"), r"count: '2' is not valid; nearest valid: 1"),
        (second(count=math.nan), r"count: nan is not valid; nearest valid: 1"),
        (asked(include=[{"class": "dog"}]), r"count: is missing; nearest valid: 1"),
        (second(position="above"), r"include\[1\].position: 'above' is no \[relation, index\]; .* \[\"left of\", 0\]"),
        (second(position=["under", 0]), r"position: 'under' is no relation; nearest valid: "),
        (second(position=["left", 0]), r"position: 'left' is no relation; nearest valid: 'left of'"),
        (second(position=[["above"], 0]), r"position: \['above'\] is no relation; nearest valid: 'above'"),
        (second(position=["above", 1]), r"position: 1 is the index of no earlier include; nearest valid: 0"),
        (second(position=["above", 2]), r"position: 2 is the index of no earlier include; nearest valid: 0"),
        (second(position=["above", -1]), r"position: -1 is the index of no earlier include"),
        (second(position=["above", "0"]), r"position: '0' is the index of no earlier include"),
        (second(position=["above", False]), r"position: False is the index of no earlier include"),
        (
            asked(include=[{"class": "dog", "count": 1, "position": ["above", 0]}]),
            r"include\[0\].position: 0 is the index of no earlier include; nearest valid: no position in the first",
        ),
    ],
)
def test_other_metadata_are_refused_by_name(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        task_of(metadata)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            asked(include=[{"class": "dog", "count": 17}]),
            r"include\[0\].count: 17, and at most 16 .*; nearest valid: 16",
        ),
        (
            asked(exclude=[{"class": "dog", "count": 1}]),
            r"exclude\[0\].count: 1 of 'dog', .* asks for 1; nearest valid: 2",
        ),
        (second(**{"class": "dog"}), r"include\[1\].position: refers to include\[0\], which is of the same class"),
        (
            asked(include=[{"class": "dog", "count": 1, "color": c} for c in ("red", "blue")]),
            r"include\[1\].color: 'blue', and include\[0\].color 'red', of the same objects \('dog'\)",
        ),
    ],
)
def test_what_can_never_be_met_is_refused_by_name(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_possible(task_of(metadata), 16)
    check_possible(task_of(second()), 16)


@given(tasks(), DETECTIONS)
def test_what_is_refused_so_is_never_right(task: Task, detections: list[Detection]) -> None:
    try:
        check_possible(task, 16)
    except ValueError:
        assert official(task, counted(task, detections)) == 0


def test_broken_detections_and_limits_are_refused() -> None:
    for box in ((0, 0, math.nan, 1), (2, 0, 1, 1), (0, 2, 1, 1), (0, 0, math.inf, 1)):
        with pytest.raises(ValueError, match="is no box"):
            Detection("dog", 0.5, box)
    for wrong, message in (
        ({"threshold": 1.0}, "threshold: 1.0"),
        ({"counting": -0.1}, "counting"),
        ({"most": 0}, "most"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*nearest valid"):
            Limits(**wrong)
