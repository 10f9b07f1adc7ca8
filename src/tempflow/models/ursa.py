"""URSA, uniform discrete diffusion on a picture's tokens: serves folders of the released layout, `shapes_tokens` among
them.

A folder has `transformer`, `vae` and `scheduler` of classes that no library has: this package brings them
(`ursa_parts`), whatever library the folder names, and never runs code of a folder. It reads their configurations and
safetensors, by name.

The released scheduler keeps the codebook of its path in a pickle, `scheduler_model.pth`, which is not read. Where
`scheduler/scheduler_model.safetensors` holds the same tensor, `path.emb`, the path has these codes, else those of the
autoencoder; `notes` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.core.distribution import check_tokens
from tempflow.core.dynamics import Dynamics, MixtureJump
from tempflow.core.metric_path import MetricJump, MetricPath
from tempflow.core.schedule import Schedule, explicit, linear
from tempflow.media import Size
from tempflow.models.diffusers_model import DiffusersModel
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, drawable
from tempflow.models.guidance import Guidance, guided
from tempflow.models.lora import Shapes, layer_shapes
from tempflow.models.pipeline_folder import (
    INDEX,
    LOADING_FAULTS,
    cannot_load,
    check_folder,
    licence_of,
    read_index,
    settings_in,
)
from tempflow.models.protocol import Conditioning, Predict
from tempflow.models.quiet import quiet
from tempflow.models.tools import Tools
from tempflow.models.ursa_parts import (
    AutoencoderVQ,
    KineticOptimalScheduler,
    URSAPipeline,
    URSATransformer3DModel,
    bare_network,
    read_network,
)

PIPELINES = {"URSAPipeline": "URSA"}

TOKENS = 320
"""The pipeline's own `max_prompt_length`: prompts are padded to it on the left, and the padding is read."""

CODES = "scheduler_model.safetensors"


@dataclass(frozen=True)
class URSAGuidance(Guidance):
    """Classifier-free guidance of logits, in the noisy part of a rollout.

    truncation   where 1 − σ is not below it any more, the prompt's own logits count (released: .9)
    temperature  logits are divided by it, guided or not; log-probs are those of the logits so divided

    Raises ValueError for a truncation outside (0, 1], or a temperature that is not positive.
    """

    truncation: float = 0.9
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.truncation <= 1:
            raise ValueError(f"truncation: {self.truncation} must be in (0, 1]; nearest valid: 0.9")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} must be above 0; nearest valid: 1.0")

    def call_options(self) -> Mapping[str, object]:
        """How a call of the pipeline is asked for the same, for model cards; it has no temperature."""
        return {"guidance_scale": self.guidance, "guidance_trunc": self.truncation}


def _latent_shape(settings: Settings, size: Size) -> tuple[int, ...] | None:
    vae = settings("vae/config.json")
    return None if vae is None else drawable(size, 1, vae.get("spatial_stride", 16))[1:]


