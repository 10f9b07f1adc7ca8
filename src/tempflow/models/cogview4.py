"""CogView4 by diffusers: serves CogView4Pipeline folders.

The network takes the time before the scheduler's shift, which goes by the size, and texts without a mask: their padding
is read, so that only texts of one length share a forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempflow.core.state import double
from tempflow.media import Size
from tempflow.models.diffusers_model import DiffusersModel
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, by_transformer, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.pipeline_folder import check_flow_match_euler, euler_grid

PIPELINES = {"CogView4Pipeline": "CogView4"}

TOKENS = 1024
"""The pipeline's own `max_sequence_length`."""

UNIT = 16
"""The pipeline takes no sides but multiples of it, whatever the autoencoder's factor."""

ROUNDING = 2.0**-22
"""By how much σ of the pipeline's grid, in float32, may be off."""

NOT_INVERTED = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings after which σ does not tell the time before the shift."""

LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
"""The attention that text and picture share: diffusers' example."""


def check_cogview4(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming class and setting, for a scheduler whose steps are not Euler's, or whose σ is more than
    a shift of the time."""
    check_flow_match_euler(path, kind, config)
    for setting in NOT_INVERTED:
        if config.get(setting):
            raise ValueError(
                f"model.path: {path!r} has a {kind} with {setting} {config[setting]!r}: the network takes the time "
                f"before the shift, which such σ do not tell; nearest valid: {setting} "
                f"{'null' if setting == 'shift_terminal' else 'false'} in scheduler/scheduler_config.json"
            )


def _latent_shape(transformer: Mapping[str, Any], scale: int, size: Size) -> tuple[int, ...]:
    patch = math.lcm(scale * transformer.get("patch_size", 2), UNIT) // scale
    return drawable(size, transformer["in_channels"], scale, patch)


def _call_options(settings: Settings) -> dict[str, object]:
    length = (settings("tokenizer/tokenizer_config.json") or {}).get("model_max_length", TOKENS)
    return {"max_sequence_length": length} if length < TOKENS else {}


def _whole(u: Sequence[float], trained: int) -> list[int]:
    """The times of points: whole ones, as the pipeline takes no others."""
    return [max(1, round(value * trained)) for value in u]


def _grid_call(u: Sequence[float], settings: Settings) -> dict[str, object]:
    """Both the times and what becomes σ: without the former the network is given those of another grid."""
    trained = (settings("scheduler/scheduler_config.json") or {}).get("num_train_timesteps", 1000)
    times = _whole(u, trained)
    return {"num_inference_steps": len(u), "timesteps": times, "sigmas": [time / trained for time in times]}


FAMILY = Family(
    title="CogView4",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer"),
    lora_targets=LORA_TARGETS,
    scheduler=check_cogview4,
    own_grid=euler_grid,
    grid_call=_grid_call,
    latent_shape=by_transformer(_latent_shape),
    call_options=_call_options,
)


class CogView4(DiffusersModel):
    """The adapter. A prompt is encoded by itself, so its padding is that of a pipeline's call with it alone."""

    family = FAMILY

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [L, d], padding in front included, and `length`, L: a multiple of 16."""
        embeds, _ = self.pipe.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=min(TOKENS, self.pipe.tokenizer.model_max_length),
        )
        return {"embeds": embeds[0], "length": torch.tensor(embeds.shape[1])}

    def blank_row(self, tokens: int) -> Row:
        length = -(-min(tokens, TOKENS, self.pipe.tokenizer.model_max_length) // 16) * 16
        width = self.pipe.transformer.config.text_embed_dim
        return {"embeds": torch.zeros(length, width), "length": torch.tensor(length)}

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        trained = scheduler.config.num_train_timesteps
        times = np.linspace(trained, 1.0, steps) if u is None else np.array(_whole(u, trained))
        whole = times.astype(np.int64).astype(np.float32)
        scheduler.set_timesteps(timesteps=whole, sigmas=whole / trained, mu=self._mu(*shape[1:]))

    def _mu(self, height: int, width: int) -> float:
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        config = self.pipe.scheduler.config
        return calculate_shift(
            height * width // self.pipe.transformer.config.patch_size**2,
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )

    def times(self, sigma: Tensor, height: int, width: int) -> Tensor:
        """What the network is given for σ [B] of latents of that height and width: the thousandfold of u, float32,
        where the scheduler shifts u to σ = μ/(μ + 1/u − 1).

        The times of the pipeline's grid are whole; what σ cannot tell from a whole one is that one.
        """
        config = self.pipe.scheduler.config
        trained, strength = config.num_train_timesteps, config.shift
        if config.use_dynamic_shifting:
            mu = self._mu(height, width)
            strength = mu if config.time_shift_type == "linear" else math.exp(mu)
        level = double(sigma)
        t = level / (level + strength * (1 - level)) * trained
        whole, off = t.round(), trained * max(strength, 1 / strength) * ROUNDING  # the shift's slope is at most that
        return torch.where((t - whole).abs() < off, whole, t).float().to(sigma.device)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        """One forward for each length of text among the rows."""
        height, width = x.shape[-2:]
        times, x, lengths = self.times(sigma, height, width), x.to(self.dtype), rows["length"]
        size = x.new_tensor([[height, width]]) * self.pipe.vae_scale_factor
        kinds = lengths.unique().tolist()
        places = [(lengths == length).nonzero().flatten() for length in kinds]
        said = [
            network(
                hidden_states=x[at],
                encoder_hidden_states=rows["embeds"][at, :length],
                timestep=times[at],
                original_size=size.expand(len(at), -1),
                target_size=size.expand(len(at), -1),
                crop_coords=torch.zeros_like(size).expand(len(at), -1),
                return_dict=False,
            )[0]
            for length, at in zip(kinds, places, strict=True)
        ]
        return torch.cat(said)[torch.cat(places).argsort()]

    def _scale_and_shift(self) -> tuple[float, float]:
        """The pipeline knows no shift of the autoencoder's."""
        return super()._scale_and_shift()[0], 0.0
