"""The networks of a URSA pipeline (arXiv 2510.24717), by the names of its released files: no library that can be
installed has them.

The trunk is transformers' own Qwen3 with another rotary embedding. Encoder and decoder are diffusers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from tempflow.models.pipeline_folder import WEIGHTS, check_names, settings_in, weight_files

Lookup = Literal["product", "nearest"]
"""How a vector becomes a token: the code of the largest inner product (as released), or the nearest code."""

AT_ONCE = 1 << 24
"""Products of vectors and codes that are held at a time."""


class ThreeAxisRotary(nn.Module):
    """Rotary angles of places (t, y, x): cos and sin, [1, L, head_dim] each, of places [1, L, 3].

    Of head_dim/2 frequencies base^(−2i/head_dim) the first 3·⌊head_dim/8⌋ belong to t, y, x in turn, the others to y, x
    in turn. The halves of a head are turned against each other, as in Qwen3.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        half, turns = self.head_dim // 2, self.head_dim // 8
        axis = torch.tensor([0, 1, 2] * turns + [1, 2] * ((half - 3 * turns) // 2), device=x.device)
        power = torch.arange(0, self.head_dim, 2, device=x.device).float() / self.head_dim
        angle = places.float()[..., axis] / self.base**power
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class URSATransformer3DModel(ModelMixin, ConfigMixin):
    """Logits of a picture's clean tokens, from its noised ones and a prompt's ids, without a time.

    The sequence is the prompt, a begin-of-vision token, and the picture row by row, its tokens numbered after the
    text's. All of it attends to all of it, padding too. A token's logits are taken one place earlier.

    lm_vocab_size  how many tokens the text has; lm_head_size: the picture's codebook; vocab_size: both

    Raises ValueError for a layout that is not this one.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["Qwen3DecoderLayer"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        num_hidden_layers: int = 28,
        head_dim: int = 128,
        rope_theta: float = 1000000,
        rms_norm_eps: float = 1e-6,
        vocab_size: int = 215669,
        lm_vocab_size: int = 151669,
        lm_head_size: int = 64000,
        bov_token_id: int = 151652,
    ) -> None:
        super().__init__()
        if head_dim % 16:
            near = max(16, head_dim // 16 * 16)
            raise ValueError(f"head_dim: {head_dim} must be a multiple of 16; nearest valid: {near}")
        if vocab_size < lm_vocab_size + lm_head_size:
            raise ValueError(f"vocab_size: {vocab_size} must hold {lm_vocab_size} of the text and {lm_head_size} codes")
        config: Any = Qwen3Config
        self.model = Qwen3Model(
            config(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_hidden_layers=num_hidden_layers,
                num_attention_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
                rms_norm_eps=rms_norm_eps,
                attn_implementation="sdpa",
                pad_token_id=None,
            )
        )
        trunk: Any = self.model
        trunk.rotary_emb = ThreeAxisRotary(head_dim, rope_theta)
        for layer in trunk.layers:
            layer.self_attn.is_causal = False
        self.lm_head = nn.Linear(hidden_size, lm_head_size, bias=False)

    def forward(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Logits [B, h, w, V] of tokens [B, h, w] for prompts' ids [B, L]."""
        told: Any = self.config
        rows, height, width = tokens.shape
        begin = tokens.new_full((rows, 1), told.bov_token_id)
        ids = torch.cat([prompt, begin, tokens.flatten(1) + told.lm_vocab_size], 1)
        seen = self.model(
            input_ids=ids,
            position_ids=places(prompt.shape[1], height, width, ids.device),
            attention_mask={"full_attention": None},
            use_cache=False,
        ).last_hidden_state
        logits = self.lm_head(seen[:, -height * width - 1 : -1])
        return logits.view(rows, height, width, -1)


def places(text: int, height: int, width: int, device: torch.device) -> Tensor:
    """(t, y, x) of a sequence, LongTensor [1, L, 3]: i on all axes for the text and the token after it, then the
    picture, one further in t, from (0, 0) on."""
    words = torch.arange(text + 1, device=device)[:, None].expand(-1, 3)
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    picture = torch.stack([torch.full_like(y, text + 1), y, x], -1).view(-1, 3)
    return torch.cat([words, picture])[None]


class _Codes(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class AutoencoderVQ(ModelMixin, ConfigMixin):
    """Pictures as tokens of a codebook. Raises ValueError for an unknown lookup."""

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        num_vq_embeddings: int = 16384,
        vq_embed_dim: int = 8,
        attn_down_block: bool = False,
        attn_up_block: bool = False,
        mid_block_add_attention: bool = True,
        spatial_stride: int = 16,
        lookup: Lookup = "product",
    ) -> None:
        super().__init__()
        if lookup not in get_args(Lookup):
            raise ValueError(
                f"lookup: {lookup!r} is not one of {', '.join(get_args(Lookup))}; nearest valid: 'nearest'"
            )
        plain = len(block_out_channels) - 1
        common: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        down = ("AttnDownEncoderBlock2D" if attn_down_block else "DownEncoderBlock2D",)
        up = ("AttnUpDecoderBlock2D" if attn_up_block else "UpDecoderBlock2D",)
        self.encoder = Encoder(
            in_channels, latent_channels, ("DownEncoderBlock2D",) * plain + down, double_z=False, **common
        )
        self.decoder = Decoder(latent_channels, out_channels, up + ("UpDecoderBlock2D",) * plain, **common)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.quantizer = _Codes(num_vq_embeddings, vq_embed_dim)

    @property
    def codes(self) -> Tensor:
        """The codebook, [V, d]."""
        return self.quantizer.embedding.weight

    def latents(self, pictures: Tensor) -> Tensor:
        """What is quantised, [B, d, h, w], of pictures [B, 3, H, W] in −1 … 1."""
        return self.quant_conv(self.encoder(pictures))

    def quantise(self, latents: Tensor) -> Tensor:
        """Tokens, LongTensor [B, h, w]."""
        told: Any = self.config
        vectors = latents.movedim(1, -1)
        codes, rows = self.codes.to(latents.dtype), vectors.reshape(-1, vectors.shape[-1])
        lengths = codes.square().sum(-1) / 2 if told.lookup == "nearest" else codes.new_zeros(())
        at_once = max(1, AT_ONCE // len(codes))
        tokens = torch.cat([(part @ codes.T - lengths).argmax(-1) for part in rows.split(at_once)])
        return tokens.view(vectors.shape[:-1])

    def rendered(self, vectors: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of quantised latents [B, d, h, w]."""
        return self.decoder(self.post_quant_conv(vectors))

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of tokens [B, h, w]."""
        return self.rendered(cast(Tensor, self.quantizer.embedding(tokens)).movedim(-1, 1))


class KineticOptimalScheduler(SchedulerMixin, ConfigMixin):
    """The numbers of a path and of its grid; without alpha and c it is the mixture path."""

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(self, alpha: float | None = None, c: float | None = None, shift: float = 1.0) -> None:
        pass


class URSAPipeline(DiffusionPipeline):
    """The parts together, as diffusers' pipelines hold theirs; it has no call."""

    def __init__(
        self,
        transformer: URSATransformer3DModel,
        scheduler: KineticOptimalScheduler,
        vae: AutoencoderVQ,
        tokenizer: Any,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer)


FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "act_fn": "silu",
    "_quantizer_name": "VQuantizer",
}
"""What a configuration may say beside the arguments of these networks, and what it must say then."""

Network = TypeVar("Network", URSATransformer3DModel, AutoencoderVQ)


def bare_network(path: str, folder: Path, kind: type[Network]) -> Network:
    """The network in `folder` by its configuration, without numbers; `path` is what the user called its pipeline.

    Raises ValueError for a configuration of another network.
    """
    told = settings_in(folder, "config.json") or {}
    for name, value in FIXED.items():
        if told.get(name, value) != value:
            raise ValueError(
                f"model.path: {path!r} has a {folder.name} with {name} {str(told[name])[:40]!r}, which is not computed "
                f"here; nearest valid: {value!r}"
            )
    arguments = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        return kind(**{name: value for name, value in told.items() if name in arguments})


def read_network(path: str, folder: Path, kind: type[Network], dtype: torch.dtype) -> Network:
    """The network in `folder` on the CPU. Raises ValueError as `bare_network`, and for tensors that are not its own."""
    network = bare_network(path, folder, kind)
    check_names(path, folder, network)
    weights = [load_file(file) for file in weight_files(folder, WEIGHTS["diffusers"])]
    network.load_state_dict({name: t.to(dtype) for part in weights for name, t in part.items()}, assign=True)
    return network
