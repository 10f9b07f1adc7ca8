"""CLIP by transformers, from safetensors: features of pictures and prompts, and how pictures are made ready for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tempflow.devices import DTYPES
from tempflow.names import PATH, cut
from tempflow.rewards.weights import folder_of, load_strict, load_tokenizer, metadata_of, read_tensors, unfilled

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI_L = "openai/clip-vit-large-patch14"

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours that OpenAI's CLIP, and every network here, was trained with."""


# ------------------------------------------------------------------------------------------------------------- pictures
def cropped(pictures: Tensor, side: int, half: Callable[[float], int] = math.floor) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, side, side]: the shorter side resized (PIL, bicubic) to `side`, the middle
    cut out, colours normalised.

    half   what becomes of half a pixel when the middle is sought: transformers' processor takes the floor, torchvision
           rounds
    """
    height, width = pictures.shape[1:3]
    shorter = min(height, width)
    high, wide = int(side * height / shorter), int(side * width / shorter)
    top, left = half((high - side) / 2), half((wide - side) / 2)
    box = (left, top, left + side, top + side)
    made = torch.empty(len(pictures), side, side, 3, dtype=torch.uint8)
    for row, picture in enumerate(pictures.numpy()):
        image = Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC).crop(box)
        made[row] = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return normalised(numbers_of(made))


def cropped_pixels(pixels: Tensor, side: int, half: Callable[[float], int] = math.floor) -> Tensor:
    """The same of float32 [N, 3, H, W] in [0, 1], with gradients: rows, then columns, by torch's bicubic filter. It is
    PIL's, but for the whole numbers that PIL rounds to after both, and for which of the two comes first, which only
    tells where the filter overshoots black or white."""
    height, width = pixels.shape[2:]
    shorter = min(height, width)
    high, wide = int(side * height / shorter), int(side * width / shorter)
    top, left = half((high - side) / 2), half((wide - side) / 2)
    for size in ((height, wide), (high, wide)):
        if size != tuple(pixels.shape[2:]):
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return normalised(pixels[:, :, top : top + side, left : left + side])


def numbers_of(pictures: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def padded(numbers: Tensor, side: int, antialias: bool) -> Tensor:
    """float32 [N, 3, H, W] in [0, 1] to [N, 3, side, side]: the longer side resized (torch, bicubic, not clamped) to
    `side`, black around it, colours normalised."""
    height, width = numbers.shape[2:]
    scale = side / max(height, width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    if (high, wide) != (height, width):
        numbers = F.interpolate(numbers, (high, wide), mode="bicubic", align_corners=False, antialias=antialias)
    down, across = side - high, side - wide
    return normalised(F.pad(numbers, (across // 2, across - across // 2, down // 2, down - down // 2)))


def normalised(numbers: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1], less CLIP's mean colour, by its standard deviation."""
    mean, std = (torch.tensor(c, device=numbers.device).view(3, 1, 1) for c in (MEAN, STD))
    return (numbers - mean) / std


# ------------------------------------------------------------------------------------------------------------- features
@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model at work.

    model      transformers' CLIPModel, on its device
    tokenizer  None where no prompt is looked at
    side       pixels of a picture's side
    scale      exp of its logit scale, as its file has it: a model in bfloat16 would round it
    """

    model: Any
    tokenizer: Any
    side: int
    scale: float

    def pictures(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, side, side] to features of length 1, float64 [N, d] on the CPU."""
        return _unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype)))

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Texts, cut to the model's length, to features of length 1, float64 [N, d] on the CPU. Equal ones are read
        once.

        All are padded to the full length, so that a text does not depend on its neighbours.
        """
        if self.tokenizer is None:
            raise ValueError("prompts of a CLIP that was loaded without a tokenizer")
        different = list(dict.fromkeys(prompts))
        most = int(self.model.config.text_config.max_position_embeddings)
        ids = self.tokenizer(different, padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        found = _unit(self.model.get_text_features(input_ids=ids["input_ids"].to(self.model.device)))
        return found[[different.index(prompt) for prompt in prompts]]

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each picture and its own prompt: float64 [N] on the CPU."""
        return (self.pictures(pixels) * self.prompts(prompts)).sum(dim=1)


def load_clip(
    path: str, revision: str | None, words: tuple[str, str | None] | None, device: str, dtype: str, scorer: str = ""
) -> Clip:
    """The CLIP in a folder with a config.json of kind "clip" and safetensors, in one such file beside its config.json,
    or in a hub's repository.

    words   path and revision of the tokenizer; None where no prompt is looked at
    scorer  what a converted file must have been converted for, where it says so

    Raises ValueError for another kind of model, tensors that do not fit, and a tokenizer of another vocabulary.
    """
    from transformers import CLIPConfig, CLIPModel

    place = folder_of(path, revision)
    folder = place if place.is_dir() else place.parent
    check_kind(path, folder, "clip")
    check_scorer(path, place, scorer)
    config: Any = CLIPConfig.from_pretrained(folder)
    model: Any = unfilled(lambda: CLIPModel(config)).float()
    tensors = read_tensors(place)
    load_strict(model, tensors, f"path: {path!r}")
    tokenizer = None if words is None else load_tokenizer(*words)
    if words is not None:
        _check_words(tokenizer, words[0], config.text_config)
    scale = float(tensors["logit_scale"].double().exp())
    model.requires_grad_(False).eval().to(device, DTYPES[dtype])
    return Clip(model, tokenizer, int(config.vision_config.image_size), scale)


def check_kind(path: str, folder: Path, kind: str) -> None:
    """Raises ValueError unless the folder's config.json says that it holds a model of that kind."""
    file = folder / "config.json"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        found = told.get("model_type") if isinstance(told, dict) else None
    except (OSError, ValueError) as error:
        why = "has no config.json" if not file.exists() else f"has a config.json that cannot be read ({error})"
        raise ValueError(f"path: {cut(path, PATH)!r} {why}; nearest valid: a folder with both") from error
    if found != kind:
        raise ValueError(f"path: {cut(path, PATH)!r} is a {str(found)[:40]!r}; nearest valid: {kind!r}")


def check_scorer(path: str, place: Path, scorer: str) -> None:
    """Raises ValueError for what scripts/convert_weights.py made for another scorer, or another version of it."""
    made = metadata_of(place).get("scorer", scorer)
    if scorer and made != scorer:
        raise ValueError(f"path: {cut(path, PATH)!r} was converted for {made}; nearest valid: one for {scorer}")


def _check_words(words: Any, path: str, config: Any) -> None:
    """A text's feature is read at its end: a tokenizer with another end would silently give that of the first token."""
    ends = config.eos_token_id
    if ends == 2:  # a slip of old configurations: the model takes the highest token of a text for its end
        ends = config.vocab_size - 1
    if len(words) > config.vocab_size or words.eos_token_id != ends:
        raise ValueError(
            f"tokenizer: {path!r} has {len(words)} tokens and ends texts by {words.eos_token_id}, where the model has "
            f"{config.vocab_size} and {ends}; nearest valid: the tokenizer that the model was trained with"
        )


def _unit(features: Any) -> Tensor:
    """transformers 4 gives the features themselves, 5 an object around them."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    found = found.cpu().double()
    return found / found.norm(dim=1, keepdim=True)
