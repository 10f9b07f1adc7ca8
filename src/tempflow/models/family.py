"""What is known of a family of pipelines before anything of it is loaded, and what an adapter's class offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch

from tempflow.grid import SCHEDULER, Grid
from tempflow.media import Kind, Size
from tempflow.models.guidance import Guidance, guidance_of
from tempflow.models.protocol import Model

Settings = Callable[[str], Mapping[str, Any] | None]
"""settings("tokenizer/tokenizer_config.json") -> that JSON file of the base model; None where it is not here."""


def any_scheduler(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """Every scheduler will do."""


def unknown_shape(settings: Settings, size: Size) -> tuple[int, ...] | None:
    """The family does not say."""
    return None


def nothing_said(settings: Settings) -> str:
    """The files say nothing of it."""
    return ""


def any_points(settings: Settings) -> str:
    """Nothing in these files keeps a sampler from stated points."""
    return ""


def as_sigmas(u: Sequence[float], settings: Settings) -> Mapping[str, object]:
    """A call of the pipeline on that grid: as many steps as points, which it shifts itself."""
    return {"num_inference_steps": len(u), "sigmas": list(u)}


def no_options(settings: Settings) -> Mapping[str, object]:
    """A call of the pipeline needs nothing more."""
    return {}


@dataclass(frozen=True)
class Family:
    """Pipelines that one adapter serves.

    title        what people call them
    needed       parts that must be there, the networks among them, by the names of model_index.json
    optional     parts that may be null
    unused       parts that may lie in the folder and are never loaded: a checker of pictures
    weightless   parts that have no weights, beside the scheduler, tokenizers and feature extractors: a processor
    own          parts whose class this package brings, and that class, whatever library a folder names for it
    together     pairs of optional parts: the first needs the second
    may_be_null  the optional ones in words, for the message over a part that is missing
    networks     the parts that are trained
    blocks       the lists of repeated layers inside a network
    float32_parts  parts that are computed in float32 whatever the network's dtype
    lora_targets ends of the names of the layers that a LoRA is put on
    task         the hub's pipeline tag, for model cards
    makes        what it makes
    sources      whether it draws from pictures too
    streams      of its states, by the names of their layout (`core.state.StateLayout`): ("video", "sound"); () for one
    tokens       whether its states are tokens (`protocol.MovesTokens`)
    guidance     its guidance
    scheduler    check(path, class, config): raises ValueError for a scheduler that cannot be honoured
    latent_shape latent_shape(settings, size): the shape of a latent; None where it cannot be told from these files
    distilled    distilled(settings): what in these files says that it is a few-step distillation; "" if nothing
    sampler      the scheduler that it is drawn by, in Python that has a `pipe`, where folders name others, for model
                 cards; "" for their own
    call_options what a call of the pipeline needs beside prompt, steps, guidance and size, for model cards
    own_grid     own_grid(settings): what in these files keeps samples from a stated grid; "" if nothing
    grid_call    grid_call(u, settings): what a call of the pipeline walks the grid through points u by, for model cards
    """

    title: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    weightless: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict[str, str])
    together: tuple[tuple[str, str], ...] = ()
    may_be_null: str = ""
    networks: tuple[str, ...] = ("transformer",)
    blocks: tuple[str, ...] = ("transformer_blocks",)
    float32_parts: tuple[str, ...] = ()
    lora_targets: Sequence[str] = ()
    task: str = "text-to-image"
    makes: Kind = "picture"
    sources: bool = False
    streams: tuple[str, ...] = ()
    tokens: bool = False
    guidance: type[Guidance] = Guidance
    scheduler: Callable[[str, str, Mapping[str, Any]], None] = field(default=any_scheduler)
    latent_shape: Callable[[Settings, Size], tuple[int, ...] | None] = field(default=unknown_shape)
    distilled: Callable[[Settings], str] = field(default=nothing_said)
    sampler: str = ""
    call_options: Callable[[Settings], Mapping[str, object]] = field(default=no_options)
    own_grid: Callable[[Settings], str] = field(default=any_points)
    grid_call: Callable[[Sequence[float], Settings], Mapping[str, object]] = field(default=as_sigmas)


def drawable(size: Size, channels: int, scale: int, patch: int = 1, most: int | None = None) -> tuple[int, int, int]:
    """[C, H, W] of one latent: `scale` pixels a side of a latent, sides of whole patches, `most` patches at most.

    Raises ValueError for another height or width, naming the nearest.
    """
    unit = scale * patch
    limit = None if most is None else most * unit
    for label, value in (("height", size.height), ("width", size.width)):
        nearest = max(round(value / unit), 1) * unit
        nearest = nearest if limit is None else min(nearest, limit)
        if value != nearest:
            upto = "" if limit is None else f" up to {limit}"
            raise ValueError(f"{label}: {value} must be a multiple of {unit}{upto}; nearest is {nearest}")
    return (channels, size.height // scale, size.width // scale)


def by_transformer(
    shape: Callable[[Mapping[str, Any], int, Size], tuple[int, ...]], stages: str = "block_out_channels", first: int = 1
) -> Callable[[Settings, Size], tuple[int, ...] | None]:
    """`Family.latent_shape` by the configurations of a transformer and an autoencoder. It raises ValueError where one
    of them does not say what is asked.

    shape   shape(the transformer's configuration, pixels a side of a latent, size)
    stages  the autoencoder's list of stages, each of which halves the sides but for the `first`
    """

    def latent_shape(settings: Settings, size: Size) -> tuple[int, ...] | None:
        transformer, vae = settings("transformer/config.json"), settings("vae/config.json")
        if transformer is None or vae is None:
            return None
        for part, told, key in (("transformer", transformer, "in_channels"), ("vae", vae, stages)):
            if key not in told:
                raise ValueError(f"model.path: {part}/config.json does not say {key!r}; is the folder whole?")
        return shape(transformer, 2 ** (len(vae[stages]) - first), size)

    return latent_shape


def check_size(size: Size, made: Kind, model: str) -> None:
    """Raises ValueError, naming the field, for frames, a rate or a length of sound of a model that makes none."""
    pictures, silent = made == "picture", "sound" not in made
    for name, value, none, wrong in (
        ("frames", size.frames, 1, pictures and size.frames != 1),
        ("fps", size.fps, "null", pictures and size.fps is not None),
        ("seconds", size.seconds, "null", silent and size.seconds is not None),
    ):
        if wrong:
            raise ValueError(f"{name}: {value} of {model!r}, which makes {made}s; nearest valid: {none}")


def check_asked(
    family: Family, model: str, settings: Settings, size: Size, guidance: float, options: Mapping[str, object]
) -> Guidance:
    """What a configuration asks of a family, before anything is loaded: the size, as far as the folder's settings tell,
    and the guidance, which it returns. Raises ValueError, naming the field."""
    check_size(size, family.makes, model)
    family.latent_shape(settings, size)
    return guidance_of(family.guidance, guidance, options)


def check_grid(family: Family, model: str, settings: Settings, grid: Grid, steps: Mapping[str, int]) -> None:
    """Whether pipelines of a family, of which `settings` are one's files, are drawn on a grid in these steps, by the
    field that asks for them. Raises ValueError: for the grid beginning with "grid:", else naming the field."""
    why = family.own_grid(settings) if grid.how != SCHEDULER else ""
    if why:
        raise ValueError(f"grid: {grid} of {model!r}, but {why}; nearest valid: {SCHEDULER!r}")
    for field_name, count in steps.items():
        grid.check_steps(field_name, count)


class Adapter(Model, Protocol):
    """A model of a pipeline's folder; `models.ADAPTERS` finds the class by the class of the pipeline.

    One on which a LoRA can be trained has the members of `lora_files.TakesLora` too.
    """

    family: ClassVar[Family]

    @classmethod
    def load(cls, folder: Path, name: str, dtype: torch.dtype, device: str) -> Self:
        """The pipeline in `folder`, safetensors only, frozen; `name` is what the user called it.

        Raises ValueError, naming `model.path`, for a folder that is not whole or cannot be honoured.
        """
        ...

    def train_fully(self) -> None:
        """All of the network's parameters become the policy."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all of the pipeline's weights."""
        ...

    def to_dtype(self, dtype: torch.dtype) -> None:
        """All of the pipeline's weights in that dtype, for `save`."""
        ...
