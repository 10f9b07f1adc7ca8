"""Low-precision copies of a network, for work that only has to rank: which precisions a device has, and the copies.

A copy never trains. It is given the network's weights again whenever they have moved, a LoRA merged into them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from tempflow.core.draft import Precision
from tempflow.core.state import upcast
from tempflow.models.quantise import Converter, Int8Linear, torchao_converter

CAPABILITY = {"int8": (8, 0), "float8": (8, 9), "nvfp4": (10, 0)}
"""The CUDA compute capability that each needs: torchao's own; int8's is ours, as the rest of its copy is bfloat16."""

SMALLEST = 128
"""A linear layer with fewer inputs or outputs stays as it is: there is little to win. Ours; Sol-RL's NVFP4 settings for
Sana take layers above 2240 alone."""

CONDITION = re.compile(r"norm|adaln|modulation|(^|[._])mod([._]|$)", re.IGNORECASE)
"""Names of what makes scales and shifts of time and text: one row a sample costs little, and its errors reach all."""


# ----------------------------------------------------------------------------------------------------------- what works
def capability(device: torch.device) -> tuple[int, int] | None:
    """A CUDA device's compute capability; None for any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def lack(precision: Precision, device: torch.device) -> str:
    """What `device` lacks for `precision`; "" where it lacks nothing."""
    if precision in ("full", "bfloat16"):
        return ""
    if precision == "int8" and device.type == "cpu":
        able = torch.backends.quantized.engine != "none" and "quantize_per_channel" in dir(torch)
        return "" if able else "needs torch's quantised tensors, and this torch has none"
    need, has = CAPABILITY[precision], capability(device)
    if has is None:
        return f"needs a CUDA device of compute capability {need[0]}.{need[1]}, and this is {device.type}"
    return "" if has >= need else f"needs compute capability {need[0]}.{need[1]}, and {device} has {has[0]}.{has[1]}"


def nearest(precision: Precision, device: torch.device) -> Precision:
    """The cheapest that `device` has and that is no cheaper than `precision`."""
    names = get_args(Precision)
    dearer = names[: names.index(precision) + 1]
    return next(name for name in reversed(dearer) if not lack(name, device))


def needs_torchao(precision: Precision, device: torch.device) -> bool:
    """Integers on a CPU are torch's own; the rest are torchao's."""
    return precision in ("float8", "nvfp4") or (precision == "int8" and device.type != "cpu")


def check_precision(precision: Precision, device: torch.device, sharded: bool = False) -> None:
    """Raises ValueError naming the nearest precision that `device` or a sharded network has, ImportError where torchao
    is missing."""
    if sharded and precision != "full":
        raise ValueError(
            f"draft_precision: {precision!r} copies the network in one piece, and parallel.mode 'fsdp' has it in "
            "parts; nearest valid: 'full', or parallel.mode 'ddp'"
        )
    missing = lack(precision, device)
    if missing:
        raise ValueError(f"draft_precision: {precision!r} {missing}; nearest valid: {nearest(precision, device)!r}")
    if needs_torchao(precision, device) and find_spec("torchao") is None:
        raise ImportError(f"draft_precision: {precision!r} needs torchao: pip install 'tempflow[quant]'")


# ------------------------------------------------------------------------------------------------------------- the copy
def cheap_copy(network: nn.Module, blocks: Sequence[nn.Module], precision: Precision) -> CheapCopy:
    """A copy of `network` that computes in `precision`, on the device where it lies.

    "bfloat16" casts all of it. The others replace the large linear layers of `blocks` (its repeated layers, so neither
    embedders nor the last layer) but those that condition (`quantised`), and leave the rest in float32 ("int8" on a
    CPU) or bfloat16. Raises what `check_precision` does, and ValueError for "full" or where no layer would be replaced.
    """
    device = next(network.parameters()).device
    check_precision(precision, device)
    if precision == "full":
        raise ValueError("draft_precision: 'full' is the network itself, no copy; nearest valid: 'bfloat16'")
    if precision == "bfloat16":
        return CheapCopy(network, (), torch.bfloat16, None)
    layers = quantised(network, blocks)
    if not layers:
        raise ValueError(
            f"draft_precision: {precision!r} finds no linear layer of {SMALLEST} inputs and outputs to replace; "
            "nearest valid: 'bfloat16'"
        )
    if device.type == "cpu":
        return CheapCopy(network, layers, torch.float32, Int8Linear)
    return CheapCopy(network, layers, torch.bfloat16, torchao_converter(precision))


