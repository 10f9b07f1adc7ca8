"""SD 1.5 and SDXL: UNets that predict ε (or v), drawn by DDIM, which is Euler's rule in flow coordinates.

With a = √ᾱ_t and b = √(1 − ᾱ_t), the pipeline's x = a·x_0 + b·ε is, divided by a + b, z = (1 − σ)·x_0 + σ·ε at
σ = b/(a + b): a point on the straight line of a flow model, whose velocity is ε − x_0.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from families import common
from families.common import EOS, VOCABULARY, Size, autoencoder, build, guided, tokenizer
from families.common import PROMPTS as PROMPTS

SIZES: tuple[Size, Size] = ((48, 64), (40, 24))
"""The pipelines take sides in multiples of 8 whatever the autoencoder's factor, which is 8 here too."""
GUIDANCE = 5.0
SHIFTED = {"beta_end": 0.02}

# The settings of the released folders, which name samplers that are no Euler steps of a flow.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
POOLED, SIZE_WIDTH = 12, 8


def _clip(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=POOLED,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )


def _unet(text: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=text,
        **more,
    )


def _make_sd15(prediction: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(4, 4, scaling_factor=0.4, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=CLIPTextModel(_clip(16)),
        tokenizer=tokenizer(12, "<bos> $A <eos>"),
        unet=_unet(16),
        scheduler=PNDMScheduler.from_config({**SCHEDULER, "prediction_type": prediction}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _make_sdxl(prediction: str) -> StableDiffusionXLPipeline:
    more = {"interpolation_type": "linear", "timestep_spacing": "leading", "use_karras_sigmas": False}
    unet = _unet(
        16 + 20,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * SIZE_WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, 4, scaling_factor=0.4, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True),
        text_encoder=CLIPTextModel(_clip(16)),
        tokenizer=tokenizer(12, "<bos> $A <eos>"),
        text_encoder_2=CLIPTextModelWithProjection(_clip(20)),
        tokenizer_2=tokenizer(12, "<bos> $A <eos>"),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config({**SCHEDULER, **more, "prediction_type": prediction}),
        add_watermarker=False,
    )


def sd15(prediction: str = "epsilon") -> StableDiffusionPipeline:
    """`prediction` is "epsilon" or "v_prediction", as the folder's scheduler says it."""
    return build(lambda: _make_sd15(prediction))


def sdxl(prediction: str = "epsilon") -> StableDiffusionXLPipeline:
    return build(lambda: _make_sdxl(prediction))


def noise_shape(pipe: Any, size: Size) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor
    return pipe.unet.config.in_channels, size[0] // scale, size[1] // scale


def ddim(pipe: Any) -> DDIMScheduler:
    """The sampler that both are compared with, made from the settings of the folder's own."""
    return DDIMScheduler.from_config(pipe.scheduler.config)


def theirs(
    pipe: Any,
    prompts: list[str],
    negatives: list[str | None],
    steps: int,
    size: Size,
    guidance: float,
    latents: Tensor,
    output: str = "latent",
) -> Any:
    """From x to x, in the pipeline's own coordinates. Negatives are all texts or all None: for SDXL None means zero
    embeddings and "" the embeddings of an empty text; for SD 1.5 they are the same."""
    kept, pipe.scheduler = pipe.scheduler, ddim(pipe)
    try:
        return pipe(
            prompts,
            negative_prompt=None if negatives[0] is None else negatives,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=latents,
            output_type=output,
        ).images
    finally:
        pipe.scheduler = kept


def encode(pipe: Any, prompts: list[str | None]) -> dict[str, Tensor]:
    texts = [text or "" for text in prompts]
    if isinstance(pipe, StableDiffusionPipeline):
        embeds, _ = pipe.encode_prompt(texts, pipe.device, 1, do_classifier_free_guidance=False)
        return {"embeds": embeds}
    embeds, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    said = torch.tensor([text is not None for text in prompts])
    return {"embeds": embeds * said[:, None, None], "pooled": pooled * said[:, None]}


encode_negatives = encode


def _alphas(scheduler: DDIMScheduler, steps: int) -> tuple[Tensor, Tensor]:
    """Timesteps [T], falling integers, and ᾱ [T + 1] there and after the last step: ᾱ_0, not 1."""
    scheduler.set_timesteps(steps)
    after = scheduler.final_alpha_cumprod
    return scheduler.timesteps, torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], after[None]])


def grid(pipe: Any, steps: int, size: Size) -> tuple[Tensor, Tensor]:
    """σ starts below 1 (.93 at T = 50) and ends above 0 (.028)."""
    timesteps, alphas = _alphas(ddim(pipe), steps)
    a, b = alphas.sqrt(), (1 - alphas).sqrt()
    return timesteps, b / (a + b)


def scales(pipe: Any, steps: int) -> tuple[Tensor, Tensor]:
    """a + b at the first point of the grid and at its last: x = z·(a + b) in both."""
    _, alphas = _alphas(ddim(pipe), steps)
    both = alphas.sqrt() + (1 - alphas).sqrt()
    return both[0], both[-1]


def velocity(
    pipe: Any, x: Tensor, t: Tensor, positive: dict[str, Tensor], negative: dict[str, Tensor], guidance: float
) -> Tensor:
    """ε − x_0 of `x` in flow coordinates, at the integer `t`. The network takes the pipeline's x and t itself.

    Guidance is linear, so it may stand before or after the change of what is predicted.
    """
    scheduler, scale = ddim(pipe), pipe.vae_scale_factor
    alpha = scheduler.alphas_cumprod[t]
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    x = x * (a + b)
    height, width = x.shape[2] * scale, x.shape[3] * scale

    def run(conditions: dict[str, Tensor]) -> Tensor:
        added = None
        if "pooled" in conditions:  # SDXL: original size, place of the crop, target size
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(x), dtype=x.dtype)
            added = {"text_embeds": conditions["pooled"], "time_ids": time_ids}
        embeds = conditions["embeds"]
        return pipe.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    o = guided(run, positive, negative, guidance)
    if scheduler.config.prediction_type == "epsilon":
        return o - (x - b * o) / a
    return (a * o + b * x) - (a * x - b * o)


def plain(family: Any, pipe: Any, *, steps: int, latents: Tensor, **asked: Any) -> Tensor:
    """As `common.plain`, from the pipeline's x to its x."""
    first, last = scales(pipe, steps)
    return common.plain(family, pipe, steps=steps, latents=latents / first, **asked) * last
