"""What a file in ComfyUI's key form means, by diffusers' converters of files from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from diffusers import FluxTransformer2DModel, Lumina2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
    _convert_non_diffusers_lumina2_lora_to_diffusers,  # pyright: ignore[reportPrivateUsage]
)
from lora_world import assert_computes, converted, original, own_model, random
from torch import Tensor
from worlds import World

from tempflow.models.comfyui import comfyui_tensors
from tempflow.models.flux import LORA_TARGETS, Flux
from tempflow.models.flux2 import Flux2
from tempflow.models.lora import Factors, FittedLora, Shapes, layer_shapes
from tempflow.models.lumina2 import Lumina2
from tempflow.models.sd3 import SD3


def updates(shapes: Shapes, layers: list[str]) -> dict[str, Factors]:
    """Of several ranks, and of a scale that float32 multiplies by without rounding."""
    lora: dict[str, Factors] = {}
    for n, layer in enumerate(layers):
        out, *into = shapes[layer]
        rank = 2 + n % 3
        b = 0.2 * random(out, rank, *(1,) * (len(into) - 1), seed=2 * n + 1)
        lora[layer] = Factors(0.2 * random(rank, *into, seed=2 * n), b, 4.0)
    return lora


def assert_means(theirs: Mapping[str, Tensor], lora: Mapping[str, Factors]) -> None:
    """The same of each layer, by what it does to a vector; nothing of any other."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    layers = {name.rpartition(".lora_")[0] for name in named}
    assert set(lora) <= layers
    for layer in layers:
        a, b = (named[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        x = random(a.shape[1], seed=1).double()
        there = lora.get(layer)
        mine = torch.zeros(len(b)).double() if there is None else there.scaled_b.double() @ (there.a.double() @ x)
        torch.testing.assert_close(b @ (a @ x), mine, rtol=1e-5, atol=1e-5)


def test_sd3s_by_the_converter_of_whole_checkpoints(tiny_world: World) -> None:
    """Every layer there is, merged under the original's names in float64."""
    base = original()
    model = own_model(tiny_world, converted(base))
    shapes = layer_shapes(model.network)
    lora = updates(shapes, list(shapes))
    whole = dict(base)
    tensors = comfyui_tensors(lora, SD3.comfyui(list(shapes)), shapes, torch.float64)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            a, b = tensors[name], tensors[f"{stem}.lora_B.weight"]
            told = f"{stem.removeprefix('diffusion_model.')}.weight"
            whole[told] = whole[told] + torch.einsum("or,r...->o...", b.flatten(1), a)
    model.attach_lora(FittedLora(lora, {}))
    assert_computes(model, converted(whole), converted(base))


@pytest.mark.parametrize("everything", [False, True])
def test_flux_by_diffusers_converter(everything: bool) -> None:
    """At real widths, which it takes for granted; by default a single block's attention alone, of a layer that holds
    its feed-forward too."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    shapes = layer_shapes(network)
    layers = [name for name in shapes if everything or any(name.endswith(f".{t}") for t in LORA_TARGETS)]
    lora = updates(shapes, layers)
    tensors = comfyui_tensors(lora, Flux.comfyui(list(shapes)), shapes)
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert_means(_convert_kohya_flux_lora_to_diffusers(tensors), lora)


def test_lumina2_by_diffusers_converter() -> None:
    """At real widths; it wants all layers of all blocks, and no other."""
    with torch.device("meta"):
        shapes = layer_shapes(Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1))
    lora = updates(shapes, [name for name in shapes if name.startswith(("layers.", "noise_", "context_"))])
    tensors = comfyui_tensors(lora, Lumina2.comfyui(list(shapes)), shapes)
    assert_means(_convert_non_diffusers_lumina2_lora_to_diffusers(tensors), lora)


def test_rows_without_a_lora_are_zeros() -> None:
    shapes = {f"transformer_blocks.0.attn.to_{x}": (n, 3) for n, x in enumerate("qkv", start=2)}
    lora = updates(shapes, [name for name in shapes if not name.endswith("to_k")])
    tensors = comfyui_tensors(lora, Flux2.comfyui(list(shapes)), shapes)
    a, b = (tensors[f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight"] for side in "AB")
    update = b @ a
    assert len(tensors) == 2 and update.shape == (9, 3) and not update[2:5].any()
    torch.testing.assert_close(update[:2], lora["transformer_blocks.0.attn.to_q"].dense())
    torch.testing.assert_close(update[5:], lora["transformer_blocks.0.attn.to_v"].dense())


def test_a_layer_without_a_name_is_refused() -> None:
    shapes = {"norm_out.linear": (4, 2)}
    with pytest.raises(
        ValueError, match=r"calls the layer 'norm_out\.linear' is not known here; nearest valid: 'lora'"
    ):
        comfyui_tensors(updates(shapes, list(shapes)), Flux2.comfyui(list(shapes)), shapes)
