"""What Sana alone has: a folder's own sampler beside the one that is walked, and a variance that nobody asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import sana
from families.common import NEGATIVES, PROMPTS
from torch import Tensor

from tempflow import models
from tempflow.config import Config
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.core.solver import DPMSolver2
from tempflow.export.card import Export, card
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.sana import Sana, check_sana
from tempflow.request import Prompt
from tempflow.train.build import check_model, prepare_model

SIZE = Size(*sana.SIZES[0])
NOISE = Noise(seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sana") / "model"
    with quiet():
        sana.pipeline().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Any:
    with quiet():
        return models.load(str(folder))


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_the_folders_own_sampler_is_our_multistep_solver_on_its_grid(adapter: Any, steps: int) -> None:
    """At its whole times, that is; twenty steps are more than it has for a shortened list of orders."""
    scheduler = type(adapter.pipe.scheduler).from_config(adapter.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    predict = adapter.predictor(adapter.encode(asked(), SIZE), 4.5)

    def at_whole_times(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return predict(x, (sigma.double() * 1000).floor().float() / 1000, rows)

    forest = rollout(
        [plan.ode(steps, 1)] * 2,
        ODE(),
        Schedule(scheduler.sigmas),
        at_whole_times,
        NOISE,
        shape=adapter.noise_shape(SIZE),
        solver=DPMSolver2(),
    )
    noise = NOISE.initial([(0, 0), (1, 0)], adapter.noise_shape(SIZE))
    given = (PROMPTS[:2], NEGATIVES[:2], steps, sana.SIZES[0], 4.5, noise)
    theirs = sana.theirs(adapter.pipe, *given, dpm=True)
    ours = forest.nodes[forest.leaves.node]
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    euler = sana.theirs(adapter.pipe, *given)
    assert float((euler - theirs).abs().max()) > 0.01


def test_it_is_said_that_euler_is_walked(folder: Path) -> None:
    said: list[str] = []
    prepare_model(configured(folder), say=said.append)
    assert said[0].startswith("model: ") and "Sana, licence unknown" in said[0]
    assert said[1:] == [
        "model: the folder names DPMSolverMultistepScheduler; it is drawn by FlowMatchEulerDiscreteScheduler with the "
        "same σ"
    ]


def test_a_folder_that_names_euler_is_walked_as_it_says(adapter: Any, tmp_path: Path) -> None:
    kept = adapter.pipe.scheduler
    adapter.pipe.scheduler = sana.euler(adapter.pipe)
    try:
        own = adapter.schedule(4, SIZE)
        with quiet():
            adapter.pipe.save_pretrained(tmp_path)
    finally:
        adapter.pipe.scheduler = kept
    assert torch.equal(own.sigmas, adapter.schedule(4, SIZE).sigmas)
    assert float(own.sigmas[0]) == 1
    said: list[str] = []
    check_model(configured(tmp_path), said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    "kind,config,said",
    [
        ("UniPCMultistepScheduler", {}, "UniPCMultistepScheduler"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling true"),
        ("DPMSolverMultistepScheduler", {}, "prediction_type false"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True},
            "use_karras_sigmas",
        ),
    ],
)
def test_a_sampler_of_another_grid_is_refused(kind: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"model.path: .*nearest valid") as caught:
        check_sana("folder", kind, config)
    assert said.lower().replace("'", "") in str(caught.value).lower().replace("'", "")


def test_a_learned_variance_is_left_out(adapter: Any) -> None:
    x = torch.randn(2, *adapter.noise_shape(SIZE))

    def network(x: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.cat([2 * x, 7 * x], 1),)

    rows = adapter.encode(asked(), SIZE).tensors
    assert torch.equal(adapter.velocity(network, x, torch.ones(2), rows, None), 2 * x)


def test_the_instruction_stands_before_prompts_alone(adapter: Any) -> None:
    """The same text is another condition on the other side."""
    told = adapter.encode([Prompt("a small bird", negative="a small bird")], SIZE)
    assert not torch.equal(told.tensors["embeds"], told.negative["embeds"])
    assert told.tensors["mask"].sum() > told.negative["mask"].sum()


def test_a_model_card_draws_by_the_sampler_that_is_walked_at_the_size_that_is_asked(
    folder: Path, tmp_path: Path
) -> None:
    config = configured(folder)
    text = card(tmp_path, config, Export(str(folder), "merged", "float32", None))
    lines = text.partition("```python\n")[2].partition("```")[0].splitlines()
    shown: dict[str, Any] = {}
    exec("\n".join(line for line in lines if not line.startswith("image")), shown)
    scheduler = shown["pipe"].scheduler
    assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and scheduler.config.shift == 3.0
    again = eval(Sana.family.sampler, shown)  # of a folder that has it already
    assert type(again) is type(scheduler) and again.config.shift == 3.0
    assert "use_resolution_binning=False" in text and "guidance_scale=4.5" in text


def configured(folder: Path) -> Config:
    return Config.model_validate(
        {
            "name": "it",
            "iterations": 1,
            "algorithm": {"name": "diffusion_nft"},
            "model": {"path": str(folder), "height": SIZE.height, "width": SIZE.width},
            "evaluation": {"steps": 4, "guidance": 4.5},
        }
    )


def asked() -> list[Prompt]:
    return [Prompt(text, negative=n) for text, n in zip(PROMPTS[:2], NEGATIVES[:2], strict=True)]
