"""GDMD: distribution matching whose targets a reward judges (arXiv 2604.19009).

Claim. Rewarding the samples of a few-step student while it is distilled pulls against the distillation. What the step
of distillation asks for is a clean sample too: decode and score that target. A target that is better than the student's
own sample is followed more, one that is worse less or not at all. No cold start is needed.

    own       x0: the student as the iteration began walks from noise to a node drawn for each row; x̂0 there
    target    y = sg[x0 − g], g DMD's gradient at x_t from the guided teacher and the fake score      (Eq. 3)
    r         ½ + ½·clip((R(decode y) − R(decode x0))/Z, −1, 1): the baseline is the own sample, no group mean (Eq. 5)
    loss      λ·½·mean (x − y)² + γ·[r·½·mean (x⁺ − y)² + (1−r)·½·mean (x⁻ − y)²]/β                (Eq. 6, 7)
              x = x_t − σ·v_θ, one prediction with gradient at the old student's state, x± = x0 ± β·(x − x0)
              at the first update the gradient is (λ + γ·(2r−1))·g: at λ = γ it is from 0 to 2 times DMD's
    head      "nft" is the paper's; "signed", ours, is AdvantageFlow's with A = 2r − 1:
              A·½·mean (x − y)² + 1.1·½·mean (x − x0)²
    fake      flow matching on the old student's samples, one update for each target

η = `turns`. The paper makes η fake updates and after each one target, whose variety is that of t and of the fake's
snapshots; then η updates of the student, one for each target (Algorithm 1). Here fake and student take turns. That is
the same: targets and the fake's data come from the student as the iteration began (weight set "old"), so nothing that
the student does in between reaches them. It differs in the noises: each turn has its own, so an iteration sees η times
as many samples with one target each. It scores two samples for a target; the paper, whose η targets are of one x0,
1 + 1/η.

Where a score failed, that row learns λ·½·mean (x − y)² alone. Gradients flow through neither reward nor decoder.

Cost of a noise at T = 4, at most: 5 forwards, 2 of the guided teacher, 1 trained, 2 decoded and scored; the fake's: 4
forwards, 1 trained.

Defaults. The equations, r, the one-to-one ratio and the missing cold start are the paper's (read but for an appendix,
sure). It gives no λ, γ, η, β, Z, rate, guidance or law of t: λ = γ = β = 1 and η = 5 are ours; t ~ U[.02, .98] and the
normaliser are DMD2's; guidance 4.5 is RTDMD's. The paper says that Z "could be the global reward std": here it is that
of all scores that the losses asked for in the run so far, which depends on no batch (ours). Until there are some, in a
run's first turn, the reward's term is left out. How "old" follows is ours too: a copy at each iteration. No code was
found.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.dmd2 import FAKE
from tempflow.algorithms.lesson import Role
from tempflow.algorithms.phase import NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few
from tempflow.core.checks import positive
from tempflow.core.ema import Copy
from tempflow.core.objective.distill import Anchor, FlowMatching
from tempflow.core.objective.guided_targets import GuidedTargets, Head


@texts_of(FEW, FAKE)
def gdmd(
    steps: int = 4,
    noises: int = 2,
    teacher_guidance: float = 4.5,
    matching_weight: float = 1.0,
    reward_weight: float = 1.0,
    head: Head = "nft",
    mix: float = 1.0,
    normaliser: Anchor = "clean",
    spread: float | None = None,
    fake_rate: float = 1.0,
    turns: int = 5,
) -> Algorithm:
    """GDMD (arXiv 2604.19009): a few-step student by distribution matching towards targets that a reward has judged.

    Args:
        matching_weight: λ, weight of the plain regression to a target.
        reward_weight: γ, weight of the term that a target's score steers; 0 is distribution matching.
        head: of that term: "nft", the paper's, or "signed", AdvantageFlow's (ours).
        mix: β of the "nft" head.
        normaliser: g is divided by the mean distance of x̂_real from the sample ("clean", DMD's), from x_t ("noisy"), or
            by nothing ("none").
        spread: Z, what a difference of scores is measured in; None: the standard deviation of all so far.
        turns: η, targets of an iteration, each behind one update of the fake score.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 1)
    check_few(noises, teacher_guidance)
    positive("fake_rate", fake_rate, 1.0)
    for name, value in (("matching_weight", matching_weight), ("reward_weight", reward_weight)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {value} must be finite and at least 0; nearest valid: 1.0")
    if not matching_weight + reward_weight:
        raise ValueError("matching_weight, reward_weight: 0 and 0 teach nothing; nearest valid: 1.0 and 1.0")
    judged = GuidedTargets(
        (matching_weight, reward_weight), head, mix, normaliser=normaliser, spread=spread, strength=teacher_guidance
    )
    follows = FlowMatching(times=judged.times, student="old")
    return Algorithm(
        name="gdmd",
        steps=steps,
        phases=(NoisePhase(follows, noises, role="fake"), NoisePhase(judged, noises)),
        turns=turns,
        roles=(Role("fake", rate=fake_rate, start="reference"),),
        weight_sets={"old": Copy()},
    )
