"""Low-rank updates of a network's layers (LoRA): put beside its weights, merged into them, read back, written."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA's file. Its names begin with the part of the pipeline that the LoRA belongs to."""

ADAPTER_FILE, ADAPTER_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
"""The two files of a PEFT folder, and what stands before each of its names."""

ADAPTER = "default"
"""The name that an adapter of ours has in peft's layers."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A layer's update: W + scale · b · a.

    a      [rank, in], of a convolution [rank, in, height, width]
    b      [out, rank], of a convolution [out, rank, 1, 1]
    scale  alpha / rank, or what stands in its place
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scaled_b(self) -> Tensor:
        """scale · b in float32: beside it the update needs no scale."""
        return self.b.float() * self.scale

    def dense(self) -> Tensor:
        """scale · b · a, float32, in the shape of the layer's weight."""
        return (self.scaled_b.flatten(1) @ self.a.float().flatten(1)).view(self.b.shape[0], *self.a.shape[1:])


Lora = Mapping[str, Factors]
"""Layer name → update."""


@dataclass(frozen=True, eq=False)
class FittedLora:
    """A LoRA in the names of a model's layers: of the trained network, and of the pipeline's other parts by name."""

    network: Lora
    others: Mapping[str, Lora]

    def by_part(self, network: str) -> dict[str, Lora]:
        """All of it, the trained network's under the name `network`."""
        return {**({network: self.network} if self.network else {}), **self.others}


Shapes = Mapping[str, tuple[int, ...]]
"""Name of a linear layer or a convolution → shape of its weight."""


def layer_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers of `network` that can have a LoRA; one that has is called as it is without."""
    return {
        name.removesuffix(".base_layer"): _shape(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def _shape(module: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Of the layer's weight, also where that is packed into fewer bits."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def ranks_of(lora: Lora) -> dict[str, int]:
    """Layer name → rank."""
    return {layer: factors.rank for layer, factors in lora.items()}


# --------------------------------------------------------------------------------------------------------- on a network
def add_adapter(network: Any, ranks: Mapping[str, int], scale: float) -> None:
    """Fresh peft layers on exactly the layers of `ranks`: a Gaussian, from torch's generator, and b zero.

    They require gradients; nothing else changes. A network of diffusers or transformers adds them itself, so that its
    library knows of them; on another module (`experts.Experts`) peft does.
    """
    from peft import LoraConfig, inject_adapter_in_model

    usual, others = _usual_rank(ranks)
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        init_lora_weights="gaussian",
        target_modules="|".join(map(re.escape, ranks)),  # whole names; those in a list would match by their ends too
        rank_pattern=others,
    )
    if hasattr(network, "add_adapter"):
        network.add_adapter(config, ADAPTER)
    else:
        inject_adapter_in_model(config, network, ADAPTER)
    for layer in ranks:
        network.get_submodule(layer).scaling[ADAPTER] = scale
    network.eval()


def fresh_adapter(network: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """`add_adapter` of scale alpha/rank on the linear layers that one of `targets` means: an end of their name, or a
    regular expression of all of it.

    Raises ValueError when rank or alpha is below 1, there is a LoRA already, or one of `targets` means no such layer.
    """
    for name, value in (("lora rank", rank), ("lora alpha", alpha)):
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; the nearest valid value is 1")
    if lora_of(network):
        raise ValueError("lora: the model has one already; load it afresh to add another")
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    _check_targets(linear, targets)
    chosen = [name for name in linear if any(_means(target, name) for target in targets)]
    add_adapter(network, dict.fromkeys(chosen, rank), alpha / rank)


def _means(target: str, layer: str) -> bool:
    """Whether `target` is an end of the layer's name, or an expression of it."""
    try:
        return f".{layer}".endswith(f".{target}") or re.fullmatch(target, layer) is not None
    except re.error:
        return False


def _check_targets(linear: Sequence[str], targets: Sequence[str]) -> None:
    inside = (re.fullmatch(r".*?\.\d+\.(.+)", name) for name in linear)  # of a numbered block
    known = sorted({found[1] for found in inside if found})
    if not targets:
        raise ValueError(f"lora targets: the list is empty; there are {', '.join(known)}")
    for target in targets:
        if not any(_means(target, name) for name in linear):
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"lora targets: {target!r} is no linear layer; nearest is {nearest!r} of {', '.join(known)}"
            )


