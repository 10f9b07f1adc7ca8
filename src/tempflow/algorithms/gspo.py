"""GSPO for flows: one ratio for a whole trajectory (arXiv 2507.18071).

Claim. The reward is the whole sample's, so the ratio that is clipped should be too: the geometric mean of the steps'
ratios, exp(mean over steps of log r). A trajectory is then inside or outside the clip as one, and noise of single
steps' ratios averages out.

    ratio       r = exp(mean over the path's trained steps of log r_i), one for the path
    loss        mean over paths of max(−A r, −A clip(r, 1 − clip, 1 + clip_high))

It is GCPO with one chunk. On a first update its gradient is Flow-GRPO's.

Cost and plan: Flow-GRPO's; a path's trained steps go into one micro-batch. Defaults: Flow-GRPO's, but std of the
group, no KL, and a clip of 5e-5, GCPO's for its chunks (its code): a mean over steps strays less than one step does.
The paper's own clips (3e-4 and 4e-4) are means over tokens, not latent elements (general knowledge of the method).
"""

from __future__ import annotations

from dataclasses import replace

from tempflow.algorithms.base import Algorithm, texts_of
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.objective.ratio import ChunkRatio, clipped
from tempflow.core.objective.regularizer import KLForm
from tempflow.core.units import whole_path


@texts_of(flow_grpo)
def gspo(
    steps: int = 10,
    group: int = 24,
    train_steps: int | None = None,
    noise_level: float = 0.7,
    clip: float = 5e-5,
    clip_high: float | None = None,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """GSPO (arXiv 2507.18071) on Flow-GRPO's chains: the ratio, and its clip, belong to the whole trajectory.

    Args:
        clip: clip of the path's ratio below and above 1.

    Raises ValueError naming the argument, its value and a valid one.
    """
    base = flow_grpo(steps, group, train_steps, noise_level, clip, clip_high, kl, kl_form, "group", eps, advantage_clip)
    high = clip if clip_high is None else clip_high
    phase = EdgePhase(clipped(clip, high, kl, kl_form, ChunkRatio()), units=whole_path)
    return replace(base, name="gspo", phases=(phase,))
