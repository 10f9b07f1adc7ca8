"""CLIPScore (Hessel et al., arXiv 2104.08718): how near a picture and its prompt are to each other for CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from tempflow.rewards.clip import OPENAI_L, Clip, cropped, load_clip
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "MIT", "tempflow[scorers]", "about 0.15 to 0.40 as a cosine"

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda cosine: cosine,
    "100max": lambda cosine: 100 * cosine.clamp(min=0),
    "2.5max": lambda cosine: 2.5 * cosine.clamp(min=0),
}


def clipscore(
    *,
    path: Place = OPENAI_L,
    revision: str | None = None,
    tokenizer: Place | None = None,
    form: Literal["cosine", "100max", "2.5max"] = "cosine",
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """CLIPScore: the cosine between a picture and its prompt for CLIP ViT-L/14, in one of three forms.

    path       a folder, file or hub id of a CLIPModel, at `revision`
    tokenizer  a folder or hub id; None: that of `path`
    form       "cosine"; "100max" is 100 · max(cosine, 0), as torchmetrics has it; "2.5max" is 2.5 · max(cosine, 0), as
               the paper has it. The column is called by it: clipscore_cosine, clipscore_100max, clipscore_2.5max
    """
    require("scorers", "transformers", "accelerate")
    words = (path, revision) if tokenizer is None else (tokenizer, None)
    formed = FORMS[form]

    def load(at: str) -> Clip:
        return load_clip(path, revision, words, at, dtype)

    def rate(clip: Clip, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return formed(clip.cosine(cropped(pictures, clip.side), prompts))

    return Scorer(f"clipscore_{form}", load, rate, batch=batch, device=device)
