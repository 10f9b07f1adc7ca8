"""LoRA files as people have them: diffusers, PEFT, kohya and ComfyUI form, read without dropping a tensor.

Every tensor of a file is used, or the file is refused with the tensor's name; so is a layer that the model lacks.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tempflow.models.lora import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE, Factors, FittedLora, Lora, Shapes
from tempflow.models.protocol import Model

METADATA = "lora_adapter_metadata"
"""The key of a safetensors header under which diffusers keeps an adapter's configuration."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

NETWORK = "transformer"
"""The part that is trained, whatever the pipeline calls it: files of one family go by several names for it."""

DOTTED = {
    "transformer.": NETWORK,
    "unet.": NETWORK,
    "model.diffusion_model.": NETWORK,
    "diffusion_model.": NETWORK,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
    "": NETWORK,
}
"""What stands before a layer's name with dots, and which part of the pipeline that means."""

PEFT_PREFIX = "base_model.model."
"""Stands before those prefixes in a PEFT file."""

FLAT = {
    "lora_unet_": NETWORK,
    "lora_transformer_": NETWORK,
    "lycoris_": NETWORK,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""The same before names whose dots are underscores (kohya, OneTrainer)."""

TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora(?:_linear_layer\.|[._])(?P<way>down|up)\.weight"
    r"|(?P<alpha>alpha))"
)
"""A tensor's name: a layer, then a (A, down), b (B, up) or alpha."""

OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a Tucker decomposition (LoCon)",
    ".diff": "a full difference of weights",
    ".bias": "a LoRA with biases",
}
"""What in a tensor's name tells that it is more than a plain LoRA."""

MERGE_IT = "merge it into its base with the tool that made it, and give that folder as the model"


@dataclass(frozen=True)
class Part:
    """Rows of a layer that goes by another name, which are those of `layer` here; `swapped`: with the two halves in the
    other order."""

    layer: str
    swapped: bool = False


@runtime_checkable
class TakesLora(Protocol):
    """A model on whose network a LoRA can be trained, and that takes one from a file."""

    def add_lora(self, rank: int, alpha: int, targets: Sequence[str] | None = None) -> None:
        """A fresh LoRA of scale alpha/rank becomes the policy: A Gaussian, from torch's generator, and B zero, so that
        the policy starts as the base. On the family's usual layers, or on those that `targets` mean: each an end of a
        layer's name, or a regular expression of all of it.

        Raises ValueError when rank or alpha is below 1, there is a LoRA already, or a target means no layer.
        """
        ...

    def add_lora_on(self, ranks: Mapping[str, int], scale: float) -> None:
        """The same on exactly the layers of `ranks`, each of its own rank."""
        ...

    def fit_lora(self, file: LoraFile) -> FittedLora:
        """What the file holds, in the names of the model's layers. Raises ValueError, naming it, for a tensor that fits
        no layer."""
        ...

    def attach_lora(self, lora: FittedLora) -> None:
        """Puts it beside the weights of the parts that it is of, frozen. Raises ValueError where the network has a LoRA
        already."""
        ...


Aliases = Mapping[str, Sequence[Part]]
"""Another name of a layer → the layers of ours that it is made of, in the order of their rows."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA as it lies on disk: the file, its tensors, and the PEFT configuration that goes with it, by part of the
    pipeline ("" for all)."""

    path: Path
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, PeftScales]


