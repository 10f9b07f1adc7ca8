"""DMD2: distribution matching distillation of a few-step student (arXiv 2405.14867; DMD: arXiv 2311.18828).

Claim. A student's samples follow its teacher's law once the scores of both agree at every noise level. The teacher's
score is the guided teacher; the student's is a "fake" model that keeps learning its samples, several updates for each
of the student's, which replaces DMD's regression on paired samples.

    student   walked from a fresh noise along its own states to a node drawn for each row; x = x̂0 there  (OwnSamples)
    gradient  g = (x̂_fake − x̂_real)/mean |x − x̂_real| at x_t, t ~ U[.02, .98]  (distill.matching_gradient)
    loss      ½·mean (x − sg[x − g])², through the student's last prediction  (DistributionMatching)
    fake      starts as the teacher does; `fake_updates` of flow matching on the student's own samples before each
              update of the student

Nothing is rolled out and no reward is asked; rewards only judge. Cost of a noise of the student at T = 4, at most: 3
forwards, 1 trained, 1 of the fake and 2 of the guided teacher; of the fake: 4 forwards, 1 trained.

Defaults: 5 fake updates, t and the normaliser are the paper's (sure), which was tuned on SDXL. Guidance 4.5 and one
learning rate for both are RTDMD's on SD3.5-M (read in its configuration). Ours: the student steps by Euler, as plain
samplers do (the paper's noises x̂0 anew), and the fake learns at the student's times. DMD2's GAN term, which needs real
pictures, is not here. In a turn the fake learns first; the codes let one counter run, and every fifth (DMD2, from
memory) or sixth iteration (DP-DMD's code) is the student's, which is that order.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, one_of, texts_of, within
from tempflow.algorithms.lesson import Role
from tempflow.algorithms.phase import NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few
from tempflow.core.checks import positive
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples

FAKE = {
    "fake_updates": "updates of the fake score for each of the student.",
    "fake_rate": "the fake's learning rate in units of the run's.",
}
"""Arguments of algorithms with a fake score."""


def check_fake(fake_updates: int, fake_rate: float) -> None:
    """Raises ValueError, naming the argument, its value and a valid one."""
    at_least("fake_updates", fake_updates, 1)
    positive("fake_rate", fake_rate, 1.0)


@texts_of(FEW, FAKE)
def dmd2(
    steps: int = 4,
    noises: int = 2,
    teacher_guidance: float = 4.5,
    fake_updates: int = 5,
    fake_rate: float = 1.0,
    stop: Literal["random", "end"] = "random",
    through: int | None = 1,
    turns: int = 1,
) -> Algorithm:
    """DMD2 (arXiv 2405.14867): a few-step student by distribution matching against a guided teacher and a fake score.

    Args:
        stop: "random", DMD2's: a sample is x̂0 at a node drawn for each row; "end": the last state, which is what the
            student's Euler steps draw.
        through: gradients flow through so many of the last predictions; None: through all.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 1)
    check_few(noises, teacher_guidance)
    check_fake(fake_updates, fake_rate)
    one_of("stop", stop, ("random", "end"))
    if through is not None:
        within("through", through, steps)
    matching = DistributionMatching(samples=OwnSamples(stop), last=through, strength=teacher_guidance)
    follows = FlowMatching(matching.times, matching.samples)
    phases = (NoisePhase(follows, noises, fake_updates, role="fake"), NoisePhase(matching, noises))
    roles = (Role("fake", rate=fake_rate, start="reference"),)
    return Algorithm(name="dmd2", steps=steps, phases=phases, roles=roles, turns=turns)
