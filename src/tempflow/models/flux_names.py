"""Names of FLUX.1's layers in Black Forest Labs' code, as kohya and ComfyUI keep them, and diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tempflow.models.lora_files import Part

OUTSIDE = {
    "img_in": Part("x_embedder"),
    "txt_in": Part("context_embedder"),
    "time_in.in_layer": Part("time_text_embed.timestep_embedder.linear_1"),
    "time_in.out_layer": Part("time_text_embed.timestep_embedder.linear_2"),
    "vector_in.in_layer": Part("time_text_embed.text_embedder.linear_1"),
    "vector_in.out_layer": Part("time_text_embed.text_embedder.linear_2"),
    "guidance_in.in_layer": Part("time_text_embed.guidance_embedder.linear_1"),
    "guidance_in.out_layer": Part("time_text_embed.guidance_embedder.linear_2"),
    "final_layer.linear": Part("proj_out"),
    "final_layer.adaLN_modulation.1": Part("norm_out.linear", swapped=True),  # diffusers has scale before shift
}

IN_BLOCKS = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    "single_transformer_blocks": {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
}
BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def original_names(layers: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """The original name of each layer → diffusers' layers that hold its rows, for a network with these `layers`."""
    there = set(layers)
    names: dict[str, tuple[Part, ...]] = {n: (part,) for n, part in OUTSIDE.items() if part.layer in there}
    for block in {found[0] for name in there if (found := re.match(r"(?:single_)?transformer_blocks\.\d+", name))}:
        kind, _, number = block.partition(".")
        for name, held in IN_BLOCKS[kind].items():
            parts = tuple(Part(f"{block}.{layer}") for layer in held)
            if all(part.layer in there for part in parts):
                names[f"{BLOCKS[kind]}.{number}.{name}"] = parts
    return names
