"""FLUX.1-dev: two texts, packed tokens, a guidance that is embedded, and a true one beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from families.common import EOS, VOCABULARY, Size, autoencoder, build, fresh, guided, length, pack, tokenizer, unpack
from families.common import PROMPTS as PROMPTS

SIZES: tuple[Size, Size] = ((16, 24), (20, 12))
GUIDANCE = 3.5
SHIFTED = {"base_shift": 1.2}


def _make(guidance_embeds: bool) -> FluxPipeline:
    clip = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    t5 = T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=EOS,
        decoder_start_token_id=0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=autoencoder(4),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer(12, "<bos> $A <eos>"),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer(16),
    )


def pipeline(guidance_embeds: bool = True) -> FluxPipeline:
    """Without `guidance_embeds` as FLUX.1-schnell is, which takes no guidance."""
    return build(lambda: _make(guidance_embeds))


def noise_shape(pipe: FluxPipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels // 4, size[0] // scale, size[1] // scale


def theirs(
    pipe: FluxPipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
    true_cfg: float = 1.0,
) -> Any:
    """`guidance` is the embedded one. The negative texts count when `true_cfg` is above 1."""
    drawn = pipe(
        prompts,
        negative_prompt=negatives,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        true_cfg_scale=true_cfg,
        latents=pack(latents),
        output_type=output,
        max_sequence_length=length(pipe.tokenizer_2, 512),
    ).images
    return unpack(drawn, *latents.shape[2:]) if output == "latent" else drawn


def encode(pipe: FluxPipeline, prompts: list[str]) -> dict[str, Tensor]:
    embeds, pooled, ids = pipe.encode_prompt(prompts, max_sequence_length=length(pipe.tokenizer_2, 512))
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}


encode_negatives = encode


def grid(pipe: FluxPipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ from 1 to 1/T evenly, then shifted by e^μ, where μ grows with the number of tokens."""
    config = pipe.scheduler.config
    _, height, width = noise_shape(pipe, size)
    mu = calculate_shift(
        height * width // 4,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: FluxPipeline,
    x: Tensor,
    t: Tensor,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    guidance: float,
    true_cfg: float = 1.0,
) -> Tensor:
    """v at t = 1000·σ. The network takes σ, as t/1000 in float32, which differs from σ in the last bit.

    The embedded guidance goes into both branches, also at 1.
    """
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    ids = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns))  # (0, row, column)

    def run(conditions: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(
            hidden_states=pack(x),
            timestep=t.expand(len(x)) / 1000,
            guidance=torch.full([len(x)], guidance) if pipe.transformer.config.guidance_embeds else None,
            img_ids=ids.float(),
            return_dict=False,
            **conditions,
        )[0]

    return unpack(guided(run, positive, negative, true_cfg), *x.shape[2:])
