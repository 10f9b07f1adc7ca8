"""RTDMD-like: distribution matching, then GRPO through the stochastic steps of the few-step student (arXiv 2605.26108).

Claim. A four-step student that is sampled with noise has stochastic steps, so policy gradients apply to it as to any
sampler. Distribution matching makes the student and then holds its last step, which draws no noise.

    step        CPS at `noise_level`, in both stages; the last step is deterministic                   (dynamics.CPS)
    fake        `fake_updates` of flow matching on the student's own CPS samples, t logit-normal, before the student's
    stage "cold_start"   DMD2's student: to a node drawn for each row, g at t ~ U[.02, .98], weight 1; no rollout
    stage "reinforce"    `group` chains a prompt; advantage (R − prompt's mean)/std of all; clipped ratio at
                         `train_steps` of the first T − 1 steps, drawn anew in each iteration, the same for all prompts;
                         then DMD's loss at `matching_weight` through the last step, of fresh samples walked to the end

A cold start is a run of its own (weights of its end: `model.start`). What it has no use for: group, train_steps,
log_prob, clip, std, eps, advantage_clip and matching_weight; `turns` above 1 is for it alone.

Where it differs from the code. One loss there, two phases here: the policy's optimizer steps twice in an iteration, for
the reward and for matching, with moments that both share, so a small weight stays small. Matching takes samples of its
own, where the code takes the rollout's. Back-propagation of a differentiable reward through the last step is not here.
A run is evaluated by plain Euler steps, the code's student draws by CPS. In either run the fake begins as the teacher;
the code goes on with that of the cold start.

Cost for a prompt at the defaults, at most: 96 forwards, 24 leaves and 48 trained edges of the rollout; for each of its
noises of matching 4 forwards, 2 of the guided teacher and 1 trained, and of the fake ten times 4 and 1.

Defaults: Harahan/RTDMD for SD3.5-M (read in its repository, sure): CPS .9, 10 fake updates, guidance 4.5, both laws of
t, 24 a prompt, global standard deviation, clip 1e-5, 2 of the first 3 steps, weight .001. That the clip is of the ratio
without 1/(2S²), as in Flow-GRPO's CPS code, is our reading; `noises` is ours; eps and the advantage's bound are
Flow-GRPO's. Its rates are the run's: 3e-5 for both in the cold start (15 000 steps, EMA .99), 3e-6 after it.
"""

from __future__ import annotations

from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, one_of, proportion, texts_of
from tempflow.algorithms.dmd2 import FAKE, check_fake
from tempflow.algorithms.flow_cps import LogProbForm, UnscaledRatio, flow_cps
from tempflow.algorithms.flow_grpo import chains_plan, flow_grpo
from tempflow.algorithms.lesson import Role
from tempflow.algorithms.phase import EdgePhase, NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few
from tempflow.core.checks import positive
from tempflow.core.credit import GroupZScore
from tempflow.core.dynamics import CPS
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples
from tempflow.core.objective.ratio import clipped
from tempflow.core.times import LogitNormalTimes

Stage = Literal["reinforce", "cold_start"]


@texts_of(FEW, FAKE, flow_grpo, flow_cps)
def rtdmd(
    steps: int = 4,
    stage: Stage = "reinforce",
    noises: int = 2,
    teacher_guidance: float = 4.5,
    noise_level: float = 0.9,
    fake_updates: int = 10,
    fake_rate: float = 1.0,
    matching_weight: float = 1e-3,
    group: int = 24,
    train_steps: int | None = 2,
    log_prob: LogProbForm = "unscaled",
    clip: float | None = None,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
    turns: int = 1,
) -> Algorithm:
    """RTDMD-like (arXiv 2605.26108): GRPO through the noisy steps of a few-step student, whose last one matches.

    Args:
        stage: "reinforce", or "cold_start", which makes the student: no rollout, no reward.
        matching_weight: of DMD's loss beside the reward's; a cold start has 1.
        train_steps: n trains n of the first T − 1 steps, drawn anew each iteration; None: all.

    Raises ValueError naming the argument, its value and a valid one.
    """
    check_few(noises, teacher_guidance)
    check_fake(fake_updates, fake_rate)
    positive("noise_level", noise_level, 0.9)
    positive("matching_weight", matching_weight, 1e-3)
    one_of("stage", stage, get_args(Stage))
    one_of("log_prob", log_prob, get_args(LogProbForm))
    one_of("std", std, ("global", "group"))
    bound = proportion("clip", clip, 1e-5 if log_prob == "unscaled" else 1e-4)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    plan, step = chains_plan(steps, group, train_steps, noisy_last=False), CPS(noise_level)
    cold = stage == "cold_start"
    samples = OwnSamples("random" if cold else "end", step)
    weight = 1.0 if cold else matching_weight
    fake = NoisePhase(FlowMatching(LogitNormalTimes(), samples), noises, fake_updates, role="fake")
    matching = NoisePhase(DistributionMatching(samples=samples, strength=teacher_guidance, weight=weight), noises)
    roles = (Role("fake", rate=fake_rate, start="reference"),)
    if cold:
        return Algorithm(name="rtdmd", steps=steps, phases=(fake, matching), roles=roles, turns=turns)
    ratio = UnscaledRatio() if log_prob == "unscaled" else None
    return Algorithm(
        name="rtdmd",
        steps=steps,
        phases=(fake, EdgePhase(clipped(bound, bound, ratio=ratio)), matching),
        roles=roles,
        turns=turns,
        plan=plan,
        dynamics=step,
        credit=GroupZScore(by=("prompt", "step"), scale=std, eps=eps, clip=advantage_clip),
    )
