"""FLUX.2 dev and klein: patchified and whitened latents, three hidden states side by side as the text.

A latent here is [4·C, h/2, w/2] of the autoencoder's [C, h, w], whitened by its batch norm's running statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from families.common import PROMPTS as PROMPTS
from families.common import QWEN_CHAT, VOCABULARY, Size, build, fresh, length, tokenizer

SIZES: tuple[Size, Size] = ((16, 24), (20, 12))
GUIDANCE = 4.0
"""Dev's is embedded; klein's is classifier-free, against the empty text always."""
SHIFTED = {"time_shift_type": "linear"}

WIDTH = 8
CHANNELS = 4
CHAT = "<bos>{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
"""Dev's messages are lists of parts."""


def _decoder(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
    }


def _transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.copy_(0.5 * torch.randn(4 * CHANNELS))
    vae.bn.running_var.copy_(0.25 + 2 * torch.rand(4 * CHANNELS))
    return vae


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential")


def _make_dev() -> Flux2Pipeline:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "patch_size": 2,
        "image_size": 8,
    }
    text = Mistral3Config(
        text_config={"model_type": "mistral", **_decoder(31)}, vision_config=vision, image_token_index=0
    )
    return Flux2Pipeline(
        scheduler=_scheduler(),
        vae=_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(text),
        tokenizer=tokenizer(48, "$A", side="left", chat=CHAT),  # the real one is a PixtralProcessor, of torchvision
        transformer=_transformer(guidance_embeds=True),
    )


def _make_klein(is_distilled: bool) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=_autoencoder(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**_decoder(28))),
        tokenizer=tokenizer(32, "$A", chat=QWEN_CHAT),
        transformer=_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    )


def dev() -> Flux2Pipeline:
    return build(_make_dev)


def klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """A distilled checkpoint says so in model_index.json, and takes no guidance."""
    return build(lambda: _make_klein(is_distilled))


def noise_shape(pipe: Any, size: Size) -> tuple[int, int, int]:
    unit = 2 * pipe.vae_scale_factor
    return pipe.transformer.config.in_channels, size[0] // unit, size[1] // unit


def flat(x: Tensor) -> Tensor:
    """[B, C, h, w] → tokens [B, h·w, C]."""
    return x.flatten(2).transpose(1, 2)


def whitening(pipe: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, both [1, 4·C, 1, 1], of the patchified latents of the autoencoder."""
    norm = pipe.vae.bn
    std = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    return norm.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def patchify(z: Tensor) -> Tensor:
    """[B, C, 2h, 2w] → [B, 4·C, h, w], channels in the order (C, 2, 2)."""
    return torch.nn.functional.pixel_unshuffle(z, 2)


def theirs(
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    """Neither takes negative texts. Dev gives back its tokens, klein latents of the autoencoder, not whitened."""
    drawn = pipe(
        prompt=prompts,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=latents,
        output_type=output,
        max_sequence_length=length(pipe.tokenizer, 512),
    ).images
    if output != "latent":
        return drawn
    if isinstance(pipe, Flux2Pipeline):
        return drawn.transpose(1, 2).reshape(latents.shape)
    mean, std = whitening(pipe)
    return (patchify(drawn) - mean) / std


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Padding stays, and is attended to. Ids of a text's token l are (0, 0, 0, l)."""
    embeds, ids = pipe.encode_prompt(prompts, max_sequence_length=length(pipe.tokenizer, 512))
    return {"encoder_hidden_states": embeds, "txt_ids": ids}


encode_negatives = encode


def grid(pipe: Any, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ from 1 to 1/T evenly, shifted by e^μ, where μ depends on the number of tokens *and of steps*."""
    _, height, width = noise_shape(pipe, size)
    mu = compute_empirical_mu(image_seq_len=height * width, num_steps=steps)
    scheduler = fresh(pipe.scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.timesteps, scheduler.sigmas


def velocity(
    pipe: Any, x: Tensor, t: Tensor, positive: dict[str, Tensor], negative: dict[str, Tensor], guidance: float
) -> Tensor:
    """v at t = 1000·σ. The network takes σ, as t/1000, and int64 ids (0, row, column, 0).

    Dev takes the guidance as a number, also at 1; a base klein's is classifier-free, against "" whatever
    `negative` says.
    """
    rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
    ids = torch.cartesian_prod(torch.tensor([0]), rows, columns, torch.tensor([0])).expand(len(x), -1, -1)
    embedded = torch.full([len(x)], guidance) if pipe.transformer.config.guidance_embeds else None

    def run(conditions: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(
            hidden_states=flat(x),
            timestep=t.expand(len(x)) / 1000,
            guidance=embedded,
            img_ids=ids,
            return_dict=False,
            **conditions,
        )[0]

    v = run(positive)
    if embedded is None and guidance != 1 and not pipe.config.is_distilled:
        base = run(encode(pipe, [""] * len(x)))
        v = base + guidance * (v - base)
    return v.transpose(1, 2).reshape(x.shape)
