"""Sana: an instruction before the prompt but not before the negative text, latents 32 times smaller, two samplers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from families.common import PROMPTS as PROMPTS
from families.common import VOCABULARY, Size, build, fresh, guided, tokenizer

SIZES: tuple[Size, Size] = ((96, 128), (128, 64))
"""The pipeline takes multiples of 32, whatever the autoencoder's factor, which is 32 here too."""
GUIDANCE = 4.5
SHIFTED = {"flow_shift": 1.0}

WIDTH = 16
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
TOKENS = 300
"""The pipeline's length of a text: token 0 and the last 299."""


def _make() -> SanaPipeline:
    text = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=32,
    )
    levels = 6
    blocks = ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(4,) * (levels - 1) + (8,),
        decoder_block_out_channels=(4,) * (levels - 1) + (8,),
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * (levels - 1) + ((5,),),
        decoder_qkv_multiscales=((),) * (levels - 1) + ((5,),),
        scaling_factor=0.6,
    )
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
    )
    return SanaPipeline(
        tokenizer=tokenizer(1024, "<bos> $A"),
        text_encoder=Gemma2Model(text),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def pipeline() -> SanaPipeline:
    return build(_make)


def noise_shape(pipe: SanaPipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale


def euler(pipe: SanaPipeline) -> FlowMatchEulerDiscreteScheduler:
    """Euler's sampler with the shift that the folder's own, DPM-Solver++, is set to."""
    return FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)


def theirs(
    pipe: SanaPipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
    dpm: bool = False,
) -> Any:
    """By Euler's sampler, or the folder's own. The bins of resolutions, on by default, would change the size."""
    kept, pipe.scheduler = pipe.scheduler, fresh(pipe.scheduler) if dpm else euler(pipe)
    try:
        return pipe(
            prompts,
            negative_prompt=negatives,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=latents,
            output_type=output,
            use_resolution_binning=False,
        ).images
    finally:
        pipe.scheduler = kept


def encode(pipe: SanaPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Texts are lower-cased and follow the instruction, of which token 0 and what fits the last 299 stay."""
    embeds, mask, _, _ = pipe.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=TOKENS,
        complex_human_instruction=INSTRUCTION,
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def encode_negatives(pipe: SanaPipeline, negatives: list[str]) -> dict[str, Tensor]:
    """No instruction before these."""
    embeds, mask, _, _ = pipe.encode_prompt(
        negatives, do_classifier_free_guidance=False, max_sequence_length=TOKENS, complex_human_instruction=None
    )
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def grid(pipe: SanaPipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """Euler's own: evenly from 1 to σ_min, where σ_min is shifted before and all are after. No sigmas are given it."""
    scheduler = euler(pipe)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: SanaPipeline, x: Tensor, t: Tensor, positive: dict[str, Tensor], negative: dict[str, Tensor], guidance: float
) -> Tensor:
    """v at t, which is 1000·σ here and the integer part of it in DPM-Solver++'s grid."""
    config = pipe.transformer.config

    def run(conditions: dict[str, Tensor]) -> Tensor:
        time = t.expand(len(x)) * config.timestep_scale
        return pipe.transformer(x, timestep=time, return_dict=False, **conditions)[0]

    v = guided(run, positive, negative, guidance)
    return v[:, : x.shape[1]]  # a network with twice the channels tells a variance in the second half


@torch.no_grad()
def plain_dpm(
    pipe: SanaPipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
) -> Tensor:
    """DPM-Solver++ 2M, the folder's sampler: x_0 is drawn on in a straight line over λ = log((1 − σ)/σ)."""
    positive, negative = encode(pipe, prompts), encode_negatives(pipe, negatives)
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    lambdas = torch.log(1 - sigmas) - torch.log(sigmas)
    x, before = latents, None
    for i, t in enumerate(scheduler.timesteps):
        clean = x - sigmas[i] * velocity(pipe, x, t, positive, negative, guidance)
        h = lambdas[i + 1] - lambdas[i]
        ahead = clean
        if before is not None and i < steps - 1:  # the first step and the last are of order one
            ahead = clean + 0.5 * h / (lambdas[i] - lambdas[i - 1]) * (clean - before)
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * (torch.exp(-h) - 1) * ahead
        before = clean
    return x
