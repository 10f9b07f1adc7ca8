"""Drafts: sample a large pool cheaply, score it, and grow the real forest from the initial noises worth it (Sol-RL)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tempflow.core.plan import Cost, Plan, ode
from tempflow.core.rng import Stream

Choice = Literal["best_worst", "mean_deviation", "random", "extremes_random"]

Precision = Literal["full", "bfloat16", "int8", "float8", "nvfp4"]
"""What a draft's network computes in, from dear to cheap; "full" is the sampler's own."""

Drawn = Callable[[Plan, int], tuple[Tensor, Tensor, Tensor]]
"""(a prompt's plan of drafts, their steps) -> of the drafts of all prompts, one after the other: float scores, whether
these are valid, and LongTensor which drafts are no pictures."""


@dataclass(frozen=True, eq=False)
class Begun:
    """Plans of some prompts whose roots start from noises that are chosen.

    scores  float, the drafts' scores of these noises, root by root; none without a draft
    broken  LongTensor [P·pool], which drafts are no pictures; none without a draft
    """

    plans: Sequence[Plan]
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    broken: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def fidelity(self, total: Tensor, prompt: Tensor, slots: Sequence[int]) -> Tensor:
        """[len(slots)] how the drafts ranked the noises beside the scores of the leaves grown from them; NaN without a
        draft, and where a root has several leaves."""
        if len(self.scores) != len(total):
            return torch.full((len(slots),), math.nan, dtype=torch.float64)
        return agreement(self.scores, total, prompt, slots)


@dataclass(frozen=True)
class NoDraft:
    """Roots start from the noises that their plans say."""

    pool: int = 0
    precision: Precision = "full"

    def cost(self) -> Cost:
        return Cost(0, 0, 0)

    def begin(self, plans: Sequence[Plan], slots: Sequence[int], stream: Stream, iteration: int, drawn: Drawn) -> Begun:
        return Begun(plans)


@dataclass(frozen=True)
class Draft:
    """`pool` noises of a prompt, walked by ODE in `steps` steps; the plan's roots start from those chosen.

    `mode`: "best_worst" the n//2 best and the n − n//2 worst; "mean_deviation" those farthest from the pool's mean;
    "random" any; "extremes_random" half by the first rule, half any of the rest (how Sol-RL divides it is our reading).
    Ties go to the lower index. A failed draft is chosen only where too few are left. Initial noises are functions of
    slot and index, so the chosen ones are walked again from the very same noise (code: NVlabs/Sana, sol_rl).
    `precision`: what the network that drafts computes in, a copy of the sampler unless "full"; the sampler itself draws
    the chosen ones again.
    Raises ValueError for a pool or steps below 1, or an unknown mode or precision.
    """

    pool: int
    steps: int
    mode: Choice = "best_worst"
    precision: Precision = "full"

    def __post_init__(self) -> None:
        for name, value in (("pool", self.pool), ("draft_steps", self.steps)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1; nearest valid: 1")
        if self.mode not in get_args(Choice):
            raise ValueError(f"mode: {self.mode!r} is not one of {', '.join(get_args(Choice))}")
        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"draft_precision: {self.precision!r} is not one of {known}; nearest valid: 'full'")

    @property
    def plan(self) -> Plan:
        """The pool's own."""
        return ode(self.steps, self.pool)

    def cost(self) -> Cost:
        """What a prompt's draft costs; its pictures are decoded and scored too."""
        return Cost(self.steps * self.pool, self.pool, 0)

    def begin(self, plans: Sequence[Plan], slots: Sequence[int], stream: Stream, iteration: int, drawn: Drawn) -> Begun:
        """Those slots' plans from the noises that the drafts chose. What is grown depends on all drafts' scores."""
        value, ok, broken = drawn(self.plan, self.steps)
        value, ok = (t.view(len(plans), self.pool) for t in (value, ok))
        starts = [
            self.choose(v, o, plan.roots, stream, (iteration, slot))
            for v, o, plan, slot in zip(value, ok, plans, slots, strict=True)
        ]
        chosen = torch.cat([v[list(start)] for v, start in zip(value, starts, strict=True)])
        return Begun([from_noises(plan, start) for plan, start in zip(plans, starts, strict=True)], chosen, broken)

    def choose(self, value: Tensor, ok: Tensor, keep: int, stream: Stream, id: tuple[int, ...]) -> tuple[int, ...]:
        """`keep` distinct indices of one prompt's pool, ascending. value float [pool], ok bool [pool]."""
        shuffled = stream.permutation(id, self.pool)
        valid = [i for i in range(self.pool) if bool(ok[i])]
        failed = [i for i in range(self.pool) if not bool(ok[i])]
        score = {i: float(value[i]) for i in valid}
        if self.mode == "random":
            ranked = [i for i in shuffled if i in score]
        elif self.mode == "mean_deviation":
            mean = math.fsum(score.values()) / max(1, len(score))
            ranked = sorted(valid, key=lambda i: (-abs(score[i] - mean), i))
        else:
            count = keep if self.mode == "best_worst" else keep // 2
            ranked = _ends(sorted(valid, key=lambda i: (-score[i], i)), count)
            ranked += [i for i in shuffled if i in score and i not in set(ranked)]
        return tuple(sorted([*ranked, *failed][:keep]))


def from_noises(plan: Plan, start: Sequence[int]) -> Plan:
    """The same forest from other initial noises, one for each root."""
    return replace(plan, start=tuple(start))


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's τ_b of two score lists, float [n]; NaN where one of them is all ties or n < 2."""
    pairs = torch.triu_indices(len(a), len(a), 1)
    x, y = ((t[pairs[0]] - t[pairs[1]]).double().sign() for t in (a, b))
    scale = math.sqrt(float(x.abs().sum()) * float(y.abs().sum()))
    return float((x * y).sum()) / scale if scale > 0 else math.nan


def agreement(a: Tensor, b: Tensor, prompt: Tensor, slots: Sequence[int]) -> Tensor:
    """[len(slots)] Kendall's τ of two score lists, prompt by prompt. a, b: float [n]; prompt: long [n], their slots.

    Scores that are not finite (failed ones) take no part.
    """
    taus = list[float]()
    for slot in slots:
        here = (prompt == slot) & a.isfinite() & b.isfinite()
        taus.append(kendall(a[here], b[here]))
    return torch.tensor(taus, dtype=torch.float64)


def overlap(a: Tensor, b: Tensor, k: int) -> float:
    """The share of `b`'s k best that are `a`'s k best too: two score lists, float [n]. overlap(-a, -b, k): the worst.

    Where values tie about the k-th, the mean over independent draws among the tied; so even overlap(b, b, k) is below 1
    there. By chance it is k/n. Raises ValueError unless 1 ≤ k ≤ n and the lists are of one length without NaN.
    """
    if not 1 <= k <= len(b):
        raise ValueError(f"k: {k} of {len(b)} scores; nearest valid: {min(max(k, 1), len(b))}")
    if len(a) != len(b) or not bool((a == a).all() and (b == b).all()):
        raise ValueError(f"scores: {len(a)} and {len(b)}; two lists of one length without NaN are compared")
    return float((_among_best(a, k) * _among_best(b, k)).sum()) / k


def _among_best(scores: Tensor, k: int) -> Tensor:
    """float64 [n]: how likely each is one of the k best, with ties about the k-th drawn by lot."""
    last = scores.topk(k).values[-1]
    above, tied = scores > last, scores == last
    return above.double() + tied.double() * ((k - int(above.sum())) / int(tied.sum()))


def _ends(ranked: list[int], keep: int) -> list[int]:
    """The keep // 2 first and the rest from the end; all of them where there are no more."""
    best = ranked[: keep // 2]
    rest = ranked[len(best) :]
    return best + rest[max(0, len(rest) - (keep - keep // 2)) :]