# -------------------------------------------------------------------------------------------------------------- reading
def lora_file(path: str | Path) -> Path:
    """The LoRA's file: `path` itself, or in the folder `path` the one with diffusers' or PEFT's name, or the only
    *.safetensors.

    Raises ValueError where there is none, several to choose from, or only pickled ones.
    """
    place = Path(path).expanduser()
    if place.is_file():
        _check_not_pickled(place)
        return place
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    named = [place / name for name in (LORA_FILE, ADAPTER_FILE) if place / name in found]
    if len(named) == 1:
        return named[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{str(path)!r} has {', '.join(f.name for f in found)}; name one of them")
    if not place.is_dir():
        raise ValueError(f"{str(path)!r} is no file; {_near(place)}")
    for pickled in sorted(p for p in place.iterdir() if p.suffix in PICKLED):
        _check_not_pickled(pickled)
    raise ValueError(f"{str(path)!r} holds no .safetensors; {_near(place)}")


def _check_not_pickled(file: Path) -> None:
    if file.suffix in PICKLED:
        raise ValueError(
            f"{str(file)!r} is a pickle, which may run code when it is read; only safetensors are read here. Where you "
            f"trust it: safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), {ADAPTER_FILE!r})"
        )


def _near(place: Path) -> str:
    """A hint: the LoRA in a folder of `place`, or beside it."""
    for folder in (place, place.parent):
        files = [*folder.glob("*/*.safetensors"), *folder.glob("*.safetensors")] if folder.is_dir() else []
        known = {str(f.parent if f.name in (LORA_FILE, ADAPTER_FILE) else f) for f in files}
        close = difflib.get_close_matches(str(place), sorted(known), n=1, cutoff=0.0)
        if close:
            return f"nearest valid: {close[0]!r}"
    return f"a LoRA is a file, or a folder with {LORA_FILE} or {ADAPTER_FILE}"


def read_lora(path: str | Path) -> LoraFile:
    """Reads the LoRA at `path`, a file or its folder. Raises ValueError for one that is missing or broken."""
    file = lora_file(path)
    try:
        with safe_open(str(file), "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is not safetensors, or damaged ({error})") from error
    if not tensors:
        raise ValueError(f"{str(file)!r} has no tensors")
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise ValueError(f"{str(file)!r}: {name[:100]!r} holds something that is no finite number")
    return LoraFile(file, tensors, _scales(file, metadata, tensors))


def _scales(file: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, PeftScales]:
    """From `adapter_config.json` beside a PEFT file, or from diffusers' metadata; by part of the pipeline."""
    config, beside = file.parent / ADAPTER_CONFIG, any(name.startswith(PEFT_PREFIX) for name in tensors)
    if config.is_file() and (beside or file.name == ADAPTER_FILE):
        return {"": _peft_scales(config.read_text(encoding="utf-8", errors="replace"), str(config))}
    if METADATA not in metadata:
        if beside and not any(name.endswith(".alpha") for name in tensors):
            raise ValueError(f"{str(file)!r} is of PEFT form, and no {ADAPTER_CONFIG} beside it gives its alpha")
        return {}
    where = f"{METADATA} of {file}"
    told: Any = _json(metadata[METADATA], where)
    if not isinstance(told, dict):
        raise ValueError(f"{where}: it is no mapping of fields")
    parts = {prefix[:-1] for prefix in DOTTED if any(str(key).startswith(prefix) for key in told)} - {""}
    if not parts:  # of a transformer's own `save_lora_adapter`, which names no part
        return {"": _peft_scales(metadata[METADATA], where)}
    split = {
        DOTTED[f"{part}."]: {k.removeprefix(f"{part}."): v for k, v in told.items() if k.startswith(f"{part}.")}
        for part in parts
    }
    return {part: _named(where, fields) for part, fields in split.items()}


def _peft_scales(text: str, where: str) -> PeftScales:
    return _named(where, _json(text, where))


def _named(where: str, fields: Any) -> PeftScales:
    try:
        return PeftScales(fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


HARMLESS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
    "qalora_group_size", "megatron_core",
}  # fmt: skip
"""Fields that are read, or that change nothing about what finished weights compute."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are; the others subtract something from them."""


@dataclass(frozen=True)
class PeftScales:
    """Scales of layers as a PEFT configuration gives them.

    Raises ValueError, naming the field, for one that makes an adapter something else than W + scale · b · a.
    """

    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        from peft import LoraConfig

        if not isinstance(self.config, Mapping):
            raise ValueError(f"it is {type(self.config).__name__}, no mapping of fields")
        kind = str(self.config.get("peft_type") or "LORA")
        if kind.rpartition(".")[2] != "LORA":
            raise ValueError(f"peft_type: {kind!r} is no LoRA; nearest valid: 'LORA'")
        usual: dict[str, Any] = LoraConfig().to_dict()
        for field, value in self.config.items():
            off = value in (None, False, "", "none") or value in ([], {}) or value == usual.get(field)
            if field not in HARMLESS and not off:
                raise ValueError(f"{field}: {str(value)[:60]!r} makes it more than a plain LoRA; {MERGE_IT}")
        if self.config.get("init_lora_weights") not in PLAIN_STARTS:
            start = self.config["init_lora_weights"]
            raise ValueError(
                f"init_lora_weights: {start!r} changes the base too; save it with peft's "
                "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            )
        for field in ("r", "lora_alpha"):
            value = self.config.get(field, usual[field])
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{field}: {value!r} is no number")

    def of(self, layer: str, rank: int) -> float:
        """The scale of `layer`, by the name that the file gives it. Raises ValueError where the file's rank is another
        than the configuration's."""
        told = self._pattern("rank_pattern", "r", layer)
        if told != rank:
            raise ValueError(f"r: {told} for {layer!r}, whose tensors have rank {rank}: of another adapter?")
        return self._pattern("alpha_pattern", "lora_alpha", layer) / (
            math.sqrt(rank) if self.config.get("use_rslora") else rank
        )

    def _pattern(self, patterns: str, usual: str, layer: str) -> float:
        found: Mapping[str, float] = self.config.get(patterns) or {}
        try:
            key = next((key for key in found if re.match(rf"(.*\.)?({key})$", layer)), None)
        except re.error as error:
            raise ValueError(f"{patterns}: not a regular expression ({error})") from error
        return found[key] if key is not None else self.config.get(usual, 8)  # peft's own defaults


# ----------------------------------------------------------------------------------------------------------- its layers
@dataclass(frozen=True, eq=False)
class Raw:
    """What a file says of one layer, under the file's own name for it."""

    stem: str
    component: str
    told: str
    a: Tensor
    b: Tensor
    alpha: float | None


def fit(file: LoraFile, shapes: Mapping[str, Shapes], aliases: Aliases, base: str) -> dict[str, Lora]:
    """The LoRA of each part of a pipeline, in its own layers' names and the shapes of their weights.

    shapes   part (NETWORK, "text_encoder" …) → its layers
    aliases  other names of the network's layers
    base     what the model is called

    Raises ValueError, naming the tensor, for one that is not used, a layer that is not there, or another shape.
    """
    try:
        return _fit(file, shapes, aliases, base)
    except ValueError as error:
        raise ValueError(f"{str(file.path)!r}: {error}") from error


def _fit(file: LoraFile, shapes: Mapping[str, Shapes], aliases: Aliases, base: str) -> dict[str, Lora]:
    found: dict[str, dict[str, Factors]] = {}
    origin: dict[tuple[str, str], str] = {}
    tables = {part: _Names.of(of, aliases if part == NETWORK else _text_names(of)) for part, of in shapes.items()}
    for raw in _layers(file.tensors):
        if raw.component not in tables:
            raise ValueError(f"{raw.stem!r} is of {raw.component}, which {base} lacks")
        table = tables[raw.component]
        parts = table.parts(raw.told)
        if parts is None:
            near = nearest(raw.told, table.known)
            raise ValueError(f"{raw.told!r} is no layer of {base}; nearest is {near!r}: another base?")
        scale = _scale(file, raw)
        for part, factors in zip(parts, _split(raw, parts, scale, table, base), strict=True):
            place = (raw.component, part.layer)
            if place in origin:
                raise ValueError(f"{origin[place]!r} and {raw.stem!r} are both of {part.layer!r}")
            origin[place] = raw.stem
            found.setdefault(raw.component, {})[part.layer] = factors
    return {part: dict(lora) for part, lora in found.items()}


CLIP = "text_model."
"""Stands before the layers of a CLIP in files, and in some releases of transformers."""


def _text_names(shapes: Shapes) -> Aliases:
    """A text encoder's layers as the other releases of transformers call them."""
    return {name[len(CLIP) :] if name.startswith(CLIP) else CLIP + name: (Part(name),) for name in shapes}


def nearest(name: str, known: Sequence[str]) -> str:
    """The name of `known` that reads most like `name`."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.0)), "none")


def _layers(tensors: Mapping[str, Tensor]) -> list[Raw]:
    """Tensors by layer, in the file's order. Raises ValueError for one whose name says something else, or whose partner
    is missing."""
    sides: dict[str, dict[str, Tensor]] = {}
    adapters: set[str] = set()
    for name, value in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None:
            kind = next((kind for sign, kind in OTHER_KINDS.items() if sign in name), None)
            why = f"{kind}; {MERGE_IT}" if kind else f"a tensor is called like '{EXAMPLE}'"
            raise ValueError(f"it has {name[:100]!r}, which is not read: {why}")
        side = "alpha" if match["alpha"] else {"A": "a", "down": "a"}.get(match["side"] or match["way"], "b")
        adapters |= {match["adapter"]} if match["adapter"] else set()
        if len(adapters) > 1:
            raise ValueError(f"it holds two adapters, {' and '.join(sorted(adapters))}; a file of one of them is read")
        if side in sides.setdefault(match["layer"], {}):
            raise ValueError(f"it has {name[:100]!r} twice, in two ways of writing")
        sides[match["layer"]][side] = value
    raws: list[Raw] = []
    for stem, pair in sides.items():
        for side, called in SIDES.items():
            if side not in pair:
                raise ValueError(f"{stem[:100]!r} has no {called}")
        component, told = _component(stem)
        alpha = pair.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"'{stem[:100]}.alpha' is {list(alpha.shape)}, no single number")
        raws.append(Raw(stem, component, told, pair["a"], pair["b"], None if alpha is None else float(alpha)))
    return raws


SIDES = {"a": "lora_A (lora_down)", "b": "lora_B (lora_up)"}
EXAMPLE = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


def _component(stem: str) -> tuple[str, str]:
    """Which part of the pipeline a layer is of, and its name there as the file writes it."""
    for prefix, component in FLAT.items():
        if stem.startswith(prefix):
            return component, stem.removeprefix(prefix)
    name = stem.removeprefix(PEFT_PREFIX)
    prefix = next(prefix for prefix in DOTTED if name.startswith(prefix))
    return DOTTED[prefix], name.removeprefix(prefix)


@dataclass(frozen=True, eq=False)
class _Names:
    """A network's layers by all of their names, and the shapes of their weights."""

    shapes: Shapes
    names: Mapping[str, Sequence[Part]]
    flat: Mapping[str, Sequence[Part]]

    @staticmethod
    def of(shapes: Shapes, aliases: Aliases) -> _Names:
        names: dict[str, Sequence[Part]] = {**aliases, **{name: (Part(name),) for name in shapes}}
        return _Names(shapes, names, {name.replace(".", "_"): parts for name, parts in names.items()})

    @property
    def known(self) -> list[str]:
        return list(self.shapes)

    def parts(self, told: str) -> Sequence[Part] | None:
        return self.names.get(told) or self.flat.get(told)


def _scale(file: LoraFile, raw: Raw) -> float:
    """alpha / rank, by the tensor or the configuration; without either 1, as diffusers and kohya have it."""
    rank = raw.a.shape[0]
    config = file.scales.get(raw.component) or file.scales.get("")
    told = None if config is None else config.of(raw.told, rank)
    if raw.alpha is None:
        return 1.0 if told is None else told
    if told is not None and not math.isclose(told, raw.alpha / rank, rel_tol=1e-6):
        raise ValueError(f"{raw.stem!r} has scale {raw.alpha / rank:g} by its alpha and {told:g} by the configuration")
    return raw.alpha / rank


def _split(raw: Raw, parts: Sequence[Part], scale: float, table: _Names, base: str) -> list[Factors]:
    """One update a part: each with the whole a, and its own rows of b."""
    shapes = [table.shapes[part.layer] for part in parts]
    width, outs = shapes[0][1:], [shape[0] for shape in shapes]
    ones = (1,) * (len(width) - 1)  # of a convolution, b is one of 1 × 1
    for side, tensor, want in (
        ("a", raw.a, (None, *width)),
        ("b", raw.b, (sum(outs), raw.a.shape[0], *ones)),
    ):
        if len(tensor.shape) != len(want) or any(w not in (None, t) for t, w in zip(tensor.shape, want, strict=True)):
            needs = ", ".join("rank" if w is None else str(w) for w in want)
            raise ValueError(
                f"{raw.stem!r} has {SIDES[side]} of {list(tensor.shape)}, but {base} needs [{needs}]: another base?"
            )
    rows = [torch.cat(r.chunk(2)[::-1]) if p.swapped else r for r, p in zip(raw.b.split(outs), parts, strict=True)]
    return [Factors(raw.a.float(), r.float().contiguous(), scale) for r in rows]


def load_lora(model: Model, path: str | Path) -> None:
    """Puts the LoRA at `path`, a file or its folder in any form, beside the weights of `model`, frozen.

    Raises ValueError for a file that is no LoRA, one of another architecture, or a model that takes none.
    """
    try:
        if not isinstance(model, TakesLora):
            raise ValueError(f"{str(path)!r} is a LoRA, and the model {model.name!r} takes none; nearest valid: none")
        model.attach_lora(model.fit_lora(read_lora(path)))
    except ValueError as error:
        raise ValueError(f"lora: {error}") from error
