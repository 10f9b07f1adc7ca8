"""DRaFT-K: direct reward fine-tuning through the sampler's last K steps (arXiv 2309.17400), for flow models.

Claim. A reward's gradient can be taken through the sampler itself. Through all of its steps that is dear and unstable;
through the last K it is neither, and K = 1 learns as well or better: a gradient cut short is the better one.

    walk        the first T − K steps without gradients, the last K with                          (LastSteps)
    score       the sample at the end is decoded and scored, both with gradients
    loss        −mean r(x0), or with a `margin` mean max(0, margin − r(x0))                        (RewardGradient)

With K = T it is plain DRaFT. Where ReFL scores what a late step foresees, this scores what the walk ends in, and steps
before the last are taught too, through the states that follow.

Cost for a prompt at the defaults: 49 forwards without gradient, 1 with, and a decode and a reward call with gradients,
which is not counted as a forward. Memory grows with K, unless `checkpointed`.

Defaults: from memory of the paper, whose authors' code is not known to us: T 50, K 1, a LoRA, AdamW 4e-4 (the run's to
say). Not here: its variant with less variance, which re-noises the sample and repeats the last step (`srpo` does that
at all σ), and truncation at a drawn step. With guidance, rows of the negative prompt bear no gradient. `margin` is
ReFL's.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, texts_of, within
from tempflow.algorithms.refl import GRADIENT, by_gradient
from tempflow.core.objective.reward_gradient import LastSteps


@texts_of(GRADIENT)
def draft(
    steps: int = 50,
    last: int = 1,
    noises: int = 1,
    margin: float | None = None,
    checkpointed: bool = False,
    turns: int = 1,
) -> Algorithm:
    """DRaFT-K (arXiv 2309.17400): the reward's gradient through the last K steps of the sampler.

    Args:
        steps: T, sampler steps.
        last: K, through how many of the last steps gradients go; T for all.
        checkpointed: keep no activations of these steps, and compute them again: less memory, more time.

    Raises ValueError naming the argument, its value and a valid one.
    """
    path = LastSteps(within("last", last, steps), checkpointed)
    return by_gradient("draft", steps, path, noises, margin, turns)
