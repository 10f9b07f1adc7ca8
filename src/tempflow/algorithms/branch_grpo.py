"""BranchGRPO: a tree of noisy steps, whose edges are valued by the leaves below them (arXiv 2509.06040).

Claim. Pictures that share their early steps cost fewer forwards, and comparing a tree's nodes depth by depth gives
every step an advantage of its own; edges that teach little are pruned from training.

    tree        every step noisy; at `splits` every node has `branches` children, elsewhere one         (plan.tree)
    noise       η, at splits η·split_scale: in the step's whole law, so in its mean and log-prob too
    value       V(edge) = mean of the leaves below; "softmax": Σ softmax(log p(child))·V(child)         (LogProbBackup)
    advantage   A = clip((V − mean) / (std + eps), ±advantage_clip) over the tree's edges at that step, unbiased std;
                value "leaves": the mean of the leaves' own z-scores in the prompt                      (FromLeaves)
    prune depth `prune_steps` are not trained; every `prune_every` iterations they move a step towards the noise, until
                the first is at `prune_stop`
    prune width of each last split only the best leaf, or the prompt's best and worst ones: an edge is trained if a
                kept leaf descends from it                                                              (Extremes)
    loss        mean over edges of max(−A r, −A clip(r, 1−clip, 1+clip))

Cost for a prompt, n_i = trees·branches^(splits before i): Σ n_i forwards, n_T leaves, Σ n_{i+1} trained edges over the
noisy steps but the pruned; width pruning comes after the plan's count. At the defaults 203, 16, 202.

Defaults: Fredreic1849/BranchGRPO (train_branchgrpo_flux.py and its script read in source, sure): T 20, η 0.3, splits 0,
3, 6, 9, split noise 4, clip 1e-3, eps 1e-8, advantages clipped at 5, slide interval 30, stop at step 8 (its depth 9
counts the child's). On purpose unlike the code, which draws split children with 4·std but scores them with std (not
their density, and four times its gradient); trains the last step too, whose noise nobody sees as x̂0 is decoded (here
it is deterministic); prunes width *inside* a last branch, whose edges all have one value (here as the paper says); and
with `use_group` gives inner edges no advantage. Its mixed mode's window (`noisy_window`) never moves at T 20.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, at_least, one_of, positive, proportion, texts_of
from tempflow.algorithms.dance_grpo import dance_grpo
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import CreditRule, Extremes, FromLeaves, GroupZScore, LogProb, LogProbBackup
from tempflow.core.dynamics import DanceSDE
from tempflow.core.objective.ratio import clipped

Value = Literal["mean", "softmax", "leaves"]
Width = Literal["all", "branch", "extremes"]


@texts_of(dance_grpo)
def branch_grpo(
    steps: int = 20,
    trees: int = 1,
    splits: tuple[int, ...] = (0, 3, 6, 9),
    branches: int = 2,
    split_scale: float = 4.0,
    noise_level: float = 0.3,
    noisy_window: int | None = None,
    value: Value = "mean",
    prune_steps: tuple[int, ...] = (),
    prune_every: int | None = None,
    prune_stop: int | None = None,
    width: Width = "all",
    width_keep: float = 0.5,
    clip: float = 1e-3,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """BranchGRPO (arXiv 2509.06040): a tree of noisy steps, valued from its leaves up, compared depth by depth.

    Args:
        trees: initial noises per prompt, a tree each.
        splits: steps at which every node has `branches` children.
        branches: children at a split.
        split_scale: multiplies η at splits.
        noisy_window: noise only at that many first steps and at splits; None: at all but the last.
        value: edges of a tree are compared at each step, by the "mean" of their leaves or the "softmax" of their
            children's log-probabilities; or the prompt's "leaves" are, and an edge has their mean advantage.
        prune_steps: steps that are not trained.
        prune_every: iterations after which these move a step towards the noise; None: they stay.
        prune_stop: where the first of them stops, between 0 and where it starts; None: a step before the last split.
        width: leaves that are trained: "all", of each last split the best ("branch"), or the "extremes".
        width_keep: share of a prompt's leaves that are its extremes.

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one draws no noise")
    at_least("trees", trees, 1)
    at_least("branches", branches, 2, "or a split is none")
    one_of("value", value, get_args(Value))
    one_of("width", width, get_args(Width))
    positive("split_scale", split_scale, 4.0)
    positive("noise_level", noise_level, 0.3)
    proportion("clip", clip, 1e-3)
    positive("advantage_clip", 5.0 if advantage_clip is None else advantage_clip, 5.0)
    for name, given in (("splits", splits), ("prune_steps", prune_steps)):
        for i in given:
            if not 0 <= i < steps - 1:
                raise ValueError(f"{name}: {i} must be in 0 … {steps - 2}; nearest valid: {min(max(i, 0), steps - 2)}")
    if not splits and (trees == 1 or value != "leaves"):
        raise ValueError("splits: () leaves nothing to compare with; nearest valid: (0,), or more trees by 'leaves'")
    if not 0 < width_keep <= 1:
        raise ValueError(f"width_keep: {width_keep} must be in (0, 1]; 0.5 is usual")
    at_least("noisy_window", steps if noisy_window is None else noisy_window, 0)
    at_least("prune_every", 1 if prune_every is None else prune_every, 1)
    if prune_stop is not None and not (prune_every and prune_steps and 0 <= prune_stop <= min(prune_steps)):
        raise ValueError(f"prune_stop: {prune_stop} is no end of {prune_steps} by {prune_every}; nearest valid: None")
    at = tuple(sorted(set(splits)))
    tree = _Tree(steps, trees, at, branches, split_scale, steps if noisy_window is None else noisy_window)
    by = ("prompt", "step") if value == "leaves" else ("prompt", "root", "step")
    credit: CreditRule = GroupZScore(by=by, unbiased=True, eps=eps, clip=advantage_clip)
    if value != "mean":
        credit = LogProbBackup(credit) if value == "softmax" else FromLeaves(credit)
    if width == "branch":
        credit = Extremes(credit, 1, 0, among="branch", by="reward")
    if width == "extremes":
        kept = max(2, int(trees * branches ** len(at) * width_keep))
        credit = Extremes(credit, kept // 2, kept - kept // 2, by="reward")  # z-scores may be a tree's, or bounded
    return Algorithm(
        name="branch_grpo",
        steps=steps,
        plan=lambda iteration, slot: tree.grown(_pruned(tree, prune_steps, prune_every, prune_stop, iteration)),
        dynamics=DanceSDE(noise_level),
        credit=credit,
        phases=(EdgePhase(clipped(clip, clip, kl, "exact")),),
        observe=(LogProb(),) if value == "softmax" else (),
    )


def _pruned(tree: _Tree, prune: tuple[int, ...], every: int | None, stop: int | None, iteration: int) -> frozenset[int]:
    furthest = max(tree.splits, default=0) - 1 if stop is None else stop
    moved = min(iteration // every, max(0, min(prune) - max(furthest, 0))) if prune and every else 0
    return frozenset(i - moved for i in prune)


@dataclass(frozen=True)
class _Tree:
    steps: int
    trees: int
    splits: tuple[int, ...]
    branches: int
    scale: float
    window: int

    @lru_cache(maxsize=256)  # noqa: B019 - equal trees share it, and it is bounded
    def grown(self, prune: frozenset[int]) -> plan.Plan:
        noisy = {*range(min(self.window, self.steps - 1)), *self.splits}
        fan, scale = dict.fromkeys(self.splits, self.branches), dict.fromkeys(self.splits, self.scale)
        return plan.tree(self.steps, self.trees, fan, noisy, noisy - prune, scale)
