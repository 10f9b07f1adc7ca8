"""DAPO for flows: clip higher, and train on groups that have something to teach (arXiv 2503.14476).

Claim. A symmetric clip holds back what is still unlikely, so spread dies: leave more room above 1 than below. Prompts
whose samples are all equally good have advantage 0 and only dilute a batch: sample more prompts, keep those with
spread, and take the mean over what is kept.

    ratio       max(−A r, −A clip(r, 1 − clip, 1 + clip_high))
    sampling    of the iteration's prompts, a pool, the first `keep` whose group has spread
    loss        mean over all trained steps of the kept groups; no KL

The published method draws prompts until the batch is full; here the pool is the iteration's prompts, and fewer than
`keep` are kept where fewer have spread. The pool's rollouts are paid for, its training is not. All trajectories have
the same number of steps, so a token-level mean and the length penalty have nothing to change.

Cost for a prompt: 240 forwards, 24 leaves, 216 trained edges where it is kept. Defaults: Flow-GRPO's chains; the clips
keep the paper's proportion (0.2 and 0.28) at Flow-GRPO's size; std of the group (general knowledge of the method).
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.core.credit import DynamicSampling
from tempflow.core.objective.regularizer import KLForm


@texts_of(flow_grpo)
def dapo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    clip_high: float = 1.4e-4,
    keep: int | None = None,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """DAPO (arXiv 2503.14476) on Flow-GRPO's chains: clip-higher and dynamic sampling from a pool of prompts.

    Args:
        clip: ratio clip below 1.
        clip_high: ratio clip above 1.
        keep: prompts trained an iteration: the first of the pool, which is the iteration's prompts, whose rewards
            differ; None: all such.
        kl: β, weight of the KL to the starting model; 0, as published, saves its forwards.

    Raises ValueError naming the argument, its value and a valid one.
    """
    if keep is not None:
        at_least("keep", keep, 1, "or None for all with spread")
    base = flow_grpo(steps, group, train_steps, noise_level, clip, clip_high, kl, kl_form, "group", eps, advantage_clip)
    return replace(base, name="dapo", credit=DynamicSampling(base.credit, keep))
