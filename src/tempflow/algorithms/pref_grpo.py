"""Pref-GRPO: compare pictures instead of trusting a score's small gaps (code CodeGoat24/Pref-GRPO).

Claim. A group's scores often differ by next to nothing; dividing by their standard deviation blows that up into
advantages that are illusions, and the policy learns to please the scorer. Let a judge compare all pairs of the group:
the reward is the win rate, which says who is better and not by how much.

    reward      R = wins / (G − 1), a tie ½ each; its mean over a group is exactly ½
    advantage   (R − ½) / (std of the group + eps): for a strict order at most √3·(G−1)/sqrt(G(G+1)) in size
    ratio       "norm": GRPO-Guard's log r̂ = −mean(Δμ·z), and loss weights ∝ 1/Δ; "step": Flow-GRPO's

Any reward is a judge here: of two scores the larger wins (`core.credit.WinRate`), so only their order matters. A
groupwise reward that asks a real judge and returns win rates itself needs `win_rate` off. Several rewards: the weighted
sum is of win rates, and normalised once; the code normalises each reward first.

Cost for a prompt at the defaults: 200 forwards, 8 leaves, 112 trained edges; a pairwise judge, 28 comparisons.

Defaults: scripts/_common_finetune.sh, ur_think_prefgrpo_flux.sh (read in source, sure): T 25, G 8, noise 0.7, shared
initial noise, a random 60 % of the steps (the code draws them per picture, here per iteration), clip 1e-4, no KL,
unbiased std with eps 1e-8, advantages clipped at 5, win rates rounded to 3 decimals. That the last step draws no noise
is inferred from DanceGRPO's code, which it extends. Not here: its re-standardising over the batch, judge prompts, and
the ½ it gives for a comparison it cannot read (a picture whose reward failed leaves the group).
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, one_of, positive, proportion, texts_of
from tempflow.algorithms.flow_grpo import chains_plan, flow_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import weight
from tempflow.core.credit import GroupZScore, WinRate
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.ratio import NormRatio, StepRatio, clipped
from tempflow.core.objective.regularizer import KLForm


@texts_of(flow_grpo)
def pref_grpo(
    steps: int = 25,
    group: int = 8,
    train_steps: int | None = 14,
    noise_level: float = 0.7,
    clip: float = 1e-4,
    win_rate: bool = True,
    rounding: int | None = 3,
    ratio: Literal["norm", "step"] = "norm",
    shared_noise: bool = True,
    kl: float = 0.0,
    kl_form: KLForm = "exact",
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Pref-GRPO (code CodeGoat24/Pref-GRPO): the reward is a picture's win rate inside its group.

    Args:
        clip: ratio clip below and above 1; a "norm" ratio strays less than a "step" ratio, by the step's noise S.
        win_rate: turn each reward into its win rate in the group; off where the reward is a win rate already.
        rounding: decimals of a win rate, which makes ties; None does not round.
        ratio: "norm": GRPO-Guard's ratio and loss weights ∝ 1/Δ, as in the scripts; "step": Flow-GRPO's.

    Raises ValueError naming the argument, its value and a valid one.
    """
    plan = chains_plan(steps, group, train_steps, shared_noise=shared_noise, noisy_last=False)
    one_of("ratio", ratio, ("norm", "step"))
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    if rounding is not None:
        at_least("rounding", rounding, 0, "or None for no rounding")
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    credit = GroupZScore(by=("prompt", "step"), scale="group", unbiased=True, eps=eps, clip=advantage_clip)
    return Algorithm(
        name="pref_grpo",
        steps=steps,
        plan=plan,
        dynamics=FlowSDE(noise_level),
        credit=WinRate(credit, rounding) if win_rate else credit,
        phases=(
            EdgePhase(
                clipped(clip, clip, kl, kl_form, NormRatio() if ratio == "norm" else StepRatio()),
                weight.inverse_step if ratio == "norm" else weight.uniform,
            ),
        ),
    )
