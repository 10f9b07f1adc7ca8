"""What makes a network fit into memory, or go faster: changes of how it computes, never of what.

They touch what diffusers and torch offer on any of their networks, so every adapter of a pipeline has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tempflow.names import nearest

Quantised = Literal["none", "int8", "float8", "nf4"]
"""How the frozen weights of a network with a LoRA are held: int8 and float8 by torchao, a scale a row; NF4 by
bitsandbytes, 4 bits, as QLoRA has it."""

NEEDS = {"int8": ("torchao", "quant"), "float8": ("torchao", "quant"), "nf4": ("bitsandbytes", "bits")}
"""The library that each takes, and the extra that brings it."""


@dataclass(frozen=True)
class Tools:
    """All off unless asked for.

    checkpointing  blocks keep their inputs alone for the backward and are computed once more there
    compile        torch.compile of each block
    compile_rows   the row counts to compile for (`models.compiled`); empty: for whatever comes
    attention      a backend of diffusers by its name ("native", "flash", "sage" …); "" is the network's own
    vae_tiling     the autoencoder works on overlapping tiles: less memory, and not quite the same pictures
    offload        what is frozen beside the network waits on the CPU until it is used: text encoders, autoencoder
    quantise       the network's frozen linear layers, under a LoRA
    """

    checkpointing: bool = False
    compile: bool = False
    compile_rows: tuple[int, ...] = ()
    attention: str = ""
    vae_tiling: bool = False
    offload: bool = False
    quantise: Quantised = "none"

    def check(self, training: str, device: str, sharded: bool) -> None:
        """Before a model is loaded. Raises ValueError for what cannot be had together, ImportError with the command
        where a library is missing."""
        if self.quantise not in get_args(Quantised):
            near = nearest(self.quantise, get_args(Quantised))
            raise ValueError(f"model.quantise: {self.quantise[:40]!r} is unknown; nearest valid: {near}")
        if self.quantise != "none":
            if training != "lora":
                raise ValueError(
                    f"model.quantise: {self.quantise!r} holds frozen weights, and model.training is {training!r}; "
                    "nearest valid: 'none', or model.training 'lora'"
                )
            if sharded:
                raise ValueError(
                    f"model.quantise: {self.quantise!r} cannot be sharded; nearest valid: 'none', or "
                    "parallel.mode 'ddp'"
                )
            if self.quantise == "nf4" and not device.startswith("cuda"):
                raise ValueError(f"model.quantise: 'nf4' needs a CUDA device, and this is {device}; nearest: 'int8'")
            library, extra = NEEDS[self.quantise]
            if find_spec(library) is None:
                raise ImportError(f"model.quantise: {self.quantise!r} needs {library}: pip install 'tempflow[{extra}]'")


ASKED = tuple(field.name for field in fields(Tools) if field.name != "compile_rows")
"""Those that a configuration names, as fields of its model."""


@runtime_checkable
class TakesTools(Protocol):
    """An adapter whose network, autoencoder and text encoders take them."""

    @classmethod
    def load_with(cls, folder: Path, name: str, dtype: torch.dtype, device: str, tools: Tools) -> Any:
        """As `Adapter.load`; quantised and placed as `tools` asks."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What is honoured otherwise than its folder says, a line each: told when a run starts."""
        ...

    def equip(self, tools: Tools) -> tuple[str, ...]:
        """Turns on what `tools` asks for; after a LoRA was added. Returns what this machine does without, a line each.
        Raises ValueError for what this network lacks."""
        ...

    def keep_embeddings(self, folder: Path, most: int, pipeline: Path) -> None:
        """Encoded prompts are kept in `folder`, of at most `most` bytes; `pipeline` is where the model came from.

        Raises ValueError where the folder holds something else."""
        ...

    def drop_encoders(self) -> None:
        """Frees the text encoders: only prompts that have been encoded can be asked for from now on."""
        ...


def quantised_loading(parts: Sequence[str], kind: Quantised, dtype: torch.dtype) -> Any:
    """diffusers' own configuration for loading those parts quantised; None for "none"."""
    if kind == "none":
        return None
    diffusers: Any = import_module("diffusers")
    if kind == "nf4":
        how = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        torchao: Any = import_module("torchao.quantization")
        how = diffusers.TorchAoConfig(
            torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig()
        )
    return diffusers.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, how))


def checkpointed(network: Any, around: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
    """Activation checkpointing of every block of a network of diffusers. `around`: what a forward runs in, so that the
    second one computes as the first did."""

    def again(block: Any, *args: Any) -> Any:
        return checkpoint(
            block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), around())
        )  # not reentrant: under a LoRA, a block's inputs may need no gradient

    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"model.checkpointing: {type(network).__name__} has none; nearest valid: false")
    network.enable_gradient_checkpointing(again)


def with_attention(network: Any, backend: str) -> None:
    """Another attention backend. Raises ValueError, naming `model.attention`, for one that is not here."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [name.value for name in AttentionBackendName]
    if backend not in known:
        raise ValueError(f"model.attention: {backend[:40]!r} is unknown; nearest valid: {nearest(backend, known)}")
    processors = [m.processor for m in network.modules() if hasattr(m, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"model.attention: {type(network).__name__} takes no backend in this diffusers; nearest valid: ''"
        )
    try:
        network.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"model.attention: {backend!r} cannot be used here ({' '.join(str(error).split())[:160]}); "
            "nearest valid: 'native'"
        ) from error


@contextmanager
def resident(modules: Sequence[nn.Module], device: torch.device, offloaded: bool) -> Iterator[None]:
    """Inside, the modules are on `device`; where they are `offloaded`, they are on the CPU again after."""
    if not offloaded:
        yield
        return
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
