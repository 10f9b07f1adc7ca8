"""DDPO: denoising diffusion policy optimisation, the first of the family (arXiv 2305.13301).

Claim. Denoising is a Markov decision process whose last state is rewarded, so policy gradients train a diffusion model
on any reward. The stochastic DDIM step is the policy.

    step        DDIM with η: S = η·σ'·sqrt(1 − σ'²(1−σ)²/(σ²(1−σ')²)); the last step draws no noise
    advantage   A = clip((R − mean of the prompt) / (std of the prompt + eps), ±advantage_clip)
    loss "is"   max(−A r, −A clip(r, 1 − clip, 1 + clip)): importance sampling, several updates from one rollout
    loss "sf"   −A·log r, whose gradient is the score function's −A·∇log p: one update from one rollout

On a first update both have the same gradient.

Where a grid ends just above 0 (SD 3's: σ' = .0089), S is as small there, and the gradient, |b|/S a unit of noise, as
large: 48 at the last noisy step of T 6 against .81 before it, 7.4 against 1.4 of T 50. `skip_last=2` leaves it out.

Cost for a prompt at the defaults: 800 forwards, 16 leaves, 784 trained edges.

Defaults: T 50, η 1, clip 1e-4, advantages bounded at 5, no KL (general knowledge of the authors' PyTorch code; not
read again). There, statistics of a prompt gather over iterations in a buffer of 16 and fall back on the batch before
it fills; here a prompt has a group of its own in every iteration, 16 by that, and nothing is carried over. On a flow's
path the DDIM step is the same one, its coefficients being 1 − σ and σ.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, one_of, positive, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan
from tempflow.algorithms.phase import EdgePhase
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import DDIM
from tempflow.core.objective.clip import Clip, Score
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, KLForm


@texts_of()
def ddpo(
    steps: int = 50,
    group: int = 16,
    train_steps: int | None = None,
    skip_last: int = 1,
    kind: Literal["is", "sf"] = "is",
    eta: float = 1.0,
    clip: float = 1e-4,
    statistics: Literal["prompt", "batch"] = "prompt",
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-6,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """DDPO (arXiv 2305.13301): policy gradients on the stochastic DDIM step, with statistics per prompt.

    Args:
        group: pictures per prompt.
        train_steps: None trains every step but the last ones; n trains n of these, drawn anew each iteration.
        skip_last: steps at the end that are never trained; 2 where the last noisy one would be all there is (above).
        kind: "is": importance sampling with a clip; "sf": the score function, meant for one update an iteration.
        eta: η of the step, in (0, 1]; 1 is DDPM's own noise.
        clip: ratio clip below and above 1, of "is".
        statistics: mean and standard deviation of the "prompt", or of the whole "batch".
        kl_form: "exact", "velocity", "k1", "k2" or "k3".

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, train_steps, noisy_last=False, skip_last=skip_last)
    one_of("kind", kind, ("is", "sf"))
    one_of("statistics", statistics, ("prompt", "batch"))
    positive("eta", eta, 1.0)
    proportion("clip", clip, 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    by_prompt = GroupZScore(by=("prompt", "step"), eps=eps, clip=advantage_clip)
    by_batch = GroupZScore(by=("prompt", "step"), center="batch", scale="pooled", eps=eps, clip=advantage_clip)
    return Algorithm(
        name="ddpo",
        steps=steps,
        plan=plan,
        dynamics=DDIM(eta),
        credit=by_prompt if statistics == "prompt" else by_batch,
        phases=(
            EdgePhase(
                PolicyRatio(Clip(clip, clip) if kind == "is" else Score(), regularizers=(Divergence(kl, kl_form),))
            ),
        ),
    )
