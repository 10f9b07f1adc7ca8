"""Dynamic-TreeRPO: MixGRPO's window as a tree with growing noise, a bent clip and a pull to the best path
(arXiv 2509.23352, and its "LayerTuning-RL").

Claim. A tree inside the window shares its prefixes, so sixteen pictures cost thirty noisy steps and not sixty-four;
stronger noise deeper down keeps its leaves apart; the velocity of the best path is a target for all the others.

    tree        ODE outside the window of `depth` steps; inside it every node has `branches` noisy children (plan.tree)
    noise       Flow-GRPO's SDE, times g(k) = 1 + growth·k/depth at depth k = 0 … depth − 1, in its log-prob too
    advantage   A_leaf = z-score in the prompt, an edge's is its leaves' mean                           (FromLeaves)
    weight      the number of leaves below an edge, mean 1 over trained edges: the paper's sum over paths meets a shared
                edge once per path
    clip        low·(1 − η·u) and high·(1 + η·u), u = clamp(A, ±1), η = `sensitivity`               (Standing, Clip):
                u has A's sign, so the side that binds, above for good edges and below for bad, gets (1 + η|u|) times
                its room: it only widens, the more the further an edge is from the mean
    loss        RL + imitation · mean (v(x) − sg V*)², V* the rollout's velocity at the same step of the prompt's best
                path, which is 0 on that path itself                                     (BestPath, Imitation)

Cost for a prompt with the window at l: trees·(l + 1 + b + … + b^(d−1) + b^d·(T − l − d)) forwards, trees·b^d leaves,
trees·(b + … + b^d) trained edges; at the defaults, l = 0: 351, 16, 30.

Sources: the abstract and four reviews; no code was found, so much is our reading. Sure: binary, depth 4, no KL, Eq. 6's
noise that grows linearly with depth, Eq. 9's clipped sum over tree edges, reward-dependent clips (Eq. 11), supervised
pull to the group's best path (Eq. 13). Ours: g's exact form, the clip's form and u, the pull's even weights over
edges (a level counts for as many edges as it has, where `weight` makes the policy's levels even), the numbers 0.5, 0.5
and 5e-4 of growth, sensitivity and imitation, and from MixGRPO T 25, noise 0.7, clip 1e-4 and the window's way (here it
never shrinks). The mean of a shared edge's leaf advantages meets one clip, where the paper's sum clips each path by
itself; before a first update that is the same gradient (where no leaf failed: weights count all).
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from tempflow.algorithms.base import Algorithm, Drawn, at_least, positive, proportion, texts_of
from tempflow.algorithms.mix_grpo import mix_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import BestPath, FromLeaves, GroupZScore, Standing
from tempflow.core.dynamics import Dynamics, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.clip import Clip
from tempflow.core.objective.ratio import PolicyRatio
from tempflow.core.objective.regularizer import Divergence, Imitation
from tempflow.core.schedule import Schedule
from tempflow.core.window import Order, SlidingWindow


@texts_of(mix_grpo)
def dynamic_treerpo(
    steps: int = 25,
    trees: int = 1,
    depth: int = 4,
    branches: int = 2,
    window_end: int | None = None,
    order: Order = "progressive",
    every: int = 25,
    stride: int = 1,
    roll_back: bool = True,
    noise_level: float = 0.7,
    growth: float = 0.5,
    clip: float = 1e-4,
    sensitivity: float = 0.5,
    imitation: float = 5e-4,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """Dynamic-TreeRPO (arXiv 2509.23352): a tree in a sliding window, its noise growing with depth.

    Args:
        trees: initial noises per prompt, a tree each; all their leaves are compared.
        depth: steps of the window, levels of the tree.
        branches: children of every node in the window; 1 makes it MixGRPO.
        window_end: the window lies in steps 0 … window_end − 1; None: in all but the sampler's last.
        noise_level: a of the SDE at the tree's first level.
        growth: how much stronger noise gets over the tree's depth; 0: it does not.
        sensitivity: η in [0, 1), how much an edge's standing bends its clip; 0: not at all.
        imitation: weight of the pull to the velocity of the prompt's best path; 0: none. 0.1 ruins `shapes`.

    Raises ValueError naming the argument, its value and a valid one.
    """
    for name, count, low in (("steps", steps, 2), ("trees", trees, 1), ("depth", depth, 1), ("branches", branches, 1)):
        at_least(name, count, low)
    if trees * branches**depth < 2:
        raise ValueError(f"branches: {branches} with {trees} tree leaves nothing to compare with; nearest valid: 2")
    if depth >= steps:
        raise ValueError(f"depth: {depth} leaves no step to finish by; nearest valid: {steps - 1}")
    positive("noise_level", noise_level, 0.7)
    proportion("clip", clip, 1e-4)
    if not 0 <= growth < float("inf"):
        raise ValueError(f"growth: {growth} must be finite and ≥ 0; 0 keeps the noise even")
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    slide = SlidingWindow.of(steps, depth, window_end, order, every, stride, roll_back, whole=True)
    leaves = GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip)
    return Algorithm(
        name="dynamic_treerpo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, trees, slide, branches, growth)),
        dynamics=FlowSDE(noise_level),
        credit=BestPath(Standing(FromLeaves(leaves))),
        phases=(
            EdgePhase(
                PolicyRatio(Clip(clip, clip, sensitivity), regularizers=(Divergence(kl), Imitation(imitation))),
                per_path,
            ),
        ),
    )


def per_path(forest: Forest, schedule: Schedule, dynamics: Dynamics) -> Tensor:
    """The number of leaves below each edge, [E], with mean 1 over trained edges: paths count alike, not edges.

    As planned: leaves whose reward failed are counted.
    """
    count = torch.bincount(forest.descent[0], minlength=len(forest.edges)).to(forest.edges.scale)
    return count / count[forest.edges.trained].mean()


def _plan(
    steps: int, trees: int, slide: SlidingWindow, branches: int, growth: float, seed: int, iteration: int, slot: int
) -> plan.Plan:
    return _tree(steps, trees, slide.at(seed, iteration), branches, growth)


@lru_cache(maxsize=256)
def _tree(steps: int, trees: int, inside: range, branches: int, growth: float) -> plan.Plan:
    scale = {i: 1.0 + growth * k / len(inside) for k, i in enumerate(inside)}
    return plan.tree(steps, trees, dict.fromkeys(inside, branches), inside, scale=scale)
