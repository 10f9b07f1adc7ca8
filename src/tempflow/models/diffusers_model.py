"""What adapters of diffusers' pipelines share; a family's file says only how it differs."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tempflow.core.schedule import Schedule
from tempflow.grid import SCHEDULER, Grid, read_grid, write_grid
from tempflow.media import Kind, Media, Size
from tempflow.models.attention import FusedForward
from tempflow.models.comfyui import Naming
from tempflow.models.compiled import RowCounts, Together, Uncompiled, compile_blocks
from tempflow.models.embeddings import Embeddings, Row, digest, stacked
from tempflow.models.family import Family, check_grid, check_size
from tempflow.models.finite import to_pictures
from tempflow.models.guidance import Guidance, guided
from tempflow.models.lora import (
    FittedLora,
    Shapes,
    add_adapter,
    attach,
    fresh_adapter,
    layer_shapes,
    lora_of,
    write_lora,
)
from tempflow.models.lora_files import NETWORK, Aliases, LoraFile, fit
from tempflow.models.pipeline_folder import (
    INDEX,
    LOADING_FAULTS,
    cannot_load,
    check_folder,
    check_names,
    check_packages,
    licence_of,
    pipeline_class,
    read_index,
    readable_index,
)
from tempflow.models.protocol import Conditioning, Predict, shared
from tempflow.models.quiet import quiet
from tempflow.models.tools import Tools, checkpointed, quantised_loading, resident, with_attention
from tempflow.request import Prompt

VAE_ROWS = 64
VAE_PIXELS = 1 << 22
"""Media decoded or encoded at once: at most so many, and together at most so many pixels (four at 1024²)."""


class DiffusersModel(ABC):
    """A loaded pipeline, all of it frozen and in eval mode until `train_fully` or `add_lora`.

    A family's class has `family`, and at least `encode_text` and `velocity`. In float32 an ODE rollout equals a call of
    the pipeline. In bfloat16 it does not: the network computes in bfloat16, but latents stay float32 here, where most
    pipelines round them after each step (2 to 5 % of their size was seen with SD 3).

    Raises ValueError for a pipeline without a part that is needed, or whose scheduler cannot be honoured.
    """

    family: ClassVar[Family]

    def __init__(self, pipe: Any, name: str, licence: str) -> None:
        self.pipe, self.name, self.licence, self.embeddings = pipe, name, licence, Embeddings()
        self._offloaded, self._dropped = False, False
        self.computes_on = ""  # a kind of device, where that is not where its tensors lie: in a count without weights
        for part in self.family.needed:
            if getattr(pipe, part) is None:
                others = f"; only {self.family.may_be_null} may be missing" if self.family.may_be_null else ""
                raise ValueError(f"model.path: {name!r} has no {part}{others}")
        self.check_scheduler()
        self._own_grid = self._grid = Grid()
        self._rows = RowCounts()
        for module in self._modules():
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path, name: str, dtype: torch.dtype, device: str) -> Self:
        """See `Adapter.load`."""
        return cls.load_with(folder, name, dtype, device, Tools())

    @classmethod
    def load_with(cls, folder: Path, name: str, dtype: torch.dtype, device: str, tools: Tools) -> Self:
        """Loads a pipeline folder, safetensors only, in `dtype`, but what the family or diffusers keeps in float32; in
        float16 the autoencoder too, which overflows. Optional parts that its index leaves out stay out.

        With `tools.offload` the networks alone go to `device`.

        Raises ValueError for a folder that is not whole, that cannot be honoured, or that the diffusers here lacks.
        """
        absent = dict.fromkeys((*check_folder(name, folder, cls.family), *cls.family.unused))
        kept = (*cls.family.float32_parts, *(("vae",) if dtype == torch.float16 else ()))
        dtypes = {"default": dtype, **dict.fromkeys(kept, torch.float32)}
        with quiet(), readable_index(folder) as place:
            index = read_index(name, folder)
            kind = pipeline_class(name, str(index["_class_name"]))
            check_packages(name, index, cls.family.needed)
            try:
                how = quantised_loading(cls.family.networks, tools.quantise, dtype)
                pipe = kind.from_pretrained(
                    str(place), torch_dtype=dtypes, use_safetensors=True, quantization_config=how, **absent
                )
            except LOADING_FAULTS as error:
                raise ValueError(cannot_load(name, error)) from error
        for part in ("vae", *(cls.family.networks if tools.quantise == "none" else ())):  # 4 bits have other names
            check_names(name, folder / part, getattr(pipe, part))
        for part in cls.family.networks if tools.offload else pipe.components:
            module = getattr(pipe, part)
            if isinstance(module, nn.Module):
                module.to(device)
        return cls(pipe, name, licence_of(folder)).carrying(folder)

    def carrying(self, folder: Path) -> Self:
        """The same, on the grid that its folder carries, if it carries one."""
        carried = read_grid(folder / "scheduler")
        if carried is not None:
            self.state_grid(carried)
            self._own_grid = carried
        return self

    # -------------------------------------------------------------------------------------------- what a family says
    @abstractmethod
    def encode_text(self, text: str, negative: bool, size: Size) -> Row:
        """One prompt's tensors, [L, …] or [d] by name; `negative`: it is what guidance leads away from.

        Tensors of several lengths are filled up with zeros (False) behind when they meet in a batch.
        """

    def text_key(self, text: str, negative: bool, size: Size) -> str:
        """All that `encode_text` reads, in one text."""
        return text

    def blank_row(self, tokens: int) -> Row | None:
        """Zeros of the shapes that `encode_text` gives, of a text of so many tokens where these count: what
        `tempflow cost` counts memory with, from configurations alone. None: the family does not say."""
        return None

    @abstractmethod
    def velocity(
        self, network: nn.Module, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor], guidance: Guidance
    ) -> Tensor:
        """The network's velocity ε − x0, [B, *S], of latents x [B, *S] at σ [B]; `rows`: a prompt's tensors for each of
        them, [B, …]."""

    def walked(self) -> Any:
        """A fresh scheduler whose grid is walked: the folder's own, without the state that a call leaves behind."""
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)

    def set_timesteps(
        self, scheduler: Any, steps: int, shape: tuple[int, ...], u: Sequence[float] | None = None
    ) -> None:
        """Sets a fresh scheduler as the pipeline does for a latent of that shape: for a number of steps, or, where they
        are given, through points u, as many (its own `sigmas`)."""
        scheduler.set_timesteps(steps if u is None else None, sigmas=u)

    def decode_latents(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in −1 … 1."""
        vae, (scale, shift) = self.pipe.vae, self._scale_and_shift()
        return vae.decode((x / scale + shift).to(vae.dtype), return_dict=False)[0]

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents of pictures [B, 3, H, W] in −1 … 1, as `decode_latents` takes them."""
        vae, (scale, shift) = self.pipe.vae, self._scale_and_shift()
        return (mode(vae.encode(pictures.to(vae.dtype))).float() - shift) * scale

    def _scale_and_shift(self) -> tuple[float, float]:
        """The autoencoder's, where null means none (diffusers' own call fails on null)."""
        config = self.pipe.vae.config
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        return 1.0 if scale is None else scale, 0.0 if shift is None else shift

    def lora_aliases(self, layers: Sequence[str]) -> Aliases:
        """Other names that LoRA files have for the network's layers."""
        return {}

    @classmethod
    def comfyui(cls, layers: Sequence[str]) -> Naming | None:
        """What ComfyUI calls these layers of the network; None where that is not known."""
        return None

    @classmethod
    def layers_in(cls, folder: Path, name: str) -> Shapes:
        """The layers of the network in a pipeline's folder, by its configuration alone; `name` is what the user called
        it."""
        from accelerate import init_empty_weights

        part = cls.family.networks[0]
        library, kind = read_index(name, folder)[part]
        made: Any = getattr(import_module(library), kind)
        with quiet(), init_empty_weights():
            return layer_shapes(made.from_config(made.load_config(folder / part)))

    def notes(self) -> tuple[str, ...]:
        """See `TakesTools.notes`: another sampler than the folder's."""
        walked, named = self.family.sampler.partition(".")[0], type(self.pipe.scheduler).__name__
        return (
            (f"the folder names {named}; it is drawn by {walked} with the same σ",) if walked not in ("", named) else ()
        )

    # ------------------------------------------------------------------------------------------------------ the model
    @property
    def makes(self) -> Kind:
        return self.family.makes

    @property
    def takes_sources(self) -> bool:
        return self.family.sources

    @property
    def guidance(self) -> type[Guidance]:
        return self.family.guidance

    @property
    def network(self) -> nn.Module:
        return getattr(self.pipe, self.family.networks[0])

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The network's blocks."""
        return [block for name in self.family.blocks for block in network.get_submodule(name).children()]

    @property
    def device(self) -> torch.device:
        any_network: Any = self.network
        return any_network.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; latents stay float32."""
        any_network: Any = self.network
        return any_network.dtype

    def text_encoders(self) -> dict[str, nn.Module]:
        """Those that the pipeline has, by the names of its parts."""
        parts: Mapping[str, Any] = self.pipe.components
        return {name: m for name, m in parts.items() if name.startswith("text_encoder") and m is not None}

    def _modules(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def settings(self, name: str) -> Mapping[str, Any] | None:
        """A JSON file of the folder as the loaded parts tell it: `family.Settings`."""
        part, _, file = name.partition("/")
        if name == INDEX:
            return self.pipe.config
        if file not in ("config.json", "scheduler_config.json"):
            return None
        config = getattr(getattr(self.pipe, part, None), "config", None)
        return config if config is None or isinstance(config, Mapping) else config.to_dict()

    # ----------------------------------------------------------------------------------------------------- conditions
    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        """See `Model.encode`. Raises ValueError for no prompt, or sources that it does not draw from."""
        if not prompts:
            raise ValueError("prompts: the list is empty; at least one prompt is needed")
        for prompt in prompts:
            if prompt.sources and not self.family.sources:
                raise ValueError(f"prompt {prompt.text[:60]!r} has pictures, and {self.name!r} draws from text alone")
        keys: list[str] = []
        encode: dict[str, Any] = {}
        for text, negative in [(p.negative, True) for p in prompts] + [(p.text, False) for p in prompts]:
            keys.append(self.text_key(text, negative, size))
            encode.setdefault(keys[-1], partial(self._encode_text, text, negative, size))
        here = partial(resident, list(self.text_encoders().values()), self.device, self._offloaded)
        rows, count = self.embeddings.rows(keys, encode, here), len(prompts)
        negatives, texts = rows[:count], rows[count:]
        return Conditioning(
            tuple(prompts),
            self._batch(texts, keys[count:], negatives),
            self._batch(negatives, keys[:count], texts),
        )

    @torch.no_grad()
    def _encode_text(self, text: str, negative: bool, size: Size) -> Row:
        # One by one: in a batch the last bits would depend on its size, so on what an earlier call happened to leave in
        # the cache, and a resumed run would drift from an uninterrupted one.
        if self._dropped:
            raise ValueError(
                f"prompt {text[:60]!r} has not been encoded, and the text encoders are dropped; nearest valid: "
                "model.drop_encoders false"
            )
        return self.encode_text(text, negative, size)

    def _batch(self, rows: Sequence[Row], keys: Sequence[str], beside: Sequence[Row]) -> dict[str, Tensor]:
        """On the model's device; fractions in the network's dtype, masks and ids as they are."""
        alike = len(set(keys)) == 1
        tensors = stacked(rows[:1] if alike else rows, (*rows, *beside))
        moved = {n: t.to(self.device, self.dtype if t.is_floating_point() else None) for n, t in tensors.items()}
        return {n: shared(t, len(rows)) for n, t in moved.items()} if alike else moved

    # -------------------------------------------------------------------------------------------------------- drawing
    def check_scheduler(self) -> None:
        """Raises ValueError for a scheduler that cannot be honoured."""
        self.family.scheduler(self.name, type(self.pipe.scheduler).__name__, self.pipe.scheduler.config)

    def state_grid(self, grid: Grid) -> None:
        """See `WalksGrids.state_grid`."""
        check_grid(self.family, self.name, self.settings, grid, {})
        self._grid = grid

    def stated_grid(self) -> Grid:
        """See `WalksGrids.stated_grid`."""
        return self._grid

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The grid of a fresh copy of the folder's own scheduler, as the pipeline sets it; where one is stated, as the
        pipeline sets it when it is given those points.

        Raises ValueError for steps below 1 or that the stated grid has not, a size that cannot be drawn, or a scheduler
        that gives no falling grid.
        """
        if steps < 1:
            raise ValueError(f"steps: {steps} is too small; the nearest valid value is 1")
        self._grid.check_steps("steps", steps)
        shape = self.noise_shape(size)
        self.check_scheduler()
        try:
            return self.grid(steps, shape)
        except ValueError as error:
            raise ValueError(
                f"model.path: the scheduler of {self.name!r} gives no falling grid for {steps} steps ({error}); "
                "nearest valid: other steps, or another scheduler/scheduler_config.json"
            ) from error

    def grid(self, steps: int, shape: tuple[int, ...]) -> Schedule:
        """The grid for latents of that shape. Raises ValueError where there is none."""
        scheduler, u = self.walked(), self._grid.points(steps)
        if u is None:
            self.set_timesteps(scheduler, steps, shape)
        else:
            self.set_timesteps(scheduler, steps, shape, u)
        sigmas = scheduler.sigmas.float()
        if sigmas[0] <= 1 + 1e-5:  # at some shifts rounding takes σ_0 to 1 + 10⁻⁷
            sigmas = sigmas.clamp(max=1)
        return Schedule(sigmas)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """See `Model.noise_shape`."""
        check_size(size, self.makes, self.name)
        shape = self.family.latent_shape(self.settings, size)
        if shape is None:
            raise ValueError(f"model.path: {self.name!r} does not say the shape of its latents; is the folder whole?")
        return shape

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        """See `Model.predictor`. The negative branch carries no gradient (Flow-GRPO's later code); where the guidance
        takes one row alone, it is not computed. Without gradients both branches are one batch.

        Velocities come in the network's dtype, guided ones in float32 or better.
        """
        module, guide = network if network is not None else self.network, guided(guidance, self.guidance)
        tensors, negative = condition.tensors, condition.negative
        if guide.rows > 1 and negative is None:
            raise ValueError(
                f"guidance: {guide.guidance} needs conditions with negative prompts; without them only 1 is valid"
            )

        def velocity(x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            def plain(x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
                return self.velocity(module, x, sigma, rows, guide)

            with self._attention():
                return self._rows(plain, x, sigma, rows)

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            asked = {name: tensor[rows] for name, tensor in tensors.items()}
            if guide.rows == 1 or negative is None:
                return velocity(x, sigma, asked)
            away = {name: tensor[rows] for name, tensor in negative.items()}
            if torch.is_grad_enabled():
                with torch.no_grad():
                    base = velocity(x, sigma, away)
                positive = velocity(x, sigma, asked)
            else:
                both = {name: torch.cat([away[name], tensor]) for name, tensor in asked.items()}
                base, positive = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return guide(positive, base)

        return predict

    def _attention(self) -> AbstractContextManager[object]:
        if (self.computes_on or self.device.type) == "cpu" and self.dtype == torch.bfloat16:
            return FusedForward()
        return nullcontext()

    def _again(self) -> AbstractContextManager[object]:
        """What a block's second forward runs in, to compute as the first did; asked at the first."""
        return Together(self._attention(), Uncompiled.as_now())

    # ---------------------------------------------------------------------------------------------------------- media
    @torch.no_grad()
    def decode(self, x: Tensor, size: Size) -> Media:
        """See `Model.decode`; in float32 equal to the pipeline's pictures, in parts that bound memory."""
        with resident([self.pipe.vae], self.device, self._offloaded):
            return to_pictures(self.decode_latents(part) for part in x.split(rows_at_once(size)))

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        """See `DecodesPixels.decode_pixels`; in parts as `decode`. Raises ValueError where the autoencoder is moved to
        the device for each call, as a backward needs it there."""
        if self._offloaded:
            raise ValueError("model.offload: true, and gradients go through the decoder; nearest valid: false")
        parts = [self.decode_latents(part).float() / 2 + 0.5 for part in x.split(rows_at_once(size))]
        return torch.cat(parts).clamp(0, 1)[:, None]

    @torch.no_grad()
    def encode_media(self, media: Media, size: Size) -> Tensor:
        """See `Model.encode_media`: float32 latents, the mode of the autoencoder's posterior (where it has one); in
        parts that bound memory."""
        self.noise_shape(size)
        media = Media.of(media)
        if media.frames.shape[1:] != (1, size.height, size.width, 3):
            raise ValueError(f"media: {media.size}, and {size} is asked for; nearest valid: pictures of {size}")
        pictures = media.pictures()
        latents: list[Tensor] = []
        with resident([self.pipe.vae], self.device, self._offloaded):
            for part in pictures.split(rows_at_once(size)):
                image = part.to(self.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
                latents.append(self.encode_pictures(image))
        return torch.cat(latents)

    # ------------------------------------------------------------------------------------------------------- training
    def equip(self, tools: Tools) -> tuple[str, ...]:
        """See `TakesTools.equip`."""
        network: Any = self.network
        self._offloaded = tools.offload
        if tools.attention:
            with_attention(network, tools.attention)
        if tools.checkpointing:
            checkpointed(network, self._again)
        if tools.vae_tiling:
            if not hasattr(self.pipe.vae, "enable_tiling"):
                raise ValueError(f"model.vae_tiling: the autoencoder of {self.name!r} has none; nearest valid: false")
            self.pipe.vae.enable_tiling()
        why = compile_blocks(self.blocks(network), self.device, tools.compile_rows) if tools.compile else ""
        if tools.compile and not why:
            self._rows = RowCounts(tools.compile_rows)
        return (f"warn: model.compile: goes on uncompiled, as {why}",) if why else ()

    def keep_embeddings(self, folder: Path, most: int, pipeline: Path) -> None:
        """See `TakesTools.keep_embeddings`. What is there of another model, dtype, kind of device or library is not
        taken for this one's."""
        import diffusers
        import transformers

        parts = [part for part in self.pipe.components if part.startswith(("text_encoder", "tokenizer", "processor"))]
        facts = [type(self).__name__, self.dtype, self.device.type, diffusers.__version__, transformers.__version__]
        facts.append(find_spec("ftfy") is not None)  # cleans prompts where it is installed
        self.embeddings = Embeddings(folder=folder, content=digest(pipeline, parts, facts), disk=most)

    def drop_encoders(self) -> None:
        """See `TakesTools.drop_encoders`."""
        for name in self.text_encoders():
            setattr(self.pipe, name, None)
        self._dropped = True

    def train_fully(self) -> None:
        """All of the network's parameters become the policy."""
        self.network.requires_grad_(True)

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] | None = None) -> None:
        """See `TakesLora.add_lora`; on the family's usual layers, unless `targets` says otherwise."""
        fresh_adapter(self.network, rank, alpha, self.family.lora_targets if targets is None else targets)

    def add_lora_on(self, ranks: Mapping[str, int], scale: float) -> None:
        """See `TakesLora.add_lora_on`."""
        add_adapter(self.network, ranks, scale)

    def fit_lora(self, file: LoraFile) -> FittedLora:
        """See `TakesLora.fit_lora`; of the network and the text encoders."""
        components = {NETWORK: self.network, **self.text_encoders()}
        shapes = {name: layer_shapes(module) for name, module in components.items()}
        found = fit(file, shapes, self.lora_aliases(list(shapes[NETWORK])), self.name)
        return FittedLora(found.pop(NETWORK, {}), found)

    def attach_lora(self, lora: FittedLora) -> None:
        """See `TakesLora.attach_lora`; prompts are encoded anew."""
        if lora_of(self.network):
            raise ValueError("the model has a LoRA already; load it afresh to add another")
        for part, factors in lora.by_part(self.family.networks[0]).items():
            attach(getattr(self.pipe, part), factors)
        self.embeddings.clear()

    @property
    def nbytes(self) -> int:
        """See `Adapter.nbytes`."""
        return sum(t.nbytes for module in self._modules() for t in module.state_dict().values())

    def to_dtype(self, dtype: torch.dtype) -> None:
        """See `Adapter.to_dtype`; what the family keeps in float32 stays so."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name not in self.family.float32_parts:
                part.to(dtype=dtype)
        self.embeddings.clear()

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        """A LoRA as `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`, else the whole pipeline folder.

        Either with the licence in `licence.json`. The LoRA's scale is multiplied into B: a file without a scale means
        the same to every reader, and one beside the weights is lost on some.
        """
        with quiet():
            kept, part = self.network if network is None else network, self.family.networks[0]
            lora = lora_of(kept)
            if lora:
                write_lora(lora, Path(folder), part=part)
            else:
                parts, told = self.pipe.components, self.pipe.config
                asked = inspect.signature(type(self.pipe).__init__).parameters
                options = {name: told[name] for name in asked if name in told and name not in parts}
                pipe = type(self.pipe)(**{**parts, part: kept}, **options)
                pipe.save_pretrained(folder, safe_serialization=True)
            if self._grid.how != SCHEDULER or (lora and self._own_grid.how != SCHEDULER):
                write_grid(self._grid, Path(folder) / ("" if lora else "scheduler"))
        (Path(folder) / "licence.json").write_text(json.dumps({"licence": self.licence}) + "\n")


def mode(encoded: Any) -> Tensor:
    """What an autoencoder's `encode` gave, as one latent: its posterior's mode, where it has one."""
    first = encoded[0]
    return first if isinstance(first, Tensor) else first.mode()


def rows_at_once(size: Size) -> int:
    """Media that go through an autoencoder at once."""
    return max(1, min(VAE_ROWS, VAE_PIXELS // size.pixels))


def token_shift(config: Mapping[str, Any], tokens: int) -> float:
    """μ of the σ grid's dynamic shift: linear in the tokens of a latent, by the scheduler's configuration."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


# Networks that take patches of 2 × 2 side by side as tokens. A permutation: noise and log-probs are the same.
def pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] → [B, h·w, 4C]: patches row by row, in each the channels outermost."""
    batch, channels, height, width = x.shape
    patches = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse, [B, C, height, width]."""
    batch, _, wide = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, wide // 4, height, width)
