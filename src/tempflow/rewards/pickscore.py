"""PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 that was trained on which picture people picked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tempflow.rewards.clip import LAION_H, Clip, cropped, cropped_pixels, load_clip
from tempflow.rewards.scorer import Batch, Dtype, Scorer, require
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "MIT", "tempflow[scorers]", "about 17 to 24"
DIFFERENTIABLE = True


def pickscore(
    *,
    path: Place = "yuvalkirstain/PickScore_v1",
    revision: str | None = None,
    tokenizer: Place = LAION_H,
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """PickScore: which picture people would pick.

    exp(logit scale) · the cosine of picture and prompt.

    path       a folder, file or hub id of a CLIPModel, at `revision`
    tokenizer  a folder or hub id

    Scores of different prompts are not comparable. The softmax over pictures of one prompt says how likely each is to
    be picked. Training code of others divides by 26; this is the raw number, as papers print it.
    """
    require("scorers", "transformers", "accelerate")

    def load(at: str) -> Clip:
        return load_clip(path, revision, (tokenizer, None), at, dtype)

    return Scorer("pickscore", load, _rate, batch=batch, device=device, pixels=_rate_pixels)


def _rate(clip: Clip, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return clip.scale * clip.cosine(cropped(pictures, clip.side), prompts)


def _rate_pixels(clip: Clip, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    return clip.scale * clip.cosine(cropped_pixels(pixels, clip.side), prompts)
