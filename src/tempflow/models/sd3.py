"""Stable Diffusion 3 / 3.5 by diffusers: serves any StableDiffusion3Pipeline folder, the embedded `shapes` included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.core.schedule import Schedule
from tempflow.media import Kind, Media, Size
from tempflow.models.attention import FusedForward
from tempflow.models.family import Family, Settings, check_size
from tempflow.models.finite import to_pictures
from tempflow.models.guidance import Guidance, guided
from tempflow.models.lora import FittedLora, add_adapter, attach, fresh_adapter, layer_shapes, lora_of, write_lora
from tempflow.models.lora_files import LoraFile, fit
from tempflow.models.pipeline_folder import (
    LOADING_FAULTS,
    cannot_load,
    check_flow_match_euler,
    check_folder,
    check_names,
    licence_of,
    readable_index,
)
from tempflow.models.protocol import Conditioning, Encoded, Predict, TextInputs, shared
from tempflow.models.quiet import quiet
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

VAE_ROWS = 64
VAE_PIXELS = 1 << 22
"""Media decoded or encoded at once: at most so many, and together at most so many pixels (four at 1024²)."""

CACHED_PROMPTS = 4096
"""Encoded prompts kept on the CPU; one is 2.7 MB for SD 3.5 in bfloat16, 20 kB for `shapes` in float32."""

T5_TOKENS = 256
"""The pipeline's own `max_sequence_length`; a T5 whose tokenizer allows less (`shapes`: 10) gets what it allows."""


def _call_options(settings: Settings) -> dict[str, object]:
    """T5's length, where its tokenizer allows less than the pipeline's own default."""
    length = (settings("tokenizer_3/tokenizer_config.json") or {}).get("model_max_length", T5_TOKENS)
    return {"max_sequence_length": length} if length < T5_TOKENS else {}


def _latent_shape(settings: Settings, size: Size) -> tuple[int, ...] | None:
    """[C, H, W], by the configurations of the transformer and the autoencoder."""
    transformer, vae = settings("transformer/config.json"), settings("vae/config.json")
    if transformer is None or vae is None:
        return None
    for part, told, key in (("transformer", transformer, "in_channels"), ("vae", vae, "block_out_channels")):
        if key not in told:
            raise ValueError(f"model.path: {part}/config.json does not say {key!r}; is the folder whole?")
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    patch, most = transformer.get("patch_size", 2), transformer.get("pos_embed_max_size", 96)  # diffusers' defaults
    return _drawable(size, transformer["in_channels"], scale, patch, most)


