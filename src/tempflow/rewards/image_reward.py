"""ImageReward (Xu et al., arXiv 2304.05977): BLIP reads the prompt while it looks at the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempflow.devices import DTYPES
from tempflow.rewards.clip import check_kind, check_scorer, cropped, cropped_pixels
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.rewards.weights import folder_of, load_strict, load_tokenizer, read_tensors, unfilled
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[scorers]", "about -2.3 to 2"
DIFFERENTIABLE = True

TOKENS = 35
"""Of a prompt, its first and last included; what is longer is cut."""

ADDED = 2
"""Tokens that BLIP adds to BERT's, for its other tasks."""

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the data that ImageReward was trained on."""


class Blip(nn.Module):
    """BLIP's picture encoder, its text encoder with cross-attention, and an affine map of the text's first token.

    config  transformers' BlipConfig
    """

    def __init__(self, config: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = nn.Linear(config.text_config.hidden_size, 1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Judge:
    blip: Blip
    tokenizer: Any
    side: int


def image_reward(
    *,
    path: Place,
    revision: str | None = None,
    tokenizer: Place = "google-bert/bert-base-uncased",
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Judge]:
    """ImageReward: how well a picture serves its prompt.

    Standardised over the data that it was trained on.

    path       what `scripts/convert_weights.py image_reward` made of ImageReward.pt; a hub id at `revision`
    tokenizer  a folder or hub id of BERT's, uncased

    Prompts are cut to 35 tokens. Scores of different prompts are not comparable.
    """
    require("scorers", "transformers", "accelerate")

    def load(at: str) -> Judge:
        return _load(path, revision, tokenizer, at, dtype)

    return Scorer("image_reward", load, _rate, batch=batch, device=device, pixels=_rate_pixels)


def _load(path: str, revision: str | None, words: str, device: str, dtype: str) -> Judge:
    from transformers import BlipConfig

    place = folder_of(path, revision)
    folder = place if place.is_dir() else place.parent
    check_kind(path, folder, "blip")
    check_scorer(path, place, "image_reward")
    config: Any = BlipConfig.from_pretrained(folder)
    blip = unfilled(lambda: Blip(config))
    encoders: list[Any] = [blip.vision_model, blip.text_encoder]
    for encoder in encoders:
        encoder.float()
    load_strict(blip, read_tensors(place), f"path: {path!r}")
    blip.requires_grad_(False).eval()
    for encoder in encoders:
        encoder.to(device, DTYPES[dtype])
    tokenizer = load_tokenizer(words)
    size = config.text_config.vocab_size
    if not size - ADDED <= len(tokenizer) <= size:
        raise ValueError(
            f"tokenizer: {words!r} has {len(tokenizer)} tokens, the model {size}; nearest valid: BERT's, uncased"
        )
    return Judge(blip, tokenizer, int(config.vision_config.image_size))


def _rate(judge: Judge, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return _rated(judge, cropped(pictures, judge.side, half=round), prompts)


def _rate_pixels(judge: Judge, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    return _rated(judge, cropped_pixels(pixels, judge.side, half=round), prompts)


def _rated(judge: Judge, made: Tensor, prompts: Sequence[str]) -> Tensor:
    vision, text = judge.blip.vision_model, judge.blip.text_encoder
    pixels = made.to(vision.device, vision.dtype)
    words = judge.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    read = text(
        input_ids=words["input_ids"].to(text.device),
        attention_mask=words["attention_mask"].to(text.device),
        encoder_hidden_states=vision(pixel_values=pixels).last_hidden_state,
    )
    rated = judge.blip.head(read.last_hidden_state[:, 0].cpu().double())[:, 0]
    return (rated - MEAN) / DEVIATION
