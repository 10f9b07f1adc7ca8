"""What `tempflow cost` counts of memory without weights is what the same model with weights takes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import cogview4, flux, flux2, lumina2, qwen_image, sana, stable_diffusion, z_image

from tempflow import models
from tempflow.media import Size
from tempflow.models.memory import TOKENS, Asked, Lora, counted, footprint
from tempflow.models.quiet import quiet
from tempflow.models.tools import Tools

CASES: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "sd3": (tiny.pipeline, (32, 32)),
    "flux": (flux.pipeline, flux.SIZES[0]),
    "qwen_image": (qwen_image.pipeline, qwen_image.SIZES[0]),
    "z_image": (z_image.pipeline, z_image.SIZES[0]),
    "sana": (sana.pipeline, sana.SIZES[0]),
    "cogview4": (cogview4.pipeline, cogview4.SIZES[0]),
    "lumina2": (lumina2.pipeline, lumina2.SIZES[0]),
    "sd15": (stable_diffusion.sd15, stable_diffusion.SIZES[0]),
    "sdxl": (stable_diffusion.sdxl, stable_diffusion.SIZES[0]),
    "flux2 dev": (flux2.dev, flux2.SIZES[0]),
    "flux2 klein": (flux2.klein, flux2.SIZES[0]),
}
SMALL = 64
"""Bytes: of tables that a family makes anew in each forward."""


def check(name: str, folder: Path, dtype: str, checkpointing: bool) -> None:
    make, size = CASES[name]
    with quiet():
        make().save_pretrained(folder)
    tools = Tools(checkpointing=checkpointing)
    asked = Asked(Size(*size), 2.0, {}, models.DTYPES[dtype], "cpu", tools, Lora(4), sampled=3, trained=2, leaves=2)
    model: Any = models.load(str(folder), dtype=dtype)
    row, blank = model.encode_text("a small bird", False, asked.size), model.blank_row(TOKENS)
    assert {n: (t.ndim, t.shape[1:]) for n, t in row.items()} == {n: (t.ndim, t.shape[1:]) for n, t in blank.items()}
    model.add_lora(4, 4)
    model.equip(tools)
    found = footprint(models.adapter_of(name, folder), folder, name, asked)
    real = counted(model, blank, asked, whole=True)
    assert found is not None
    for part, value in vars(real).items():
        assert vars(found)[part] == pytest.approx(value, abs=SMALL), part


def test_a_count_without_weights_is_the_one_with_them(tmp_path: Path) -> None:
    check("cogview4", tmp_path, "bfloat16", checkpointing=True)  # the quickest whose control flow hangs on numbers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_familys_count_is_the_one_with_weights(
    name: str, dtype: str, checkpointing: bool, tmp_path: Path
) -> None:
    check(name, tmp_path, dtype, checkpointing)


@pytest.mark.slow
def test_tools_and_training_change_what_they_should(tmp_path: Path) -> None:
    with quiet():
        flux.pipeline().save_pretrained(tmp_path)
    adapter = models.adapter_of("flux", tmp_path)
    asked = Asked(Size(16, 24), 1.0, {}, torch.bfloat16, "cuda", Tools(), Lora(4), sampled=1, trained=1, leaves=1)

    def of(**changed: Any) -> Any:
        return footprint(adapter, tmp_path, "flux", replace(asked, **changed))

    plain, full = of(), of(lora=None)
    assert of(tools=Tools(checkpointing=True)).saved < plain.saved / 4
    assert of(tools=Tools(quantise="int8")).network < 0.7 * plain.network
    assert full.trainable > 10 * plain.trainable and full.split and plain.split
    assert of(trained=3).saved == pytest.approx(3 * plain.saved, rel=0.1)
    assert of(guidance_options={"true_cfg": 2.0}).sampling > 1.5 * plain.sampling
