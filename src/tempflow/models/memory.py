"""What a pipeline's folder takes in memory, counted without its weights.

Networks are built from their configurations on fake tensors, which have shapes and no numbers, and then run: a forward
of sampling, a minibatch of training with its backward, a decode. Every tensor that they make is counted as long as it
lives, so checkpointing, guidance and a family's own ways count by themselves. Not counted: what a kernel takes inside
(cuDNN's workspaces), and what an allocator holds in reserve.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tempflow.media import Size
from tempflow.models.diffusers_model import DiffusersModel, rows_at_once
from tempflow.models.guidance import guidance_of
from tempflow.models.lora_files import TakesLora
from tempflow.models.pipeline_folder import pipeline_class, read_index, settings_in
from tempflow.models.protocol import Conditioning
from tempflow.models.quiet import quiet
from tempflow.models.tools import Quantised, Tools
from tempflow.request import Prompt

TOKENS = 128
"""Of a text, where a family keeps its own length."""

FEW = 2
"""Blocks of each kind that are run: blocks are alike, so what the third adds every further one does."""

SMALL = 4096
"""Numbers of a tensor that keeps them on fake tensors too: lengths, masks and times that control flow hangs on."""

BITS: Mapping[Quantised, tuple[float, float]] = {"int8": (8, 0), "float8": (8, 0), "nf4": (4, 32 / 64)}
"""Of a quantised weight, and of its scales where they are for blocks: NF4 has 32 bits for 64 weights. The scale of a
row is added apart."""


@dataclass(frozen=True)
class Lora:
    """A fresh one; no `targets`: the family's own."""

    rank: int
    targets: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """How a pipeline is run.

    device         where it computes: bfloat16 on a CPU has attention of its own
    lora           None: full training
    sampled, trained  rows of a forward of sampling, and of a minibatch of training; guidance not doubled
    leaves         media that are decoded together
    others         whether the loss asks weight sets beside the policy
    """

    size: Size
    guidance: float
    guidance_options: Mapping[str, float | bool]
    dtype: torch.dtype
    device: str
    tools: Tools
    lora: Lora | None
    sampled: int
    trained: int
    leaves: int
    others: bool = False


@dataclass(frozen=True)
class Footprint:
    """In bytes, but for `trainable`.

    network    the trained network's weights as they are held
    encoders   the text encoders'
    vae        the autoencoder's
    trainable  how many numbers are trained; they are among the network's weights
    split      whether these are of less than float32, so that there are float32 masters beside them
    sampling   what a forward of sampling takes at most beside the weights
    saved      what a minibatch keeps for its backward
    training   what a minibatch takes at most, `saved` included, and gradients in the network's dtype where it is split
    decoding   what a decode takes at most
    block      the weights of the largest block
    outside    the weights outside of all blocks
    taught     how many numbers of the largest block are trained
    """

    network: int
    encoders: int
    vae: int
    trainable: int
    split: bool
    sampling: int
    saved: int
    training: int
    decoding: int
    block: int
    outside: int
    taught: int


def footprint(adapter: type[DiffusersModel], folder: Path, name: str, asked: Asked) -> Footprint | None:
    """Of the pipeline in `folder`, of which configurations are read. None where the family does not say of what shape
    a text's tensors are. `name` is what the user called it.

    Raises ValueError for a size, guidance, LoRA target or tool that cannot be had.
    """
    with quiet():
        model = bare(adapter, folder, name, asked.dtype, asked.lora)
        spared = _spared(model.network, asked.tools.quantise)
        if asked.lora is None:
            model.train_fully()
        model.computes_on = torch.device(asked.device).type
        if asked.tools.quantise in ("int8", "float8"):
            _widened(model.network)
        model.equip(Tools(checkpointing=asked.tools.checkpointing, vae_tiling=asked.tools.vae_tiling))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            values = _Values(mode)
            with values:
                row = model.blank_row(TOKENS)
            if row is None:
                return None
            for network in (model.network, model.pipe.vae):
                _replace(network, lambda _, t: torch.empty(t.shape, dtype=t.dtype, device="cpu") if t.is_meta else t)
            return counted(model, row, asked, lambda: values, spared)


