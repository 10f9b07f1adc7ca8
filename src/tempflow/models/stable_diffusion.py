"""Stable Diffusion 1.x / 2.x and XL by diffusers: UNets that predict the noise or DDPM's v, as flow models.

They are walked by DDIM, which is Euler's rule in flow coordinates (`core.prediction`), with the betas and the times of
the folder's scheduler, whichever sampler that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.core.prediction import Kind, VariancePreserving, predictor
from tempflow.core.schedule import Schedule
from tempflow.media import Size
from tempflow.models.comfyui import Naming, own_names
from tempflow.models.diffusers_model import DiffusersModel
from tempflow.models.embeddings import Row
from tempflow.models.family import Family, Settings, drawable
from tempflow.models.guidance import Guidance
from tempflow.models.lora_files import Aliases, Part

PIPELINES = {"StableDiffusionPipeline": "StableDiffusion", "StableDiffusionXLPipeline": "StableDiffusionXL"}

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Both attentions of every transformer block: diffusers' examples, DDPO's PyTorch code."""

KINDS: Mapping[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""Those that clip x̂0 unless told otherwise."""

OWN_GRID = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings of samplers' own grids, which DDIM does not have."""

NO_SIGNAL = 1e-16
"""ᾱ in the place of 0 where the betas are rescaled to end in noise alone: its σ is 1 in float32."""

DISTILLED = ("LCMScheduler", "TCDScheduler")


# ------------------------------------------------------------------------------------------------------------ scheduler
def check_betas(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming class and setting, for a scheduler without betas, or one whose x̂0 is clipped."""
    told = _told(config)
    if "beta_schedule" not in told and not told.get("trained_betas"):
        raise ValueError(
            f"model.path: {path!r} has the scheduler {kind!r}, which says no betas; nearest valid: 'DDIMScheduler' "
            "with the model's own in scheduler/scheduler_config.json"
        )
    one, first = told.get("set_alpha_to_one", True), told.get("steps_offset", 0) == 0
    spacing, prediction = told.get("timestep_spacing", "leading"), told.get("prediction_type", "epsilon")
    zero = told.get("rescale_betas_zero_snr", False)
    for setting, wrong, why, nearest in (
        ("clip_sample", told.get("clip_sample", kind in CLIPPING), "it clips x0, and latents have no bounds", "false"),
        ("thresholding", told.get("thresholding"), "it clips x0, and latents have no bounds", "false"),
        ("use_flow_sigmas", told.get("use_flow_sigmas"), "its σ come from no betas", "false"),
        ("prediction_type", prediction not in KINDS, f"known are {', '.join(KINDS)}", "'epsilon'"),
        (
            "beta_schedule",
            not told.get("trained_betas") and told["beta_schedule"] not in BETAS,
            f"DDIM has {', '.join(BETAS)}",
            "'scaled_linear'",
        ),
        (
            "rescale_betas_zero_snr",
            zero and prediction == "epsilon",
            "at the first time there is noise alone, of which ε says nothing",
            "prediction_type 'v_prediction'",
        ),
        (
            "set_alpha_to_one",
            not one and (spacing == "linspace" or (spacing == "leading" and first)),
            "the last step would lead from time 0 to time 0",
            "timestep_spacing 'leading' with steps_offset 1",
        ),
    ):
        if wrong:
            raise ValueError(
                f"model.path: {path!r} has a {kind} with {setting} {str(told.get(setting))[:40]!r}: {why}; "
                f"nearest valid: {nearest} in scheduler/scheduler_config.json"
            )


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder itself says; a class's defaults are not those of DDIM."""
    defaults = config.get("_use_default_values", ())
    return {name: value for name, value in config.items() if name not in defaults}


@lru_cache(maxsize=4)
def ddim_of(scheduler: Any) -> tuple[Any, VariancePreserving, Kind]:
    """DDIM with that scheduler's betas and times, its noise levels, and what the network predicts."""
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

    ddim: Any = DDIMScheduler.from_config(scheduler.config)
    path = VariancePreserving(ddim.alphas_cumprod.double().clamp(min=NO_SIGNAL))
    return ddim, path, KINDS[ddim.config.prediction_type]


# --------------------------------------------------------------------------------------------------------------- family
def _latent_shape(settings: Settings, size: Size) -> tuple[int, ...] | None:
    unet, vae = settings("unet/config.json"), settings("vae/config.json")
    if unet is None or vae is None:
        return None
    channels, own = unet["in_channels"], vae.get("latent_channels", 4)
    if channels != own:
        raise ValueError(
            f"model.path: unet/config.json has in_channels {channels}, and the autoencoder {own}: it draws into a "
            "picture that it is given; nearest valid: a text-to-image checkpoint"
        )
    if unet.get("time_cond_proj_dim"):
        raise ValueError(
            f"model.path: unet/config.json has time_cond_proj_dim {unet['time_cond_proj_dim']}: a consistency model; "
            "nearest valid: the checkpoint that it was distilled from"
        )
    return drawable(size, channels, 2 ** (len(vae["block_out_channels"]) - 1))


def _distilled(settings: Settings) -> str:
    sampler = (settings("model_index.json") or {}).get("scheduler") or ("", "")
    return f"its scheduler is {sampler[1]}" if sampler[1] in DISTILLED else ""


def _own_grid(settings: Settings) -> str:
    return "it is drawn at DDIM's own times"


SD = Family(
    title="Stable Diffusion 1.x / 2.x",
    needed=("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    optional=("feature_extractor", "image_encoder"),
    unused=("safety_checker",),
    networks=("unet",),
    float32_parts=("vae",),
    lora_targets=LORA_TARGETS,
    scheduler=check_betas,
    latent_shape=_latent_shape,
    distilled=_distilled,
    own_grid=_own_grid,
    sampler="DDIMScheduler.from_config(pipe.scheduler.config)",
)

SDXL = Family(
    title="Stable Diffusion XL",
    needed=("unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    optional=("feature_extractor", "image_encoder"),
    networks=("unet",),
    float32_parts=("vae",),  # in half precision the released one overflows
    lora_targets=LORA_TARGETS,
    scheduler=check_betas,
    latent_shape=_latent_shape,
    distilled=_distilled,
    own_grid=_own_grid,
    sampler="DDIMScheduler.from_config(pipe.scheduler.config)",
)


class StableDiffusion(DiffusersModel):
    """The adapter of SD 1.x / 2.x. States are z = x/(a+b); samples, which the autoencoder takes, are x."""

    family = SD

    def notes(self) -> tuple[str, ...]:
        """That it is walked by DDIM, where the folder names another sampler."""
        scheduler = self.pipe.scheduler
        kind, grids = type(scheduler).__name__, [name for name in OWN_GRID if scheduler.config.get(name)]
        if kind == "DDIMScheduler":
            return ()
        without = f", without {', '.join(grids)}" if grids else ""
        return (f"the folder names {kind}; it is drawn by DDIM with the same betas{without}",)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """Transformer blocks and residual blocks, wherever they are nested."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return [module for module in network.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [77, d]."""
        return {"embeds": self.pipe.encode_prompt([text], self.device, 1, do_classifier_free_guidance=False)[0][0]}

    def blank_row(self, tokens: int) -> Row:
        width = self.pipe.unet.config.cross_attention_dim
        return {"embeds": torch.zeros(self.pipe.tokenizer.model_max_length, width)}

    def grid(self, steps: int, shape: tuple[int, ...]) -> Schedule:
        """DDIM's: at the times that the folder's spacing visits, and then at ᾱ_0 or, with `set_alpha_to_one`, at 1."""
        ddim, path, _ = ddim_of(self.pipe.scheduler)
        ddim.set_timesteps(steps)
        return path.schedule(ddim.timesteps.tolist(), 0.0 if ddim.config.set_alpha_to_one else None)

    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        _, path, kind = ddim_of(self.pipe.scheduler)

        def said(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
            return network(
                x.to(self.dtype),
                t,
                encoder_hidden_states=rows["embeds"],
                added_cond_kwargs=self.added(x, rows),
                return_dict=False,
            )[0]

        return predictor(said, path, kind)(x, sigma, torch.arange(len(x), device=x.device))

    def added(self, x: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """What the network takes beside the text."""
        return None

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """CompVis' own names of the layers."""
        return original_names(layers)

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        """Our names, as kohya's scripts write them for SD 1.x."""
        return Naming(own_names(layers), kohya=True)


class StableDiffusionXL(StableDiffusion):
    """The adapter of SDXL. A prompt without a negative text is guided away from zeros, where its folder says so
    (`force_zeros_for_empty_prompt`), as by its pipeline: not from the embedding of an empty text."""

    family = SDXL

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming:
        """CompVis' names, as kohya's scripts write them for SDXL."""
        return Naming(original_names(layers), kohya=True)

    def text_key(self, text: str, negative: bool, size: Size) -> str:
        """Nothing to lead away from is not the empty text."""
        return f"{self._nothing(text, negative)}\0{text}"

    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """`embeds` [77, d] and `pooled` [p]."""
        embeds, _, pooled, _ = self.pipe.encode_prompt([text], device=self.device, do_classifier_free_guidance=False)
        row = {"embeds": embeds[0], "pooled": pooled[0]}
        if self._nothing(text, negative):
            return {name: torch.zeros_like(tensor) for name, tensor in row.items()}
        return row

    def blank_row(self, tokens: int) -> Row:
        config = self.pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim  # beside 6 sizes
        return {**super().blank_row(tokens), "pooled": torch.zeros(pooled)}

    def _nothing(self, text: str, negative: bool) -> bool:
        return negative and not text and bool(self.pipe.config.force_zeros_for_empty_prompt)

    def added(self, x: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled text, and the sizes that the picture is said to have: its own, and no crop."""
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device)
        return {"text_embeds": rows["pooled"], "time_ids": sizes.expand(len(x), -1)}

    def _statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the autoencoder's channels, [C, 1, 1]; None where it says none."""
        config = self.pipe.vae.config
        told = [config.get(name) for name in ("latents_mean", "latents_std")]
        if None in told:
            return None
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in told)
        return mean, std

    def decode_latents(self, x: Tensor) -> Tensor:
        told, (scale, _) = self._statistics(), self._scale_and_shift()
        return super().decode_latents(x if told is None else x * told[1] + told[0] * scale)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        told, (scale, _), x = self._statistics(), self._scale_and_shift(), super().encode_pictures(pictures)
        return x if told is None else (x - told[0] * scale) / told[1]


# ---------------------------------------------------------------------------------------------------------------- names
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
IN_RESNETS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
LAYER = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_names(layers: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """CompVis' name of each layer of a UNet (`input_blocks.4.1.…`) → diffusers' layer.

    There, blocks are numbered through: each residual block of a level is one, with its attention as the second part of
    it; so is what halves the sides, while what doubles them is the last part of the level's last block.
    """
    there = list(layers)
    names: dict[str, tuple[Part, ...]] = {name: (Part(layer),) for name, layer in OUTSIDE.items() if layer in there}
    found = [(layer, match) for layer in there if (match := LAYER.fullmatch(layer))]
    counts: dict[tuple[str, int, str], int] = {}
    for _, match in found:
        place = (match[1], int(match[2] or 0), match[3])
        counts[place] = max(counts.get(place, 0), int(match[4]) + 1)

    def before(side: str, level: int) -> int:
        """Numbered blocks of the levels above."""
        return sum(
            count for (s, n, part), count in counts.items() if s == side and n < level and part in ("resnets", DOWN)
        )

    for layer, match in found:
        side, level, part, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        inside = IN_RESNETS.get(rest, rest) if part == "resnets" else rest
        if side == "mid":
            place = f"middle_block.{1 if part == 'attentions' else 2 * number}"
        elif part == DOWN:
            place, inside = f"input_blocks.{1 + before(side, level) + counts[side, level, 'resnets']}.0", "op"
        elif part == "upsamplers":
            last = before(side, level) + counts[side, level, "resnets"] - 1
            place = f"output_blocks.{last}.{2 if (side, level, 'attentions') in counts else 1}"
        else:
            at = before(side, level) + number + (side == "down")
            place = f"{'input' if side == 'down' else 'output'}_blocks.{at}.{int(part == 'attentions')}"
        names[f"{place}.{inside}"] = (Part(layer),)
    return names


DOWN = "downsamplers"
