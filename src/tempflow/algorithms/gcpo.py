"""GCPO: one ratio, and one clip decision, for a chunk of neighbouring steps (arXiv 2510.21583, ICML 2026).

Claim. A picture's reward is the wrong label for roughly four in ten of its steps. Steps glued to chunks are labelled
better than steps alone, if chunks follow how fast the latent changes.

    chunk ratio    r_j = exp(mean over the chunk's steps of log p − log p_old)                       (ChunkRatio)
    loss           mean over chunks of max(−A r_j, −A clip(r_j, 1−clip, 1+clip)) + kl · exact KL
    dynamics       l1rel(x → x') = ‖x' − x‖₁ / ‖x‖₁, its mean by step over the iteration's rollouts  (RelativeChange)
    chunks         `sizes`, from the noisiest step on; or, adaptive, cut where the l1rel's difference changes sign (in
                   the middle where it never does), parts by the next order's                        (core.units.cuts)
    which          max(1, ⌊share·K⌋) of a path's K chunks, drawn per path without replacement, evenly or ∝ l1rel
    advantage      A = clip((R − mean of the prompt's group) / (its unbiased std + eps), ±advantage_clip)

Trajectories: Flow-GRPO's chains from one shared noise, the last step not trained. Chunks of one step are Flow-GRPO's
own ratio; one chunk is GSPO's. A chunk's steps share a micro-batch, so `train_rows` below a chunk is exceeded.
Cost for a prompt at the defaults: 204 forwards, 12 leaves, 192 trained edges at most; chunks left out are not computed,
so at share 0.5 it is 60 to 132 of them by which two of (2, 3, 4, 7) are drawn, 96 on average.

Defaults: the released FLUX script (paper read in full, code read in source; sure): T 17, group 12, noise 0.7, clip
5e-5, sizes (2, 3, 4, 7), share 0.5, eps 1e-8, advantages clipped at 5, no KL (the code's own is against the rollout's
policy). The paper's default is adaptive chunks, without the sampling. The unbiased std is DanceGRPO's, from which the
code descends (our reading); where the recursion stops, and on which side of a cut a turning point falls, is not given.
The draws are the iteration's and path's, whatever the run's seed.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, positive
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import ChunkRatio, clipped
from tempflow.core.stepwise import RelativeChange
from tempflow.core.units import AdaptiveChunks, ChunkSampler, FixedChunks


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
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """GCPO (arXiv 2510.21583): Flow-GRPO with a geometric-mean ratio over chunks of steps.

    Args:
        steps: T, sampler steps of a rollout; all but the last are trained.
        group: pictures per prompt, compared with each other.
        sizes: steps of each chunk, which add up to T − 1; None cuts chunks by the latent's dynamics.
        largest: without sizes: a chunk of at most that many steps is not cut further.
        share: share of a path's chunks that is trained, drawn anew each iteration; 1 trains all.
        weighted: chunks are drawn in proportion to how much the latent changes in them.
        shared_noise: a prompt's pictures start from one noise.
        noise_level: a of the SDE.
        clip: clip of the chunk's ratio below and above 1.
        kl: β, weight of the exact KL to the starting model; 0 saves its forwards.
        eps: added to the standard deviation.
        advantage_clip: bound of |A|; None for no bound.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, None, shared_noise=shared_noise)
    at_least("largest", largest, 1)
    positive("noise_level", noise_level, 0.7)
    positive("clip", clip, 5e-5)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    sampler = ChunkSampler(share, weighted)
    units = AdaptiveChunks(largest, sampler) if sizes is None else FixedChunks(tuple(sizes), sampler)
    if sizes is not None and sum(sizes) != steps - 1:
        raise ValueError(f"sizes: {sizes} add up to {sum(sizes)}; nearest valid: a sum of {steps - 1}, steps − 1")
    return Algorithm(
        name="gcpo",
        steps=steps,
        plan=plan,
        dynamics=FlowSDE(noise_level),
        credit=GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip),
        objective=clipped(clip, clip, kl, "exact", ChunkRatio()),
        units=units,
        observe=(RelativeChange(),) if sizes is None or weighted else (),
    )
