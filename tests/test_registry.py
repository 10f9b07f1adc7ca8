"""Algorithms and rewards are found by their files: one new file adds one, and none imports the others."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tempflow
from tempflow import algorithms, models, registry, rewards
from tempflow.cli import main
from tempflow.config import algorithm_config
from tempflow.config.algorithm import to_algorithm
from tempflow.registry import Declared
from tempflow.rewards import Note

MY_GRPO = '''
from dataclasses import replace

from tempflow.algorithms.flow_grpo import flow_grpo


def my_grpo(steps: int = 4, group: int = 3):
    """My GRPO: nothing is new.

    Args:
        steps: how many.
        group: how many pictures.
    """
    return replace(flow_grpo(steps, group), name="my_grpo")
'''

REDNESS = '''
from tempflow.rewards.function import from_function

LICENCE, NEEDS, RANGE = "CC0-1.0", "tempflow[demo]", "0 to 1"


def redness():
    """How red a picture is, 0 to 1."""
    return from_function(lambda images, prompts: [i.getpixel((0, 0))[0] / 255 for i in images], name="redness")
'''


def added(package: ModuleType, name: str, text: str, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, the package has that one file more."""
    (folder / f"{name}.py").write_text(text)
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    algorithm_config.cache_clear()
    yield
    algorithm_config.cache_clear()
    sys.modules.pop(f"{package.__name__}.{name}", None)
    vars(package).pop(name, None)


@pytest.fixture
def my_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from added(algorithms, "my_grpo", MY_GRPO, tmp_path, monkeypatch)


@pytest.fixture
def redness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from added(rewards, "redness", REDNESS, tmp_path, monkeypatch)


@pytest.mark.usefixtures("my_grpo")
def test_a_new_file_is_a_new_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    made = algorithms.find("my_grpo")()
    assert (made.name, made.steps, algorithms.plugin("my_grpo")) == ("my_grpo", 4, None)
    assert "my_grpo" in algorithms.ALGORITHMS and "my_grpo" in dir(algorithms)
    assert algorithms.my_grpo is algorithms.ALGORITHMS["my_grpo"]
    config = to_algorithm({"name": "my_grpo", "group": 5})
    assert config.build().plan(0, 0).roots == 5
    assert main(["algorithms"]) == 0
    assert "My GRPO: nothing is new." in capsys.readouterr().out
    assert main(["train", "demo", "--algorithm.name", "my_grpo", "--help"]) == 0
    assert "how many pictures." in capsys.readouterr().out
    with pytest.raises(ValueError, match="nearest valid: 'my_grpo'"):
        algorithms.find("my_grp")


