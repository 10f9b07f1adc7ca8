"""Grids that a configuration states and a folder carries; what they are on each model is tested beside the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempflow import models
from tempflow.config import Config, parse_config
from tempflow.core.schedule import explicit
from tempflow.grid import FILE, Grid, grid_in, read_grid, write_grid
from tempflow.media import Size
from tempflow.models.family import Family
from tempflow.models.protocol import WalksGrids
from tempflow.recipes import shapes_flow, shapes_lora
from tempflow.strict import ConfigError
from tempflow.train.grids import grid_of, with_grid
from tempflow.train.state import changed_fields

SIZE = Size(32, 32)
FEW = (1.0, 0.75, 0.5, 0.25)


def configured(grid: Any = "own", steps: int = 4, **more: Any) -> Config:
    tree = shapes_flow().model_dump(mode="json")
    tree["model"] |= {"grid": grid, **more}
    tree["algorithm"]["steps"] = tree["evaluation"]["steps"] = steps
    return parse_config(tree)


def test_useful_steps_of_shapes() -> None:
    """σ = shift(1, .75, .5, .25), shift 3: exactly what diffusers makes of these points."""
    model: Any = models.load("shapes")
    scheduler = model.walked()
    scheduler.set_timesteps(sigmas=list(FEW))
    for grid in (Grid("useful"), Grid(FEW), Grid("useful", 4)):
        model.state_grid(grid)
        walked = model.schedule(4, SIZE)
        assert torch.equal(walked.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0])) and walked.useful == 4
        assert torch.equal(walked.sigmas, scheduler.sigmas) and torch.equal(walked.sigmas, explicit(FEW, 3.0).sigmas)
    model.state_grid(Grid("useful"))
    assert [model.schedule(steps, SIZE).useful for steps in (1, 2, 10)] == [1, 2, 10]
    model.state_grid(Grid())
    assert [model.schedule(steps, SIZE).useful for steps in (2, 4, 10)] == [1, 3, 9]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("usefull", "'usefull' is none of own, scheduler, useful, nor a list of points; nearest valid: useful"),
        (4, "'4' is none of own, scheduler, useful, nor a list of points; nearest valid: own"),
        (True, "'True' is none of"),
        ([], "0 points; nearest valid: 1 to 1000"),
        ([1, "x"], r"\[1, 'x'\].* is none of"),
        ([True, 0.5], "is none of"),
        ([1.5, 0.5], "point 0 is 1.5, and must be above 0 and at most 1; nearest valid: 1"),
        ([1, 0.5, 0.5], "point 2 is 0.5, and must be above 0 and below the 0.5 before it; nearest valid: 0.25"),
        ([1, 0.5, 0], "point 2 is 0, and must be above 0 and below the 0.5 before it"),
        ([float("nan")], "point 0 is nan"),
        ([1, 0.5], r"algorithm.steps: 4 steps, and the grid \(1, 0.5\) has 2 points, one a step; nearest valid: 2"),
    ],
)
def test_a_grid_that_is_none_is_one_line(given: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as error:
        configured(given)
    assert str(error.value).startswith(("model.grid: ", "algorithm.steps: ")) and "\n" not in str(error.value)


def test_points_fit_the_steps_of_evaluation_and_drafts() -> None:
    tree = configured(list(FEW)).model_dump(mode="json")
    tree["evaluation"]["steps"] = 10
    with pytest.raises(ConfigError, match=r"^evaluation.steps: 10 steps, .* nearest valid: 4$"):
        parse_config(tree)
    tree["evaluation"]["steps"] = 4
    tree["algorithm"] = {"name": "sol_rl", "steps": 4, "pool": 8, "group": 8, "draft_steps": 6}
    with pytest.raises(ConfigError, match=r"^algorithm.draft_steps: 6 steps, .* nearest valid: 4$"):
        parse_config(tree)
    assert parse_config({**tree, "algorithm": {**tree["algorithm"], "draft_steps": 4}}).model.grid == FEW


def test_a_resumed_run_must_agree_on_it() -> None:
    old, useful, points = configured(), configured("useful"), configured(list(FEW))
    before = old.model_dump(mode="json")
    before["model"] = {name: value for name, value in before["model"].items() if name != "grid"}
    assert not changed_fields(parse_config(before), old)  # a run that was begun before there were grids
    assert changed_fields(old, useful) == ["model.grid: 'own' → 'useful'"]
    assert changed_fields(useful, points) == ["model.grid: 'useful' → [1.0, 0.75, 0.5, 0.25]"]


def test_folders_carry_their_grid(tmp_path: Path) -> None:
    """And weights that are started from: a run goes on where its student was trained."""
    model: Any = models.load("shapes")
    model.train_fully()
    model.save(str(tmp_path / "plain"))
    assert grid_in(tmp_path / "plain") is None
    model.state_grid(Grid(FEW))
    model.save(str(tmp_path / "student"))
    assert read_grid(tmp_path / "student" / "scheduler") == grid_in(tmp_path / "student") == Grid(FEW, 4)
    loaded: Any = models.load(str(tmp_path / "student"))
    assert loaded.schedule(4, SIZE).useful == 4
    own = configured(path=str(tmp_path / "student"))
    assert grid_of(own) == Grid(FEW, 4) and with_grid(own, own.algorithm.build()).model.grid == FEW
    ten = configured(path=str(tmp_path / "student"), steps=10)
    with pytest.raises(ValueError, match=r"^algorithm.steps: 10 steps, and the grid .* nearest valid: 4$"):
        with_grid(ten, ten.algorithm.build())
    other = configured("scheduler", 10, path=str(tmp_path / "student"))
    assert grid_of(other) == Grid() and with_grid(other, other.algorithm.build()) == other
    lora = tmp_path / "lora"
    lora.mkdir()
    write_grid(Grid("useful", 4), lora)
    started = shapes_lora().with_model(start=str(lora))
    assert grid_of(started) == Grid("useful", 4)
    other_lora = tmp_path / "other"
    other_lora.mkdir()
    mean = configured().with_model(start=(str(lora), str(other_lora)))
    with pytest.raises(ValueError, match=r"^model.grid: own, and '.*lora' walks useful, '.*other' scheduler; nearest"):
        grid_of(mean)
    write_grid(Grid("useful", 4), other_lora)
    assert grid_of(mean) == Grid("useful", 4) and grid_of(mean.with_model(grid="scheduler")) == Grid("scheduler")
    assert (
        grid_of(shapes_lora()) == Grid() and with_grid(shapes_lora(), shapes_lora().algorithm.build()) == shapes_lora()
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"grid": "own"}', '{"grid": [1, 2]}', '{"grid": [1], "steps": 4}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE}' states no grid \(.*nearest valid: without that file$"):
        read_grid(tmp_path)


class Elsewhere:
    """A model object that knows nothing of grids."""

    name = "elsewhere"


def test_a_model_with_a_grid_of_its_own_is_told_so() -> None:
    model: Any = Elsewhere()
    config = configured("useful")
    with pytest.raises(ValueError, match=r"^model.grid: useful, and 'elsewhere' has a grid of its own; .*'own'$"):
        with_grid(config, config.algorithm.build(), model)
    plain = configured()
    assert with_grid(plain, plain.algorithm.build(), model) == plain and not isinstance(model, WalksGrids)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_scheduler_that_makes_other_sigmas_of_points_is_refused(setting: str) -> None:
    family: Family = models.adapter_for("StableDiffusion3Pipeline").family
    assert family.own_grid(lambda name: {setting: True} if "scheduler" in name else None).count(setting) == 1
    assert not family.own_grid(lambda name: {setting: False} if "scheduler" in name else None)
