"""ReFL: reward feedback learning (ImageReward, arXiv 2304.05977; code THUDM/ImageReward), for flow models.

Claim. A reward that has gradients needs no policy gradient: late in the walk the clean picture that one prediction
foresees is good enough to be scored, so the score's own gradient is taken there, through that one prediction.

    walk        from noise to a node drawn among the last `late` before the end, without gradients  (core.unroll)
    foresee     x̂0 = x − σ·v at that node, with gradients through this v alone                     (LateStep)
    score       x̂0 is decoded and scored, both with gradients; several rewards are summed by weight
    loss        −mean r(x̂0), or with a `margin` mean max(0, margin − r(x̂0))                       (RewardGradient)

It knows the reward's gradient, not only its value, so it learns from few samples; and it follows it to wherever the
reward is wrong, which is soon with a small network (docs/algorithms/refl.md). Watch another reward beside it.

Cost for a prompt at the defaults: at most 39 forwards without gradient, 1 with, and a decode and a reward call with
gradients, which is not counted as a forward.

Defaults: from memory of the paper and its code, which were not at hand: T 40, a node of the last ten (30 … 39), one
picture a prompt, no guidance at the step with gradients. There the loss is 1e-3·max(0, 2 − r) with ImageReward for r
(so margin 2.0), beside a loss on pre-training data. Ours: no margin, as rewards differ in scale; no factor, as AdamW
undoes it; no second loss; the run's guidance throughout.
"""

from __future__ import annotations

from math import isfinite

from tempflow.algorithms.base import Algorithm, at_least, texts_of, within
from tempflow.algorithms.phase import NoisePhase
from tempflow.core.objective.reward_gradient import LateStep, Path, RewardGradient

GRADIENT = {
    "noises": "pictures of a prompt in an update.",
    "margin": "a score from which on a picture teaches nothing more; None for none.",
    "turns": "updates in an iteration, each from noises of its own.",
}
"""What arguments of that name are, of an algorithm that learns by the reward's gradient."""


@texts_of(GRADIENT)
def refl(steps: int = 40, late: int = 10, noises: int = 1, margin: float | None = None, turns: int = 1) -> Algorithm:
    """ReFL (arXiv 2304.05977): the reward's gradient at one late step.

    Args:
        steps: T, sampler steps of the grid that is walked.
        late: from how many of the last steps the one with gradients is drawn.

    Raises ValueError naming the argument, its value and a valid one.
    """
    return by_gradient("refl", steps, LateStep(within("late", late, steps)), noises, margin, turns)


def by_gradient(name: str, steps: int, path: Path, noises: int, margin: float | None, turns: int) -> Algorithm:
    """The policy learns from fresh noises by the reward's gradient along that path; what the family shares."""
    at_least("steps", steps, 1)
    at_least("noises", noises, 1)
    if margin is not None and not isfinite(margin):
        raise ValueError(f"margin: {margin} must be finite; nearest valid: None, for none")
    phase = NoisePhase(RewardGradient(path, margin), noises)
    return Algorithm(name, (phase,), steps, turns=turns)
