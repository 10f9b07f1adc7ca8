"""A whole run on the shipped shapes model, small enough for seconds: the same code path as `make demo`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tempflow.config import Config
from tempflow.models import load
from tempflow.recipes.shapes import shapes_flow, shapes_lora, shapes_tempflow
from tempflow.train.records import Run
from tempflow.train.trainer import train

SMALL = {"every": 1, "validation_prompts": 6, "test_prompts": 12, "steps": 2, "metric": "shapes_strict"}


def small(config: Config, folder: Path, **fields: object) -> Config:
    algorithm = config.algorithm.model_dump() | (
        {"seeds": 1, "branches": 3} if config.algorithm.name == "tempflow_grpo" else {"group": 4}
    )
    return Config.model_validate(
        config.model_dump()
        | {
            "iterations": 2,
            "output": str(folder),
            "threads": 1,
            "algorithm": algorithm | {"steps": 4},
            "data": config.data.model_dump() | {"prompts_per_iteration": 2},
            "evaluation": config.evaluation.model_dump() | SMALL,
        }
        | fields
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_with_one_seed_write_identical_files(tmp_path: Path, dtype: str) -> None:
    model = shapes_tempflow().model.model_dump() | {"dtype": dtype}
    for name in "ab":
        train(small(shapes_tempflow(), tmp_path / name, model=model), quiet=True)
    for file in ("metrics.jsonl", "evaluation.jsonl", "samples.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["log_ratio_max"] <= 1e-5
    assert lines[0]["trained_edges"] > 0
    assert lines[0]["grad_norm"] > 0


@pytest.mark.parametrize("recipe", [shapes_flow, shapes_lora])
def test_other_recipes_run(tmp_path: Path, recipe) -> None:
    run = train(small(recipe(), tmp_path / "run"), quiet=True)
    assert run.last_line.startswith("held-out strict score: ")
    assert (run.folder / "before_after.png").stat().st_size > 1000
    assert (run.folder / "curve.png").stat().st_size > 1000


def test_forwards_by_hook_equal_cost_and_the_counter(tmp_path: Path) -> None:
    model = load("shapes")
    model.train_fully()
    rows: list[tuple[bool, int]] = []
    model.network.register_forward_hook(
        lambda module, args, kwargs, out: rows.append((torch.is_grad_enabled(), len(kwargs["hidden_states"]))),
        with_kwargs=True,
    )
    config = small(shapes_tempflow(), tmp_path / "run", iterations=1)
    run = train(config, model=model, quiet=True)
    expected = config.algorithm.build().cost(0, 2)
    assert run.counter.rollout == expected.forwards
    assert run.counter.train == sum(n for grad, n in rows if grad)
    evaluation = 2 * (12 + 12 + 6 + 6 + 12 + 12)  # test, grid, validation twice, test, grid; two steps each
    assert run.counter.rollout == sum(n for grad, n in rows if not grad) - evaluation


def test_the_trained_folder_loads_and_draws_as_the_run_reported(tmp_path: Path) -> None:
    run: Run = train(small(shapes_tempflow(), tmp_path / "run"), quiet=True)
    weights = load_file(run.folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    state = run.model.network.state_dict()
    assert weights.keys() <= state.keys()
    assert all(torch.equal(w, state[k]) for k, w in weights.items())


def test_own_reward_function(tmp_path: Path) -> None:
    def redness(images, prompts):
        pixels = [np.asarray(image, dtype=float) / 255 for image in images]
        return [p[..., 0].mean() - p[..., 1:].mean() for p in pixels]

    run = train(small(shapes_tempflow(), tmp_path / "run"), reward=redness, quiet=True)
    assert run.metric == "reward"
    assert run.before.scores.names == ("redness", "reward")
