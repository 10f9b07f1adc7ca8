"""Stable Diffusion 3 / 3.5 by diffusers: serves any StableDiffusion3Pipeline folder, the embedded `shapes` included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.media import Size
from tempflow.models.comfyui import Naming
from tempflow.models.diffusers_model import DiffusersModel
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.lora_files import Aliases
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid
from tempflow.models.protocol import Encoded, TextInputs
from tempflow.models.sd3_names import original_names
from tempflow.models.sd3_text_inputs import encode_inputs, text_inputs
from tempflow.request import Prompt

PIPELINES = {"StableDiffusion3Pipeline": "SD3"}
"""The pipeline classes that this file serves, and by which class: `models.ADAPTERS` reads it."""

LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Attention projections of both streams: what Flow-GRPO and TempFlow-GRPO train (rank 32, alpha 64)."""

T5_TOKENS = 256
"""The pipeline's own `max_sequence_length`; a T5 whose tokenizer allows less (`shapes`: 10) gets what it allows."""


def _call_options(settings: Settings) -> dict[str, object]:
    """T5's length, where its tokenizer allows less than the pipeline's own default."""
    length = (settings("tokenizer_3/tokenizer_config.json") or {}).get("model_max_length", T5_TOKENS)
    return {"max_sequence_length": length} if length < T5_TOKENS else {}


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    patch, most = transformer.get("patch_size", 2), transformer.get("pos_embed_max_size", 96)  # diffusers' defaults
    return drawable(size, transformer["in_channels"], scale, patch, most)


FAMILY = Family(
    title="Stable Diffusion 3 / 3.5 (and the embedded `shapes`)",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    # without its T5 it is drawn with zeros in T5's place
    optional=("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"),
    together=(("text_encoder_3", "tokenizer_3"),),
    may_be_null="text_encoder_3 and tokenizer_3 (T5)",
    lora_targets=LORA_TARGETS,
    scheduler=check_flow_match_euler,
    own_grid=euler_grid,
    latent_shape=by_transformer(_latent_shape),
    call_options=_call_options,
)


class SD3(DiffusersModel):
    """The adapter. A pipeline without T5 has zeros in its place, as many as its `max_sequence_length`."""

    family = FAMILY

    @property
    def _max_tokens(self) -> int:
        tokenizer = self.pipe.tokenizer_3
        return T5_TOKENS if tokenizer is None else min(T5_TOKENS, tokenizer.model_max_length)

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d] and `pooled` [p]."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            [text],
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_tokens,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def blank_row(self, tokens: int) -> Row:
        config = self.pipe.transformer.config
        length = self.pipe.tokenizer.model_max_length + self._max_tokens
        return {
            "embeds": torch.zeros(length, config.joint_attention_dim),
            "pooled": torch.zeros(config.pooled_projection_dim),
        }

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        """See `EncodesInputs.text_inputs`: of both CLIPs and, where the pipeline has it, T5."""
        return text_inputs(self.pipe, prompt.text, self._max_tokens)

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        """See `EncodesInputs.encode_inputs`; the tensors are on the model's device, in the transformer's dtype."""
        encoded = encode_inputs(self.pipe, prompt.text, tokens, self._max_tokens)
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in encoded.tensors.items()}
        return Encoded(tensors, encoded.vectors)

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config, patch = scheduler.config, self.pipe.transformer.config.patch_size
        count = steps if u is None else None
        if not config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(count, sigmas=u)
            return
        mu = calculate_shift(
            (shape[1] // patch) * (shape[2] // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        scheduler.set_timesteps(count, sigmas=u, mu=mu)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        return network(
            hidden_states=x.to(self.dtype),
            timestep=sigma * self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=rows["embeds"],
            pooled_projections=rows["pooled"],
            return_dict=False,
        )[0]

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """Stability's own names of the layers."""
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        return Naming(original_names(layers))
