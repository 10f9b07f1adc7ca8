"""DP-DMD: distribution matching distillation that keeps diversity (arXiv 2602.03139).

Claim. A few-step student settles layout, and with it variety, in its first step, and texture in the others. Matching
distributions descends the reverse KL, which is content with few modes. So the first step imitates the teacher, and only
what follows is matched.

    student  T Euler steps from a fresh noise ε to x_θ, with a cut behind the first
    first    ṽ = (ε − z̃)/(σ_0 − t̃), z̃ at t̃ the teacher's after `taught` of its own `teacher_steps` guided Euler steps
             from the same ε; L_Div = mean (v_θ(ε, σ_0) − ṽ)²  (core.objective.diversity)
    rest     L_DMD = ½·mean (x_θ − sg[x_θ − g])², g = (x̂_fake − x̂_real)/mean |x_t − x̂_real|: by the noisy x_t
    loss     L_DMD + `weight`·L_Div; the cut gives the first step none of L_DMD
    fake     starts as the teacher does; `fake_updates` of flow matching on x_θ before each update of the student

Nothing is rolled out and no reward is asked; rewards only judge. Cost of a noise of the student at the defaults: 4
trained forwards, 1 of the fake and 12 of the guided teacher; of the fake: 4 forwards, 1 trained.

Defaults: the paper's and its code's for SD3.5-M (read in source): T 4, guidance 3.5, 30 teacher steps, λ .05, 5 fake
updates, one rate, times shifted by 3. K is 5 in the paper; the released script says 10, in a run named for 5. Ours: a
time for each row (the code: one for a batch); the teacher's grid is even before the shift from the student's first σ to
its last, so that it fits any student (t̃ .9375 for K 5, .9353 in the code); vanishing normalisers are clamped (the code
replaces NaN). The code trains on SD3's own grid of 4 steps, the last of which starts at σ .0089 and does hardly
anything: give a grid of four useful ones.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.dmd2 import FAKE, check_fake
from tempflow.algorithms.lesson import Role
from tempflow.algorithms.phase import NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few, segment_matching
from tempflow.core.checks import positive
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples
from tempflow.core.objective.diversity import TaughtFirstStep
from tempflow.core.times import UniformTimes


@texts_of(FEW, FAKE, segment_matching)
def dp_dmd(
    steps: int = 4,
    noises: int = 2,
    teacher_guidance: float = 3.5,
    teacher_steps: int = 30,
    taught: int = 5,
    weight: float = 0.05,
    shift: float = 3.0,
    fake_updates: int = 5,
    fake_rate: float = 1.0,
    turns: int = 1,
) -> Algorithm:
    """DP-DMD (arXiv 2602.03139): distribution matching behind a first step that imitates the teacher's first ones.

    Args:
        teacher_steps: of the teacher, from noise to sample.
        taught: K, the teacher's steps that the student's first one takes at once.
        weight: λ, of the first step's loss.
        shift: spacing of the teacher's steps, and of the times at which samples are noised; 1 is even in σ.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as what follows the first one is matched")
    check_few(noises, teacher_guidance)
    check_fake(fake_updates, fake_rate)
    positive("shift", shift, 3.0)
    at_least("teacher_steps", teacher_steps, steps, "the student's own steps")
    end, times = OwnSamples("end"), UniformTimes(shift=shift)
    matching = DistributionMatching(times, end, anchor="noisy", last=None, strength=teacher_guidance)
    student = TaughtFirstStep(matching, weight, taught, teacher_steps, shift)
    follows = NoisePhase(FlowMatching(times, end), noises, fake_updates, role="fake")
    phases, roles = (follows, NoisePhase(student, noises)), (Role("fake", rate=fake_rate, start="reference"),)
    return Algorithm(name="dp_dmd", steps=steps, phases=phases, roles=roles, turns=turns)