def _usual_rank(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The rank that most layers have, and peft's pattern for each of the others."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}


@torch.no_grad()
def attach(network: nn.Module, lora: Lora) -> None:
    """Puts `lora` beside the weights of `network`, frozen; it computes as peft does: W·x + scale · b·(a·x)."""
    add_adapter(network, ranks_of(lora), 1.0)
    for layer, factors in lora.items():
        tuned: Any = network.get_submodule(layer)
        tuned.lora_A[ADAPTER].weight.copy_(factors.a)
        tuned.lora_B[ADAPTER].weight.copy_(factors.b)
        tuned.scaling[ADAPTER] = factors.scale
    network.requires_grad_(False)


@torch.no_grad()
def merge(network: nn.Module, lora: Lora) -> None:
    """W ← W + scale · b · a for each layer of `lora`, in the network's own dtype (float32 to lose nothing).

    Raises ValueError for a layer that the network does not have.
    """
    parameters = dict(network.named_parameters())
    for layer, factors in lora.items():
        if f"{layer}.weight" not in parameters:
            raise ValueError(f"its weight '{layer}.weight' is not in the base model; is model.path still the same?")
        parameters[f"{layer}.weight"].add_(factors.dense())


def lora_of(network: nn.Module) -> dict[str, Factors]:
    """The LoRA that `network` has beside its weights, in its own dtype; empty where there is none."""
    found: dict[str, Factors] = {}
    for layer, module in network.named_modules():
        tuned: Any = module
        if hasattr(module, "lora_A") and ADAPTER in tuned.lora_A:
            a, b = tuned.lora_A[ADAPTER].weight, tuned.lora_B[ADAPTER].weight
            found[layer] = Factors(a.detach(), b.detach(), tuned.scaling[ADAPTER])
    return found


def parameter_names(layer: str) -> tuple[str, str]:
    """What a network's parameters a and b of `layer` are called."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


TRAINED = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
"""With the adapter's name in a checkpoint (`….lora_A.default.weight`), without it in a file of ours."""


def paired(tensors: Mapping[str, Tensor], scale: float, prefix: str = "") -> dict[str, Factors]:
    """A LoRA from a run's tensors by parameter name, all of one scale. `prefix`: of each name in a file.

    Raises ValueError for a tensor of another kind, or one without its partner.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        found = TRAINED.fullmatch(name.removeprefix(prefix))
        if found is None:
            raise ValueError(f"{name!r} is no weight of a LoRA; was config.yaml changed after the run?")
        sides.setdefault(found["layer"], {})[found["side"]] = value.float()
    for layer, pair in sides.items():
        if len(pair) < 2:
            raise ValueError(f"{layer!r} has only a half of its LoRA")
    return {layer: Factors(pair["A"], pair["B"], scale) for layer, pair in sides.items()}


# ---------------------------------------------------------------------------------------------------------------- files
def write_lora(lora: Lora, folder: Path, dtype: torch.dtype = torch.float32, part: str = "transformer") -> None:
    """Writes diffusers' form into `folder`; `part` of the pipeline is what the LoRA is of. The scale is multiplied into
    b: a file without a scale means the same to every reader, and one beside the weights is lost on some."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(lora, f"{part}.", dtype), folder / LORA_FILE, metadata={"format": "pt"})


def write_peft(lora: Lora, folder: Path, base: str, dtype: torch.dtype = torch.float32) -> None:
    """Writes PEFT's form into `folder`, for `PeftModel.from_pretrained(transformer, folder)`: every layer by its full
    name, alpha equal to the rank, because the scale is multiplied into b here too. `base`: what the base is called."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    usual, others = _usual_rank(ranks_of(lora))
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(lora),
        rank_pattern=others,
        alpha_pattern=dict(others),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(_tensors(lora, PEFT_PREFIX, dtype), folder / ADAPTER_FILE, metadata={"format": "pt"})


def lora_bytes(lora: Lora, dtype: torch.dtype) -> int:
    """Size of a LoRA's tensors in `dtype`."""
    return sum(f.a.numel() + f.b.numel() for f in lora.values()) * dtype.itemsize


def _tensors(lora: Lora, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, factors in lora.items():
        for side, value in (("A", factors.a), ("B", factors.scaled_b)):
            tensors[f"{prefix}{layer}.lora_{side}.weight"] = value.detach().to("cpu", dtype, copy=True).contiguous()
    return tensors
