"""Pipelines in memory with the released ones' configurations and weights drawn on the device: for `gpu_check.py`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """A pipeline to be drawn: the configurations of its parts, and what is asked of it.

    text        tokens and width of a prompt's embeddings, and width of its pooled one
    rows        of a rollout's forward, of a training pass
    algorithms  settings by name, for one prompt an iteration
    """

    title: str
    pipeline: str
    network: str
    config: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text: tuple[int, int, int]
    side: int
    guidance: float
    rows: tuple[int, int]
    rank: int
    algorithms: Mapping[str, Mapping[str, Any]]


VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
LARGE_VAE = {**VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
TINY: Mapping[str, Any] = {"side": 32, "rows": (4, 2), "rank": 2, "text": (6, 32, 16), "vae": TINY_VAE}
TINY_ALGORITHMS = {
    "tempflow_grpo": {"steps": 3, "seeds": 1, "branches": 2},
    "diffusion_nft": {"steps": 3, "group": 3},
}


def sd35(tiny: bool, blocks: int = 24) -> Shape:
    """Stable Diffusion 3.5 Medium: its widths, depth and tokens (77 of CLIP, 256 of T5)."""
    config = {"in_channels": 16, "patch_size": 2, "attention_head_dim": 64, "qk_norm": "rms_norm"}
    real = {
        "num_layers": blocks,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(min(13, blocks))),
    }
    small = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 4,
        "sample_size": 4,
        "dual_attention_layers": (0,),
    }
    return Shape(
        **{
            "title": "tiny SD 3.5" if tiny else f"SD 3.5 Medium, {blocks} of 24 blocks",
            "pipeline": "StableDiffusion3Pipeline",
            "network": "SD3Transformer2DModel",
            "config": {**config, **(small if tiny else real)},
            "vae": {**LARGE_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
            "scheduler": {"shift": 3.0},
            "text": (333, 4096, 2048),
            "side": 512,
            "guidance": 4.5,
            "rows": (24, 6),
            "rank": 32,
            "algorithms": {"tempflow_grpo": {"seeds": 2}, "diffusion_nft": {"group": 24}},
            **({**TINY, "algorithms": TINY_ALGORITHMS} if tiny else {}),
        }
    )


def flux(tiny: bool, double: int = 4, single: int = 8) -> Shape:
    """FLUX.1 [dev] with its widths and tokens, and fewer blocks than its 19 + 38."""
    real = {"num_layers": double, "num_single_layers": single, "guidance_embeds": True}
    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "guidance_embeds": True,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (16, 24, 24),
    }
    return Shape(
        **{
            "title": "tiny FLUX.1" if tiny else f"FLUX.1 [dev], {double} + {single} of 19 + 38 blocks",
            "pipeline": "FluxPipeline",
            "network": "FluxTransformer2DModel",
            "config": small if tiny else real,
            "vae": {**LARGE_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
            "scheduler": {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15},
            "text": (512, 4096, 768),
            "side": 512,
            "guidance": 3.5,
            "rows": (12, 3),
            "rank": 64,
            "algorithms": {"tempflow_grpo": {"seeds": 1}, "diffusion_nft": {"group": 12}},
            **({**TINY, "algorithms": TINY_ALGORITHMS} if tiny else {}),
        }
    )


class Pipe:
    """Stands in for a pipeline: what an adapter asks of one, with text encoders that answer noise, a prompt's own."""

    def __init__(self, shape: Shape, network: nn.Module, vae: nn.Module, scheduler: object) -> None:
        self.transformer, self.vae, self.scheduler, self.shape = network, vae, scheduler, shape
        self.text_encoder = self.text_encoder_2 = self.text_encoder_3 = nn.Identity()
        self.tokenizer = self.tokenizer_2 = self.tokenizer_3 = SimpleNamespace(model_max_length=512)
        self.components: dict[str, object] = {"transformer": network, "vae": vae, "scheduler": scheduler}

    def set_progress_bar_config(self, disable: bool) -> None:
        """There is none."""

    def encode_prompt(self, texts: Sequence[str], *_others: object, device: object, **_options: object) -> tuple:
        """In the order of the pipeline that it stands in for."""
        tokens, width, pooled_width = self.shape.text
        source = torch.Generator().manual_seed(zlib.crc32(texts[0].encode()))
        embeds = torch.randn(1, tokens, width, generator=source)
        pooled = torch.randn(1, pooled_width, generator=source)
        return (embeds, None, pooled, None) if "3" in self.shape.pipeline else (embeds, pooled, None)


