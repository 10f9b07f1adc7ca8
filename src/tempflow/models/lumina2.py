"""Lumina-Image 2 by diffusers: serves Lumina2Pipeline folders.

Its time runs from noise at 0 to the picture at 1, and its velocity the same way; both are turned around here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempflow.core.state import upcast
from tempflow.media import Size
from tempflow.models.comfyui import Naming
from tempflow.models.diffusers_model import DiffusersModel, token_shift
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.lora_files import Aliases, Part
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid

PIPELINES = {"Lumina2Pipeline": "Lumina2"}

TOKENS = 256
"""The pipeline's own `max_sequence_length`."""

UNIT = 16
"""The pipeline takes no sides but multiples of it, whatever the autoencoder's factor."""

LORA_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
"""The attention of the layers and of both refiners; diffusers' example leaves out `to_out`."""


@dataclass(frozen=True)
class Lumina2Guidance(Guidance):
    """Classifier-free guidance, then every line of the picture, in every channel, gets the norm that the prompt's
    velocity has there: over the last axis, the width, as the pipeline takes it.

    cfg_normalization  false: plain guidance
    """

    cfg_normalization: bool = True

    def call_options(self) -> Mapping[str, object]:
        """How a call of the pipeline is asked for the same, for model cards."""
        told = {} if self.cfg_normalization else {"cfg_normalization": False}
        return {"guidance_scale": self.guidance, **told}

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        mixed = super().__call__(positive, negative)
        if not self.cfg_normalization:
            return mixed
        return mixed * (upcast(positive).norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    patch = transformer.get("patch_size", 2)
    unit = math.lcm(scale * patch, UNIT) // scale
    most = min(transformer.get("axes_lens", (300, 512, 512))[1:]) * patch // unit  # places that a token can have
    return drawable(size, transformer["in_channels"], scale, unit, most)


def _call_options(settings: Settings) -> dict[str, object]:
    length = (settings("tokenizer/tokenizer_config.json") or {}).get("model_max_length", TOKENS)
    return {"max_sequence_length": length} if length < TOKENS else {}


FAMILY = Family(
    title="Lumina-Image 2",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
    blocks=("noise_refiner", "context_refiner", "layers"),
    lora_targets=LORA_TARGETS,
    guidance=Lumina2Guidance,
    scheduler=check_flow_match_euler,
    own_grid=euler_grid,
    latent_shape=by_transformer(_latent_shape),
    call_options=_call_options,
)


class Lumina2(DiffusersModel):
    """The adapter. A system prompt stands before every prompt, and none before a negative one."""

    family = FAMILY

    def text_key(self, text: str, negative: bool, size: Size) -> str:
        return f"{negative}\0{text}"

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d] and `mask` [L]; L is 256, or what the tokenizer allows."""
        length = min(TOKENS, self.pipe.tokenizer.model_max_length)
        if negative:  # the pipeline encodes these beside some prompt alone: one that is encoded already
            nothing = torch.zeros(1, 1, 1, device=self.device)
            _, _, embeds, mask = self.pipe.encode_prompt(
                None,
                negative_prompt=[text],
                device=self.device,
                prompt_embeds=nothing,
                prompt_attention_mask=nothing[0],
                max_sequence_length=length,
            )
        else:
            embeds, mask, _, _ = self.pipe.encode_prompt(
                [text], do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
            )
        return {"embeds": embeds[0], "mask": mask[0]}

    def blank_row(self, tokens: int) -> Row:
        length = min(TOKENS, self.pipe.tokenizer.model_max_length)
        width = self.pipe.transformer.config.cap_feat_dim
        return {"embeds": torch.zeros(length, width), "mask": torch.ones(length, dtype=torch.long)}

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        mu = token_shift(scheduler.config, shape[0])  # the pipeline takes the channels for the tokens
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps) if u is None else u, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        trained = self.pipe.scheduler.config.num_train_timesteps
        return -network(
            hidden_states=x.to(self.dtype),
            timestep=1 - sigma * trained / trained,  # the last bit as the pipeline has it
            encoder_hidden_states=rows["embeds"],
            encoder_attention_mask=rows["mask"],
            return_dict=False,
        )[0]

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """The original code's names of the layers."""
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        return Naming(original_names(layers))


# ---------------------------------------------------------------------------------------------------------------- names
OUTSIDE = {
    "x_embedder": "x_embedder",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
IN_BLOCKS = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
BLOCK = re.compile(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)")


def original_names(layers: Sequence[str]) -> dict[str, tuple[Part, ...]]:
    """The name of each layer in the original code → diffusers' layers that hold its rows."""
    names: dict[str, tuple[Part, ...]] = {}
    for layer in layers:
        found = BLOCK.fullmatch(layer)
        if found is None and layer in OUTSIDE:
            names[OUTSIDE[layer]] = (Part(layer),)
        elif found and found[2] in IN_BLOCKS:
            names[f"{found[1]}.{IN_BLOCKS[found[2]]}"] = (Part(layer),)
        elif found and found[2] == "attn.to_q":
            names[f"{found[1]}.attention.qkv"] = tuple(Part(f"{found[1]}.attn.to_{x}") for x in "qkv")
    return names
