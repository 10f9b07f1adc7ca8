"""DGPO, direct group preference optimisation: learn the order of a group's samples, not of noisy steps.

Claim. Samples drawn by an ODE, compared as a whole group: those above the group's mean should become more likely than
those below. Advantages that sum to 0 cancel the unknown normaliser of the likelihood, so that no noisy sampler, and no
pairing, is needed.

    advantage   A = clip((R − mean of the prompt) / (std of the prompt + eps), ±advantage_clip)
    order       S = beta · mean over the group of A·(m − m_cmp), m = mean (v − v*)² at the group's common (t, ε)
    loss        mean over groups and pairs of softplus(S) / beta: its gradient is mean σ(S)·A·∇m, a weighted matching
                loss that fades as the order is learned                              (preference.GroupPreference)
    clip        a sample leaves the gradient once exp(m_old − m) > 1 + clip with A > 0, or < 1 − clip with A < 0
    pairs       the first int(0.6·T) t of the sampler's grid, all of them; ε common to a prompt's group
    old         a fast average of the policy, its decay min(0.3, 0.001·i), i from 0         (ema.Ramp)

Cost for a prompt at the defaults: 240 forwards, 24 leaves; 144 pairs, each a forward of policy, reference and old. A
micro-batch never splits a group at one pair: 24 forwards.

Defaults: Luo-Yihong/DGPO, config/dgpo.py and train_sd3_dgpo.py, and Flow-Factory's trainers/dgpo.py (read in source,
sure): T 10, beta 100 to the starting model (2000 to old), no KL, shared noise, old 0.3 by 0.001, its counter raised
after the blend. The repository's clip is 5e-2, with 1e-2 and 1e-3 named as steadier; ours is 1e-2. G 24 is our reading.
It trains 4 t of the noisiest 7, drawn for each iteration; here the noisiest 6 are trained, all of them. Not here: after
200 steps its rollouts come from the average; there the group's mean divides by the configured size, here by the valid
samples'.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, one_of, positive, texts_of
from tempflow.algorithms.diffusion_nft import diffusion_nft, held_to_reference, ode_plan
from tempflow.algorithms.phase import LeafPhase
from tempflow.core.credit import GroupZScore
from tempflow.core.ema import Ramp
from tempflow.core.objective.preference import GroupPreference
from tempflow.core.renoise import Renoise
from tempflow.core.times import WindowTimes


@texts_of(diffusion_nft)
def dgpo(
    steps: int = 10,
    group: int = 24,
    beta: float = 100.0,
    clip: float | None = 1e-2,
    compare_to: Literal["reference", "old"] = "reference",
    fraction: float = 0.6,
    old_hold: float = 0.3,
    kl: float = 0.0,
    share_noise: bool = True,
    std: Literal["global", "group"] = "group",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """DGPO: a group's order as one preference, by matching losses at common (t, ε).

    Args:
        beta: how sharply the group's order fades out of the loss.
        clip: a sample's ratio to old beyond which it is left alone; None for no clip, and no forwards of old for it.
        compare_to: "reference", the starting model, or "old" (beta 2000).
        fraction: share of the sampler's grid that is trained, its noisiest int(T·fraction) t.
        old_hold: how much of the average stays at an update, once it has ramped up by 0.001 an iteration.
        kl: weight of the squared velocity distance to the starting model; 0 saves its forwards where old is compared
            to.
        share_noise: the pictures of a prompt share their ε.

    Raises ValueError naming the argument, its value and a valid one.
    """
    one_of("std", std, ("global", "group"))
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    if not 0 <= old_hold <= 1:
        raise ValueError(f"old_hold: {old_hold} is a decay, in 0 … 1; 0.3 is usual")
    objective = GroupPreference(beta, clip, compare_to, regularizers=held_to_reference(kl))
    return Algorithm(
        name="dgpo",
        steps=steps,
        plan=ode_plan(steps, group),
        credit=GroupZScore(by=("prompt",), scale=std, eps=eps, clip=advantage_clip),
        phases=(LeafPhase(objective, Renoise(first_times(steps, fraction), 2, 2 if share_noise else None)),),
        weight_sets={"old": Ramp(1, 0.001, old_hold)} if "old" in objective.weight_sets else {},
    )


def first_times(steps: int, fraction: float) -> WindowTimes:
    """The noisiest int(T·fraction) t of the grid, all of them. Raises ValueError where there is none, or too many."""
    if not 1 <= int(steps * fraction) <= steps:
        nearest = 1.0 if fraction > 1 else 1 / steps
        raise ValueError(f"fraction: {fraction} of {steps} steps is no share of them; nearest valid: {nearest:.3g}")
    return WindowTimes(int(steps * fraction))
