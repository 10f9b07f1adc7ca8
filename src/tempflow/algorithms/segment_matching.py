"""Segment matching: a few-step student learns a guided teacher's own path, one segment a step (warm-up; ours).

Claim. A few-step student that is bad at its own steps wastes a distribution-matching run on them. Regressing the mean
velocity of each segment of the teacher's path takes it most of the way first, and takes guidance into one forward.

    path    x_0 … x_T: the teacher's Euler path from a fresh noise, by its guidance, each step of the student cut into
            `parts`; the student's nodes are among its nodes
    target  (x_k − x_{k+1})/(σ_k − σ_{k+1}): one step of the student lands where the teacher does  (core.distill)
    loss    mean over k of (v_θ(x_k, σ_k) − target)², the student on the teacher's path  (imitation.SegmentMatching)

Nothing is rolled out and no reward is asked; rewards only judge. Cost of a noise: `parts`·T forwards of the teacher,
twice that with guidance, and T trained.

Defaults: ours. It is the loss of DP-DMD's first step (arXiv 2602.03139) on every step, and progressive distillation
(arXiv 2202.00512) without its halvings.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.phase import NoisePhase
from tempflow.core.checks import not_negative, positive
from tempflow.core.objective.imitation import SegmentMatching

FEW = {
    "steps": "T, the student's steps; its grid is the run's.",
    "noises": "starting noises of a prompt in every update.",
    "teacher_guidance": "of the reference, which is the teacher; the student has the run's.",
    "turns": "rounds of updates in an iteration, each from noises of its own.",
}
"""Arguments that algorithms of few-step students share."""


def check_few(noises: int, teacher_guidance: float) -> None:
    """Raises ValueError, naming the argument, its value and a valid one."""
    at_least("noises", noises, 1)
    not_negative("teacher_guidance", teacher_guidance, "1 is no guidance")


@texts_of(FEW)
def segment_matching(
    steps: int = 4,
    noises: int = 2,
    teacher_guidance: float = 4.5,
    parts: int = 2,
    shift: float = 3.0,
    turns: int = 1,
) -> Algorithm:
    """A few-step student regresses the mean velocities of a guided teacher's path (warm-up of distillation; ours).

    Args:
        parts: Euler steps of the teacher within one of the student's.
        shift: spacing of the teacher's steps between two nodes of the student; 1 is even in σ.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 1)
    check_few(noises, teacher_guidance)
    at_least("parts", parts, 1)
    positive("shift", shift, 3.0)
    matching = SegmentMatching(parts, shift, strength=teacher_guidance)
    return Algorithm(name="segment_matching", steps=steps, phases=(NoisePhase(matching, noises),), turns=turns)
