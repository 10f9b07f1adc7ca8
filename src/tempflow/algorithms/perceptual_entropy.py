"""Perceptual entropy: reward what sets a picture apart from its group, PEC and PCVAE (arXiv 2605.12112).

Claim. An entropy bonus cannot keep a flow's pictures diverse: a step is N(μ, S²I) with S given, so its entropy does not
depend on the weights, while pictures collapse where the eye looks. Measure surprise in a perceptual embedding φ, and
put it into the reward, before the group is normalised.

    PEC     R̃ = R + bonus · (−log p_perc)
    PCVAE   R̃ = R − bonus · (log p_perc − log p_latent): the latent policy's surprise is taken away again
    −log p_perc = |φ_k − φ̄|² / (2·scale²), a Gaussian around the group's mean; over a group the sum is that of squares

All else is Flow-GRPO: advantage, ratio, cost (and one embedding a leaf); without its KL, which the page shows as
another remedy. bonus 0 is Flow-GRPO.

Pitfalls. Shallow variety is rewarded like any other. The bonus is in units of the reward over φ's squared distances, so
`bonus`, `scale` and the embedding belong together. It gives groups of equal rewards a spread, and so advantages.

Sources: the project page (λ 0.03, 0.05 or 0.10; PCVAE 0.03; encoders PickScore, DINO, CLIP; FLUX.1-dev, SD 3.5). The
density is not shown: the Gaussian, its scale, ω = 1, φ of decoded pictures, and log p_latent as a mean over steps and
latent elements are our plain reading. φ by default is made by hand, without a network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torch import Tensor

from tempflow.algorithms.base import Algorithm, Observation, one_of, positive, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.core.credit import PathLogProb, Surprisal
from tempflow.core.forest import Forest
from tempflow.core.objective.regularizer import KLForm
from tempflow.perception import DinoEmbedding, Embedding, HandEmbedding


@texts_of(flow_grpo)
def perceptual_entropy(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    kind: Literal["pec", "pcvae"] = "pec",
    bonus: float = 0.05,
    scale: float = 1.0,
    embedding: str = "hand",
    noise_level: float = 0.7,
    clip: float = 1e-4,
    kl: float = 0.0,
    kl_form: KLForm = "drift",
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Perceptual entropy (arXiv 2605.12112): Flow-GRPO whose reward adds how far a picture is from its group.

    Args:
        kind: "pec", or "pcvae", which takes the latent policy's surprise away.
        bonus: λ, weight of the surprise in the reward.
        scale: standard deviation of the Gaussian in φ's units.
        embedding: "hand", or the folder or hub name of a DINOv2 model, loaded when first asked.
        std: "global": standard deviation of all the iteration's R̃; "group": of the prompt's own.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("kind", kind, ("pec", "pcvae"))
    if not (math.isfinite(bonus) and bonus >= 0):
        raise ValueError(f"bonus: {bonus} must be finite and at least 0; 0.05 is usual")
    positive("scale", scale, 1.0)
    base = flow_grpo(steps, group, train_steps, noise_level, clip, None, kl, kl_form, std, eps, advantage_clip)
    seen: tuple[Observation, ...] = (Embedded(embedding),)
    return replace(
        base,
        name="perceptual_entropy",
        credit=Surprisal(base.credit, Embedded.name, bonus, scale, latent=kind == "pcvae"),
        observe=seen if kind == "pec" else (*seen, PathLogProb()),
    )


@dataclass(frozen=True)
class Embedded:
    """Leaf observation "embedding": the pictures' vectors, float32 [N, d]."""

    by: str = "hand"
    name = "embedding"

    @property
    def of(self) -> Literal["edge", "leaf"]:
        return "leaf"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        return _embedding(self.by)(media)


@lru_cache(maxsize=1)
def _embedding(by: str) -> Embedding:
    return HandEmbedding() if by == "hand" else DinoEmbedding(by)
