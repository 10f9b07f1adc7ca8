"""Qwen-Image: a chat's last hidden states as the text, packed tokens, a guidance that keeps each token's norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from families.common import PROMPTS as PROMPTS
from families.common import VOCABULARY, Size, build, fresh, guided, pack, tokenizer, unpack

SIZES: tuple[Size, Size] = ((16, 24), (20, 12))
GUIDANCE = 4.0
SHIFTED = {"base_shift": 1.5}

WIDTH = 16
CHANNELS = 4


def _make() -> QwenImagePipeline:
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY + len(special),
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},  # sums to 8 / 2
            "bos_token_id": 1,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "patch_size": 2,
            "fullatt_block_indexes": [0],
        },
        **{name: VOCABULARY + i for i, name in enumerate(special)},
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],  # its length is the number of halvings
        latents_mean=[-0.5, 0.3, 0.1, 0.8],
        latents_std=[1.5, 0.7, 1.2, 2.0],
    )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=tokenizer(256, "$A"),
        transformer=transformer,
    )


def pipeline() -> QwenImagePipeline:
    """The tokenizer makes 34 tokens of the pipeline's template before the prompt, as the real one does."""
    return build(_make)


def noise_shape(pipe: QwenImagePipeline, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels // 4, size[0] // scale, size[1] // scale


def theirs(
    pipe: QwenImagePipeline,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    """Without negative texts the pipeline would draw unguided, whatever the scale."""
    drawn = pipe(
        prompts,
        negative_prompt=negatives if guidance > 1 else None,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        true_cfg_scale=guidance,
        latents=pack(latents),
        output_type=output,
    ).images
    return unpack(drawn, *latents.shape[2:]) if output == "latent" else drawn


def encode(pipe: QwenImagePipeline, prompts: list[str]) -> dict[str, Tensor | None]:
    """Rows are cut to the longest of the batch; the mask is None where all are equally long."""
    embeds, mask = pipe.encode_prompt(prompts, max_sequence_length=512)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


encode_negatives = encode


def grid(pipe: QwenImagePipeline, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ from 1 to 1/T evenly, shifted by e^μ(tokens), then stretched so that the last one is `shift_terminal`."""
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
    pipe: QwenImagePipeline,
    x: Tensor,
    t: Tensor,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    guidance: float,
) -> Tensor:
    """v at t = 1000·σ. The network takes σ, as t/1000. The guided v of each token gets the norm that v_c has there."""
    _, _, height, width = x.shape

    def run(conditions: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(
            hidden_states=pack(x),
            timestep=t.expand(len(x)) / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
            **conditions,
        )[0]

    v = guided(run, positive, negative, guidance)
    if guidance != 1:
        v = v * (torch.norm(run(positive), dim=-1, keepdim=True) / torch.norm(v, dim=-1, keepdim=True))
    return unpack(v, height, width)
