"""Z-Image by diffusers: serves ZImagePipeline folders.

Its network takes lists of texts without padding, a time that runs from 0 (noise) to 1, and gives the velocity's
negative.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.media import Size
from tempflow.models.comfyui import Naming, own_names
from tempflow.models.diffusers_model import DiffusersModel, token_shift
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.lora_files import Aliases, Part
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid

PIPELINES = {"ZImagePipeline": "ZImage"}

PATCH = 2
"""A token is a patch of 2 × 2 latents."""

TOKENS = 512
"""The pipeline's own `max_sequence_length`, the chat around a prompt included."""

TURBO_SHIFT = 3.0
"""The σ grid's shift in Z-Image-Turbo's folder; Z-Image's own is 6. Nothing else in their files tells them apart."""

LORA_TARGETS = (
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
"""Attention and feed-forward layers, of the two refiners too: Flow-Factory's (read in source)."""


@dataclass(frozen=True)
class ZImageGuidance(Guidance):
    """Classifier-free guidance as everywhere here; the pipeline's own scale is this number − 1."""

    def call_options(self) -> Mapping[str, object]:
        return {"guidance_scale": self.guidance - 1}


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    return drawable(size, transformer["in_channels"], scale, PATCH)


def _distilled(settings: Settings) -> str:
    shift = (settings("scheduler/scheduler_config.json") or {}).get("shift")
    return f"shift is {shift:g} in scheduler/scheduler_config.json, as in Z-Image-Turbo" if shift == TURBO_SHIFT else ""


FAMILY = Family(
    title="Z-Image",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
    blocks=("noise_refiner", "context_refiner", "layers"),
    lora_targets=LORA_TARGETS,
    guidance=ZImageGuidance,
    scheduler=check_flow_match_euler,
    own_grid=euler_grid,
    latent_shape=by_transformer(_latent_shape),
    distilled=_distilled,
)


class ZImage(DiffusersModel):
    """The adapter. A text's tensors are padded, and cut to its length for the network."""

    family = FAMILY

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d] and `mask` [L], true; L is the prompt's own length and that of the chat around it."""
        length = min(TOKENS, self.pipe.tokenizer.model_max_length)
        (embeds,), _ = self.pipe.encode_prompt(
            [text], device=self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"embeds": embeds, "mask": torch.ones(len(embeds), dtype=torch.bool)}

    def blank_row(self, tokens: int) -> Row:
        length = min(tokens, TOKENS, self.pipe.tokenizer.model_max_length)
        width = self.pipe.transformer.config.cap_feat_dim
        return {"embeds": torch.zeros(length, width), "mask": torch.ones(length, dtype=torch.bool)}

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        mu = token_shift(scheduler.config, shape[1] * shape[2] // PATCH**2)  # which a constant shift ignores
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist() if u is None else u, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        lengths = rows["mask"].sum(1).tolist()
        said = network(
            x=list(x.to(self.dtype)[:, :, None].unbind()),  # a picture is a clip of one frame there
            t=(1000 - sigma * 1000) / 1000,  # the last bit as the pipeline has it
            cap_feats=[text[:length] for text, length in zip(rows["embeds"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(said)[:, :, 0]

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        """Our names, q, k and v apart, which ComfyUI knows too; of the first and the last layer the original ones."""
        return Naming({ONE_SIZE.sub(r"\1\2", name): parts for name, parts in own_names(layers).items()})


ONE_SIZE = re.compile(r"all_(final_layer|x_embedder)\.2-1(.*)")
"""diffusers keeps a first and a last layer for each size of a patch; the original code has the one of 2 × 2 × 1."""


def original_names(layers: Sequence[str]) -> dict[str, tuple[Part, ...]]:
    """The name of a layer in the original code, where it is another → diffusers' layers that hold its rows."""
    names: dict[str, tuple[Part, ...]] = {}
    for layer in layers:
        attention, _, kind = layer.rpartition(".attention.")
        if kind == "to_q":
            names[f"{attention}.attention.qkv"] = tuple(Part(f"{attention}.attention.to_{x}") for x in "qkv")
        elif kind == "to_out.0":
            names[f"{attention}.attention.out"] = (Part(layer),)
        elif found := ONE_SIZE.fullmatch(layer):
            names[found[1] + found[2]] = (Part(layer),)
    return names