def _check_scheduler(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for another scheduler, or one whose numbers give no path."""
    if kind != "KineticOptimalScheduler":
        raise ValueError(
            f"model.path: {path!r} has the scheduler {kind!r}, whose path is not known here; nearest valid: "
            "'KineticOptimalScheduler'"
        )
    for name, least in (("alpha", None), ("c", None), ("shift", 1.0)):
        value = config.get(name, least)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(
                f"model.path: {path!r} has a scheduler with {name} {value!r}; nearest valid: a number above 0"
            )
    if (config.get("alpha") is None) != (config.get("c") is None):
        raise ValueError(
            f"model.path: {path!r} has a scheduler with one of alpha and c; nearest valid: both or neither"
        )


FAMILY = Family(
    title="URSA (and the embedded `shapes_tokens`)",
    needed=("transformer", "vae", "scheduler", "tokenizer"),
    own={
        "transformer": "URSATransformer3DModel",
        "vae": "AutoencoderVQ",
        "scheduler": "KineticOptimalScheduler",
    },
    blocks=("model.layers",),
    lora_targets=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    tokens=True,
    guidance=URSAGuidance,
    scheduler=_check_scheduler,
    latent_shape=_latent_shape,
)


@dataclass(frozen=True, eq=False)
class Files:
    """What a folder has beside the parts.

    index    its model_index.json
    codes    [V, d] of the path, where they have a file of their own
    pickled  whether they have one that is not read
    """

    index: Mapping[str, Any]
    codes: Tensor | None = None
    pickled: bool = False


NO_FILES = Files({})


class URSA(DiffusersModel):
    """The adapter. States are tokens, LongTensor [B, h, w]; what the network predicts of them are the clean tokens'
    logits, whatever σ is, which it is not told."""

    family = FAMILY

    def __init__(self, pipe: Any, name: str, licence: str, files: Files = NO_FILES) -> None:
        super().__init__(pipe, name, licence)
        self.files, codes = files, files.codes
        told, codebook, tokenizer = pipe.transformer.config, len(pipe.vae.codes), pipe.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"model.path: the tokenizer of {name!r} has no padding, which prompts begin with and the empty prompt "
                "of guidance is made of; nearest valid: one with a pad_token"
            )
        if max(len(tokenizer), told.bov_token_id + 1) > told.lm_vocab_size:
            raise ValueError(
                f"model.path: the tokenizer of {name!r} has {len(tokenizer)} tokens and the transformer "
                f"{told.lm_vocab_size} of text, {told.bov_token_id} beginning a picture; get the folder again"
            )
        for what, count in (
            ("transformer", told.lm_head_size),
            ("scheduler", codebook if codes is None else len(codes)),
        ):
            if count != codebook:
                raise ValueError(
                    f"model.path: the {what} of {name!r} has {count} codes and the vae {codebook}; get the folder again"
                )

    @classmethod
    def load_with(cls, folder: Path, name: str, dtype: torch.dtype, device: str, tools: Tools) -> Self:
        """See `DiffusersModel.load_with`. Raises ValueError, too, for tensors that are not these networks'."""
        check_folder(name, folder, cls.family)
        if tools.quantise != "none":
            raise ValueError(f"model.quantise: {name!r} has none; nearest valid: 'none'")
        index = read_index(name, folder)
        whole = torch.float32 if dtype == torch.float16 else dtype
        with quiet():
            try:
                parts = {
                    "transformer": read_network(name, folder / "transformer", URSATransformer3DModel, dtype),
                    "vae": read_network(name, folder / "vae", AutoencoderVQ, whole),
                    "scheduler": KineticOptimalScheduler.from_config(
                        settings_in(folder, "scheduler/scheduler_config.json") or {}
                    ),
                    "tokenizer": getattr(transformers, index["tokenizer"][1]).from_pretrained(
                        folder / "tokenizer", local_files_only=True
                    ),
                }
                pipe: Any = URSAPipeline(**parts)
                codes = load_file(folder / "scheduler" / CODES) if (folder / "scheduler" / CODES).is_file() else {}
            except LOADING_FAULTS as error:
                told = str(error)
                raise ValueError(told if told.startswith("model.path") else cannot_load(name, error)) from error
        for part in cls.family.networks if tools.offload else ("transformer", "vae"):
            getattr(pipe, part).to(device)
        pickled = (folder / "scheduler" / "scheduler_model.pth").is_file()
        return cls(pipe, name, licence_of(folder), Files(index, codes.get("path.emb"), pickled)).carrying(folder)

    @classmethod
    def layers_in(cls, folder: Path, name: str) -> Shapes:
        """See `DiffusersModel.layers_in`; the library that the folder names is not asked."""
        return layer_shapes(bare_network(name, folder / "transformer", URSATransformer3DModel))

    def notes(self) -> tuple[str, ...]:
        if self.files.codes is not None or self.pipe.scheduler.config.alpha is None or not self.files.pickled:
            return ()
        return (f"the path's codes are the autoencoder's: a .pth is not read, and there is no scheduler/{CODES}",)

    # ------------------------------------------------------------------------------------------------------ the states
    @property
    def jump(self) -> Dynamics:
        """See `MovesTokens.jump`: along the metric path, or where the scheduler has no α along the mixture path."""
        told, vae = self.pipe.scheduler.config, self.pipe.vae
        if told.alpha is None:
            return MixtureJump(len(vae.codes))
        codes = vae.codes if self.files.codes is None else self.files.codes
        return MetricJump(MetricPath(codes.detach().float().to(self.device), told.c, told.alpha))

    def grid(self, steps: int, shape: tuple[int, ...]) -> Schedule:
        """σ = s·u / (1 + (s−1)·u) of even u, or of stated ones; s is the scheduler's shift."""
        shift, u = self.pipe.scheduler.config.shift, self._grid.points(steps)
        return linear(steps, shift) if u is None else explicit(u, shift)

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`ids` [L]: padded on the left, L is 320 or what the tokenizer allows; the network embeds them."""
        tokenizer = self.pipe.tokenizer
        length = min(TOKENS, tokenizer.model_max_length)
        told = tokenizer(
            text, padding="max_length", padding_side="left", truncation=True, max_length=length, return_tensors="pt"
        )
        return {"ids": told.input_ids[0]}

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        """Logits of the clean tokens, [B, h, w, V]."""
        return network(x, rows["ids"])

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        """See `DiffusersModel.predictor`; both branches are asked only of the rows where guidance acts."""
        guide = guided(guidance, self.guidance)
        assert isinstance(guide, URSAGuidance)
        plain = super().predictor(condition, guide.at(1.0), network)
        both = plain if guide.rows == 1 else super().predictor(condition, guide, network)

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            acts = 1 - sigma < guide.truncation if guide.rows > 1 else torch.zeros_like(sigma, dtype=torch.bool)
            if bool(acts.all()) or not bool(acts.any()):
                said = (both if bool(acts.all()) else plain)(x, sigma, rows)
            else:  # rows of a training batch may be on both sides
                parts = [ask(x[on], sigma[on], rows[on]).float() for ask, on in ((both, acts), (plain, ~acts))]
                said = torch.cat(parts)[torch.cat([acts.nonzero(), (~acts).nonzero()])[:, 0].argsort()]
            return said if guide.temperature == 1 else said / guide.temperature

        return predict

    # ----------------------------------------------------------------------------------------------------------- media
    def decode_latents(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W]. Raises ValueError for what are no tokens of the codebook."""
        vae = self.pipe.vae
        check_tokens("tokens", x, tuple(x.shape), len(vae.codes))
        return vae.decode(x.to(vae.device))

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Tokens, LongTensor [B, h, w]."""
        vae = self.pipe.vae
        return vae.quantise(vae.latents(pictures.to(vae.dtype)))

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        """See `DiffusersModel.save`; a pipeline's index names the libraries that the folder it came from named."""
        super().save(folder, network)
        place = Path(folder) / INDEX
        if place.is_file() and self.files.index:
            place.write_text(json.dumps(self.files.index, indent=2) + "\n")
        if place.is_file() and self.files.codes is not None:
            save_file({"path.emb": self.files.codes.contiguous()}, Path(folder) / "scheduler" / CODES)
