"""CogView4: texts with padding that counts, three sizes as conditions, a time that the shift does not move."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor
from transformers import GlmConfig, GlmModel

from families.common import PROMPTS as SHORT
from families.common import VOCABULARY, Size, autoencoder, build, fresh, guided, length, tokenizer

PROMPTS = [SHORT[0], " ".join([SHORT[2]] * 3), SHORT[1]]
"""Padded to multiples of 16 tokens, neighbours still differ in length."""
SIZES: tuple[Size, Size] = ((48, 64), (80, 32))
"""The pipeline takes multiples of 16, whatever the autoencoder's factor, which is 8 here."""
GUIDANCE = 5.0
SHIFTED = {"base_shift": 1.5}

WIDTH = 16


def _make() -> CogView4Pipeline:
    text = GlmConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=3,
    )
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    return CogView4Pipeline(
        tokenizer=tokenizer(128, "<bos> $A", side="left"),
        text_encoder=GlmModel(text),
        vae=autoencoder(4, 4, shift_factor=0.0),
        transformer=transformer,
        scheduler=scheduler,
    )


def pipeline() -> CogView4Pipeline:
    return build(_make)


def noise_shape(pipe: CogView4Pipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale


def theirs(
    pipe: CogView4Pipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    """Prompt by prompt: in a batch each would be padded to the longest, and padding is attended to."""
    drawn = [
        pipe(
            prompt,
            negative_prompt=negative,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise[None],
            output_type=output,
            max_sequence_length=length(pipe.tokenizer, 1024),
        ).images
        for prompt, negative, noise in zip(prompts, negatives, latents, strict=True)
    ]
    return torch.cat(drawn) if output == "latent" else np.concatenate(drawn)


def encode(pipe: CogView4Pipeline, prompts: list[str]) -> list[Tensor]:
    """One tensor [L_i, d] a prompt; L_i, padding included, is a multiple of 16. There is no mask."""
    longest = length(pipe.tokenizer, 1024)
    return [
        pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=longest)[0][0]
        for prompt in prompts
    ]


encode_negatives = encode


def grid(pipe: CogView4Pipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """Timesteps are integers from 1000 to 1, and stay; σ is a thousandth of them, shifted to μ/(μ + 1/σ − 1), where μ
    grows with the root of the number of tokens."""
    config = pipe.scheduler.config
    _, height, width = noise_shape(pipe, size)
    tokens = height * width // pipe.transformer.config.patch_size**2
    mu = calculate_shift(tokens, config.base_image_seq_len, config.base_shift, config.max_shift)
    timesteps = np.linspace(config.num_train_timesteps, 1.0, steps).astype(np.int64).astype(np.float32)
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(timesteps=timesteps, sigmas=timesteps / config.num_train_timesteps, mu=mu)
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: CogView4Pipeline, x: Tensor, t: Tensor, positive: list[Tensor], negative: list[Tensor], guidance: float
) -> Tensor:
    """v at the unshifted `t`; original and target size in pixels, and the place of the crop, enter as numbers."""
    scale = pipe.vae_scale_factor
    size = torch.tensor([[x.shape[2] * scale, x.shape[3] * scale]], dtype=x.dtype)

    def run(texts: list[Tensor]) -> Tensor:
        rows = [
            pipe.transformer(
                hidden_states=row[None],
                encoder_hidden_states=text[None],
                timestep=t[None],
                original_size=size,
                target_size=size,
                crop_coords=torch.zeros_like(size),
                return_dict=False,
            )[0]
            for row, text in zip(x, texts, strict=True)
        ]
        return torch.cat(rows)

    return guided(run, positive, negative, guidance)
