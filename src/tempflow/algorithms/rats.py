"""RATS: reward-aware trajectory shaping of a few-step student (arXiv 2604.14910; a reconstruction).

Claim. A student of few steps need not stop at its teacher. While a teacher of many steps is better by the reward, its
way is worth following; where the student has caught up, the reward should lead. A gate per sample decides.

    walks    student: T Euler steps; teacher: an average of the student ("teacher"), each of these steps cut into
             `parts`; from the same noise and prompt
    shaping  at every node of the student's own walk 1 − cos(x̂_S, x̂_T) + c·mean (x̂_S − x̂_T)², x̂_T the teacher's clean
             sample where its σ is nearest  (distill.shaping, nearest_nodes)
    gate     g = sg sigmoid((R_T − R_S)/(τ·Z)): ½ between equals, and never quite 0  (distill.reward_gate)
    loss     L_reward + `weight`·mean g·shaping  (core.objective.shaping)
    term     "nft": DiffusionNFT's loss on the student's own samples, at the σ of its own nodes, with advantages
             (R_S − mean of the prompt's)/Z; "none": shaping alone

Where a score failed, that row is not shaped, or has no advantage. The teacher is asked with a guidance of its own.

Cost of a noise at the defaults, T = 4: 48 forwards of the teacher (twice that with guidance), 4 trained on the walk;
with "nft" 4 more and 4 of "old"; 2 samples decoded and scored.

Defaults. There is no code, and what is known of the paper is second-hand: noise and prompt shared, horizons matched by
σ, cosine and square of x̂0, the sigmoid of the reward gap, a teacher of 50 steps that is an average of the student, a
weight α, a terminal reward's term, students of 3, 5 and 8 steps on FLUX.1. Unknown are that term, τ, α, c and the
average's decay. Ours: all of these; Z, the standard deviation of all scores that the run's losses asked for, without
which τ has no meaning across rewards; the mean over nodes; no gradient through states; an average without warm-up, for
with it the teacher would be the student after a few iterations. In a run's first iteration, while there is no Z, gates
are ½ and advantages 0.
"""

from __future__ import annotations

from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, one_of, proportion, texts_of
from tempflow.algorithms.phase import NoisePhase
from tempflow.algorithms.segment_matching import FEW, check_few, segment_matching
from tempflow.core.checks import not_negative, positive
from tempflow.core.ema import Copy, Ramp
from tempflow.core.objective.matching import NegativeAware
from tempflow.core.objective.shaping import GatedShaping


@texts_of(FEW, segment_matching)
def rats(
    steps: int = 4,
    noises: int = 8,
    teacher_guidance: float = 1.0,
    teacher_decay: float = 0.99,
    parts: int = 12,
    shift: float = 3.0,
    weight: float = 1.0,
    square: float = 1.0,
    temperature: float = 1.0,
    reward_term: Literal["nft", "none"] = "nft",
    mix: float = 1.0,
    turns: int = 1,
) -> Algorithm:
    """RATS (arXiv 2604.14910): a few-step student is shaped by its own many-step average as far as that scores better.

    Args:
        noises: starting noises of a prompt in every update, compared with each other.
        teacher_guidance: of the average, which is the teacher; the student has the run's.
        teacher_decay: of the average at each iteration.
        weight: α, of the shaping.
        square: c, of the square beside the cosine.
        temperature: τ of the gate, in units of the scores' spread.
        reward_term: "nft", DiffusionNFT's loss on the student's own samples; "none", shaping alone.
        mix: β of that loss.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 1)
    check_few(noises, teacher_guidance)
    proportion("teacher_decay", teacher_decay, 0.99)
    one_of("reward_term", reward_term, ("nft", "none"))
    if reward_term != "none":
        at_least("noises", noises, 2, "or there is nothing to compare with")
    positive("mix", mix, 1.0)
    not_negative("weight", weight, "0 leaves the reward's term alone")
    term = NegativeAware(mix) if reward_term == "nft" else None
    objective = GatedShaping(weight, square, temperature, parts, shift, teacher_guidance, term)
    sets = {"teacher": Ramp(0, teacher_decay, teacher_decay)} | ({"old": Copy()} if reward_term == "nft" else {})
    phases = (NoisePhase(objective, noises, together=True),)
    return Algorithm(name="rats", steps=steps, phases=phases, weight_sets=sets, turns=turns)
