"""LoRAs with a family's original names of layers mean what diffusers' own converters make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from families import flux, qwen_image, z_image
from lora_world import Update, dense, random, update
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow import models
from tempflow.models import flux_names
from tempflow.models import z_image as ours_z_image
from tempflow.models.lora import Factors, Shapes, layer_shapes, lora_of
from tempflow.models.lora_files import NETWORK, Aliases, fit, load_lora, read_lora
from tempflow.models.quiet import quiet

Read = Mapping[str, Factors]


def written(file: Path, lora: Mapping[str, Update], kohya: bool) -> Path:
    tensors: dict[str, Tensor] = {}
    for layer, (a, b, alpha) in lora.items():
        stem = f"lora_unet_{layer.replace('.', '_')}" if kohya else f"diffusion_model.{layer}"
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


def updates(layers: Mapping[str, Sequence[str]], shapes: Shapes, plain: str = "never") -> dict[str, Update]:
    """One of several ranks and alphas for each name; `layers`: of which of ours it holds the rows, one under another.
    Those with `plain` in their names have no alpha."""
    made: dict[str, Update] = {}
    for n, (name, held) in enumerate(layers.items()):
        shape = (sum(shapes[layer][0] for layer in held), shapes[held[0]][1])
        made[name] = update(shape, 2 + n % 3, None if plain in name else (1.0, 4.0)[n % 2], 2 * n)
    return made


def read(file: Path, shapes: Shapes, aliases: Aliases) -> Read:
    return fit(read_lora(file), {NETWORK: shapes}, aliases, "tiny")[NETWORK]


def assert_alike(ours: Read, theirs: Mapping[str, Tensor]) -> None:
    """The same layers, and the same of each, by what they do to a vector: dense, FLUX.1's would take gigabytes."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    assert {f"{layer}.lora_{side}.weight" for layer in ours for side in "AB"} == set(named)
    for layer, factors in ours.items():
        x = random(factors.a.shape[1], seed=1).double()
        a, b = (named[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        mine = factors.scaled_b.double() @ (factors.a.double() @ x)
        torch.testing.assert_close(mine, b @ (a @ x), rtol=1e-5, atol=1e-5)


def names_of(aliases: Aliases) -> dict[str, list[str]]:
    return {name: [part.layer for part in parts] for name, parts in aliases.items()}


@pytest.mark.parametrize("kohya", [True, False])
def test_flux_in_the_names_of_its_makers(tmp_path: Path, kohya: bool) -> None:
    """At real widths, which diffusers' converter takes for granted; one block of each kind. Its own alphas of the last
    layer it drops."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    shapes = layer_shapes(network)
    aliases = flux_names.original_names(shapes)
    file = written(tmp_path / "flux.safetensors", updates(names_of(aliases), shapes, plain="final_layer"), kohya)
    ours = read(file, shapes, aliases)
    assert set(ours) == set(shapes)
    assert_alike(ours, lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(file)))


CONVERTERS: dict[str, tuple[Any, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "qwen_image": (qwen_image, lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers),
    "z_image": (z_image, lora_conversion_utils._convert_non_diffusers_z_image_lora_to_diffusers),
}


@pytest.mark.parametrize("kohya", [True, False])
@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_names_in_other_forms(tmp_path: Path, family: str, kohya: bool) -> None:
    """Every layer there is."""
    module, convert = CONVERTERS[family]
    shapes = layer_shapes(module.pipeline().transformer)
    lora = updates({layer: [layer] for layer in shapes}, shapes)
    file = written(tmp_path / "x.safetensors", lora, kohya)
    assert_alike(read(file, shapes, {}), convert(load_file(file)))


@pytest.mark.parametrize("kohya", [True, False])
def test_z_image_in_the_names_of_its_makers(tmp_path: Path, kohya: bool) -> None:
    """By diffusers' converter of whole checkpoints, given the dense updates as weights."""
    shapes = layer_shapes(z_image.pipeline().transformer)
    aliases = ours_z_image.original_names(list(shapes))
    lora = updates(names_of(aliases), shapes)
    whole = {f"{name}.weight": dense(change) for name, change in lora.items()}
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(whole)
    ours = read(written(tmp_path / "z.safetensors", lora, kohya), shapes, aliases)
    assert {f"{layer}.weight" for layer in ours} == set(theirs)
    renamed = {"attention.to_", "all_x_embedder.2-1", "all_final_layer.2-1."}
    assert set(ours) == {layer for layer in shapes if any(part in layer for part in renamed)}
    for layer, factors in ours.items():
        torch.testing.assert_close(factors.dense().double(), theirs[f"{layer}.weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "name", "held"),
    [
        (flux, "single_blocks.1.linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
        (z_image, "layers.1.attention.qkv", ["attention.to_q", "attention.to_k", "attention.to_v"]),
    ],
)
def test_the_adapters_know_them(tmp_path: Path, family: Any, name: str, held: list[str]) -> None:
    with quiet():
        family.pipeline().save_pretrained(tmp_path / "model")
        model: Any = models.load(str(tmp_path / "model"))
    block = {"single_blocks.1.linear1": "single_transformer_blocks.1", "layers.1.attention.qkv": "layers.1"}[name]
    layers = [f"{block}.{layer}" for layer in held]
    lora = updates({name: layers}, layer_shapes(model.network))
    load_lora(model, written(tmp_path / "x.safetensors", lora, True))
    found = lora_of(model.network)
    assert sorted(found) == sorted(layers)
    stacked = torch.cat([found[layer].dense() for layer in layers])
    torch.testing.assert_close(stacked.double(), dense(lora[name]), rtol=1e-5, atol=1e-6)
