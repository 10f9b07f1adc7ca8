"""OPD: on-policy distillation of velocities (a baseline of several code bases; no paper of its own).

Claim. A student that imitates its teacher on the teacher's states meets other states when it draws. Asking the teacher
at the student's own states trains it where it will be. No fake score and no reward are needed, and a walk is all the
data.

    student  T Euler steps from a fresh noise along its own states x_k, through which no gradient flows
    loss     mean over k of w_k·mean (v_θ(x_k, σ_k) − v_teacher(x_k, σ_k))², w_k ∝ σ_k^`power` with mean 1
             (imitation.OnPolicyMatching)
    teacher  the reference with a guidance of its own: the untrained model, or a stronger one by `model.reference`

The optimum is the teacher's own velocity, so its Euler path on the student's grid: with few steps guidance comes into
one forward, but the steps' error stays, which `segment_matching` and `dmd2` are for. With as many steps as the teacher
has (10, say) the student is the teacher without its second forward, or a weaker checkpoint that follows a stronger one.

Nothing is rolled out and no reward is asked; rewards only judge. Cost of a noise: T trained forwards, which are the
walk itself, and T of the teacher, twice that with guidance.

Defaults: ours. The codes differ in where states come from and in the weight; on stochastic paths the KL of two steps is
this error with a weight of step size over noise.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.phase import NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few
from tempflow.core.objective.imitation import OnPolicyMatching


@texts_of(FEW)
def opd(
    steps: int = 10,
    noises: int = 2,
    teacher_guidance: float = 4.5,
    power: float = 0.0,
    turns: int = 1,
) -> Algorithm:
    """On-policy distillation: a student regresses a stronger teacher's velocities at its own states (ours).

    Args:
        power: a step weighs σ to that power; 0 weighs velocities alike, 2 predicted clean samples.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 1)
    check_few(noises, teacher_guidance)
    matching = OnPolicyMatching(power, teacher_guidance)
    return Algorithm(name="opd", steps=steps, phases=(NoisePhase(matching, noises),), turns=turns)