Around = Callable[[], AbstractContextManager[object]]


def counted(
    model: DiffusersModel,
    row: Mapping[str, Tensor],
    asked: Asked,
    around: Around = nullcontext,
    spared: int = 0,
    whole: bool = False,
) -> Footprint:
    """Of a model that is ready to be trained, its tensors fake or not.

    row     a text's tensors
    around  what is entered for every run
    spared  bytes of the network that are not held
    whole   whether all blocks are run; else `FEW` of each kind and one more, and the rest by what that one adds
    """
    network = model.network
    trained = [p for p in network.parameters() if p.requires_grad]
    lists = {name: len(blocks) for name in model.family.blocks if (blocks := getattr(network, name, None)) is not None}
    few = {name: length if whole else min(length, FEW) for name, length in lists.items()}

    def work(depths: Mapping[str, int]) -> tuple[int, int, int]:
        with _depths(network, depths):
            return (_sampling(model, row, asked, around), *_training(model, row, trained, asked, around))

    base = work(few)
    total = list(base)
    for name, length in lists.items():
        if length > few[name]:
            more = work({**few, name: few[name] + 1})
            total = [t + (m - b) * (length - few[name]) for t, m, b in zip(total, more, base, strict=True)]
    sampling, saved, training = total
    blocks = model.blocks(network)
    sizes = [nbytes(block) for block in blocks] or [0]
    return Footprint(
        network=nbytes(network) - spared,
        encoders=sum(nbytes(m) for m in model.text_encoders().values()),
        vae=nbytes(model.pipe.vae),
        trainable=sum(p.numel() for p in trained),
        split=_split(trained),
        sampling=sampling,
        saved=saved,
        training=training,
        decoding=_decoding(model, asked, around),
        block=max(sizes),
        outside=nbytes(network) - sum(sizes),
        taught=max((sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks), default=0),
    )


@contextmanager
def _depths(network: nn.Module, depths: Mapping[str, int]) -> Iterator[None]:
    """Inside, the network has so many blocks of each list."""
    lists = {name: network.get_submodule(name) for name in depths}
    for name, depth in depths.items():
        setattr(network, name, nn.ModuleList(list(lists[name].children())[:depth]))
    try:
        yield
    finally:
        for name, blocks in lists.items():
            setattr(network, name, blocks)


def nbytes(module: nn.Module) -> int:
    """Of its weights and buffers, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _spared(network: nn.Module, quantise: Quantised) -> int:
    """Bytes that quantisation takes off the linear layers."""
    if quantise == "none":
        return 0
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Linear)]
    bits, scales = BITS[quantise]
    rows = 0 if scales else sum(w.shape[0] * w.element_size() for w in weights)
    return sum(w.nbytes for w in weights) - round(sum(w.numel() for w in weights) * (bits + scales) / 8) - rows


def _widened(network: nn.Module) -> None:
    """Linear layers compute as torchao's, with a widened copy of their weight; autograd keeps it for the backward
    wherever a gradient passes."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            layer: Any = module
            layer.forward = partial(_linear, layer)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight.clone(), layer.bias)


def _split(trained: Sequence[Tensor]) -> bool:
    return any(p.dtype != torch.float32 for p in trained)


def _forward(model: DiffusersModel, row: Mapping[str, Tensor], rows: int, asked: Asked) -> Callable[[], Tensor]:
    """The velocity of so many rows, their conditions and states made already."""
    guidance = guidance_of(model.guidance, asked.guidance, asked.guidance_options)
    moved = {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in row.items()}
    batch = {n: torch.stack([t] * rows) for n, t in moved.items()}
    predict = model.predictor(Conditioning((Prompt("a"),) * rows, batch, batch), guidance)
    x = torch.zeros(rows, *model.noise_shape(asked.size), device=model.device)
    sigma, index = torch.full((rows,), 0.5, device=model.device), torch.arange(rows, device=model.device)
    return lambda: predict(x, sigma, index)


