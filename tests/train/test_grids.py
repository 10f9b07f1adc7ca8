"""A run's grid: what rolls out, validates, is recorded and resumed walks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Fake, brightness, config

from tempflow.core.schedule import Schedule, explicit
from tempflow.grid import Grid
from tempflow.media import Size
from tempflow.train.trainer import train


class Walking(Fake):
    """Its grid can be stated; which σ were asked of its network, by call, is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.stated, self.asked = Grid(), list[float]()

    def state_grid(self, grid: Grid) -> None:
        self.stated = grid

    def stated_grid(self) -> Grid:
        return self.stated

    def schedule(self, steps: int, size: Size) -> Schedule:
        points = self.stated.points(steps)
        return super().schedule(steps, size) if points is None else explicit(points, 2.0)

    def predictor(self, condition: Any, guidance: Any, network: Any = None) -> Any:
        inner = super().predictor(condition, guidance, network)

        def predict(x: torch.Tensor, sigma: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            self.asked += sigma.tolist()
            return inner(x, sigma, rows)

        return predict


def test_a_run_walks_the_grid_that_it_states(tmp_path: Path) -> None:
    points = [1.0, 0.6, 0.3]
    algorithm = {"name": "tempflow_grpo", "steps": 3, "seeds": 2, "branches": 3, "kl": 0.0}
    changed = {"algorithm": algorithm, "evaluation": {"steps": 3}, "model": {"grid": points}}
    model = Walking()
    how = config(tmp_path / "run", iterations=1, **changed)
    train(how, model=model, reward=brightness, prompts=PROMPTS, quiet=True)
    assert set(model.asked) == set(explicit(points, 2.0).sigmas[:-1].tolist())
    assert model.stated == Grid((1.0, 0.6, 0.3), 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert all(line["walk"] == {"grid": "(1, 0.6, 0.3)", "useful": 3, "forwards": 3} for line in lines) and lines
    other = config(tmp_path / "run", iterations=1, **{**changed, "model": {"grid": "useful"}})
    with pytest.raises(ValueError, match=r"model\.grid: \[1\.0, 0\.6, 0\.3\] → 'useful'"):
        train(other, model=Walking(), reward=brightness, prompts=PROMPTS, quiet=True, resume=True)


def test_a_model_object_that_cannot_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    how = config(tmp_path / "run", model={"grid": "useful"})
    with pytest.raises(
        ValueError, match=r"^model\.grid: useful, and 'fake' has a grid of its own; nearest valid: 'own'$"
    ):
        train(how, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    assert not (tmp_path / "run").exists()
