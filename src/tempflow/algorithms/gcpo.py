"""GCPO: one ratio, and one clip decision, for a chunk of neighbouring steps (arXiv 2510.21583, ICML 2026).

Claim. A picture's reward is the wrong label for roughly four in ten of its steps. Steps glued to chunks are labelled
better than steps alone, if chunks follow how fast the latent changes.

    chunk ratio    r_j = exp(mean over the chunk's steps of log p − log p_old)                       (ChunkRatio)
    loss           mean over chunks of w_j·max(−A r_j, −A clip(r_j, 1−clip, 1+clip_high)) + kl · exact KL
                   + rollout_kl · (1/r_j − 1 + log r_j), the code's KL, to the policy that rolled out    (ToRollout)
    w_j            1; with `reweight` √((T − m_j)/m_j), m_j = first step + ⌊size/2⌋ of the chunk       (ChunkWeight)
    dynamics       l1rel(x → x') = ‖x' − x‖₁ / ‖x‖₁, its mean by step over the iteration's rollouts  (RelativeChange)
    chunks         `sizes`, from the noisiest step on; or, adaptive, cut where the l1rel's difference changes sign (in
                   the middle where it never does), parts by the next order's                        (core.units.cuts)
    which          max(1, ⌊share·K⌋) of a path's K chunks, drawn per path without replacement, evenly or ∝ the
                   path's own l1rel, a mean over the chunk
    advantage      A = clip((R − mean of the prompt's group) / (its unbiased std + eps), ±advantage_clip)

Trajectories: Flow-GRPO's chains from one shared noise, the last step not trained. Chunks of one step are Flow-GRPO's
own ratio; one chunk is GSPO's. A chunk's steps share a micro-batch, so `train_rows` below a chunk is exceeded.
Cost for a prompt at the defaults: 204 forwards, 12 leaves, 192 trained edges at most; chunks left out are not computed,
so at share 0.5 it is 60 to 132 of them by which two of (2, 3, 4, 7) are drawn, 96 on average.

Defaults: the released FLUX script (paper read in full, code read in source; sure): T 17, group 12, noise 0.7, clip
5e-5 below and above, sizes (2, 3, 4, 7), share 0.5, even draws, unbiased std, eps 1e-8, advantages clipped at 5, no KL,
no reweighting (there for comparison with TempFlow-GRPO: 4, 2.16, 1.20, 0.65). Its gradient norm is bounded by 0.01,
which is the run's. The paper's default is adaptive chunks, without the sampling, which no released code has; where the
recursion stops, and on which side of a cut a turning point falls, is not given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tempflow.algorithms.base import EXACT_KL, Algorithm, at_least, positive, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore, RelativeChange
from tempflow.core.dynamics import Dynamics, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.clip import Clip
from tempflow.core.objective.ratio import ChunkRatio, PolicyRatio
from tempflow.core.objective.regularizer import Divergence, ToRollout
from tempflow.core.schedule import Schedule
from tempflow.core.units import AdaptiveChunks, ChunkSampler, FixedChunks
from tempflow.core.weight import uniform


@texts_of(EXACT_KL)
def gcpo(
    steps: int = 17,
    group: int = 12,
    sizes: tuple[int, ...] | None = (2, 3, 4, 7),
    largest: int = 4,
    share: float = 0.5,
    weighted: bool = False,
    shared_noise: bool = True,
    noise_level: float = 0.7,
    clip: float = 5e-5,
    clip_high: float | None = None,
    reweight: bool = False,
    rollout_kl: float = 0.0,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """GCPO (arXiv 2510.21583): Flow-GRPO with a geometric-mean ratio over chunks of steps.

    Args:
        steps: T, sampler steps of a rollout; all but the last are trained.
        sizes: steps of each chunk, which add up to T − 1; None cuts chunks by the latent's dynamics.
        largest: without sizes: a chunk of at most that many steps is not cut further.
        share: share of a path's chunks that is trained, drawn anew each iteration; 1 trains all.
        weighted: chunks are drawn in proportion to how much the path's latent changes in them.
        clip: clip of the chunk's ratio below and above 1.
        reweight: noisy chunks weigh more, √((T − m)/m) of the step m in a chunk's middle; `sizes` must begin with 2.
        rollout_kl: weight of the KL to the policy that rolled out.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, None, shared_noise=shared_noise)
    at_least("largest", largest, 1)
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 5e-5)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    sampler = ChunkSampler(share, weighted)
    units = AdaptiveChunks(largest, sampler) if sizes is None else FixedChunks(tuple(sizes), sampler)
    if sizes is not None and sum(sizes) != steps - 1:
        raise ValueError(f"sizes: {sizes} add up to {sum(sizes)}; nearest valid: a sum of {steps - 1}, steps − 1")
    if reweight and (sizes is None or sizes[0] < 2):
        raise ValueError(f"reweight: needs sizes whose first is 2 at least, not {sizes}; nearest valid: false")
    ratio = ChunkRatio()
    objective = PolicyRatio(
        Clip(clip, clip if clip_high is None else clip_high), ratio, (Divergence(kl), ToRollout(rollout_kl, ratio))
    )
    return Algorithm(
        name="gcpo",
        steps=steps,
        plan=plan,
        dynamics=FlowSDE(noise_level),
        credit=GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip),
        phases=(
            EdgePhase(objective, ChunkWeight(tuple(sizes)) if reweight and sizes is not None else uniform, units=units),
        ),
        observe=(RelativeChange(),) if sizes is None or weighted else (),
    )


@dataclass(frozen=True)
class ChunkWeight:
    """√((T − m)/m) for every edge of a chunk, m its middle step, as the code reckons it; outside the clip, not
    rescaled."""

    sizes: tuple[int, ...]

    def __call__(self, forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
        starts = accumulate(self.sizes, initial=0)
        middle = [start + size // 2 for start, size in zip(starts, self.sizes, strict=False) for _ in range(size)]
        by_step = torch.tensor([math.sqrt((forest.steps - m) / m) for m in middle] + [1.0])  # the last is not trained
        return by_step.to(forest.edges.scale)[forest.edges.step]