def _sampling(model: DiffusersModel, row: Mapping[str, Tensor], asked: Asked, around: Around) -> int:
    with around():
        velocity = _forward(model, row, asked.sampled, asked)
    with Live() as live, around(), torch.no_grad():
        velocity()
    return live.peak


def _training(
    model: DiffusersModel, row: Mapping[str, Tensor], trained: Sequence[Tensor], asked: Asked, around: Around
) -> tuple[int, int]:
    """What the forward leaves for the backward, and the most that lives until that is through."""
    with around():
        velocity = _forward(model, row, asked.trained, asked)
    for parameter in trained:  # every minibatch but an update's first finds gradients there
        parameter.grad = None if _split(trained) else torch.zeros_like(parameter)
    with Live() as live, around(), torch.enable_grad():
        said = velocity()
        saved = live.now
        if asked.others:  # they compute by the same network, without gradients
            for parameter in trained:
                parameter.requires_grad_(False)
            velocity()
            for parameter in trained:
                parameter.requires_grad_(True)
        said.float().square().mean().backward()
    for parameter in trained:
        parameter.grad = None
    return saved, live.peak


def _decoding(model: DiffusersModel, asked: Asked, around: Around) -> int:
    rows = min(asked.leaves, rows_at_once(asked.size))
    x = torch.zeros(rows, *model.noise_shape(asked.size), device=model.device)
    with Live() as live, around(), torch.no_grad():
        model.decode_latents(x)
    return live.peak


# ------------------------------------------------------------------------------------------------------ without weights
def bare(
    adapter: type[DiffusersModel], folder: Path, name: str, dtype: torch.dtype, lora: Lora | None = None
) -> DiffusersModel:
    """The model of a folder by its configurations alone, in the dtypes that loading gives. Its weights are on the meta
    device; of its tokenizers there is nothing but their longest text."""
    from accelerate import init_empty_weights

    index, family = read_index(name, folder), adapter.family
    kind = pipeline_class(name, str(index["_class_name"]))
    given: dict[str, Any] = {}
    for part in inspect.signature(kind.__init__).parameters:
        told = index.get(part)
        if not isinstance(told, list):
            given |= {part: told} if part in index else {}
            continue
        absent = None in told or part in family.unused
        kept = part in family.float32_parts or (part == "vae" and dtype == torch.float16)
        given[part] = None if absent else _part(folder, part, told, torch.float32 if kept else dtype)
    model = adapter(kind(**given), name, "")
    if lora is not None:
        assert isinstance(model, TakesLora)
        with init_empty_weights():
            model.add_lora(lora.rank, lora.rank, lora.targets or None)
        for parameter in model.network.parameters():
            if parameter.requires_grad:  # peft leaves what has no numbers in float32
                parameter.data = parameter.data.to(model.dtype)
    return model


def real(
    adapter: type[DiffusersModel], folder: Path, name: str, asked: Asked
) -> tuple[DiffusersModel, Callable[[], None]]:
    """The same with random weights on `asked.device`, to measure: the model, and what runs a minibatch of training.

    Raises ImportError where the library of a quantisation is missing.
    """

    def drawn(_: str, t: Tensor) -> Tensor:
        if not t.is_meta:
            return t.to(asked.device)
        empty = torch.empty(t.shape, dtype=t.dtype, device=asked.device)
        return empty.normal_(std=0.02) if t.is_floating_point() else empty.zero_()

    with quiet():
        model = bare(adapter, folder, name, asked.dtype)
        for part in model.pipe.components.values():
            if isinstance(part, nn.Module):
                _replace(part, drawn)
        if asked.tools.quantise != "none":
            ao: Any = import_module("torchao.quantization")
            kind = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}[asked.tools.quantise]
            ao.quantize_(model.network, getattr(ao, kind)())
        if asked.lora is None:
            model.train_fully()
        else:
            assert isinstance(model, TakesLora)
            model.add_lora(asked.lora.rank, asked.lora.rank, asked.lora.targets or None)
        model.equip(Tools(checkpointing=asked.tools.checkpointing, vae_tiling=asked.tools.vae_tiling))
    row = model.blank_row(TOKENS)
    assert row is not None
    velocity = _forward(model, row, asked.trained, asked)
    return model, lambda: velocity().float().square().mean().backward()


