"""What tempflow asks of a generator: a model knows nothing of RL, and any object with these members plugs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tempflow.core.dynamics import ODE, Dynamics
from tempflow.core.schedule import Schedule
from tempflow.core.state import WHOLE, StateLayout
from tempflow.grid import Grid
from tempflow.media import Kind, Media, Size
from tempflow.models.guidance import Guidance
from tempflow.request import Prompt

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""predict(x [B, *S], sigma float32[B], rows long[B]) -> velocity [B, *S], of tokens logits [B, *S, V]; `rows` index the
bound conditions."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What prompts were encoded to: named tensors [N, …], row n for prompt n, and the prompts for the record.

    `negative` holds the same tensors for what guidance leads away from, a row for each prompt too: its negative text,
    with the prompt's own sources (None: no guidance). Rows that are all alike may share memory (`shared`).
    """

    prompts: tuple[Prompt, ...]
    tensors: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def repeated(self, count: int) -> Conditioning:
        """Every row `count` times, one after the other."""
        prompts = tuple(prompt for prompt in self.prompts for _ in range(count))
        negative = None if self.negative is None else {n: _repeated(t, count) for n, t in self.negative.items()}
        return Conditioning(prompts, {n: _repeated(t, count) for n, t in self.tensors.items()}, negative)


def _repeated(tensor: Tensor, count: int) -> Tensor:
    alike = len(tensor) > 0 and tensor.stride(0) == 0
    return shared(tensor[:1], len(tensor) * count) if alike else tensor.repeat_interleave(count, 0)


def shared(row: Tensor, count: int) -> Tensor:
    """[count, …] whose rows are all that one, [1, …], in its memory. Indexing makes rows of their own."""
    return row.expand(count, *row.shape[1:])


@dataclass(frozen=True, eq=False)
class TextInputs:
    """One prompt as its text encoders take it in, by their names.

    tokens   [L, d], the embedded tokens
    content  bool [L], which of them stand for the prompt's own words, not for its beginning, its end or padding
    """

    tokens: Mapping[str, Tensor]
    content: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What text encoders make of inputs: `tensors` as a `Conditioning`'s, [K, …]; `vectors` [K, g], each encoder's own
    summary of the prompt, by its name."""

    tensors: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]


class Trunk(Protocol):
    """The early blocks of a network as a module of their own, float32: what a latent reward is made of.

    A file of `models/` declares those of its networks, `TRUNKS = {"the network's class": "the trunk's class"}`.
    Parameters are called as the network's are.

    inner   channels of a token
    fields  of the network's configuration, which say whose latents and prompts it reads: whole numbers ≥ 1
    layers  the field that counts the blocks
    """

    inner: int
    fields: ClassVar[tuple[str, ...]]
    layers: ClassVar[str]

    def __init__(self, config: Mapping[str, Any], kept: int) -> None: ...

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Tensor, tuple[int, int]]:
        """Called as the network is, by its adapter: the picture's tokens [B, h·w, d], and their grid (h, w).

        Raises ValueError where what it is called with is another network's.
        """
        ...


@runtime_checkable
class EncodesInputs(Protocol):
    """A model whose text encoders can be asked with other token embeddings than a prompt's own: E²PO wants this."""

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        """What enters the text encoders for that prompt."""
        ...

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        """The prompt encoded with these token embeddings in place of its own, [K, L, d] by encoder, all of them given.

        With gradients to them where gradients are enabled. The prompt's own give its own condition, up to what a batch
        of another size rounds otherwise.
        """
        ...


@runtime_checkable
class LaysOut(Protocol):
    """A model that holds some elements of its states at given values (the first frame of image-to-video), or packs
    several outputs into one state (video and sound). The states of other models are all free and of one stream."""

    def layout(self, condition: Conditioning, size: Size) -> StateLayout:
        """By row of the condition: which elements are held and at what, and the streams.

        `predictor` then makes of one σ a row a time for each token (`core.state.times_per_token`); what it says of
        held elements is not read.
        """
        ...


@runtime_checkable
class MovesTokens(Protocol):
    """A model whose states are tokens, LongTensor [B, *S]; of them it predicts the clean tokens' logits [B, *S, V]."""

    @property
    def jump(self) -> Dynamics:
        """How a sampler steps, and by its `corruption` what states start from and how clean tokens are noised."""
        ...


def jump_of(model: object) -> Dynamics | None:
    """How the model's tokens jump; None where its states are real numbers."""
    return model.jump if isinstance(model, MovesTokens) else None


