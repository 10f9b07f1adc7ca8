"""Z-Image: lists of texts without padding, a time that runs backwards, a sign that is turned, a scale one too small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from families.common import PROMPTS as PROMPTS
from families.common import QWEN_CHAT, VOCABULARY, Size, autoencoder, build, fresh, guided, length, tokenizer

SIZES: tuple[Size, Size] = ((24, 32), (20, 12))
GUIDANCE = 5.0
"""Ours: v_∅ + g·(v_c − v_∅). The pipeline's scale is g − 1."""
SHIFTED = {"shift": 3.0}

WIDTH = 16


def _make() -> ZImagePipeline:
    text = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer(48, "$A", chat=QWEN_CHAT),
        transformer=transformer,
    )


def pipeline() -> ZImagePipeline:
    return build(_make)


def noise_shape(pipe: ZImagePipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale


def theirs(
    pipe: ZImagePipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    """The pipeline writes its chat template into the lists that it is given, so it gets copies."""
    return pipe(
        list(prompts),
        negative_prompt=list(negatives),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        latents=latents,
        output_type=output,
        max_sequence_length=length(pipe.tokenizer, 512),
    ).images


def encode(pipe: ZImagePipeline, prompts: list[str]) -> list[Tensor]:
    """One tensor [L_i, d] a prompt, of its own length."""
    embeds, _ = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=length(pipe.tokenizer, 512)
    )
    return embeds


encode_negatives = encode


def grid(pipe: ZImagePipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ from 1 to 1/T evenly, in float32 (NumPy's float64 would move the latents by 4e-5), shifted by a constant."""
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: ZImagePipeline, x: Tensor, t: Tensor, positive: list[Tensor], negative: list[Tensor], guidance: float
) -> Tensor:
    """v at t = 1000·σ. The network takes 1 − σ, as (1000 − t)/1000, and gives −v; latents have a frame axis there."""

    def run(texts: list[Tensor]) -> Tensor:
        frames = list(x[:, :, None].unbind())
        time = (1000 - t.expand(len(x))) / 1000
        return -torch.stack(pipe.transformer(frames, time, texts, return_dict=False)[0])[:, :, 0]

    return guided(run, positive, negative, guidance)
