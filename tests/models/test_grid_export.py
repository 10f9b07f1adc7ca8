"""A student that is exported is drawn by plain diffusers, as its card says, on the grid that it was trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic import agree
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tempflow import models
from tempflow.config import Config, parse_config, to_yaml
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.evaluate.source import find, load_source, settings
from tempflow.export import export_run
from tempflow.models.pipeline_folder import few_step_scheduler
from tempflow.models.quiet import quiet
from tempflow.recipes import shapes_flow
from tempflow.request import asked
from tempflow.train.grids import on_grid

PROMPT, NOISE = "a red circle", Noise(seed=11)


def made(folder: Path, base: str, training: str, side: int, grid: Any, steps: int) -> tuple[Config, Any]:
    """A run's folder, as it ends, whose weights are not the base's, and its model."""
    tree = shapes_flow().model_dump(mode="json") | {"output": str(folder)}
    tree["model"] |= {"path": base, "training": training, "height": side, "width": side, "grid": grid}
    tree["model"] |= {"dtype": "float32", "lora_rank": 2, "lora_alpha": 2}
    tree["algorithm"]["steps"] = tree["evaluation"]["steps"] = steps
    config = parse_config(tree)
    model: Any = on_grid(config, models.load(base))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_lora(2, 2) if training == "lora" else model.train_fully()
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.network.parameters()):
                parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
                parameter += 0.02 if training == "lora" else 0.0
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    model.save(str(folder / "model"))
    return config, model


def latents(model: Any, config: Config, steps: int) -> Tensor:
    forest = rollout(
        [plan.ode(steps, 1)],
        ODE(),
        model.schedule(steps, config.size),
        model.predictor(model.encode(asked([PROMPT]), config.size), 1.0),
        NOISE,
        shape=model.noise_shape(config.size),
    )
    return forest.nodes[forest.leaves.node]


def by_its_card(folder: Path, noise: Tensor) -> tuple[Tensor, Any]:
    """What the card's code draws from that noise, up to the autoencoder; its pipeline."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[0]
    code = re.sub(
        r"^image = pipe\((.*)\)\.images\[0\]$",
        r"drawn = pipe(\1, latents=noise, output_type='latent').images",
        code,
        flags=re.M,
    )
    kept: dict[str, Any] = {"noise": noise}
    with quiet():
        exec(code.replace('image.save("picture.png")', ""), kept)
    return kept["drawn"], kept["pipe"]


@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize(
    ("world", "grid", "steps"), [("tiny", "useful", 4), ("shapes", [1, 0.75, 0.5, 0.25], 4), ("tiny", [1, 0.6, 0.3], 3)]
)
def test_the_card_draws_the_students_latents(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, grid: Any, steps: int, training: str
) -> None:
    """Bit for bit where torch has AVX-512, to 1e-5 else; on the scheduler's own grid they are others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_folder)
    config, model = made(
        tmp_path / "run",
        world if world == "shapes" else str(tmp_path / "tiny"),
        training,
        32 if world == "shapes" else 64,
        grid,
        steps,
    )
    to = export_run(tmp_path / "run", tmp_path / "student")
    expected, noise = latents(model, config, steps), NOISE.initial([(0, 0)], model.noise_shape(config.size))
    drawn, pipe = by_its_card(to, noise)
    assert agree(drawn, expected)
    assert torch.equal(pipe.scheduler.sigmas, model.schedule(steps, config.size).sigmas)
    base = config.model.path if training == "lora" else ""
    assert settings(find(str(to), base)).steps == steps
    student = load_source(find(str(to), base))
    assert student.schedule(steps, config.size).useful == steps
    assert agree(latents(student, config, steps), expected)
    few = to / f"scheduler_{steps}_steps"
    assert few.is_dir() == (training == "full" and grid in ("useful", [1, 0.75, 0.5, 0.25]))
    if few.is_dir():
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(few)
        scheduler.set_timesteps(steps)
        assert torch.equal(scheduler.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
        assert "σ = 1, 0.9, 0.75, 0.5, 0" in (to / "README.md").read_text()
    pipe.scheduler.set_timesteps(steps)
    assert not torch.allclose(pipe.scheduler.sigmas, model.schedule(steps, config.size).sigmas, atol=0.01)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_a_scheduler_of_few_steps_is_found_or_not_told_of(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = {n: few_step_scheduler(scheduler, [(n - i) / n for i in range(n)]) for n in (1, 2, 3, 4, 7)}
    assert [n for n, fitting in found.items() if fitting] == [2, 3, 4, 7][: 4 if shift == 1 else 3]
    assert few_step_scheduler(scheduler, (1.0, 0.6, 0.3)) is None
    assert few_step_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), (1.0, 0.5)) is None
