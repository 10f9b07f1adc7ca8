"""The early blocks of a Stable Diffusion 3 transformer, for latent rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

TRUNKS = {"SD3Transformer2DModel": "SD3Trunk"}
"""The network's class, and the class here: `models.TRUNKS` reads it."""


class SD3Trunk(nn.Module):
    """The transformer up to its last kept block. See `models.protocol.Trunk`."""

    fields: ClassVar[tuple[str, ...]] = ("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
    layers: ClassVar[str] = "num_layers"

    def __init__(self, config: Mapping[str, Any], kept: int) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        # the last block of a network lacks parts that the kept ones have, so one more is built where there is one
        layers = min(kept + 1, config["num_layers"])
        network: Any = SD3Transformer2DModel.from_config({**config, "num_layers": layers})
        self.config = dict(config)
        self.inner: int = network.inner_dim
        self.pos_embed = network.pos_embed
        self.time_text_embed = network.time_text_embed
        self.context_embedder = network.context_embedder
        self.transformer_blocks = network.transformer_blocks[:kept]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Picture tokens [B, h·w, d] and their grid, in the dtype of its weights.

        Args:
            hidden_states: x_σ, [B, C, h, w], whole patches.
            timestep: σ · num_train_timesteps, [B].
            encoder_hidden_states, pooled_projections: a prompt's tensors, [B, L, d] and [B, p].
            return_dict: only False.

        Raises ValueError where a shape is not that of the transformer it was made from.
        """
        if return_dict:
            raise ValueError("return_dict: True, but tokens come as a tuple; nearest valid: False")
        self.check(hidden_states, encoder_hidden_states, pooled_projections)
        dtype, patch = self.context_embedder.weight.dtype, self.config["patch_size"]
        tokens = self.pos_embed(hidden_states.to(dtype)).contiguous()
        moment = self.time_text_embed(timestep, pooled_projections.to(dtype))
        text = self.context_embedder(encoder_hidden_states.to(dtype))
        for block in self.transformer_blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=moment)
        return tokens, (hidden_states.shape[2] // patch, hidden_states.shape[3] // patch)

    def check(self, x: Tensor, embeds: Tensor, pooled: Tensor) -> None:
        """Raises ValueError for tensors of another model's shapes."""
        for name, value, field in (
            ("x: channels", x.shape[1], "in_channels"),
            ("embeds: width", embeds.shape[-1], "joint_attention_dim"),
            ("pooled: width", pooled.shape[-1], "pooled_projection_dim"),
        ):
            if value != self.config[field]:
                mine = self.config[field]
                raise ValueError(f"{name} {value} is another model's; nearest valid: {mine}, as it was made")
        patch = self.config["patch_size"]
        if x.dim() != 4 or x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"x: shape {list(x.shape)} must be [B, C, h, w]; nearest valid: h, w multiples of {patch}")
