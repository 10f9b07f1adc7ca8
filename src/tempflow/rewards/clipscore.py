"""CLIPScore as a cosine: how near a picture and its prompt are to each other for CLIP (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tempflow.rewards.clip import OPENAI_L, Clip, cropped, cropped_pixels, load_clip
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "MIT", "tempflow[scorers]", "about 0.15 to 0.40"
DIFFERENTIABLE = True


def clipscore(
    *,
    path: Place = OPENAI_L,
    revision: str | None = None,
    tokenizer: Place = "",
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """CLIPScore: the cosine of a picture and its prompt, by CLIP ViT-L/14.

    path       a folder, file or hub id of a CLIPModel, at `revision`
    tokenizer  a folder or hub id; "": that of `path`

    The literature calls three things CLIPScore; the others are `clipscore_100` and `clipscore_2_5`.
    """
    return by_form("clipscore", lambda cosine: cosine, path, revision, tokenizer, device, dtype, batch)


def by_form(
    name: str,
    form: Callable[[Tensor], Tensor],
    path: str,
    revision: str | None,
    tokenizer: str,
    device: str,
    dtype: Dtype,
    batch: int,
) -> Scorer[Clip]:
    """`form` of the cosine, as a reward called `name`; the others are `clipscore`'s options."""
    require("scorers", "transformers", "accelerate")
    words = (tokenizer, None) if tokenizer else (path, revision)

    def load(at: str) -> Clip:
        return load_clip(path, revision, words, at, dtype)

    def rate(clip: Clip, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return form(clip.cosine(cropped(pictures, clip.side), prompts))

    def rate_pixels(clip: Clip, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return form(clip.cosine(cropped_pixels(pixels, clip.side), prompts))

    return Scorer(name, load, rate, batch=batch, device=device, pixels=rate_pixels)