def quantised(network: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Names of the linear layers that are replaced, a LoRA's own left out.

    Those within `blocks` with at least SMALLEST inputs and outputs, both multiples of 16 as float8 and nvfp4 need them,
    whose name does not say CONDITION.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    found: list[str] = []
    for name, module in network.named_modules():
        sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (0, 0)
        fits = min(sides) >= SMALLEST and not any(side % 16 for side in sides)
        if fits and id(module) in inside and ".lora_" not in name and not CONDITION.search(name):
            found.append(name.removesuffix(".base_layer"))
    return tuple(found)


class CheapCopy(nn.Module):
    """Called as the network is. Matrices among its inputs are cast; vectors (σ, times) keep their precision.

    layers   replaced by `convert`, which is given each as a plain linear layer in `dtype`
    dtype    of all else
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], dtype: torch.dtype, convert: Converter | None
    ) -> None:
        super().__init__()
        self.layers, self.dtype, self.convert = tuple(layers), dtype, convert
        plain = _without_lora(copy.deepcopy(network))
        self.inner = nn.Module.to(plain, dtype=dtype).requires_grad_(False)  # diffusers' own `to` warns
        self.eval()
        self.refresh(network, {})

    @torch.no_grad()
    def refresh(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Takes the weights of `network` as they are now, `values` standing in for its parameters of these names."""
        state, own = {**network.state_dict(), **values}, self.inner.state_dict()
        names = {name.replace(".base_layer.", "."): None for name in state if ".lora_" not in name}
        for name in names:
            if name.rpartition(".")[0] not in self.layers:
                own[name].copy_(merged(network, state, name))
        for layer in self.layers:
            parts = {part: f"{layer}.{part}" for part in ("weight", "bias") if f"{layer}.{part}" in names}
            self._replace(layer, {part: merged(network, state, name) for part, name in parts.items()})

    def _replace(self, layer: str, parts: Mapping[str, Tensor]) -> None:
        outputs, inputs = parts["weight"].shape
        linear = nn.Linear(inputs, outputs, "bias" in parts, device="meta")  # draws no initial weights
        for part, value in parts.items():
            linear.register_parameter(part, nn.Parameter(value.to(self.dtype, copy=True), requires_grad=False))
        assert self.convert is not None
        self.inner.set_submodule(layer, self.convert(linear).eval())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*map(self._cast, args), **{name: self._cast(value) for name, value in kwargs.items()})

    def _cast(self, value: Any) -> Any:
        matrix = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(self.dtype) if matrix else value


# ----------------------------------------------------------------------------------------------------------------- lora
def merged(network: nn.Module, state: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor `name` from the state of `network`, its LoRA added in: W + scale·B·A in float32 or better."""
    if name in state:
        return state[name]
    layer, _, part = name.rpartition(".")
    base = state[f"{layer}.base_layer.{part}"]
    if part != "weight":
        return base
    tuned: Any = network.get_submodule(layer)
    weight = upcast(base)
    for adapter in tuned.active_adapters:
        down, up = (upcast(state[f"{layer}.lora_{side}.{adapter}.weight"]) for side in "AB")
        weight = weight + tuned.scaling[adapter] * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return weight


def _without_lora(network: nn.Module) -> nn.Module:
    for name, module in list(network.named_modules()):
        children = dict(module.named_children())
        if "base_layer" in children:
            network.set_submodule(name, cast(nn.Module, children["base_layer"]))
    return network
