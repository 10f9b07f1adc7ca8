"""A LoRA in ComfyUI's key form: the inverse of what `lora_files` reads.

ComfyUI takes a layer by its own network's name for it, with dots behind `diffusion_model.` or with underscores behind
`lora_unet_` (read in its source, comfy/lora.py). Where that network keeps several of our layers in one, so does the
file: their updates stand in it block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.models.lora import Lora, Shapes
from tempflow.models.lora_files import Aliases, Part


@dataclass(frozen=True)
class Naming:
    """What ComfyUI calls a network's layers.

    names  its name → our layers whose rows it holds, one under another
    kohya  whether a file is written as kohya writes it (`lora_unet_`, underscores, alpha beside the weights), else with
           dots and without alpha; ComfyUI reads both, the family's other readers one of them
    """

    names: Aliases
    kohya: bool = False


def own_names(layers: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Every layer by our own name for it."""
    return {layer: (Part(layer),) for layer in layers}


def comfyui_tensors(
    lora: Lora, naming: Naming, shapes: Shapes, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a file that holds `lora`, the scale multiplied into b: where there is an alpha, it is the rank.

    shapes  of the weights of all of the network's layers: one that has no LoRA may share a name with one that has

    Raises ValueError for a layer that has no name in ComfyUI, or that the network lacks.
    """
    whole = sorted(naming.names.items(), key=lambda item: len(item[1]))  # the name that holds most of it comes last
    home = {part.layer: name for name, parts in whole for part in parts}
    for layer in lora:
        if layer not in home:
            raise ValueError(
                f"form: 'comfyui', and what ComfyUI calls the layer {layer!r} is not known here; nearest valid: 'lora'"
            )
    prefix, dot, down, up = ("lora_unet_", "_", "down", "up") if naming.kohya else ("diffusion_model.", ".", "A", "B")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(home[layer] for layer in lora):
        a, b = _stacked(lora, naming.names[name], shapes)
        stem = prefix + name.replace(".", dot)
        for side, value in ((down, a), (up, b)):
            tensors[f"{stem}.lora_{side}.weight"] = value.detach().to("cpu", dtype, copy=True).contiguous()
        if naming.kohya:
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(a)))
    return tensors


def _stacked(lora: Lora, parts: Sequence[Part], shapes: Shapes) -> tuple[Tensor, Tensor]:
    """a and scaled b of a layer that holds the rows of `parts`, zeros for those that have no LoRA."""
    there = [part for part in parts if part.layer in lora]
    a = torch.cat([lora[part.layer].a.float() for part in there])
    b = a.new_zeros(sum(shapes[part.layer][0] for part in parts), len(a), *(1,) * (a.ndim - 2))
    row = column = 0
    for part in parts:
        if part in there:
            update = lora[part.layer].scaled_b
            update = torch.cat(update.chunk(2)[::-1]) if part.swapped else update
            b[row : row + update.shape[0], column : column + update.shape[1]] = update
            column += update.shape[1]
        row += shapes[part.layer][0]
    return a, b
