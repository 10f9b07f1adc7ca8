"""Names of Stable Diffusion 3's layers in Stability's code, as kohya and ComfyUI keep them, and diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tempflow.models.lora_files import Part

OUTSIDE = {
    "x_embedder.proj": Part("pos_embed.proj"),
    "context_embedder": Part("context_embedder"),
    "t_embedder.mlp.0": Part("time_text_embed.timestep_embedder.linear_1"),
    "t_embedder.mlp.2": Part("time_text_embed.timestep_embedder.linear_2"),
    "y_embedder.mlp.0": Part("time_text_embed.text_embedder.linear_1"),
    "y_embedder.mlp.2": Part("time_text_embed.text_embedder.linear_2"),
    "final_layer.linear": Part("proj_out"),
    "final_layer.adaLN_modulation.1": Part("norm_out.linear", swapped=True),  # diffusers has scale before shift
}

IN_BLOCKS = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}


def original_names(layers: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Stability's name of each layer → diffusers' layers that hold its rows, for a network with these `layers`.

    A fused qkv is three of them; a part of it alone ("qkv.0", OneTrainer) is one.
    """
    there = set(layers)
    blocks = sorted({int(found[1]) for name in there if (found := re.match(r"transformer_blocks\.(\d+)\.", name))})
    names: dict[str, tuple[Part, ...]] = {name: (part,) for name, part in OUTSIDE.items() if part.layer in there}
    for block in blocks:
        for name, held in IN_BLOCKS.items():
            # The last block's context is only normalised, by a layer that has scale before shift in diffusers.
            swapped = block == blocks[-1] and name == "context_block.adaLN_modulation.1"
            parts = tuple(Part(f"transformer_blocks.{block}.{layer}", swapped) for layer in held)
            if all(part.layer in there for part in parts):
                names[f"joint_blocks.{block}.{name}"] = parts
                if len(parts) > 1:
                    names |= {f"joint_blocks.{block}.{name}.{i}": (part,) for i, part in enumerate(parts)}
    return names