def sampler_of(model: object) -> Dynamics:
    """The steps that the model is drawn by, where an algorithm says no others: jumps of tokens, else the ODE."""
    return jump_of(model) or ODE()


@runtime_checkable
class DecodesPixels(Protocol):
    """A model whose decoder can be asked with gradients: direct reward gradients want this."""

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        """Latents [B, *S], samples as `decode` takes them, → frames, float32 [B, F, 3, H, W] in 0 … 1 on the model's
        device: what `decode` rounds to whole numbers. With gradients to x, where they are enabled, and to nothing else.

        A row depends on its own latents alone. What is not finite stays so.
        """
        ...


def layout_of(model: object, condition: Conditioning, size: Size, first: int = 0) -> StateLayout:
    """The layout of that condition's states, its rows numbered from `first`; `WHOLE` where the model has none.

    Raises ValueError where the layout has other rows than the condition, or one for all.
    """
    if not isinstance(model, LaysOut):
        return WHOLE
    layout = model.layout(condition, size)
    for name, given in (("free", layout.free), ("clean", layout.clean)):
        if given is not None and len(given) not in (1, len(condition)):
            raise ValueError(
                f"layout: {name} has {len(given)} rows; nearest valid: 1, or {len(condition)}, the prompts"
            )
    return replace(layout, first=first)


@runtime_checkable
class WalksGrids(Protocol):
    """A model whose σ grid can be stated: every adapter of diffusers' flow models."""

    def state_grid(self, grid: Grid) -> None:
        """From now on `schedule` gives that grid, and `save` writes it beside the weights. Raises ValueError, beginning
        with "grid:", where its sampler has a grid of its own."""
        ...

    def stated_grid(self) -> Grid:
        """The grid that was stated last: at first the one that its folder carries, else its scheduler's."""
        ...


class Model(Protocol):
    """A generator: prompts → conditioning, noise → latents by its velocity, latents ↔ media."""

    @property
    def name(self) -> str:
        """What the run's records call it."""
        ...

    @property
    def licence(self) -> str:
        """The licence of the weights, as far as the folder says; "unknown" otherwise."""
        ...

    @property
    def network(self) -> nn.Module:
        """The module that is trained. Parameters with `requires_grad` are the policy's.

        Of a model with several networks the one module that holds them all (`models.experts.Experts`).
        """
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; latents stay float32."""
        ...

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """The repeated layers of `network` (the policy's or a copy of it), each called once in a forward, in that
        order: what a sharded run gathers at a time."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents and conditions live."""
        ...

    @property
    def makes(self) -> Kind:
        """What it makes: "picture", "video" or "video and sound"."""
        ...

    @property
    def takes_sources(self) -> bool:
        """Whether it draws from a prompt's `sources` too. Where not, `encode` refuses a prompt that has some."""
        ...

    @property
    def guidance(self) -> type[Guidance]:
        """The family's guidance."""
        ...

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        """Encodes prompts and their negative texts without gradients; what was encoded before comes from a cache.

        Each by itself, so that an embedding does not depend on its neighbours. A cache's key is all that the embedding
        depends on: texts, the sources' sums and, where it enters, the size.
        """
        ...

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The model's σ grid for `steps` steps at `size`: its own, or the one that was stated (`WalksGrids`). Raises
        ValueError, beginning with "steps:", where that has another number."""
        ...

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        """Shape of one latent. Raises ValueError for a size the model cannot draw, naming the nearest it can."""
        ...

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        """The velocity with conditions and guidance bound; with gradients where they are enabled.

        `guidance`: the family's; a number is plain classifier-free guidance (`models.guidance.guided`).
        `network`: another set of weights of the same architecture (a frozen reference); None is the policy's.
        """
        ...

    def decode(self, x: Tensor, size: Size) -> Media:
        """Latents [B, *S], samples as `Schedule.samples` gives them, → B media.

        Raises `models.finite.BrokenPicturesError`, which carries the media, where some are not finite: as whole numbers
        nobody could tell NaN from black. `models.finite.to_pictures` does it.
        """
        ...

    def encode_media(self, media: Media, size: Size) -> Tensor:
        """B media of `size` → latents [B, *S] on the model's device, such that `decode` gives nearly
        the media back. Deterministic, without gradients. Raises ValueError for media of another kind or size."""
        ...

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        """Writes the network (or its LoRA) as safetensors that the model's own library loads.

        `network`: a copy of the policy's to write in its place, where that is sharded.
        """
        ...
