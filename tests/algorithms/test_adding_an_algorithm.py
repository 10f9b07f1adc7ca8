"""docs/adding_an_algorithm.md, followed: its files are run as they stand."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake import PROMPTS, Bench, Fake, brightness, config, same, weights
from rich.console import Console

import tempflow
from tempflow import algorithms
from tempflow.cost import beside, run_cost
from tempflow.train import checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "adding_an_algorithm.md").read_text(encoding="utf-8")
FILES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = ("sign_grpo", "better_half", "two_step")


@pytest.fixture
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of that name, as a module of an installed package."""
    module = ModuleType(f"my_package_{request.param}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(FILES[NAMES.index(request.param)], "adding_an_algorithm.md", "exec"), vars(module))
    return getattr(module, request.param)


@pytest.mark.parametrize("made", NAMES, indirect=True)
def test_a_whole_file_trains_and_is_resumed(made: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"iterations": 2, "checkpoint": {"every": 1}}
    call: dict[str, Any] = {"reward": brightness, "prompts": PROMPTS, "algorithm": made(), "quiet": True}
    model = Fake()
    before = weights(model)
    if made.__name__ == "two_step":  # its reference is where it starts: a jump of two steps is what there is to mend
        assert made().cost(0, 3).trained_edges == 3 * 4 * (1 + 5)
    run = tempflow.train(config(tmp_path / "toy", **options), model=model, **call)
    assert not same(before, dict(checkpoint.read(checkpoint.newest(run.folder)).tensors["policy/weights"]))
    more = config(tmp_path / "toy", **{**options, "iterations": 3})
    tempflow.train(more, model=Fake(), resume=True, allow_changes=True, **call)


@pytest.mark.parametrize("made", ["sign_grpo"], indirect=True)
def test_an_installed_package(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("sign_grpo", f"{made.__module__}:sign_grpo", "tempflow.algorithms")])
    monkeypatch.setattr(algorithms, "entry_points", lambda group: points.select(group=group))
    built = tempflow.Config.model_validate(
        {"name": "x", "iterations": 1, "algorithm": {"name": "sign_grpo", "group": 4}}
    ).algorithm.build()
    bench = Bench(algorithm=built)
    metrics = bench.iterate()
    assert metrics["updates"] == 1 and metrics["trained_edges"] == 6 * 4 * 5
    with pytest.raises(ValueError, match=r"clip: 0\.0 must be"):
        made(clip=0.0)


@pytest.mark.parametrize("made", ["two_step"], indirect=True)
def test_what_it_costs_is_counted_role_by_role(
    made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = EntryPoints([EntryPoint("two_step", f"{made.__module__}:two_step", "tempflow.algorithms")])
    monkeypatch.setattr(algorithms, "entry_points", lambda group: points.select(group=group))
    fields = {"name": "x", "iterations": 2, "algorithm": {"name": "two_step"}, "data": {"prompts_per_iteration": 3}}
    settings = tempflow.Config.model_validate(fields)
    configured = settings.replace(algorithm={"name": "flow_grpo"})
    cost = run_cost(settings)
    student, fake = cost.phases
    assert (student.role, student.trained, student.beside) == ("policy", (12, 24), (12 * 3, 24 * 3))
    assert (fake.role, fake.trained, fake.beside) == ("fake", (60, 120), (120, 240))
    assert cost.forwards == 24 + 120 + 72 + 240 and cost.equivalents == 3 * 144 + 312 and cost.total.leaves == 0
    held, plain = (beside(c, cost, 1000, 0) for c in (settings, configured))
    extra = {name: held[name] - plain[name] for name in held if held[name] != plain[name]}
    # weights, gradients and two moments of the fake score; weights and moments of both, to go back to
    assert extra == {"other roles, with gradients and moments": 16_000, "roles as the iteration found them": 24_000}
    Console(width=120).print(cost.table())
    said = capsys.readouterr().out
    assert "policy: training forwards" in said and "fake: policy forwards, at most" in said


def test_every_kind_of_phase_has_an_example() -> None:
    assert len(FILES) == 3
    for file, kind in zip(FILES, ("EdgePhase", "LeafPhase", "NoisePhase"), strict=True):
        assert f"import {kind}" in file
