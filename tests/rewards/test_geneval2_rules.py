"""Soft-TIFA's arithmetic, the forms of answers, and what atoms are refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempflow.rewards.geneval2_rules import NUMBERS, Atom, answer_forms, atoms_of, soft_tifa

HOW_MANY = "How many cows are in the image?"


def test_forms_of_an_answer() -> None:
    assert set(answer_forms("Yes")) == {"yes", "Yes", " yes", " Yes"} == set(answer_forms(" YES "))
    assert set(answer_forms("three")) == {"three", "Three", "3", " three", " Three", " 3"} == set(answer_forms("3"))
    assert set(answer_forms("21")) == {"21", " 21"} and len(answer_forms("12")) == 6


def test_forms_of_different_answers_share_nothing() -> None:
    answers = ("Yes", "No", *NUMBERS, "21", "red")
    every = [form for answer in answers for form in answer_forms(answer)]
    assert len(every) == len(set(every))


def test_means() -> None:
    assert soft_tifa([0.25, 1.0]) == pytest.approx(0.5) and soft_tifa([0.25, 1.0], "arithmetic") == 0.625
    assert soft_tifa([0.0, 1.0]) == 0 and soft_tifa([1.0, 1.0]) == 1 and soft_tifa([1.00001]) == 1
    assert soft_tifa([1e-300] * 40) == pytest.approx(1e-300)  # a product would be 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_laws_of_the_means(values: list[float]) -> None:
    geometric, arithmetic = soft_tifa(values), soft_tifa(values, mean="arithmetic")
    assert 0 <= geometric <= arithmetic + 1e-12 and min(values) - 1e-12 <= arithmetic <= 1
    assert soft_tifa(values[::-1]) == pytest.approx(geometric)


@pytest.mark.parametrize("wrong", [[], [math.nan], [0.5, -0.1], [1.01], [math.inf]])
def test_what_is_no_probability_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"atom_probabilities.*; nearest valid"):
        soft_tifa(wrong)


def test_another_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mean: 'harmonic'; nearest valid: '(arithmetic|geometric)'"):
        soft_tifa([0.5], "harmonic")


def test_atoms_are_read() -> None:
    published = {
        "atom_count": 1,
        "vqa_list": [[HOW_MANY, "three"], ["Are the cows plastic?", "Yes"]],
        "skills": ["count", "attribute"],
    }
    assert atoms_of(published) == (Atom(HOW_MANY, "three"), Atom("Are the cows plastic?", "Yes"))
    assert atoms_of({"atoms": [{"question": HOW_MANY, "answer": 3}]}) == ((HOW_MANY, "3"),)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "vqa_list: is missing"),
        ({"vqa_list": []}, r"vqa_list: \[\] holds no atom"),
        ({"vqa_list": "Are there cows?"}, "vqa_list: 'Are there cows.' holds no atom"),
        ({"vqa_list": [["Are there cows?"]]}, r"vqa_list\[0\]: .* is no \[question, answer\]"),
        (
            {"vqa_list": [["Are there cows?", "Yes"], ["Are they?", " "]]},
            r"vqa_list\[1\]: .* is no \[question, answer\]",
        ),
        ({"vqa_list": [["Are there cows?", True]]}, r"vqa_list\[0\]: .* is no \[question, answer\]"),
        ({"vqa_list": [["Where are they?", "on grass"]]}, r"vqa_list\[0\]: 'on grass' is more than one word"),
        ({"atoms": [{"question": HOW_MANY}]}, r"atoms\[0\]: .* is no \[question, answer\]"),
        ({"atoms": [], "vqa_list": []}, "atoms: there is vqa_list too"),
        ({"vqa_list": [[HOW_MANY, "tree"]]}, r"vqa_list\[0\]: 'tree' answers no 'How many .*; nearest valid: 'three'"),
        ({"vqa_list": [[HOW_MANY, "3"]], "skills": []}, r"skills: \[\]; nearest valid: 1 skills, one per atom"),
    ],
)
def test_other_atoms_are_refused_by_name(metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*") as caught:
        atoms_of(metadata)
    assert "nearest valid" in str(caught.value)
