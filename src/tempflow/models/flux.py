"""FLUX.1 [dev] by diffusers: serves FluxPipeline folders.

Its guidance is a number that the network takes in, distilled from classifier-free guidance; true guidance with a
negative prompt is an option beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempflow.core.state import upcast
from tempflow.media import Size
from tempflow.models.comfyui import Naming
from tempflow.models.diffusers_model import DiffusersModel, pack, token_shift, unpack
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.flux_names import original_names
from tempflow.models.guidance import Guidance
from tempflow.models.lora_files import Aliases
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid

PIPELINES = {"FluxPipeline": "Flux"}

PATCH = 2
"""A token is a patch of 2 × 2 latents."""

T5_TOKENS = 512
"""The pipeline's own `max_sequence_length`; padding is attended to, so it is part of the condition."""

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""Both streams' attention and feed-forward layers, in single blocks the attention: diffusers' example and Flow-Factory
(read in source)."""


@dataclass(frozen=True)
class FluxGuidance(Guidance):
    """`guidance` is the number that the network takes in, also at 1; checkpoints without it (schnell) ignore it.

    true_cfg  classifier-free guidance against the negative prompt; 1: the negative branch is not asked
    """

    true_cfg: float = 1.0

    @property
    def rows(self) -> int:
        return 1 if self.true_cfg == 1 else 2

    def call_options(self) -> Mapping[str, object]:
        beside = {} if self.rows == 1 else {"true_cfg_scale": self.true_cfg, "negative_prompt": ""}
        return {**super().call_options(), **beside}

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        base, guided = upcast(negative), upcast(positive)
        return base + self.true_cfg * (guided - base)


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    return drawable(size, transformer["in_channels"] // PATCH**2, scale, PATCH)


def _distilled(settings: Settings) -> str:
    told = settings("transformer/config.json") or {}
    return "" if told.get("guidance_embeds", True) else "guidance_embeds is false in transformer/config.json"


FAMILY = Family(
    title="FLUX.1 [dev]",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    optional=("image_encoder", "feature_extractor"),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    lora_targets=LORA_TARGETS,
    guidance=FluxGuidance,
    scheduler=check_flow_match_euler,
    own_grid=partial(euler_grid, more=("use_flow_sigmas",)),
    latent_shape=by_transformer(_latent_shape),
    distilled=_distilled,
)


class Flux(DiffusersModel):
    """The adapter. Latents are unpacked, [16, H/8, W/8]; the network's tokens are their patches."""

    family = FAMILY

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d] and `pooled` [p]; L is 512, or what T5's tokenizer allows."""
        length = min(T5_TOKENS, self.pipe.tokenizer_2.model_max_length)
        embeds, pooled, _ = self.pipe.encode_prompt([text], None, device=self.device, max_sequence_length=length)
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def blank_row(self, tokens: int) -> Row:
        config = self.pipe.transformer.config
        length = min(T5_TOKENS, self.pipe.tokenizer_2.model_max_length)
        return {
            "embeds": torch.zeros(length, config.joint_attention_dim),
            "pooled": torch.zeros(config.pooled_projection_dim),
        }

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        mu = token_shift(scheduler.config, shape[1] * shape[2] // PATCH**2)
        own = scheduler.config.get("use_flow_sigmas")  # then it isn't given points
        even = u if u is not None else None if own else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(None if even is not None else steps, sigmas=even, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        said = network(
            hidden_states=pack(x.to(self.dtype)),
            timestep=sigma * 1000 / 1000,  # the last bit as the pipeline has it
            guidance=sigma.new_full([len(x)], guidance.guidance)
            if self.pipe.transformer.config.guidance_embeds
            else None,
            pooled_projections=rows["pooled"],
            encoder_hidden_states=rows["embeds"],
            txt_ids=torch.zeros(rows["embeds"].shape[1], 3, device=x.device),
            img_ids=_places(height, width, x.device),
            return_dict=False,
        )[0]
        return unpack(said, *x.shape[-2:])

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """Black Forest Labs' own names of the layers."""
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        return Naming(original_names(layers), kohya=True)


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """[h·w, 3], (0, row, column) of each token, for the rotary embedding."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows.new_zeros(1), rows, columns).float()
