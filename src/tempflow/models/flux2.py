"""FLUX.2 [dev] and [klein] by diffusers, from text alone: serves Flux2Pipeline and Flux2KleinPipeline folders.

They run in latents of patches: 2 × 2 of the autoencoder's side by side as channels, whitened by the running statistics
of its batch norm. Dev takes its guidance in as a number; klein's is classifier-free, against the empty text always.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempflow.media import Size
from tempflow.models.comfyui import Naming
from tempflow.models.diffusers_model import DiffusersModel, mode
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance, guided
from tempflow.models.lora_files import Aliases, Part
from tempflow.models.pipeline_folder import INDEX, check_flow_match_euler, euler_grid
from tempflow.models.protocol import Conditioning, Predict
from tempflow.request import Prompt

PIPELINES = {"Flux2Pipeline": "Flux2", "Flux2KleinPipeline": "Flux2Klein"}

PATCH = 2

TEXT_TOKENS = 512
"""The pipelines' own `max_sequence_length`; padding is attended to, so it is part of the condition."""

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.linear_in",
    "ff.linear_out",
    "ff_context.linear_in",
    "ff_context.linear_out",
    "attn.to_qkv_mlp_proj",  # of single blocks, with the next: attention and feed-forward in one
    "attn.to_out",
)
"""All of the blocks' layers. Flow-Factory leaves `attn.to_out` out, so its single blocks' outputs stay as they are."""


@dataclass(frozen=True)
class EmbeddedGuidance(Guidance):
    """A number that the network takes in, also at 1; there is no other branch."""

    @property
    def rows(self) -> int:
        return 1


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    return drawable(size, transformer["in_channels"], PATCH * scale)


def _distilled(settings: Settings) -> str:
    return f"is_distilled is true in {INDEX}" if (settings(INDEX) or {}).get("is_distilled") else ""


NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")

DEV = Family(
    title="FLUX.2 [dev]",
    needed=NEEDED,
    blocks=BLOCKS,
    lora_targets=LORA_TARGETS,
    guidance=EmbeddedGuidance,
    scheduler=check_flow_match_euler,
    own_grid=partial(euler_grid, more=("use_flow_sigmas",)),
    latent_shape=by_transformer(_latent_shape),
)

KLEIN = Family(
    title="FLUX.2 [klein]",
    needed=NEEDED,
    blocks=BLOCKS,
    lora_targets=LORA_TARGETS,
    scheduler=check_flow_match_euler,
    own_grid=partial(euler_grid, more=("use_flow_sigmas",)),
    latent_shape=by_transformer(_latent_shape),
    distilled=_distilled,
)


class Flux2(DiffusersModel):
    """The adapter of dev. Latents are [128, H/16, W/16], whitened; each place is a token."""

    family = DEV

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, 3·d]; L is 512, or what the tokenizer allows."""
        embeds, _ = self.pipe.encode_prompt([text], device=self.device, max_sequence_length=self._tokens)
        return {"embeds": embeds[0]}

    @property
    def _tokens(self) -> int:
        tokenizer = getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)  # dev's is in a processor
        return min(TEXT_TOKENS, tokenizer.model_max_length)

    def blank_row(self, tokens: int) -> Row:
        width = self.pipe.transformer.config.joint_attention_dim
        return {"embeds": torch.zeros(self._tokens, width)}

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(image_seq_len=shape[1] * shape[2], num_steps=steps)
        own = scheduler.config.get("use_flow_sigmas")  # then it isn't given points
        even = u if u is not None else None if own else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(None if even is not None else steps, sigmas=even, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        count, height, width = len(x), *x.shape[-2:]
        embedded = self.pipe.transformer.config.guidance_embeds
        said = network(
            hidden_states=x.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=sigma * 1000 / 1000,  # the last bit as the pipeline has it
            guidance=sigma.new_full([count], guidance.guidance) if embedded else None,
            encoder_hidden_states=rows["embeds"],
            txt_ids=_places(1, 1, rows["embeds"].shape[1], x.device).expand(count, -1, -1),
            img_ids=_places(height, width, 1, x.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return said.transpose(1, 2).reshape(x.shape)

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """Black Forest Labs' own names of the layers."""
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        return Naming(original_names(layers))

    def decode_latents(self, x: Tensor) -> Tensor:
        mean, std = self._statistics()
        vae = self.pipe.vae
        return vae.decode(nn.functional.pixel_shuffle(x * std + mean, PATCH).to(vae.dtype), return_dict=False)[0]

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        mean, std = self._statistics()
        vae = self.pipe.vae
        latents = mode(vae.encode(pictures.to(vae.dtype))).float()
        return (nn.functional.pixel_unshuffle(latents, PATCH) - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the patches' channels, [128, 1, 1], float32."""
        vae = self.pipe.vae
        mean, variance = (t.float().view(-1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()


class Flux2Klein(Flux2):
    """The adapter of klein. A distilled checkpoint takes no guidance."""

    family = KLEIN

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        """See `Model.encode`. Raises ValueError for a negative text."""
        for prompt in prompts:
            if prompt.negative:
                raise ValueError(
                    f"prompt {prompt.text[:60]!r}: negative_prompt {prompt.negative[:60]!r}, and {self.name!r} "
                    "(FLUX.2 klein) is guided away from the empty text alone; nearest valid: ''"
                )
        return super().encode(prompts, size)

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        """See `Model.predictor`. Raises ValueError for guidance of a distilled checkpoint."""
        asked, distilled = guided(guidance, self.guidance), _distilled(self.settings)
        if distilled and asked.rows > 1:
            raise ValueError(f"guidance: {asked.guidance} of {self.name!r}, and {distilled}; nearest valid: 1.0")
        return super().predictor(condition, asked, network)


# ---------------------------------------------------------------------------------------------------------------- names
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}
IN_BLOCKS = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": ("attn.to_qkv_mlp_proj",),
        "linear2": ("attn.to_out",),
    },
}


def original_names(layers: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """Black Forest Labs' name of each layer → diffusers' layers that hold its rows.

    Without the last layer's modulation: whether its halves have the same order in files is not known for sure.
    """
    there = set(layers)
    names: dict[str, tuple[Part, ...]] = {name: (Part(layer),) for name, layer in OUTSIDE.items() if layer in there}
    for (theirs, ours), inside in IN_BLOCKS.items():
        blocks = {found[1] for name in there if (found := re.match(rf"{ours}\.(\d+)\.", name))}
        for block in blocks:
            for name, held in inside.items():
                names[f"{theirs}.{block}.{name}"] = tuple(Part(f"{ours}.{block}.{layer}") for layer in held)
    return names


def _places(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """[rows · columns · tokens, 4], (0, row, column, token) of each, for the rotary embedding."""
    sides = [torch.arange(side, device=device) for side in (1, rows, columns, tokens)]
    return torch.cartesian_prod(*sides)
