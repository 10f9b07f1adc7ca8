"""docs/adding_a_model.md, followed to the letter: its one file is a family that trains, evaluates and exports."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tempflow import models
from tempflow.cli import main
from tempflow.media import Size
from tempflow.request import asked

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)[0].strip().splitlines()
SHORT = "--iterations 2 --data.prompts-per-iteration 4 --algorithm.group 4 --evaluation.test-prompts 4 "
SHORT += "--evaluation.validation-prompts 4 --threads 1 --optimizer.warmup-iterations 0"


@pytest.fixture
def glow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """While it lasts, the package has the page's file."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "glow.py").write_text(CODE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "code")])
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("tempflow.models.glow")
    sys.modules.pop("tempflow.models.glow", None)
    vars(models).pop("glow", None)


def test_the_page_is_enough(glow: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "GlowPipeline" in capsys.readouterr().out
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "python":
            exec(arguments[1], {})
            continue
        short = shlex.split(SHORT) if arguments[0] in ("train", "doctor") else []
        assert program == "tempflow" and main([*arguments, *short]) == 0, command
    said = capsys.readouterr().out
    assert "a GlowPipeline" in said
    trained, before = models.load("glow-trained"), models.load("glow")
    assert type(trained) is glow.Glow and (trained.name, trained.licence) == ("glow-trained", "cc0-1.0")
    assert json.loads(Path("runs/glow/summary.json").read_text())["after"]["count"] == 4
    assert "text-to-image" in Path("glow-trained/README.md").read_text()
    assert main(["sample", "glow-trained", "--prompt", "a lamp", "--height", "8", "--width", "8"]) == 0
    assert main(["export", "runs/glow", "--output", "last", "--weights", "policy"]) == 0
    last = models.load("last").network
    moved = [a - b for a, b in zip(last.parameters(), before.network.parameters(), strict=True)]
    assert min(float(m.abs().max()) for m in moved) > 0


def test_the_pages_model_hears_its_prompt_and_its_guidance(glow: ModuleType) -> None:
    glow.write(Path("glow"), glow.GlowNetwork(16))
    model = models.load("glow")
    condition = model.encode(asked(["a lamp", "fog"]), Size(8, 8))
    x, sigma = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5)
    plain, other = (model.predictor(condition, 1.0)(x, sigma, torch.tensor(r)) for r in ([0, 0], [1, 1]))
    assert (plain - other).abs().max() > 1e-3
    assert (model.predictor(condition, 3.0)(x, sigma, torch.tensor([0, 0])) - plain).abs().max() > 1e-3


def test_a_folder_of_it_that_is_not_whole_is_refused(glow: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    glow.write(Path("glow"), glow.GlowNetwork(16))
    (Path("glow") / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.path: '.*diffusion_pytorch_model.safetensors' is missing"):
        models.load("glow")
    assert main(["train", "shapes_flow", "--model.path", "glow", "--model.training", "lora"]) == 2
    assert "is missing" in capsys.readouterr().err


def test_an_adapter_without_a_family_is_named(glow: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    del glow.Glow.family
    glow.write(Path("glow"), glow.GlowNetwork(16))
    for words in (["models"], ["sample", "glow", "--prompt", "a lamp", "--height", "8", "--width", "8"]):
        assert main(words) == 2
        assert "PIPELINES: 'GlowPipeline':" in capsys.readouterr().err
