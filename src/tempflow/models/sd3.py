"""Stable Diffusion 3 / 3.5 by diffusers: serves any StableDiffusion3Pipeline folder, the embedded `shapes` included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempflow.core.schedule import Schedule
from tempflow.models.protocol import Conditioning, Predict, Size

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

DECODE_ROWS = 64


class SD3:
    """The adapter. Holds a loaded pipeline; `max_tokens` is T5's `max_sequence_length`.

    Everything that is not trained is frozen and in eval mode. Prompts are encoded once and cached on the CPU.
    """

    def __init__(self, pipe: Any, name: str, licence: str, max_tokens: int, text_batch: int = 64) -> None:
        self.pipe, self.name, self.licence = pipe, name, licence
        self._max_tokens, self._text_batch = max_tokens, text_batch
        self._lora = False
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        for module in (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: str | Path, name: str, revision: str | None, dtype: torch.dtype, device: str) -> SD3:
        """Loads a pipeline folder or hub id with safetensors only. Raises what diffusers raises on a broken folder."""
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained(
            str(folder), revision=revision, torch_dtype=dtype, use_safetensors=True
        ).to(device)
        return cls(pipe, name, _licence(Path(folder)), min(256, pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 else 77))

    @property
    def network(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def device(self) -> torch.device:
        return self.pipe.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in; latents stay float32."""
        return self.pipe.transformer.dtype

    # ------------------------------------------------------------------------------------------------- conditions
    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `Model.encode`; the tensors are `embeds` [N, L, d] and `pooled` [N, p]."""
        self._encode_missing([*dict.fromkeys(["", *prompts])])
        return Conditioning(tuple(prompts), self._rows(prompts), self._rows([""]))

    def _encode_missing(self, prompts: list[str]) -> None:
        missing = [p for p in prompts if p not in self._cache]
        for i in range(0, len(missing), self._text_batch):
            part = missing[i : i + self._text_batch]
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                part, None, None, do_classifier_free_guidance=False, max_sequence_length=self._max_tokens
            )
            # Copies: a view would keep the whole batch alive for every cached row.
            self._cache |= {p: (embeds[j].clone(), pooled[j].clone()) for j, p in enumerate(part)}

    def _rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds = torch.stack([self._cache[p][0] for p in prompts])
        pooled = torch.stack([self._cache[p][1] for p in prompts])
        return {"embeds": embeds.to(self.device, self.dtype), "pooled": pooled.to(self.device, self.dtype)}

    # ---------------------------------------------------------------------------------------------------- drawing
    def schedule(self, steps: int, size: Size) -> Schedule:
        """The folder's own scheduler settings, resolution-dependent shift included."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        if scheduler.config.use_dynamic_shifting:
            _, height, width = self.noise_shape(size)
            tokens = (height // self._patch) * (width // self._patch)
            mu = calculate_shift(
                tokens,
                scheduler.config.base_image_seq_len,
                scheduler.config.max_image_seq_len,
                scheduler.config.base_shift,
                scheduler.config.max_shift,
            )
            scheduler.set_timesteps(steps, mu=mu)
        else:
            scheduler.set_timesteps(steps)
        return Schedule(scheduler.sigmas.float())

    @property
    def _patch(self) -> int:
        return self.pipe.transformer.config.patch_size

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        unit = self.pipe.vae_scale_factor * self._patch
        limit = self.pipe.transformer.config.pos_embed_max_size * unit
        for label, value in zip(("height", "width"), size, strict=True):
            nearest = min(max(round(value / unit), 1) * unit, limit)
            if value != nearest:
                raise ValueError(f"{label}: {value} must be a multiple of {unit} up to {limit}; nearest is {nearest}")
        scale = self.pipe.vae_scale_factor
        return (self.pipe.transformer.config.in_channels, size[0] // scale, size[1] // scale)

    def predictor(self, condition: Conditioning, guidance: float, network: nn.Module | None = None) -> Predict:
        """See `Model.predictor`. Guidance g: v = v_∅ + g·(v_c − v_∅), as the pipeline has it; the empty branch carries
        no gradient (Flow-GRPO's later code). At g = 1 the empty branch is not computed."""
        module = network if network is not None else self.pipe.transformer
        tensors, empty = condition.tensors, condition.empty
        if guidance != 1 and empty is None:
            raise ValueError(f"guidance: {guidance} needs conditions with an empty prompt; without one only 1 is valid")

        def velocity(x: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
            with self._attention():
                return module(
                    hidden_states=x.to(self.dtype),
                    timestep=sigma * 1000,
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    return_dict=False,
                )[0]

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            embeds, pooled = tensors["embeds"][rows], tensors["pooled"][rows]
            if guidance == 1 or empty is None:
                return velocity(x, sigma, embeds, pooled)
            no_embeds = empty["embeds"].expand(len(x), -1, -1)
            no_pooled = empty["pooled"].expand(len(x), -1)
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
            return base + guidance * (guided - base)

        return predict

    def _attention(self) -> AbstractContextManager[object]:
        """Plain attention in bfloat16 on a CPU: the fused one's backward is ten times slower there (torch 2.13), and mixing
        the two between rollout and training moves the log ratio by 1e-3; with one kernel on both sides it is exactly 0."""
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    @torch.no_grad()
    def decode(self, x: Tensor, size: Size) -> Tensor:
        vae = self.pipe.vae
        parts = []
        for part in x.split(DECODE_ROWS):
            z = part.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
            parts.append(vae.decode(z, return_dict=False)[0])
        image = (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)
        return (image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # --------------------------------------------------------------------------------------------------- training
    def train_fully(self) -> None:
        """All of the transformer's parameters become the policy."""
        self.pipe.transformer.requires_grad_(True)

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] = LORA_TARGETS) -> None:
        """A fresh LoRA (Gaussian init, so the policy starts as the base) becomes the policy.

        Raises ValueError when no module's name ends with one of `targets`.
        """
        from peft import LoraConfig

        names = [name for name, module in self.pipe.transformer.named_modules() if isinstance(module, nn.Linear)]
        unmatched = [t for t in targets if not any(n.endswith(t) for n in names)]
        if unmatched:
            known = ", ".join(sorted({n.split(".", 2)[-1] for n in names if n.startswith("transformer_blocks")}))
            raise ValueError(f"lora targets: {unmatched[0]!r} matches no linear layer; there are {known}")
        self._lora = True
        self.pipe.transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
        )

    def save(self, folder: str) -> None:
        """A LoRA as `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, else the whole pipeline folder."""
        if self._lora:
            from peft.utils import get_peft_model_state_dict

            layers: Mapping[str, Tensor] = get_peft_model_state_dict(self.pipe.transformer)
            self.pipe.save_lora_weights(folder, transformer_lora_layers=dict(layers), safe_serialization=True)
        else:
            self.pipe.save_pretrained(folder, safe_serialization=True)


def _licence(folder: Path) -> str:
    """The licence that the folder's README front matter or `licence.json` names."""
    card = folder / "README.md"
    if card.is_file():
        for line in card.read_text(errors="replace").splitlines()[:40]:
            if line.lower().startswith("license:"):
                return line.split(":", 1)[1].strip()
    record = folder / "licence.json"
    return json.loads(record.read_text())["licence"] if record.is_file() else "unknown"
