"""Converts a scorer's published weights, torch pickles, to the safetensors that tempflow reads.

    python scripts/convert_weights.py hpsv2.1 HPS_v2.1_compressed.pt --output weights/hpsv2.1
    python scripts/convert_weights.py aesthetic sac+logos+ava1-l14-linearMSE.pth --output weights/aesthetic
    python scripts/convert_weights.py image_reward ImageReward.pt --list
    python scripts/convert_weights.py video_reward checkpoint-11352/model.pth --output weights/video_reward

This is the one place of the project that opens a pickle, and it opens it with `weights_only=True`: tensors and plain
containers are read, anything else is refused. Each tensor of the file is renamed, split, joined or, where the score
does not use it, named as left out; a name that is unknown or missing, or a shape that is not the published network's,
ends the conversion and nothing is written. It keeps the dtype, but for heads, which become one affine map in float64.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempflow.folder import check, claim
from tempflow.names import PATH, cut

Tensors = dict[str, Tensor]
MENTIONED = 5
"""Names in a message."""

CLIP_H = {
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
    },
}
"""open_clip's ViT-H-14 as transformers' CLIPConfig; what is not said is its default."""

BLIP_L = {
    "model_type": "blip",
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
    },
}
"""ImageReward's BLIP as transformers' BlipConfig."""

LINEAR = (0, 2, 4, 6, 7)
"""Places of the linear layers in a head; the others are dropouts."""


@dataclass
class Converted:
    """What becomes of a file: tensors to be written, and the names of those that the score does not use."""

    tensors: Tensors = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ the kinds
CLIP_NAMES = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"logit_scale", "logit_scale"),
)
CLIP_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
CLIP_BLOCK_NAMES = (
    (r"ln_([12])\.(weight|bias)", r"layer_norm\1.\2"),
    (r"attn\.out_proj\.(weight|bias)", r"self_attn.out_proj.\1"),
    (r"mlp\.c_fc\.(weight|bias)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(weight|bias)", r"mlp.fc2.\1"),
)


def clip(found: Mapping[str, Tensor]) -> Converted:
    """open_clip's names to transformers' CLIPModel: attention's joint projection is split in three, and projections,
    which open_clip multiplies from the right, are transposed."""
    made = Converted()
    for name, tensor in found.items():
        block = CLIP_BLOCK.fullmatch(name)
        if block is None:
            to = _renamed(name, CLIP_NAMES)
            made.tensors[to] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
            continue
        tower, place, part = block.groups()
        stem = f"{'vision' if tower else 'text'}_model.encoder.layers.{place}"
        joint = re.fullmatch(r"attn\.in_proj_(weight|bias)", part)
        if joint is None:
            made.tensors[f"{stem}.{_renamed(part, CLIP_BLOCK_NAMES, name)}"] = tensor
            continue
        for letter, third in zip("qkv", tensor.tensor_split(3), strict=True):
            made.tensors[f"{stem}.self_attn.{letter}_proj.{joint[1]}"] = third.clone()
    return made


BLIP_BLOCK = r"blip\.visual_encoder\.blocks\.(\d+)\."
BLIP_NAMES = (
    (r"blip\.visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (rf"{BLIP_BLOCK}norm([12])\.(\w+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (rf"{BLIP_BLOCK}attn\.qkv\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (rf"{BLIP_BLOCK}attn\.proj\.(\w+)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (rf"{BLIP_BLOCK}mlp\.fc([12])\.(\w+)", r"vision_model.encoder.layers.\1.mlp.fc\2.\3"),
    (r"blip\.text_encoder\.(embeddings|encoder)\.(.+)", r"text_encoder.\1.\2"),
)
BLIP_UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)")
"""Heads of BLIP's contrastive loss, which is no part of the score."""


