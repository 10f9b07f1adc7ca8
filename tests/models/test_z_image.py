"""What is Z-Image's own; that it draws what its pipeline draws is in test_family_adapters.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import z_image

from tempflow import models
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.z_image import FAMILY
from tempflow.request import Prompt

SIZE = Size(*z_image.SIZES[0])
LONG = "a small bird on the red house under the large blue tree " * 3
"""More than the 32 tokens to multiples of which the network pads each text."""
NOISE = Noise(seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("z_image") / "model"
    with quiet():
        z_image.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Any:
    with quiet():
        return models.load(str(folder))


def drawn(adapter: Any, *prompts: Prompt) -> torch.Tensor:
    forest = rollout(
        [plan.ode(3, 1)] * len(prompts),
        ODE(),
        adapter.schedule(3, SIZE),
        adapter.predictor(adapter.encode(prompts, SIZE), 5.0),
        NOISE,
        shape=adapter.noise_shape(SIZE),
    )
    return forest.nodes[forest.leaves.node]


def test_texts_of_very_different_lengths_share_a_batch(adapter: Any) -> None:
    prompts = (Prompt("blue", negative="a small house"), Prompt(LONG, negative=LONG + "blue"))
    lengths = adapter.encode(prompts, SIZE).tensors["mask"].sum(1)
    assert lengths[0] < 16 and lengths[1] > 32
    both = drawn(adapter, *prompts)
    theirs = z_image.theirs(
        adapter.pipe,
        [p.text for p in prompts],
        [p.negative for p in prompts],
        3,
        z_image.SIZES[0],
        5.0,
        NOISE.initial([(0, 0), (1, 0)], adapter.noise_shape(SIZE)),
    )
    bound = 1e-5 * max(1.0, float(theirs.abs().max()))
    assert (both - theirs).abs().max() <= bound
    assert (drawn(adapter, prompts[0]) - both[:1]).abs().max() <= bound


@pytest.mark.parametrize(("shift", "found"), [(3.0, "shift is 3 in scheduler/scheduler_config.json"), (6.0, "")])
def test_turbo_is_told_by_its_grid(shift: float, found: str) -> None:
    assert FAMILY.distilled(lambda name: {"shift": shift} if name.startswith("scheduler") else None).startswith(found)
    assert bool(found) == bool(FAMILY.distilled(lambda name: {"shift": shift}))
    assert FAMILY.distilled(lambda name: None) == ""
