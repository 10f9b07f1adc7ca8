"""SRPO's alignment step ("Direct-Align", arXiv 2509.06942): the reward's gradient at any σ, by a noise that is known.

Claim. Methods that foresee the clean picture in one prediction can only do so late, and so they learn what is easy to
hack there. If a picture is noised by an ε that one knows, one small step from there can be undone exactly: whatever is
left of ε is subtracted. So a picture can be had, and a reward's gradient taken, at every σ, also where the layout is
decided.

    sample      x, by the whole walk without gradients                                     (core.unroll)
    noise       x_σ = (1−σ)·x + σ·ε at a node drawn from all of the grid, fresh ε; `pairs` times for each sample
    step        x_σ' = x_σ + (σ'−σ)·v(x_σ) to the next node's σ', with gradients through this v
    recover     x̂0 = (x_σ' − σ'·ε)/(1−σ'), which is x where v = ε − x                      (KnownNoise)
    loss        −mean r(x̂0), or with a `margin` mean max(0, margin − r(x̂0))               (RewardGradient)

The gradient to v is that to x̂0 times (σ−σ')/(1−σ'): 1 at σ = 1, small where steps are small.

Cost for a prompt at the defaults: 25 forwards without gradient, 4 with, and 4 decodes and reward calls with gradients.

Only the alignment step is here. From memory of the paper: T 25 on FLUX.1-dev, samples of the policy itself. Not here,
as memory does not say enough of them: its relative reward, a text's score with words in front that praise less
the same with words that blame; the step in the other direction, whose score is lowered; a discount by σ. `pairs` is
ours.
"""

from __future__ import annotations

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.refl import GRADIENT, by_gradient
from tempflow.core.objective.reward_gradient import KnownNoise


@texts_of(GRADIENT)
def srpo(steps: int = 25, noises: int = 1, pairs: int = 4, margin: float | None = None, turns: int = 1) -> Algorithm:
    """SRPO's alignment step (arXiv 2509.06942): the reward's gradient at any noise level, by a known noise.

    Args:
        steps: T, sampler steps; re-noised samples take one of them.
        pairs: how often a picture is noised, each time to a σ and by an ε of its own.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pairs", pairs, 1)
    return by_gradient("srpo", steps, KnownNoise(pairs), noises, margin, turns)
