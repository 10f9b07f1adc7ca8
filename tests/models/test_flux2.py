"""What FLUX.2 has beside the others: a distilled checkpoint, a processor of another package, names of layers."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_flux2_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
)
from families import flux2
from families.common import PROMPTS
from torch import Tensor

from tempflow import models
from tempflow.media import Size
from tempflow.models.flux2 import OUTSIDE, original_names
from tempflow.models.lora import layer_shapes
from tempflow.models.quiet import quiet
from tempflow.request import Prompt

SIZE = Size(*flux2.SIZES[0])


def saved(make: Any, folder: Path) -> Path:
    with quiet():
        make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(flux2.dev, tmp_path_factory.mktemp("dev") / "model")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(flux2.klein, tmp_path_factory.mktemp("klein") / "model")


def test_a_distilled_klein_is_known_and_takes_no_guidance(tmp_path: Path, klein: Path) -> None:
    folder = saved(lambda: flux2.klein(is_distilled=True), tmp_path / "model")
    adapter: Any = models.load(str(folder))
    assert adapter.family.distilled(adapter.settings) == "is_distilled is true in model_index.json"
    assert adapter.family.distilled(lambda name: json.loads((folder / name).read_text())) != ""
    condition = adapter.encode([Prompt(PROMPTS[0])], SIZE)
    with pytest.raises(ValueError, match=r"guidance: 4\.0 of '.*', and is_distilled is true.*nearest valid: 1\.0"):
        adapter.predictor(condition, 4.0)
    x = torch.randn(1, *adapter.noise_shape(SIZE))
    assert adapter.predictor(condition, 1.0)(x, torch.tensor([0.5]), torch.tensor([0])).isfinite().all()
    base: Any = models.load(str(klein))
    assert base.family.distilled(base.settings) == ""


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_processor_without_its_package_is_named_with_the_command(dev: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dev, tmp_path / "model")
    index = folder / "model_index.json"
    told = {**json.loads(index.read_text()), "tokenizer": ["transformers", "PixtralProcessor"]}
    index.write_text(json.dumps(told))
    words = f"'{folder}' has a PixtralProcessor (tokenizer), which needs torchvision: pip install torchvision"
    with pytest.raises(ImportError, match=re.escape(words) + "$"):
        models.load(str(folder))


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_in_bfloat16_all_is_finite(family: str, request: pytest.FixtureRequest) -> None:
    adapter: Any = models.load(str(request.getfixturevalue(family)), dtype="bfloat16")
    x = torch.randn(2, *adapter.noise_shape(SIZE))
    condition = adapter.encode([Prompt(text) for text in PROMPTS[:2]], SIZE)
    v = adapter.predictor(condition, 4.0)(x, torch.tensor([0.5, 0.9]), torch.tensor([0, 1]))
    assert v.shape == x.shape and v.isfinite().all() and float(v.std()) > 0.1


def test_the_grid_depends_on_tokens_and_on_steps(dev: Path) -> None:
    """Its shift grows with the picture and falls with the steps, so that a step of a cut trajectory is another."""
    adapter: Any = models.load(str(dev))
    first = [float(adapter.schedule(steps, SIZE).sigmas[steps // 2]) for steps in (4, 40)]
    assert first[0] > first[1] and float(adapter.schedule(4, Size(32, 24)).sigmas[2]) > first[0]


def test_names_of_black_forest_labs_are_those_of_diffusers_converter(dev: Path) -> None:
    adapter: Any = models.load(str(dev))
    shapes = layer_shapes(adapter.network)
    names = original_names(shapes)
    named = [part.layer for parts in names.values() for part in parts]
    assert sorted([*named, "norm_out.linear"]) == sorted(shapes)
    assert set(OUTSIDE) <= set(names)
    for name, parts in names.items():
        rows = sum(shapes[part.layer][0] for part in parts)
        file: dict[str, Tensor] = {
            f"diffusion_model.{name}.lora_A.weight": torch.ones(2, shapes[parts[0].layer][1]),
            f"diffusion_model.{name}.lora_B.weight": torch.arange(2.0 * rows).view(rows, 2),
        }
        b, theirs = list(file.values())[1], _convert_non_diffusers_flux2_lora_to_diffusers(dict(file))
        ours = b.split([shapes[part.layer][0] for part in parts])
        assert len(theirs) == 2 * len(parts)
        for part, own in zip(parts, ours, strict=True):
            assert torch.equal(theirs[f"transformer.{part.layer}.lora_B.weight"], own)
