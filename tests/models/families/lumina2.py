"""Lumina-Image 2: a system prompt before the prompt alone, a time that runs backwards, a norm over the width axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from families.common import PROMPTS as PROMPTS
from families.common import VOCABULARY, Size, autoencoder, build, fresh, guided, length, tokenizer

SIZES: tuple[Size, Size] = ((48, 64), (80, 32))
"""The pipeline takes every autoencoder's factor to be 8."""
GUIDANCE = 4.0
SHIFTED = {"shift": 2.0}

WIDTH = 16


def _make() -> Lumina2Pipeline:
    text = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 16, 16),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4, 4),
        text_encoder=Gemma2Model(text),
        tokenizer=tokenizer(56, "<bos> $A"),
    )


def pipeline() -> Lumina2Pipeline:
    return build(_make)


def noise_shape(pipe: Lumina2Pipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale


def theirs(
    pipe: Lumina2Pipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    return pipe(
        prompts,
        negative_prompt=negatives,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=latents,
        output_type=output,
        max_sequence_length=length(pipe.tokenizer, 256),
    ).images


def encode(pipe: Lumina2Pipeline, prompts: list[str]) -> dict[str, Tensor]:
    """The pipeline writes its system prompt and "<Prompt Start>" before each."""
    embeds, mask, _, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=length(pipe.tokenizer, 256)
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def encode_negatives(pipe: Lumina2Pipeline, negatives: list[str]) -> dict[str, Tensor]:
    """Nothing before these; `encode_prompt` gives them only beside some prompt."""
    _, _, embeds, mask = pipe.encode_prompt(
        negatives, negative_prompt=negatives, max_sequence_length=length(pipe.tokenizer, 256)
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def grid(pipe: Lumina2Pipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ from 1 to 1/T evenly, shifted by a constant. (With a dynamic shift the pipeline takes the latents' number of
    channels for that of tokens.)"""
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: Lumina2Pipeline,
    x: Tensor,
    t: Tensor,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    guidance: float,
) -> Tensor:
    """v at t = 1000·σ. The network takes 1 − σ, as 1 − t/1000, and gives −v. The guided v gets the norm that v_c has
    in each row of the picture: over the last axis, the width, which is what the pipeline does."""
    time = (1 - t / pipe.scheduler.config.num_train_timesteps).expand(len(x))

    def run(conditions: dict[str, Tensor]) -> Tensor:
        return -pipe.transformer(hidden_states=x, timestep=time, return_dict=False, **conditions)[0]

    v = guided(run, positive, negative, guidance)
    if guidance != 1:
        v = v * (torch.norm(run(positive), dim=-1, keepdim=True) / torch.norm(v, dim=-1, keepdim=True))
    return v