def _drawable(size: Size, channels: int, scale: int, patch: int, most: int) -> tuple[int, int, int]:
    """[C, H, W] of one latent. Sides are whole patches, at most as many as there are position embeddings.

    Raises ValueError for another height or width, naming the nearest.
    """
    unit, limit = scale * patch, most * scale * patch
    for label, value in (("height", size.height), ("width", size.width)):
        nearest = min(max(round(value / unit), 1) * unit, limit)
        if value != nearest:
            raise ValueError(f"{label}: {value} must be a multiple of {unit} up to {limit}; nearest is {nearest}")
    return (channels, size.height // scale, size.width // scale)


FAMILY = Family(
    title="Stable Diffusion 3 / 3.5 (and the embedded `shapes`)",
    needed=("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    # without its T5 it is drawn with zeros in T5's place
    optional=("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"),
    together=(("text_encoder_3", "tokenizer_3"),),
    may_be_null="text_encoder_3 and tokenizer_3 (T5)",
    lora_targets=LORA_TARGETS,
    scheduler=check_flow_match_euler,
    latent_shape=_latent_shape,
    call_options=_call_options,
)


class SD3:
    """The adapter. Holds a loaded pipeline, all of it frozen and in eval mode until `train_fully` or `add_lora`.

    `max_tokens` is T5's `max_sequence_length`; a pipeline without T5 has that many zeros in its place. In float32 an
    ODE rollout equals `StableDiffusion3Pipeline.__call__`. In bfloat16 it does not: the network computes in bfloat16,
    but latents stay float32 here, where the pipeline rounds them after each step (2 to 5 % of their size was seen).

    Raises ValueError for a scheduler that cannot be honoured, or a pipeline without a part that is needed.
    """

    family = FAMILY
    makes: Kind = FAMILY.makes
    takes_sources, guidance = FAMILY.sources, FAMILY.guidance

    def __init__(self, pipe: Any, name: str, licence: str, max_tokens: int) -> None:
        self.pipe, self.name, self.licence = pipe, name, licence
        self._max_tokens = max_tokens
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        for part in FAMILY.needed:
            if getattr(pipe, part) is None:
                raise ValueError(f"model.path: {name!r} has no {part}; only T5 (text_encoder_3) may be missing")
        check_flow_match_euler(name, type(pipe.scheduler).__name__, pipe.scheduler.config)
        for module in (pipe.vae, pipe.transformer, *self._text_encoders().values()):
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path, name: str, dtype: torch.dtype, device: str) -> SD3:
        """Loads a pipeline folder, safetensors only, everything in `dtype` as diffusers does. Optional parts that its
        index leaves out (T5) stay out.

        Raises ValueError for a folder that is not whole, or that cannot be honoured.
        """
        absent = dict.fromkeys(check_folder(name, folder, FAMILY))
        with quiet(), readable_index(folder) as place:
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

            try:
                pipe = StableDiffusion3Pipeline.from_pretrained(
                    str(place), torch_dtype=dtype, use_safetensors=True, **absent
                )
            except LOADING_FAULTS as error:
                raise ValueError(cannot_load(name, error)) from error
        check_names(name, folder / "transformer", pipe.transformer)
        check_names(name, folder / "vae", pipe.vae)
        tokens = T5_TOKENS if pipe.tokenizer_3 is None else min(T5_TOKENS, pipe.tokenizer_3.model_max_length)
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

    def _text_encoders(self) -> dict[str, nn.Module]:
        """Those that the pipeline has, by the names of its parts."""
        found = {name: getattr(self.pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        return {name: module for name, module in found.items() if module is not None}

    # ------------------------------------------------------------------------------------------------- conditions
    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        """See `Model.encode`; the tensors are `embeds` [N, L, d] and `pooled` [N, p], in the transformer's dtype. The
        size does not enter them. Raises ValueError for no prompt, or one with sources."""
        if not prompts:
            raise ValueError("prompts: the list is empty; at least one prompt is needed")
        for prompt in prompts:
            if prompt.sources:
                raise ValueError(f"prompt {prompt.text[:60]!r} has pictures, and {self.name!r} draws from text alone")
        texts, negatives = [p.text for p in prompts], [p.negative for p in prompts]
        for text in dict.fromkeys((*negatives, *texts)):
            if text not in self._cache:
                self._cache[text] = self._encode_one(text)
        condition = Conditioning(tuple(prompts), self._rows(texts), self._rows(negatives))
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

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        """See `EncodesInputs.text_inputs`: of both CLIPs and, where the pipeline has it, T5."""
        return text_inputs(self.pipe, prompt.text, self._max_tokens)

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        """See `EncodesInputs.encode_inputs`; the tensors are on the model's device, in the transformer's dtype."""
        encoded = encode_inputs(self.pipe, prompt.text, tokens, self._max_tokens)
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in encoded.tensors.items()}
        return Encoded(tensors, encoded.vectors)

    def _rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        kept = texts[:1] if len(set(texts)) == 1 else texts
        rows: dict[str, Tensor] = {}
        for place, name in enumerate(("embeds", "pooled")):
            tensor = torch.stack([self._cache[text][place] for text in kept]).to(self.device, self.dtype)
            rows[name] = tensor if len(kept) == len(texts) else shared(tensor, len(texts))
        return rows

    # ---------------------------------------------------------------------------------------------------- drawing
    def schedule(self, steps: int, size: Size) -> Schedule:
        """The grid of the folder's own scheduler, resolution-dependent shift included, as the pipeline sets it.

        Raises ValueError for steps below 1, a size that cannot be drawn, or a scheduler that gives no falling grid.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} is too small; the nearest valid value is 1")
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        _, height, width = self.noise_shape(size)
        config = self.pipe.scheduler.config
        check_flow_match_euler(self.name, type(self.pipe.scheduler).__name__, config)
        scheduler = type(self.pipe.scheduler).from_config(config)
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
        sigmas = scheduler.sigmas.float()
        if sigmas[0] <= 1 + 1e-5:  # at some shifts rounding takes σ_0 to 1 + 10⁻⁷
            sigmas = sigmas.clamp(max=1)
        try:
            return Schedule(sigmas)
        except ValueError as error:
            raise ValueError(
                f"model.path: the scheduler of {self.name!r} gives no falling grid for {steps} steps ({error}); "
                "nearest valid: other steps, or another scheduler/scheduler_config.json"
            ) from error

    @property
    def _patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """See `Model.noise_shape`: [C, H, W]."""
        check_size(size, self.makes, self.name)
        config, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor
        return _drawable(size, config.in_channels, scale, self._patch, config.pos_embed_max_size)

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        """See `Model.predictor`. Guidance g: v = v_neg + g·(v_c − v_neg), as the pipeline has it at g > 1. The negative
        branch carries no gradient (Flow-GRPO's later code), and at g = 1 it is not computed.

        Velocities come in the transformer's dtype, guided ones in float32 or better.
        """
        module, guide = network if network is not None else self.pipe.transformer, guided(guidance)
        tensors, negative = condition.tensors, condition.negative
        timesteps = self.pipe.scheduler.config.num_train_timesteps
        if guide.rows > 1 and negative is None:
            raise ValueError(
                f"guidance: {guide.guidance} needs conditions with negative prompts; without them only 1 is valid"
            )

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
            if guide.rows == 1 or negative is None:
                return velocity(x, sigma, embeds, pooled)
            no_embeds, no_pooled = negative["embeds"][rows], negative["pooled"][rows]
            if torch.is_grad_enabled():
                with torch.no_grad():
                    base = velocity(x, sigma, no_embeds, no_pooled)
                positive = velocity(x, sigma, embeds, pooled)
            else:
                both = velocity(
                    torch.cat([x, x]),
                    torch.cat([sigma, sigma]),
                    torch.cat([no_embeds, embeds]),
                    torch.cat([no_pooled, pooled]),
                )
                base, positive = both.chunk(2)
            return guide(positive, base)

        return predict

    def _attention(self) -> AbstractContextManager[object]:
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            return FusedForward()
        return nullcontext()

    @torch.no_grad()
    def decode(self, x: Tensor, size: Size) -> Media:
        """See `Model.decode`; in float32 equal to the pipeline's `output_type="pil"`, in parts that bound memory."""
        vae, (scale, shift) = self.pipe.vae, self._scale_and_shift()
        parts = (
            vae.decode((part / scale + shift).to(vae.dtype), return_dict=False)[0]
            for part in x.split(_rows_at_once(size))
        )
        return to_pictures(parts)

    @torch.no_grad()
    def encode_media(self, media: Media, size: Size) -> Tensor:
        """See `Model.encode_media`: float32 latents, the mode of the autoencoder's posterior (where it has one),
        shifted and scaled as the pipeline's decoding takes it back; in parts that bound memory."""
        shape, vae, (scale, shift) = self.noise_shape(size), self.pipe.vae, self._scale_and_shift()
        media = Media.of(media)
        if media.frames.shape[1:] != (1, size.height, size.width, 3):
            raise ValueError(f"media: {media.size}, and {size} is asked for; nearest valid: pictures of {size}")
        pictures = media.pictures()
        latents = torch.empty(len(media), *shape, device=self.device)
        for rows in torch.arange(len(media)).split(_rows_at_once(size)):
            image = pictures[rows].to(self.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
            encoded = vae.encode(image.to(vae.dtype))
            z = (encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents).float()
            latents[rows.to(self.device)] = (z - shift) * scale
        return latents

    def _scale_and_shift(self) -> tuple[float, float]:
        """The autoencoder's, where null means none (diffusers' own call fails on null)."""
        config = self.pipe.vae.config
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        return 1.0 if scale is None else scale, 0.0 if shift is None else shift

    # --------------------------------------------------------------------------------------------------- training
    def train_fully(self) -> None:
        """All of the transformer's parameters become the policy."""
        self.pipe.transformer.requires_grad_(True)

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] = LORA_TARGETS) -> None:
        """See `TakesLora.add_lora`; the attention's projections of both streams, unless `targets` says otherwise."""
        fresh_adapter(self.network, rank, alpha, targets)

    def add_lora_on(self, ranks: Mapping[str, int], scale: float) -> None:
        """See `TakesLora.add_lora_on`."""
        add_adapter(self.network, ranks, scale)

    def fit_lora(self, file: LoraFile) -> FittedLora:
        """See `TakesLora.fit_lora`; of the transformer and the text encoders."""
        components = {"transformer": self.network, **self._text_encoders()}
        shapes = {part: layer_shapes(module) for part, module in components.items()}
        found = fit(file, shapes, original_names(shapes["transformer"]), self.name)
        return FittedLora(found.pop("transformer", {}), found)

    def attach_lora(self, lora: FittedLora) -> None:
        """See `TakesLora.attach_lora`; prompts are encoded anew."""
        if lora_of(self.network):
            raise ValueError("the model has a LoRA already; load it afresh to add another")
        for part, factors in lora.by_part("transformer").items():
            attach(getattr(self.pipe, part), factors)
        self._cache.clear()

    @property
    def nbytes(self) -> int:
        """See `Model.nbytes`."""
        modules = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return sum(t.nbytes for module in modules for t in module.state_dict().values())

    def to_dtype(self, dtype: torch.dtype) -> None:
        """See `Model.to_dtype`."""
        self.pipe.to(dtype)
        self._cache.clear()

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        """A LoRA as `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, else the whole pipeline folder.

        Either with the licence in `licence.json`. The LoRA's scale is multiplied into B: a file without a scale means
        the same to every reader, and one beside the weights is lost on some.
        """
        with quiet():
            transformer = self.pipe.transformer if network is None else network
            lora = lora_of(transformer)
            if lora:
                write_lora(lora, Path(folder))
            else:
                pipe = type(self.pipe)(**{**self.pipe.components, "transformer": transformer})
                pipe.save_pretrained(folder, safe_serialization=True)
        (Path(folder) / "licence.json").write_text(json.dumps({"licence": self.licence}) + "\n")


def _rows_at_once(size: Size) -> int:
    return max(1, min(VAE_ROWS, VAE_PIXELS // size.pixels))
