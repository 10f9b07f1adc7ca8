"""CLIPScore, 100 · max(cosine, 0), as torchmetrics has it."""

from __future__ import annotations

from tempflow.rewards.clip import OPENAI_L, Clip
from tempflow.rewards.clipscore import LICENCE, NEEDS, by_form
from tempflow.rewards.scorer import Batch, Dtype, Scorer
from tempflow.strict import Place

RANGE = "about 15 to 40"
DIFFERENTIABLE = True

__all__ = ["LICENCE", "NEEDS", "RANGE", "clipscore_100"]


def clipscore_100(
    *,
    path: Place = OPENAI_L,
    revision: str | None = None,
    tokenizer: Place = "",
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """CLIPScore: 100 · max(cosine, 0).

    Options as `clipscore`'s.
    """
    name = "clipscore_100"
    return by_form(name, lambda c: 100 * c.clamp(min=0), path, revision, tokenizer, device, dtype, batch)
