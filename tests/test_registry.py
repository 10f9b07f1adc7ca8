"""Algorithms and rewards are found by their files: one new file adds one, and none imports the others."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tempflow
from tempflow import algorithms, rewards
from tempflow.cli import main
from tempflow.config import algorithm_config
from tempflow.config.algorithm import to_algorithm

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

LICENCE, NEEDS = "CC0-1.0", "tempflow[demo]"


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
def test_a_new_file_is_a_new_reward(capsys: pytest.CaptureFixture[str]) -> None:
    red = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    red[1, :, :, 0] = 255
    scores = rewards.build("redness").score(red, ["a", "b"], [{}, {}])
    assert scores.value[:, 0].tolist() == [0.0, 1.0]
    assert "redness" in rewards.names() and rewards.plugin("redness") is None
    assert rewards.notes()["redness"] == ("How red a picture is, 0 to 1.", "CC0-1.0", "tempflow[demo]")
    assert main(["rewards"]) == 0
    assert "How red a picture is" in capsys.readouterr().out


@pytest.mark.parametrize("registry", [algorithms.ALGORITHMS, rewards.REWARDS])
def test_a_registry_is_a_read_only_mapping(registry: Any) -> None:
    assert list(registry) == sorted(registry) and len(registry) == len(list(registry)) > 2
    assert all(make.__name__ == name for name, make in registry.items())
    assert not {"base", "frames", "function", "protocol", "safe", "__init__", ""} & registry.keys()
    for nothing in ("base", "flow_grpo.py", "os.path", "", 3):
        assert nothing not in registry
        with pytest.raises(KeyError):
            registry[nothing]
    with pytest.raises(TypeError):
        registry["mine"] = len


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
assert files("algorithms") == {"base"} and len(algorithms.ALGORITHMS) > 30, files("algorithms")
algorithms.find("rloo")()
assert files("algorithms") == {"base", "rloo", "flow_grpo"}, files("algorithms")
assert algorithms.flow_grpo().name == "flow_grpo" and algorithms.rloo().name == "rloo"
import tempflow.algorithms.dapo, tempflow.algorithms.base
assert tempflow.algorithms.dapo().name == "dapo" and tempflow.algorithms.base.Algorithm
tools = {"frames", "function", "protocol", "safe"}
assert "jpeg_compressibility" in rewards.names() and files("rewards") == tools, files("rewards")
rewards.build("jpeg_compressibility")
assert files("rewards") == tools | {"jpeg_compressibility"}, files("rewards")
"""


def test_one_that_is_found_imports_no_other() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
