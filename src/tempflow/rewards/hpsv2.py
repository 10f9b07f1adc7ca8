"""HPS v2 (Wu et al., arXiv 2306.09341) and v2.1: a CLIP ViT-H/14 that was trained on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from tempflow.rewards.clip import LAION_H, Clip, load_clip, numbers_of, padded
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[scorers]", "about 0.20 to 0.35"
DIFFERENTIABLE = True


def hpsv2(
    *,
    path: Place,
    revision: str | None = None,
    version: Literal["2.1", "2.0"] = "2.1",
    tokenizer: Place = LAION_H,
    antialias: bool = True,
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """Human Preference Score v2: which picture people prefer.

    The cosine of picture and prompt, without logit scale.

    path       what `scripts/convert_weights.py hpsv2.1` made of HPS_v2.1_compressed.pt (hpsv2.0: of
               HPS_v2_compressed.pt), or any CLIPModel of these weights; a hub id at `revision`
    version    which of the two the weights are: their scores are not comparable. A converted file that says otherwise
               is refused
    tokenizer  a folder or hub id
    antialias  whether pictures are smoothed when they are made smaller, as torchvision does by itself since 0.17; it
               did not when HPS v2 was published

    A picture is made smaller as a whole and padded with black, never cropped. Scores of different prompts are not
    comparable.
    """
    require("scorers", "transformers", "accelerate")

    def load(at: str) -> Clip:
        return load_clip(path, revision, (tokenizer, None), at, dtype, f"hpsv{version}")

    def rate(clip: Clip, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return rate_pixels(clip, numbers_of(pictures), prompts)

    def rate_pixels(clip: Clip, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return clip.cosine(padded(pixels, clip.side, antialias), prompts)

    return Scorer("hpsv2", load, rate, batch=batch, device=device, pixels=rate_pixels)
