"""Sana by diffusers: serves SanaPipeline folders (Sana 1.0 and 1.5).

Folders name DPM-Solver++; here they are walked by Euler's rule on the same shift, from σ = 1, at times that are not
rounded to whole ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.media import Size
from tempflow.models.diffusers_model import DiffusersModel
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.pipeline_folder import EULER, check_flow_match_euler, euler_grid

PIPELINES = {"SanaPipeline": "Sana"}

SHIPPED = "DPMSolverMultistepScheduler"

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""What makes DPM-Solver++ one of flow models."""

OWN_GRID = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting")
"""Settings by which its grid is another than that of `flow_shift`."""

TOKENS = 300
"""The pipeline's own `max_sequence_length`: token 0 and the last 299 are kept."""

UNIT = 32
"""The pipeline takes no sides but multiples of it, whatever the autoencoder's factor."""

LORA_TARGETS = tuple(
    f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
)
"""Self-attention and cross-attention: what Sol-RL trains (read in source); diffusers' example leaves out `to_out`."""


def check_sana(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming class and setting, for a scheduler that is neither Euler's nor DPM-Solver++ of flow
    matching with a constant shift."""
    if kind != SHIPPED:
        check_flow_match_euler(path, kind, config)
        return
    for setting, wanted in (*FLOW.items(), *((name, False) for name in OWN_GRID)):
        told = config.get(setting, False)
        if told != wanted:
            raise ValueError(
                f"model.path: {path!r} has a {kind} with {setting} {str(told)[:40]!r}, whose σ are not those walked "
                f"here; nearest valid: {setting} {str(wanted).lower()} in scheduler/scheduler_config.json"
            )


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    patch = math.lcm(scale * transformer.get("patch_size", 1), UNIT) // scale
    return drawable(size, transformer["in_channels"], scale, patch)


def _call_options(settings: Settings) -> dict[str, object]:
    """Without it the pipeline draws at the nearest size of a list, and scales the picture."""
    return {"use_resolution_binning": False}


FAMILY = Family(
    title="Sana",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
    lora_targets=LORA_TARGETS,
    scheduler=check_sana,
    own_grid=euler_grid,
    latent_shape=by_transformer(_latent_shape, "encoder_block_out_channels"),
    sampler=f'{EULER}.from_config({{"shift": pipe.scheduler.config.get("flow_shift"), **pipe.scheduler.config}})',
    call_options=_call_options,
)


class Sana(DiffusersModel):
    """The adapter. An instruction stands before every prompt, and none before a negative one."""

    family = FAMILY

    def text_key(self, text: str, negative: bool, size: Size) -> str:
        return f"{negative}\0{text}"

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [300, d] and `mask` [300]."""
        asked = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"]
        embeds, mask, _, _ = self.pipe.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=None if negative else asked.default,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def blank_row(self, tokens: int) -> Row:
        width = self.pipe.transformer.config.caption_channels
        return {"embeds": torch.zeros(TOKENS, width), "mask": torch.ones(TOKENS, dtype=torch.long)}

    def walked(self) -> Any:
        """Euler's, with the shift of the folder's."""
        from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

        kept = self.pipe.scheduler
        if type(kept).__name__ == EULER:
            return super().walked()
        trained, shift = kept.config.num_train_timesteps, kept.config.flow_shift
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=trained, shift=shift)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        said = network(
            x.to(self.dtype),
            encoder_hidden_states=rows["embeds"],
            encoder_attention_mask=rows["mask"],
            timestep=sigma
            * self.pipe.scheduler.config.num_train_timesteps
            * self.pipe.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return said[:, : x.shape[1]]  # what is behind these channels is a learned variance