@pytest.mark.usefixtures("redness")
def test_a_new_file_is_a_new_reward(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    red = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    red[1, :, :, 0] = 255
    scores = rewards.build("redness").score(red, ["a", "b"], [{}, {}])
    assert scores.value[:, 0].tolist() == [0.0, 1.0]
    assert "redness" in rewards.names() and rewards.plugin("redness") is None
    assert rewards.notes()["redness"] == Note("How red a picture is, 0 to 1.", "0 to 1", "CC0-1.0", "tempflow[demo]")
    assert main(["rewards"]) == 0
    assert "How red a picture is" in capsys.readouterr().out


@pytest.mark.parametrize("found", [algorithms.ALGORITHMS, rewards.REWARDS])
def test_a_registry_is_a_read_only_mapping(found: Any) -> None:
    assert list(found) == sorted(found) and len(found) == len(list(found)) > 2
    assert all(isinstance(make, type) or make.__name__ == name for name, make in found.items())
    assert (
        not {"base", "around", "compose", "function", "options", "protocol", "safe", "scoring", "__init__", ""}
        & found.keys()
    )
    for nothing in ("base", "flow_grpo.py", "os.path", "", 3):
        assert nothing not in found
        with pytest.raises(KeyError):
            found[nothing]
    with pytest.raises(TypeError):
        found["mine"] = len


def test_a_name_is_the_function_even_after_its_file_was_imported() -> None:
    for name in ("flow_grpo", "dapo"):
        file = importlib.import_module(f"tempflow.algorithms.{name}")
        assert isinstance(file, ModuleType) and vars(file)[name] is algorithms.find(name)
        assert getattr(algorithms, name) is getattr(tempflow.algorithms, name) is algorithms.find(name)
        scope: dict[str, Any] = {}
        exec(f"from tempflow.algorithms import {name}", scope)
        assert scope[name] is algorithms.find(name) and scope[name]().name == name
    assert isinstance(importlib.import_module("tempflow.algorithms.base"), ModuleType)
    assert isinstance(algorithms.base, ModuleType) and algorithms.base.Algorithm is algorithms.Algorithm
    assert {*algorithms.ALGORITHMS, "find", "Algorithm"} <= {*dir(algorithms)}
    with pytest.raises(AttributeError, match=r"module 'tempflow.algorithms' has no attribute 'tempflow'"):
        _ = algorithms.tempflow


ALONE = """
import sys
from tempflow import algorithms, rewards
def files(room): return {m.split(".")[2] for m in sys.modules if m.startswith(f"tempflow.{room}.")}
assert files("algorithms") == {"base", "lesson"} and len(algorithms.ALGORITHMS) > 30, files("algorithms")
algorithms.find("rloo")()
assert files("algorithms") == {"base", "lesson", "phase", "rloo", "flow_grpo"}, files("algorithms")
assert algorithms.flow_grpo().name == "flow_grpo" and algorithms.rloo().name == "rloo"
import tempflow.algorithms.dapo, tempflow.algorithms.base
assert tempflow.algorithms.dapo().name == "dapo" and tempflow.algorithms.base.Algorithm
tools = {"around", "function", "options", "protocol", "safe", "weights"}
assert "jpeg_compressibility" in rewards.names() and files("rewards") == tools, files("rewards")
rewards.build("jpeg_compressibility")
assert files("rewards") == tools | {"jpeg_compressibility"}, files("rewards")
"""


def test_one_that_is_found_imports_no_other() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ declared
Written = Callable[[str | bytes], Declared[Any]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """Puts a file `odd.py` of that text into models/, and gives what is declared then."""
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])

    def write(text: str | bytes) -> Declared[Any]:
        (tmp_path / "odd.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        return Declared("tempflow.models", "PIPELINES")

    yield write
    sys.modules.pop("tempflow.models.odd", None)
    vars(models).pop("odd", None)


PLAIN = 'PIPELINES = {"OddPipeline": "Odd"}\n'
UNREADABLE = {
    "a syntax error": (PLAIN + "def", r"odd\.py: PIPELINES cannot be read: invalid syntax.*line 2"),
    "no UTF-8": (PLAIN.encode() + b'X = "\xff"\n', r"odd\.py: PIPELINES cannot be read: .*utf-8"),
    "a null byte": (PLAIN.encode() + b"\0", r"odd\.py: PIPELINES cannot be read: .*null bytes"),
    "a key twice": (
        'PIPELINES = {"A": "Odd", "B": "B", "A": "C"}',
        r"odd\.py: PIPELINES has 'A' 2 times; nearest .*once",
    ),
    "no literal": ("PIPELINES = dict(A='Odd')", r"odd\.py: PIPELINES must be a dictionary of texts, as literals"),
    "a number": ('PIPELINES = {"A": 1}', r"odd\.py: PIPELINES must be a dictionary of texts"),
    "another one inside": (
        'PIPELINES = {"A": "Odd", **{"B": "B"}}',
        r"odd\.py: PIPELINES must be a dictionary of texts",
    ),
    "another file's": (PLAIN.replace("Odd", "StableDiffusion3"), r"odd\.py and sd3\.py both declare"),
    "more by |=": (
        PLAIN + 'PIPELINES |= {"B": "B"}',
        r"odd\.py:2: PIPELINES is set or changed here; nearest valid: one",
    ),
    "more by a key": (PLAIN + 'PIPELINES["B"] = "B"', r"odd\.py:2: PIPELINES is set or changed"),
    "more by update": (PLAIN + "PIPELINES.update(B='B')", r"odd\.py:2: PIPELINES is set or changed"),
    "twice": (PLAIN + PLAIN, r"odd\.py:2: PIPELINES is set or changed"),
    "if": ("if True:\n    " + PLAIN, r"odd\.py:2: PIPELINES is set or changed"),
    "try": ("try:\n    " + PLAIN + "finally:\n    pass", r"odd\.py:2: PIPELINES is set or changed"),
    "two names": ('X = PIPELINES = {"A": "Odd"}', r"odd\.py:1: PIPELINES is set or changed"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_that_cannot_be_read_is_one_line(written: Written, case: str) -> None:
    text, message = UNREADABLE[case]
    with pytest.raises(ValueError, match=message) as caught:
        list(written(text))
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PLAIN + "class Od: pass",
            r"odd\.py: PIPELINES\['OddPipeline'\] is 'Odd', which .* not have; nearest valid: 'Od'",
        ),
        (PLAIN, r"odd\.py: PIPELINES\['OddPipeline'\] is 'Odd', which the file does not have$"),
        (PLAIN + "import math\nmath.nothing", r"PIPELINES\['OddPipeline'\]: which fails: module .* \(AttributeError\)"),
        (PLAIN + "{}['a']", r"PIPELINES\['OddPipeline'\]: which fails: 'a' \(KeyError\)"),
        (PLAIN + "Odd = nothing", r"PIPELINES\['OddPipeline'\]: which fails: .* \(NameError\)"),
    ],
)
def test_a_file_without_what_it_declares_says_so_when_that_is_asked_for(
    written: Written, text: str, message: str
) -> None:
    declared = written(text)
    assert "OddPipeline" in declared and "StableDiffusion3Pipeline" in declared
    assert "tempflow.models.odd" not in sys.modules  # listing imports none
    with pytest.raises(ValueError, match=message):
        declared["OddPipeline"]
    assert declared["StableDiffusion3Pipeline"].__name__ == "SD3"


