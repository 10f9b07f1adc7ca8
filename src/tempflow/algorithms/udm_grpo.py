"""UDM-GRPO (arXiv 2604.18518; code Yovecent/UDM-GRPO, on baaivision/URSA's diffnext/pipelines/ursa/pipeline_grpo.py).

Claim. Of uniform discrete diffusion, what a network predicts between is a poor action, and states of a sampler's own
path are unlike those that the forward process gives: GRPO on these is unstable. Take the final, clean tokens for the
action at every step, at states that noise them anew, at a few early steps and without guidance. URSA 1.7B: GenEval 69 %
to 96 % (abstract).

    advantage   A = clip((R − mean) / (std + eps), ±5), mean and std of the prompt's group
    states      x_t, the clean tokens noised by the model's own path, at `window` grid times in a row, from a start
                drawn from 0 … `starts` − 1                                                       (times.WindowTimes)
    log p       mean over tokens of log softmax(logits(x_t))[clean token]             (corruption.TokenLikelihood)
    loss        mean of max(−A·ρ, −A·clip(ρ, 1 ± clip)) + kl·k3, ρ = exp(log p − sg log p): 1 on its one update
    k3          e^d − 1 − d, d = log p_ref − log p, of the means over tokens; `kl_of` "token": of each, then their mean

The mean's k3 is below the tokens' (Jensen): tokens whose probabilities move apart cancel in it.

`actions` "jumps" is the baseline, with backward states: the steps of the rollout are the actions, in the same window,
and their log-prob is that of the jump itself. The released baseline takes the clean tokens that a step drew and then
mostly threw away; given the jump, the gradient of ours is the mean of that one's, so it has less noise. It needs a
codebook of 2048 codes at most.

`actions` "branches" is ours, after TempFlow-GRPO: at each step of the window the prompt's path parts into `group`
jumps, of which the first goes on to part again and the others are finished. They are the actions, and those of one
state are compared: what came before they have in common, and what comes after is still drawn.

Cost for a prompt at the defaults: 80 forwards, 8 leaves; 24 pairs (edges), each a forward of policy and reference. Of
"branches": 22 leaves, 24 edges, and 178, 157 or 136 forwards by the start.

Defaults: configs/geneval_grpo/ursa_1.7b_ibq512.yaml (read in source, sure): T 10, G 8 (OCR 16), window 3, starts 3,
clip 1e-4 (inert), KL .05, A within ±5. The code draws a start for a batch of samples, here each has its own. At its
first state, σ = 1, nothing is left of the clean tokens: log p is their marginal there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, Drawn, at_least, one_of, positive, proportion, texts_of
from tempflow.algorithms.phase import EdgePhase, LeafPhase
from tempflow.core import plan
from tempflow.core.checks import not_negative
from tempflow.core.corruption import TokenLikelihood
from tempflow.core.credit import GroupZScore
from tempflow.core.credit.rule import Key
from tempflow.core.dynamics import ModelJump
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate
from tempflow.core.objective.ratio import clipped
from tempflow.core.objective.regularizer import LikelihoodKL, TokenKL
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.times import WindowTimes

Actions = Literal["clean", "jumps", "branches"]
Mean = Literal["sequence", "token"]
Grown = Callable[[int, int, range], plan.Plan]

COMPARED: Mapping[Actions, tuple[Key, ...]] = {
    "clean": ("prompt",),
    "jumps": ("prompt", "step"),
    "branches": ("prompt", "parent"),
}
"""Which actions are compared with each other."""


@texts_of()
def udm_grpo(
    steps: int = 10,
    group: int = 8,
    window: int = 3,
    starts: int = 3,
    actions: Actions = "clean",
    clip: float = 1e-4,
    kl: float = 0.05,
    kl_of: Mean = "sequence",
    eps: float = 1e-4,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """UDM-GRPO (arXiv 2604.18518): clean tokens as actions, at states that noise them anew, at a few early steps.

    Args:
        window: steps in a row that are trained.
        starts: the first of them is drawn from 0 … starts − 1.
        actions: "clean": the final tokens, at states noised anew; "jumps": the rollout's own steps, its baseline;
            "branches": steps at which one path parts into `group`, compared with each other.
        kl_of: k3 of a "sequence"'s mean log-prob, or the mean of every "token"'s; of jumps always the latter.

    Raises ValueError naming the argument, its value and a valid one.
    """
    for name, value in (("steps", steps), ("window", window), ("starts", starts)):
        at_least(name, value, 1)
    at_least("group", group, 2, "or there is nothing to compare with")
    one_of("actions", actions, get_args(Actions))
    if window + starts - 1 > steps:
        raise ValueError(
            f"window: {window} from the last of {starts} starts leaves the grid of {steps} steps; nearest valid: "
            f"{max(1, steps - starts + 1)}"
        )
    one_of("kl_of", kl_of, get_args(Mean))
    proportion("clip", clip, 1e-4)
    not_negative("kl", kl)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: {eps} must be finite and ≥ 0; nearest valid: 1e-4")
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    if actions != "clean":
        phase = EdgePhase(clipped(clip, clip, kl, "k3"))
        grown = Drawn(partial(_window, _forest if actions == "branches" else _chains, steps, group, window, starts))
    else:
        grown = partial(_whole, steps, group)
        like = TokenLikelihood()
        held = TokenKL("reference", kl) if kl_of == "token" else LikelihoodKL("reference", kl, "k3", like)
        phase = LeafPhase(
            ClippedLikelihood(clip, clip, Estimate(like, on_policy=True), regularizers=(held,)),
            Renoise(WindowTimes(window, starts)),
        )
    return Algorithm(
        name="udm_grpo",
        steps=steps,
        plan=grown,
        dynamics=ModelJump(),
        credit=GroupZScore(by=COMPARED[actions], eps=eps, clip=advantage_clip),
        phases=(phase,),
    )


def _whole(steps: int, group: int, iteration: int, slot: int) -> plan.Plan:
    return _chains(steps, group, range(0))


def _window(
    grown: Grown, steps: int, group: int, window: int, starts: int, seed: int, iteration: int, slot: int
) -> plan.Plan:
    start = Stream(seed, "udm_grpo.window").integers((iteration, slot), starts, 1)[0]
    return grown(steps, group, range(start, start + window))


@lru_cache(maxsize=256)
def _chains(steps: int, group: int, trained: range) -> plan.Plan:
    """All steps draw noise: tokens jump."""
    return plan.chain(steps, group, train=trained)


@lru_cache(maxsize=256)
def _forest(steps: int, group: int, trained: range) -> plan.Plan:
    """The same, from one trunk."""
    return plan.branch_each_step(steps, 1, group, trained, jumps=True)
