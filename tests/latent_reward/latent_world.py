"""A tiny random pipeline behind the SD3 adapter, and a few rated latents of it."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from tempflow.core.rng import Stream
from tempflow.latent_reward import Rated
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.shapes import build

PROMPTS = ("a red circle", "two squares")
SHAPE = (8, 8, 8)


def adapter(layers: int = 4) -> SD3:
    with quiet():
        pipe = build.pipeline(seed=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            pipe.register_modules(transformer=build.transformer(heads=1, layers=layers))
        return SD3(pipe, "tiny", "apache-2.0")


def dual_transformer(layers: int = 5) -> SD3Transformer2DModel:
    """SD 3.5 medium's kind of block: a second attention in the first ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            pos_embed_max_size=6,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ).requires_grad_(False)


def normal(name: str, count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return Stream(7, name).normal([(i,) for i in range(count)], shape)


def rated() -> Rated:
    """Six latents, three of each prompt: eight pairs, as one score has failed to differ."""
    scores = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.7, 0.2])
    return Rated(normal("latents", 6), scores, torch.tensor([0, 0, 0, 1, 1, 1]), PROMPTS)
