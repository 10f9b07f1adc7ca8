"""E²PO: explore by perturbed prompts, train as if all pictures were the clean prompt's (arXiv 2605.15803, ICML 2026).

Claim. Group methods stop learning when all members of a group look alike. Rather than by more initial noises, spread
the group by other conditions: a few offsets of the prompt's token embeddings, learned to differ from each other and to
keep its sense, steer the noisy part of sampling and fade out after it. Scores, advantages and loss never hear of them.

    conditions  C of the prompt, and what the frozen text encoder says of E + δ_k, E its input embeddings and δ_k on
                content tokens, for k < K, from minimising λ_div·mean_{k<l} cos(e_k, e_l) + Σ_k |cos(e_k, e) − μ|_ε of
                the encoder's own vectors e_k, through it    (core.perturb.Perturbation, models.protocol.EncodesInputs)
    blend       C_k(σ) = γ(σ)·C_k + (1 − γ(σ))·C, γ = clip((σ − (1 − ρ))/ρ, 0, 1)
    rollout     G noises × K conditions by ODE, of the lagged policy                                     (plan.crossed)
    advantage   over all G·K pictures of the prompt, in which its conditions are not told apart
    loss, old   DiffusionNFT's, every forward with C alone                             (algorithms.diffusion_nft)

Samples of C_k are trained under C: off policy, which a regression on clean samples should bear and a ratio of
densities would not (our inference). With one condition, ρ = 0 or offsets of 0 this is DiffusionNFT, on G noises drawn
K times.

Cost for a prompt: G·K·T forwards, G·K pictures, pairs as DiffusionNFT; at the defaults 480, 48, 432. Learning δ takes
no forward of the flow: `embed_steps` forwards and backwards of the text encoders on K − 1 rows, once a prompt.

Source: second-hand notes (likely); no code was found. By these: what is perturbed and through what it is learned, the
loss, the blend, content tokens only, that K counts the clean condition, and (G, K) = (4, 12) to explore, (2, 4) where
cost counts, (8, 3) for preference rewards. Not stated there, and here ours: λ_div, μ, ε, ρ, σ_init, the optimizer, that
each of several encoders has offsets and a loss of its own (a T5, which has no vector of its own, the mean of what it
says at the content tokens), that δ depends on seed and prompt text alone (so it is the same in every iteration). T and
the base are DiffusionNFT's. Not a reproduction.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

from tempflow.algorithms.base import Algorithm, at_least, texts_of
from tempflow.algorithms.diffusion_nft import Lag, diffusion_nft
from tempflow.core import plan
from tempflow.core.perturb import Perturbation


@texts_of(diffusion_nft)
def e2po(
    steps: int = 10,
    noises: int = 4,
    conditions: int = 12,
    fade: float = 0.5,
    spread: float = 0.5,
    target: float = 0.9,
    band: float = 0.05,
    init: float = 0.1,
    embed_steps: int = 50,
    embed_rate: float = 0.03,
    mix_beta: float = 1.0,
    advantage_max: float = 5.0,
    lag: Lag = "type1",
    fraction: float = 0.99,
    kl: float = 1e-4,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
) -> Algorithm:
    """E²PO (arXiv 2605.15803): DiffusionNFT on groups that are spread by perturbed prompts.

    Args:
        noises: G, initial noises per prompt.
        conditions: K, conditions per prompt with its own; each noise is drawn with each. 1: DiffusionNFT.
        fade: ρ in [0, 1], the noisy part of sampling in which conditions differ, σ > 1 − ρ; unknown, ours.
        spread: λ_div, weight of how alike the perturbed vectors are; unknown, ours. Below (K−2)/(2(μ−ε)) they stay in
            the band.
        target: μ, their cosine with the prompt's own; unknown, ours.
        band: ε, how far from the target costs nothing; unknown, ours.
        init: σ_init, where offsets start, in a token's root mean square; unknown, ours.
        embed_steps: steps to learn the offsets of a prompt; unknown, ours.
        embed_rate: length of the first of them, in the same unit; it falls to 0; unknown, ours.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("conditions", conditions, 1)
    at_least("noises", noises, 1 if conditions > 1 else 2, "or there is nothing to compare with")
    base = diffusion_nft(
        steps=steps,
        group=noises * conditions,
        mix_beta=mix_beta,
        advantage_max=advantage_max,
        lag=lag,
        fraction=fraction,
        kl=kl,
        std=std,
        eps=eps,
    )
    return replace(
        base,
        name="e2po",
        plan=partial(_plan, steps, noises, conditions),
        conditions=Perturbation(conditions, fade, spread, target, band, init, embed_steps, embed_rate),
    )


def _plan(steps: int, noises: int, conditions: int, iteration: int, slot: int) -> plan.Plan:
    return _crossed(steps, noises, conditions)


@lru_cache(maxsize=256)
def _crossed(steps: int, noises: int, conditions: int) -> plan.Plan:
    return plan.crossed(steps, noises, conditions)