def test_what_is_declared_beside_functions_and_annotations(written: Written) -> None:
    text = "# coding: latin-1\nPIPELINES: dict[str, str]\n" + PLAIN + "class Odd: pass\n# \xe9\n"
    declared = written((text + "def f():\n    PIPELINES = 3\n    return PIPELINES\n").encode("latin-1"))
    assert declared["OddPipeline"].__name__ == "Odd"
    written(b"# \xff, and nothing declared")
    assert "OddPipeline" not in declared and len(declared) >= 1


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(*told: tuple[str, str]) -> None:
        found = EntryPoints(EntryPoint(name, value, "tempflow.models") for name, value in told)
        monkeypatch.setattr(registry, "entry_points", found.select)

    declared: Declared[Any] = Declared("tempflow.models", "PIPELINES", "tempflow.models")
    points(("A", "json:loads"), ("B", "json:nothing"), ("C", "no_such_module:x"))
    assert declared["A"].__name__ == "loads" and {"A", "B", "C"} <= declared.keys()
    with pytest.raises(ValueError, match=r"^tempflow\.models: 'B' is 'json:nothing', which fails: .*AttributeError"):
        declared["B"]
    with pytest.raises(
        ValueError, match=r"^tempflow\.models: 'C' is 'no_such_module:x', which fails: .*no_such_module"
    ):
        declared["C"]
    points(("A", "json:loads"), ("A", "json:dumps"))
    with pytest.raises(
        ValueError, match=r"^tempflow\.models: 'A' is 'json:loads' and 'json:dumps'; nearest valid: one"
    ):
        list(declared)
