"""Qwen-Image by diffusers: serves QwenImagePipeline folders.

Its guidance gives each token of the guided velocity the length that the prompt's own velocity has there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempflow.core.state import upcast
from tempflow.media import Size
from tempflow.models.comfyui import Naming, own_names
from tempflow.models.diffusers_model import DiffusersModel, mode, pack, token_shift, unpack
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid

PIPELINES = {"QwenImagePipeline": "QwenImage"}

PATCH = 2
"""A token is a patch of 2 × 2 latents."""

TOKENS = 512
"""The call's own `max_sequence_length`; the default of `encode_prompt` alone is another."""

NO_NEGATIVE = " "
"""What stands for an empty negative prompt, by the model card: without any the pipeline would draw unguided."""

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)
"""Both streams' attention and feed-forward layers: what verl's Flow-GRPO trains on this model (read in source)."""


@dataclass(frozen=True)
class QwenGuidance(Guidance):
    """Classifier-free guidance, then each token (a patch of 2 × 2 latents, all channels) gets the norm that the
    prompt's velocity has there. At 1 the negative branch is not asked; the pipeline has no guidance below 1."""

    def call_options(self) -> Mapping[str, object]:
        return {"true_cfg_scale": self.guidance, **({} if self.rows == 1 else {"negative_prompt": NO_NEGATIVE})}

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        mixed = super().__call__(positive, negative)
        own, theirs = pack(upcast(positive)), pack(mixed)
        scaled = theirs * (own.norm(dim=-1, keepdim=True) / theirs.norm(dim=-1, keepdim=True))
        return unpack(scaled, *positive.shape[-2:])


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    return drawable(size, transformer["in_channels"] // PATCH**2, scale, PATCH)


FAMILY = Family(
    title="Qwen-Image",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
    lora_targets=LORA_TARGETS,
    guidance=QwenGuidance,
    scheduler=check_flow_match_euler,
    own_grid=euler_grid,
    latent_shape=by_transformer(_latent_shape, "temperal_downsample", 0),
)


class QwenImage(DiffusersModel):
    """The adapter. Latents are unpacked, [16, H/8, W/8]; the network's tokens are their patches.

    Raises ValueError for a checkpoint that takes its guidance in: the pipeline cannot draw with one either.
    """

    family = FAMILY

    def __init__(self, pipe: Any, name: str, licence: str) -> None:
        super().__init__(pipe, name, licence)
        if pipe.transformer.config.guidance_embeds:
            raise ValueError(
                f"model.path: {name!r} has guidance_embeds true in transformer/config.json, which is not served; "
                "nearest valid: a checkpoint with false"
            )

    def text_key(self, text: str, negative: bool, size: Size) -> str:
        return (text or NO_NEGATIVE) if negative else text

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d], and `mask` [L], true; L is the prompt's own length and that of the chat around it."""
        asked = self.text_key(text, negative, size)
        embeds, _ = self.pipe.encode_prompt([asked], device=self.device, max_sequence_length=TOKENS)
        return {"embeds": embeds[0], "mask": torch.ones(embeds.shape[1], dtype=torch.bool)}

    def blank_row(self, tokens: int) -> Row:
        length = min(tokens, TOKENS)
        width = self.pipe.transformer.config.joint_attention_dim
        return {"embeds": torch.zeros(length, width), "mask": torch.ones(length, dtype=torch.bool)}

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        mu = token_shift(scheduler.config, shape[1] * shape[2] // PATCH**2)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps) if u is None else u, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        said = network(
            hidden_states=pack(x.to(self.dtype)),
            timestep=sigma * 1000 / 1000,  # the last bit as the pipeline has it
            encoder_hidden_states=rows["embeds"],
            # also where nothing is padded: another attention kernel would give other last bits
            encoder_hidden_states_mask=rows["mask"],
            img_shapes=[[(1, x.shape[-2] // PATCH, x.shape[-1] // PATCH)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(said, *x.shape[-2:])

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        return Naming(own_names(layers))

    # The autoencoder is one of videos; a picture is its first frame.
    def decode_latents(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        vae = self.pipe.vae
        return vae.decode((x * std + mean).to(vae.dtype)[:, :, None], return_dict=False)[0][:, :, 0]

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        vae = self.pipe.vae
        x = mode(vae.encode(pictures.to(vae.dtype)[:, :, None]))[:, :, 0].float()
        mean, std = self._statistics(x)
        return (x - mean) / std

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, [1, C, 1, 1]."""
        config = self.pipe.vae.config
        mean, std = (x.new_tensor(told).view(1, -1, 1, 1) for told in (config.latents_mean, config.latents_std))
        return mean, std
