"""The aesthetic predictor of LAION (its version 2, "improved aesthetic predictor"): how much people like a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tempflow.rewards.clip import OPENAI_L, Clip, check_scorer, cropped, cropped_pixels, load_clip
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.rewards.weights import folder_of, load_strict, read_tensors
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[scorers]", "1 to 10, mostly 4.5 to 6.7"
DIFFERENTIABLE = True


@dataclass(frozen=True, eq=False)
class Predictor:
    clip: Clip
    head: nn.Linear


def aesthetic(
    *,
    path: Place,
    clip: Place = OPENAI_L,
    revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Predictor]:
    """LAION's aesthetic score of a picture.

    An affine map of CLIP ViT-L/14's feature of the picture, whose length is 1.

    path  what `scripts/convert_weights.py aesthetic` made of sac+logos+ava1-l14-linearMSE.pth
    clip  a folder, file or hub id of a CLIPModel, at `revision`

    The prompt plays no part. The published head has five linear layers and nothing between them, which is one affine
    map; the converter multiplies them in float64.
    """
    require("scorers", "transformers", "accelerate")

    def load(at: str) -> Predictor:
        loaded = load_clip(clip, revision, None, at, dtype)
        return Predictor(loaded, load_head(path, loaded.model.config.projection_dim, "aesthetic"))

    return Scorer("aesthetic", load, _rate, batch=batch, device=device, pixels=_rate_pixels)


def load_head(path: str, width: int, scorer: str) -> nn.Linear:
    """An affine map of features, [1, width] and a bias, in float64 on the CPU."""
    place = folder_of(path)
    check_scorer(path, place, scorer)
    head = nn.Linear(width, 1, dtype=torch.float64)
    load_strict(head, read_tensors(place), f"path: {path!r}")
    return head.requires_grad_(False)


def _rate(predictor: Predictor, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    pixels = cropped(pictures, predictor.clip.side, half=round)
    return predictor.head(predictor.clip.pictures(pixels))[:, 0]


def _rate_pixels(predictor: Predictor, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    made = cropped_pixels(pixels, predictor.clip.side, half=round)
    return predictor.head(predictor.clip.pictures(made))[:, 0]