def image_reward(found: Mapping[str, Tensor]) -> Converted:
    """BLIP's names to transformers', and the head to one affine map."""
    made, head = Converted(), dict[str, Tensor]()
    for name, tensor in found.items():
        if name.startswith("mlp.layers."):
            head[name.removeprefix("mlp.")] = tensor
        elif BLIP_UNUSED.fullmatch(name) or (name.endswith(".position_ids") and _counts_up(tensor)):
            made.unused.append(name)
        else:
            made.tensors[_renamed(name, BLIP_NAMES)] = tensor
    made.tensors |= {f"head.{name}": tensor for name, tensor in affine(head).items()}
    return made


def aesthetic(found: Mapping[str, Tensor]) -> Converted:
    """The head to one affine map."""
    return Converted(affine(found))


def affine(layers: Mapping[str, Tensor]) -> Tensors:
    """Linear layers with nothing between them, "layers.0.weight" …, as one, in float64."""
    expected = [f"layers.{place}.{part}" for place in LINEAR for part in ("weight", "bias")]
    _check_names(layers.keys(), expected)
    weight = layers["layers.0.weight"].double()
    bias = layers["layers.0.bias"].double()
    for place in LINEAR[1:]:
        factor = layers[f"layers.{place}.weight"].double()
        if factor.ndim != 2 or factor.shape[1] != len(weight):
            raise ValueError(f"layers.{place}.weight is {list(factor.shape)}; nearest valid: [·, {len(weight)}]")
        weight, bias = factor @ weight, factor @ bias + layers[f"layers.{place}.bias"].double()
    return {"weight": weight, "bias": bias}


WORDS = "base_model.model.lm_head.weight"
"""The predictor of words, which the score does not use."""


def video_reward(found: Mapping[str, Tensor]) -> Converted:
    """As it is, by peft's names: the reward merges the LoRA by its settings, and checks each tensor when it loads."""
    rest = {name: tensor.clone() for name, tensor in found.items() if name != WORDS}  # no two in one memory
    return Converted(rest, [name for name in found if name == WORDS])


@dataclass(frozen=True)
class Kind:
    """A published file.

    convert  its tensors to ours
    shapes   what they must be then: of a configuration, name → shape; None: whoever loads them checks
    config   what is written as config.json; None: nothing
    beside   a file that lies beside the published one, or in the folder above, and belongs to it
    """

    convert: Callable[[Mapping[str, Tensor]], Converted]
    shapes: Callable[[Any], dict[str, torch.Size]] | None
    config: dict[str, Any] | None
    beside: str | None = None

    def companion(self, file: Path) -> Path | None:
        """The file beside; None where none belongs to it. Raises ValueError where it is not there."""
        if self.beside is None:
            return None
        for folder in (file.parent, file.resolve().parent.parent):
            if (folder / self.beside).is_file():
                return folder / self.beside
        raise ValueError(f"FILE: {cut(str(file), PATH)!r} has no {self.beside} beside it; get that file, too")


def clip_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        return _shapes(CLIPModel(CLIPConfig(**config)))


def blip_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    from transformers import BlipConfig

    from tempflow.rewards.image_reward import Blip

    with torch.device("meta"):
        return _shapes(Blip(BlipConfig(**config)))


def head_shapes(config: None) -> dict[str, torch.Size]:
    return {"weight": torch.Size([1, 768]), "bias": torch.Size([1])}


KINDS = {
    "hpsv2.0": Kind(clip, clip_shapes, CLIP_H),
    "hpsv2.1": Kind(clip, clip_shapes, CLIP_H),
    "aesthetic": Kind(aesthetic, head_shapes, None),
    "image_reward": Kind(image_reward, blip_shapes, BLIP_L),
    "video_reward": Kind(video_reward, None, None, "model_config.json"),
}
"""Scorer → what its published file is. Other scorers' weights are published as safetensors."""


