"""docs/adding_a_reward.md, followed: its code is run as it stands."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from tempflow import rewards
from tempflow.doctor.reward import reward_checks, sample_of
from tempflow.rewards import build, from_function
from tempflow.rewards.protocol import Reward, differentiable_of

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_reward.md").read_text(encoding="utf-8")
FUNCTION, CLASS, METHOD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RED = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
RED[1, ..., 0] = 255


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's class, in an installed package's module."""
    made = ModuleType("my_package_rewards")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(CLASS, "adding_a_reward.md", "exec"), vars(made))
    return made


def test_a_function() -> None:
    there: dict[str, Any] = {}
    exec(FUNCTION.partition("tempflow.train(")[0], there)
    reward = from_function(there["brightness"])
    light = [Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 255)]
    assert there["brightness"](light, ["a", "b"]) == [0, 1] and reward.name == "brightness"


def test_a_class(module: ModuleType) -> None:
    reward = module.Redness(gain=0.5)
    assert isinstance(reward, Reward)
    checks, figures = reward_checks(reward, sample_of("", 5))
    assert not [c for c in checks if c.state == "fails"] and figures["columns"] == ["redness"]
    assert reward.score(RED, ["a", "b"], [{}, {}]).value[:, 0].tolist() == [0.0, 0.5]


def test_a_method_with_gradients(module: ModuleType) -> None:
    there: dict[str, Any] = {}
    exec(METHOD, there)
    module.Redness.differentiable = there["differentiable"]
    reward = module.Redness(gain=0.5)
    rewards.protocol.prepare(reward)
    score, pixels = differentiable_of(reward), (RED.permute(0, 3, 1, 2)[:, None].float() / 255).requires_grad_(True)
    assert score is not None
    value = score(pixels, ["a", "b"], [{}, {}])
    assert value.tolist() == reward.score(RED, ["a", "b"], [{}, {}]).value[:, 0].tolist()
    value.sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.any())


def test_an_installed_package(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("redness", "my_package_rewards:Redness", rewards.GROUP)])
    monkeypatch.setattr(rewards, "entry_points", lambda group: points.select(group=group))
    reward = build("mine", "redness", {"gain": 2.0})
    rewards.protocol.prepare(reward)
    assert reward.score(RED, ["a", "b"], [{}, {}]).names == ("mine",)
    with pytest.raises(ValueError, match=r"options\.gain: 0\.0 must be above 0"):
        build("redness", options={"gain": 0.0})
