"""Supervised fine-tuning: flow matching on pictures with captions from disk.

Claim. The plain start of every pipeline: the model learns to draw what it is shown. No reward, no reference, no
sampling; and the yardstick that preference and reward methods are held to on the same data.

    data        each prompt's own `image`, encoded to latents                                          (OfflineSamples)
    loss        mean (v − v*)² at `pairs` (t, ε) of each + kl·mean (v − v_ref)²          (preference.Supervised)

The training prompts are a .jsonl of {"prompt": …, "image": "a.png"}, pictures beside it (data/pictures.py). The run's
rewards judge validation and test alone. Captions are never dropped, so the empty prompt, which guidance contrasts with,
is not trained.

Cost for a prompt: no rollout, no decode, no reward call; `pairs` forwards of the policy (4 at the default), and of the
reference where kl > 0. The picture is encoded anew whenever its prompt comes.

Defaults: the loss is standard (certain); 4 pairs and SD 3's pre-training density of t are ours.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_nft import diffusion_nft, held_to_reference
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import AsScored
from tempflow.core.objective.preference import Supervised
from tempflow.core.offline import OfflineSamples
from tempflow.core.renoise import Renoise
from tempflow.core.times import LogitNormalTimes

PICTURE = OfflineSamples(("image",), (1.0,))


@texts_of(diffusion_nft)
def sft(pairs: int = 4, kl: float = 0.0) -> Algorithm:
    """Supervised fine-tuning: flow matching on pictures on disk.

    Args:
        pairs: (t, ε) of a picture.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    return Algorithm(
        name="sft",
        steps=1,  # these times ask for no grid
        plan=PICTURE.plan,
        offline=PICTURE,
        credit=AsScored(),
        phases=(LeafPhase(Supervised(regularizers=held_to_reference(kl)), Renoise(LogitNormalTimes(pairs))),),
    )