# ----------------------------------------------------------------------------------------------------------- the script
def read(file: Path) -> Tensors:
    """The tensors of a torch pickle by name; of one with a "state_dict", these. Where all names begin with "module.",
    they lose it. Raises ValueError for anything that is not a mapping of names to tensors."""
    try:
        told = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none raises what its reader does
        raise ValueError(f"FILE: {str(file)!r} cannot be read as weights ({cut(str(error), PATH)})") from error
    if isinstance(told, Mapping) and isinstance(told.get("state_dict"), Mapping):
        others = [str(key) for key in told if key != "state_dict"]
        if others:
            print(f"beside state_dict, not converted: {', '.join(others)}")
        told = told["state_dict"]
    if not isinstance(told, Mapping) or not told or not all(isinstance(t, Tensor) for t in told.values()):
        raise ValueError(f"FILE: {str(file)!r} is no mapping of names to tensors; nearest valid: the published file")
    tensors = {str(name): tensor for name, tensor in told.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def convert(name: str, found: Mapping[str, Tensor], config: dict[str, Any] | None) -> Converted:
    """The tensors of a published file as ours; `config` is the network's. Raises ValueError for names that are unknown
    or missing, shapes that are another network's, and numbers that are not finite."""
    kind = KINDS[name]
    made = kind.convert(found)
    shapes = {name: tensor.shape for name, tensor in made.tensors.items()}
    if kind.shapes is not None:
        shapes = kind.shapes(config)
        _check_names(made.tensors.keys(), shapes)
    for tensor in shapes:
        if made.tensors[tensor].shape != shapes[tensor]:
            wrong = list(made.tensors[tensor].shape)
            raise ValueError(
                f"{tensor} is {wrong}; nearest valid: {list(shapes[tensor])}, that of the published network"
            )
        if not made.tensors[tensor].isfinite().all():
            raise ValueError(f"{tensor} has numbers that are not finite; get the file again")
    return made


def write(name: str, made: Converted, source: str, config: dict[str, Any] | None, output: Path) -> Path:
    """Writes model.safetensors, which says what it is for and of which file, and config.json. Returns the folder."""
    folder = claim(output, "weights")
    part = folder / "model.safetensors.part"
    tensors = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
    save_file(tensors, part, metadata={"format": "pt", "scorer": name, "source": source})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "model.safetensors")
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", metavar="KIND", choices=KINDS, help=f"the scorer: {', '.join(KINDS)}")
    parser.add_argument("file", metavar="FILE", type=Path, help="the published file, a torch pickle")
    parser.add_argument("--output", type=Path, help="a new folder for model.safetensors and config.json")
    parser.add_argument("--list", action="store_true", help="convert in memory, say what becomes of each tensor's name")
    given = parser.parse_args(arguments)
    if (given.output is None) != given.list:
        parser.error("nearest valid: either --output FOLDER or --list")
    config = KINDS[given.kind].config
    try:
        if not given.file.is_file():
            raise ValueError(f"FILE: {str(given.file)!r} is not there")
        if given.output is not None:
            check(given.output, "weights")
        beside = KINDS[given.kind].companion(given.file)
        made = convert(given.kind, read(given.file), config)
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    for name in made.unused:
        print(f"not used by the score, left out: {name}")
    if given.output is None:
        for name, tensor in made.tensors.items():
            print(f"{name}  {str(tensor.dtype).removeprefix('torch.')}  {list(tensor.shape)}")
        return 0
    folder = write(given.kind, made, given.file.name, config, given.output)
    if beside is not None:
        (folder / beside.name).write_bytes(beside.read_bytes())
    print(f"{len(made.tensors)} tensors in {folder}")
    return 0


# ---------------------------------------------------------------------------------------------------------------- parts
def _renamed(name: str, table: tuple[tuple[str, str], ...], whole: str = "") -> str:
    for pattern, to in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, to, name)
    raise ValueError(f"{whole or name!r} is no tensor of the published network; nearest valid: the published file")


def _check_names(found: Any, expected: Any) -> None:
    missing, unknown = [n for n in expected if n not in found], [n for n in found if n not in expected]
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            over = f" and {len(names) - MENTIONED} more" if len(names) > MENTIONED else ""
            raise ValueError(f"{what}: {', '.join(names[:MENTIONED])}{over}; nearest valid: the published file")


def _counts_up(tensor: Tensor) -> bool:
    return torch.equal(tensor.flatten(), torch.arange(tensor.numel()))


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


if __name__ == "__main__":
    sys.exit(main())
