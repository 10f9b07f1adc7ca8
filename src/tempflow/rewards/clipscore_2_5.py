"""CLIPScore, 2.5 · max(cosine, 0), as its paper has it (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from tempflow.rewards.clip import OPENAI_L, Clip
from tempflow.rewards.clipscore import LICENCE, NEEDS, by_form
from tempflow.rewards.scorer import Batch, Dtype, Scorer
from tempflow.strict import Place

RANGE = "about 0.4 to 1"
DIFFERENTIABLE = True

__all__ = ["LICENCE", "NEEDS", "RANGE", "clipscore_2_5"]


def clipscore_2_5(
    *,
    path: Place = OPENAI_L,
    revision: str | None = None,
    tokenizer: Place = "",
    device: str = "cpu",
    dtype: Dtype = "float32",
    batch: Batch = 16,
) -> Scorer[Clip]:
    """CLIPScore: 2.5 · max(cosine, 0).

    Options as `clipscore`'s.
    """
    name = "clipscore_2_5"
    return by_form(name, lambda c: 2.5 * c.clamp(min=0), path, revision, tokenizer, device, dtype, batch)
