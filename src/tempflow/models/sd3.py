"""Stable Diffusion 3 / 3.5 by diffusers: serves any StableDiffusion3Pipeline folder, the embedded `shapes` included."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.core.distribution import upcast
from tempflow.core.schedule import Schedule
from tempflow.models.attention import FusedForward
from tempflow.models.finite import to_pictures
from tempflow.models.protocol import Conditioning, Encoded, Predict, Size, TextInputs
from tempflow.models.quiet import quiet
from tempflow.models.text_inputs import encode_inputs, text_inputs

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

VAE_ROWS = 64
VAE_PIXELS = 1 << 22
"""Media decoded or encoded at once: at most so many, and together at most so many pixels (four at 1024²)."""

CACHED_PROMPTS = 4096
"""Encoded prompts kept on the CPU; one is 2.7 MB for SD 3.5 in bfloat16, 20 kB for `shapes` in float32."""

T5_TOKENS = 256
"""The pipeline's own `max_sequence_length`; a T5 whose tokenizer allows less (`shapes`: 10) gets what it allows."""


class SD3:
    """The adapter. Holds a loaded pipeline, all of it frozen and in eval mode until `train_fully` or `add_lora`.

    `max_tokens` is T5's `max_sequence_length`. Latents and velocities keep to the pipeline's own arithmetic, so that an
    ODE rollout equals `StableDiffusion3Pipeline.__call__`.
    """

    def __init__(self, pipe: Any, name: str, licence: str, max_tokens: int) -> None:
        self.pipe, self.name, self.licence = pipe, name, licence
        self._max_tokens = max_tokens
        self._lora_scale: float | None = None
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        for module in (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path, name: str, dtype: torch.dtype, device: str) -> SD3:
        """Loads a pipeline folder, safetensors only, everything in `dtype` as diffusers does.

        Raises what diffusers raises on a broken folder (OSError for a missing file).
        """
        with quiet():
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

            pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True)
        tokens = min(T5_TOKENS, pipe.tokenizer_3.model_max_length)
        return cls(pipe.to(device), name, licence_of(folder), tokens)

    @property
    def network(self) -> nn.Module:
        return self.pipe.transformer

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The transformer's blocks."""
        return list(network.get_submodule("transformer_blocks").children())

    @property
    def device(self) -> torch.device:
        return self.pipe.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in; latents stay float32."""
        return self.pipe.transformer.dtype

    # ------------------------------------------------------------------------------------------------- conditions
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Model.encode`; the tensors are `embeds` [N, L, d] and `pooled` [N, p], in the transformer's dtype."""
        for prompt in dict.fromkeys(("", *prompts)):
            if prompt not in self._cache:
                self._cache[prompt] = self._encode_one(prompt)
        condition = Conditioning(tuple(prompts), self._rows(prompts), self._rows([""]))
        for oldest in list(self._cache)[: max(0, len(self._cache) - CACHED_PROMPTS)]:
            del self._cache[oldest]
        return condition

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor]:
        # One by one: in a batch the last bits would depend on its size, so on what an earlier call happened to leave in
        # the cache, and a resumed run would drift from an uninterrupted one.
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            [prompt], None, None, do_classifier_free_guidance=False, max_sequence_length=self._max_tokens
        )
        return embeds[0].cpu(), pooled[0].cpu()

    def text_inputs(self, prompt: str) -> TextInputs:
        """See `EncodesInputs.text_inputs`: of both CLIPs and T5."""
        return text_inputs(self.pipe, prompt, self._max_tokens)

    def encode_inputs(self, prompt: str, tokens: Mapping[str, Tensor]) -> Encoded:
        """See `EncodesInputs.encode_inputs`; the tensors are on the model's device, in the transformer's dtype."""
        encoded = encode_inputs(self.pipe, prompt, tokens, self._max_tokens)
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in encoded.tensors.items()}
        return Encoded(tensors, encoded.vectors)

    def _rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if not prompts:
            raise ValueError("prompts: the list is empty; at least one prompt is needed")
        embeds = torch.stack([self._cache[p][0] for p in prompts])
        pooled = torch.stack([self._cache[p][1] for p in prompts])
        return {"embeds": embeds.to(self.device, self.dtype), "pooled": pooled.to(self.device, self.dtype)}

    # ---------------------------------------------------------------------------------------------------- drawing
    def schedule(self, steps: int, size: Size) -> Schedule:
        """The grid of the folder's own scheduler, resolution-dependent shift included, as the pipeline sets it.

        Raises ValueError for steps below 1 or a size that cannot be drawn.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} is too small; the nearest valid value is 1")
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        _, height, width = self.noise_shape(size)
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        config = scheduler.config
        if config.get("use_dynamic_shifting"):
            mu = calculate_shift(
                (height // self._patch) * (width // self._patch),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
            scheduler.set_timesteps(steps, mu=mu)
        else:
            scheduler.set_timesteps(steps)
        return Schedule(scheduler.sigmas.float().clamp(max=1))  # at some shifts rounding takes σ_0 to 1 + 10⁻⁷

    @property
    def _patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """[C, H, W] of one latent. Sides are whole patches, at most as many as there are position embeddings.

        Raises ValueError for another height or width, naming the nearest.
        """
        unit = self.pipe.vae_scale_factor * self._patch
        limit = self.pipe.transformer.config.pos_embed_max_size * unit
        for label, value in zip(("height", "width"), size, strict=True):
            nearest = min(max(round(value / unit), 1) * unit, limit)
            if value != nearest:
                raise ValueError(f"{label}: {value} must be a multiple of {unit} up to {limit}; nearest is {nearest}")
        scale = self.pipe.vae_scale_factor
        return (self.pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale)

    def predictor(self, condition: Conditioning, guidance: float, network: nn.Module | None = None) -> Predict:
        """See `Model.predictor`. Guidance g: v = v_∅ + g·(v_c − v_∅), as the pipeline has it for g > 1; the empty
        branch carries no gradient (Flow-GRPO's later code). At g = 1 the empty branch is not computed.

        Velocities come in the transformer's dtype, guided ones in float32 or better.
        """
        module = network if network is not None else self.pipe.transformer
        tensors, empty = condition.tensors, condition.empty
        timesteps = self.pipe.scheduler.config.num_train_timesteps
        if guidance != 1 and empty is None:
            raise ValueError(f"guidance: {guidance} needs conditions with an empty prompt; without one only 1 is valid")

        def velocity(x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
            with self._attention():
                return module(
                    hidden_states=x.to(self.dtype),
                    timestep=sigma * timesteps,
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    return_dict=False,
                )[0]

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            embeds, pooled = tensors["embeds"][rows], tensors["pooled"][rows]
            if guidance == 1 or empty is None:
                return velocity(x, sigma, embeds, pooled)
            first = torch.zeros_like(rows)  # `expand` would do, but rows of stride 0 take another bfloat16 kernel
            no_embeds, no_pooled = empty["embeds"][first], empty["pooled"][first]
            if torch.is_grad_enabled():
                with torch.no_grad():
                    base = velocity(x, sigma, no_embeds, no_pooled)
                guided = velocity(x, sigma, embeds, pooled)
            else:
                both = velocity(
                    torch.cat([x, x]),
                    torch.cat([sigma, sigma]),
                    torch.cat([no_embeds, embeds]),
                    torch.cat([no_pooled, pooled]),
                )
                base, guided = both.chunk(2)
            base, guided = upcast(base), upcast(guided)
            return base + guidance * (guided - base)

        return predict

    def _attention(self) -> AbstractContextManager[object]:
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            return FusedForward()
        return nullcontext()

    @torch.no_grad()
    def decode(self, x: Tensor, size: Size) -> Tensor:
        """See `Model.decode`; equal to the pipeline's `output_type="pil"`, in parts that bound memory."""
        vae = self.pipe.vae
        parts = (
            vae.decode((part / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype), return_dict=False)[0]
            for part in x.split(_rows_at_once(size))
        )
        return to_pictures(parts)

    @torch.no_grad()
    def encode_media(self, media: Tensor, size: Size) -> Tensor:
        """See `Model.encode_media`: float32 latents, the mode of the autoencoder's posterior, shifted and scaled as the
        pipeline's decoding takes it back; in parts that bound memory."""
        shape, vae = self.noise_shape(size), self.pipe.vae
        if media.dtype != torch.uint8 or media.shape[1:] != (*size, 3):
            raise ValueError(
                f"media: {media.dtype} {list(media.shape)} must be torch.uint8 [B, {size[0]}, {size[1]}, 3]"
            )
        latents = torch.empty(len(media), *shape, device=self.device)
        for rows in torch.arange(len(media)).split(_rows_at_once(size)):
            image = media[rows].to(self.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
            z = vae.encode(image.to(vae.dtype)).latent_dist.mode().float()
            latents[rows.to(self.device)] = (z - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    # --------------------------------------------------------------------------------------------------- training
    def train_fully(self) -> None:
        """All of the transformer's parameters become the policy."""
        self.pipe.transformer.requires_grad_(True)

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] = LORA_TARGETS) -> None:
        """A fresh LoRA of scale alpha/rank becomes the policy: A Gaussian, from torch's generator, and B zero, so that
        the policy starts as the base.

        Raises ValueError when rank or alpha is below 1, there is a LoRA already, or one of `targets` ends no linear
        layer's name.
        """
        from peft import LoraConfig

        transformer = self.pipe.transformer
        for name, value in (("lora rank", rank), ("lora alpha", alpha)):
            if value < 1:
                raise ValueError(f"{name}: {value} is too small; the nearest valid value is 1")
        if self._lora_scale is not None:
            raise ValueError("lora: the model has one already; load it afresh to add another")
        _check_targets(transformer, targets)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        )
        transformer.eval()
        self._lora_scale = alpha / rank

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        """A LoRA as `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, else the whole pipeline folder.

        Either with the licence in `licence.json`. The LoRA's scale is multiplied into B: a file without a scale means
        the same to every reader, and one beside the weights is lost on some.
        """
        with quiet():
            transformer = self.pipe.transformer if network is None else network
            if self._lora_scale is None:
                pipe = type(self.pipe)(**{**self.pipe.components, "transformer": transformer})
                pipe.save_pretrained(folder, safe_serialization=True)
            else:
                self.pipe.save_lora_weights(folder, _lora_layers(transformer, self._lora_scale))
        (Path(folder) / "licence.json").write_text(json.dumps({"licence": self.licence}) + "\n")