def _replace(network: nn.Module, change: Callable[[str, Tensor], Tensor], buffers: bool = True) -> None:
    """Every weight and buffer becomes what `change` makes of its name and itself; what is shared stays so."""
    made: dict[int, Tensor] = {}
    for place, module in network.named_modules():
        tensors = [*module.named_parameters(recurse=False), *(module.named_buffers(recurse=False) if buffers else ())]
        for name, old in tensors:
            if id(old) not in made:
                new = change(f"{place}.{name}", old.detach())
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[id(old)])


@dataclass
class Tokenizer:
    """What stands in for one (or a processor) where nothing is read."""

    model_max_length: int


def _part(folder: Path, part: str, told: Sequence[str], dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    library, kind = told
    settings = partial(settings_in, folder)
    if part.startswith(("tokenizer", "processor", "feature_extractor")):
        of_it = settings(f"{part}/tokenizer_config.json") or {}
        return Tokenizer(of_it.get("model_max_length", 10**9))
    made: Any = getattr(import_module(library), kind)
    if part == "scheduler":
        return made.from_config(settings("scheduler/scheduler_config.json"))
    with init_empty_weights():
        if library == "diffusers":
            network = made.from_config(made.load_config(folder / part))
        else:
            network = made(made.config_class.from_pretrained(folder / part))
    if library != "diffusers":
        network.tie_weights()
    whole = {*(getattr(network, "_keep_in_fp32_modules_strict", None) or ())}
    if library == "diffusers" or dtype == torch.float16:  # as each of the two libraries reads it
        whole |= {*(network._keep_in_fp32_modules or ())}

    def cast(name: str, t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and not whole & set(name.split(".")) else t

    _replace(network, cast, buffers=library == "diffusers")
    return network


# ------------------------------------------------------------------------------------------------------------- counting
DEVICE = torch.ops.prim.device.default
"""Asked of every fake tensor; it makes nothing."""


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, as long as they live.

    now   of those that live now
    peak  the most that lived at once
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            return func(*args)
        for t in tree_iter((args, kwargs)):
            if isinstance(t, Tensor):
                self._see(t, False)  # from before: another's
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._see(t, True)
        return out

    def _see(self, t: Tensor, made: bool) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes() if made and t.device.type != "meta" else 0
        self._held[key] = (weakref.ref(storage, lambda _: self._gone(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]


class _Values(TorchDispatchMode):
    """Keeps the numbers of small fake tensors beside them, so that `tolist`, `if` and masks' lengths work on them."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            return func(*args)
        args, named = tree_map_only(Tensor, self._held, (args, dict(kwargs or {})))
        values = [self._value(t) for t in tree_iter((args, named)) if isinstance(t, Tensor)]
        known = all(v is not None for v in values) and torch.Tag.nondeterministic_seeded not in func.tags
        try:
            out = func(*args, **named)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not known:
                raise
            real = self._real(func, args, named)
            out = tree_map_only(Tensor, self.mode.from_tensor, real)
        else:
            small = [t for t in tree_iter(out) if isinstance(t, FakeTensor)]
            if not known or not small or any(t.numel() > SMALL or t.device.type != "cpu" for t in small):
                if func._schema.is_mutable:  # what is written into, and no longer known
                    for t in small:
                        self._known.pop(t, None)
                return out
            real = self._real(func, args, named)
        for fake, value in zip(tree_iter(out), tree_iter(real), strict=True):
            if isinstance(fake, FakeTensor):
                self._known[fake] = value
        return out

    def _real(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            return func(*tree_map_only(Tensor, self._value, args), **tree_map_only(Tensor, self._value, kwargs))

    def _held(self, t: Tensor) -> Tensor:
        """A fake tensor for a real one, always the same."""
        if isinstance(t, FakeTensor):
            return t
        fake = self.mode.from_tensor(t)
        self._known[fake] = t
        return fake

    def _value(self, t: Tensor) -> Tensor | None:
        return self._known.get(t)
