"""What is said of every argument of every algorithm, and that it is written once."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path

import pytest

from tempflow.algorithms import ALGORITHMS
from tempflow.algorithms.base import COMMON, EXACT_KL, argument_texts, texts_of
from tempflow.config import algorithm_config


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_argument_has_a_text(name: str) -> None:
    function = ALGORITHMS[name]
    texts = argument_texts(function.__doc__ or "")
    assert list(texts) == list(inspect.signature(function).parameters) and all(texts.values())
    shown = {key: field.description for key, field in algorithm_config(name).model_fields.items() if key != "name"}
    assert shown == texts
    head, *_, last = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    assert "\n" not in head and last.startswith("Raises ValueError") and max(map(len, last.splitlines())) <= 120


def test_no_text_is_written_twice() -> None:
    written = [*COMMON.values(), *EXACT_KL.values()]
    for name, function in ALGORITHMS.items():
        body = ast.parse(Path(inspect.getfile(function)).read_text()).body
        (node,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
        written += argument_texts(ast.get_docstring(node) or "").values()
    assert [text for text, times in Counter(written).items() if times > 1] == []


def base(steps: int, first: int, second: int) -> None:
    """A base.

    Args:
        first: the base's own,
            in two lines.
        second: the base's.
    """


def variant(second: int, steps: int, first: int, kl: float, mine: int, nobody: int) -> None:
    """A variant.

    More of it.

    Args:
        mine: its own.
        second: another.

    Raises nothing.
    """


def test_own_texts_come_first_then_the_sources_then_the_common_ones() -> None:
    doc = texts_of(base, EXACT_KL)(variant).__doc__ or ""
    texts = argument_texts(doc)
    assert list(texts) == ["second", "steps", "first", "kl", "mine"]
    assert texts["second"] == "another." and texts["mine"] == "its own."
    assert texts["first"] == "the base's own, in two lines."
    assert texts["steps"] == COMMON["steps"] and texts["kl"] == EXACT_KL["kl"] != COMMON["kl"]
    assert doc.startswith("A variant.\n\nMore of it.\n\nArgs:\n    second: ") and doc.endswith("\n\nRaises nothing.")


def test_a_function_without_a_docstring_gets_one() -> None:
    def bare(steps: int) -> None: ...

    assert texts_of()(bare).__doc__ == f"\n\nArgs:\n    steps: {COMMON['steps']}"


def test_faults_of_arguments_begin_with_the_arguments_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of `core` finds it: the name is what stands in a configuration."""
    monkeypatch.setattr("tempflow.core.plan.MAX_EDGES", 5000)
    wrong, refused = dict[tuple[str, str], str](), 0
    for name, function in ALGORITHMS.items():
        arguments = inspect.signature(function).parameters
        for argument in arguments:
            for value in (-1, 0, 1, 2, 99, 1.5, (99,)):
                try:
                    function(**{argument: value})
                except ValueError as error:
                    refused += 1
                    if str(error).partition(":")[0] not in arguments:
                        wrong[name, argument] = str(error)
                except TypeError:  # a tuple for a number, which a configuration refuses
                    pass
    assert wrong == {} and refused > 500