def built(shape: Shape, device: torch.device, seed: int = 0) -> Any:
    """The adapter of such a pipeline, bfloat16, with weights drawn on the device and a LoRA to train."""
    from accelerate import init_empty_weights
    from diffusers.utils import logging

    from tempflow.models import adapter_for

    logging.set_verbosity_error()
    with init_empty_weights():  # buffers are computed, weights are not there yet
        network, vae, scheduler = parts(shape)
    source = torch.Generator(device).manual_seed(seed)
    for module in (network, vae):
        draw(module, source, torch.bfloat16)
        nn.Module.to(module, device, torch.bfloat16)  # the buffers, as a file has them
    adapter: Any = adapter_for(shape.pipeline)
    model = adapter(Pipe(shape, network, vae, scheduler), shape.title, "none: random weights")
    torch.manual_seed(seed)
    model.add_lora(shape.rank, 2 * shape.rank)
    return model


def parts(shape: Shape) -> tuple[Any, Any, Any]:
    """Network, autoencoder and scheduler."""
    diffusers: Any = import_module("diffusers")
    network = getattr(diffusers, shape.network)(**shape.config)
    return network, diffusers.AutoencoderKL(**shape.vae), diffusers.FlowMatchEulerDiscreteScheduler(**shape.scheduler)


TEXT_PARTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "clip": (
        "CLIPTextModel",
        {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1},
    ),
    "t5": ("T5EncoderModel", {"vocab_size": 8, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}),
}
"""Text encoders that take next to nothing: embeddings are noise here."""


def write_configurations(shape: Shape, folder: Path) -> None:
    """A pipeline's folder without weights, as `tempflow cost` reads it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        made = dict(zip(("transformer", "vae", "scheduler"), parts(shape), strict=True))
    for name, part in made.items():
        part.save_config(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in made.items()}
    tokens, of_clip = shape.text[0], min(77, shape.text[0] // 2)
    sd3 = "3" in shape.pipeline  # its embeddings are CLIP's, and T5's behind them
    texts = [("clip", of_clip), ("clip", of_clip), ("t5", tokens - of_clip)] if sd3 else [("clip", 77), ("t5", tokens)]
    for n, (kind, length) in enumerate(texts, start=1):
        suffix = "" if n == 1 else f"_{n}"
        encoder, config = TEXT_PARTS[kind]
        for name, file, told in (
            (f"text_encoder{suffix}", "config.json", config),
            (f"tokenizer{suffix}", "tokenizer_config.json", {"model_max_length": length}),
        ):
            (folder / name).mkdir()
            (folder / name / file).write_text(json.dumps(told), encoding="utf-8")
        index |= {f"text_encoder{suffix}": ["transformers", encoder], f"tokenizer{suffix}": ["transformers", kind]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": shape.pipeline, **index}), encoding="utf-8")


def draw(network: nn.Module, source: torch.Generator, dtype: torch.dtype) -> None:
    """Weights ~ N(0, 1/inputs), biases and the scales of norms spread by 0.1, so that every input moves the output."""
    for module in network.modules():
        for name, like in list(module.named_parameters(recurse=False)):
            drawn = torch.randn(like.shape, generator=source, device=source.device, dtype=dtype)
            inputs = like.numel() // max(1, len(like))
            if name == "bias":
                drawn *= 0.1
            elif inputs == 1:
                drawn = 1 + 0.1 * drawn
            else:
                drawn *= inputs**-0.5
            module.register_parameter(name, nn.Parameter(drawn, requires_grad=False))