def _rows_at_once(size: Size) -> int:
    return max(1, min(VAE_ROWS, VAE_PIXELS // (size[0] * size[1])))


def _check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({name.split(".", 2)[2] for name in linear if name.startswith("transformer_blocks.")})
    if not targets:
        raise ValueError(f"lora targets: the list is empty; there are {', '.join(known)}")
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"lora targets: {target!r} is no linear layer; nearest is {nearest!r} of {', '.join(known)}"
            )


def _lora_layers(network: nn.Module, scale: float) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    layers: Mapping[str, Tensor] = get_peft_model_state_dict(network)
    return {name: value.float() * (scale if ".lora_B." in name else 1.0) for name, value in layers.items()}


def licence_of(folder: Path) -> str:
    """The licence of the weights: `license` in the README's front matter ("other": its `license_name`), else the
    `licence` that `licence.json` names, else "unknown"."""
    card, record = folder / "README.md", folder / "licence.json"
    stated = _front_matter(card.read_text(errors="replace")) if card.is_file() else {}
    licence = stated.get("license", "")
    if licence == "other":
        licence = stated.get("license_name", licence)
    if not licence and record.is_file():
        licence = str(json.loads(record.read_text()).get("licence", ""))
    return licence or "unknown"


def _front_matter(text: str) -> dict[str, str]:
    """The plain `key: value` lines between the two `---` that open a model card."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and not key.startswith((" ", "-", "#")):
            fields[key.strip()] = value.strip().strip("\"'")
    return fields
