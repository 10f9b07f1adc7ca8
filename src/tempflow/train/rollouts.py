"""What was grown, decoded and scored, as data: chunks of whole prompts that can be made anywhere and joined by slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from tempflow.core.forest import Forest
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.train.signals import Signals

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Some prompt slots of an iteration, or the offline samples in their place. It holds tensors and numbers alone: no
    network, no function, no pictures.

    slots          P prompt slots, ascending
    iteration      which one it is, from 0
    schedule       the grid that was walked
    forest         of N leaves: with edges and without leaf latents where edges are trained; with leaf latents and
                   without edges where leaves are
    scores         of the leaves
    signals        by slot
    broken         LongTensor [N], which leaves are no pictures, and why (`models.finite`)
    fidelity       [P] how the draft ranked the chosen noises beside the regenerated pictures; None without a draft
    drafts         LongTensor [P·pool], as `broken`, of the drafts; None without a draft
    latent_scores  a latent reward's scores of the trained edges (or leaves); None without one

    Raises ValueError where the parts are not of one size.
    """

    slots: tuple[int, ...]
    iteration: int
    schedule: Schedule
    forest: Forest
    scores: Scores
    signals: Signals
    broken: Tensor
    fidelity: Tensor | None = None
    drafts: Tensor | None = None
    latent_scores: Scores | None = None

    def __post_init__(self) -> None:
        if not self.slots or self.slots[0] < 0 or any(b <= a for a, b in pairwise(self.slots)):
            raise ValueError(f"slots: {list(self.slots)[:8]} must ascend from 0 or more; nearest valid: [0]")
        leaves, prompts = len(self.forest.leaves), len(self.slots)
        sizes = [("scores", len(self.scores), leaves), ("broken", len(self.broken), leaves)]
        sizes += [("signals", len(self.signals.prompt), prompts)]
        if self.fidelity is not None:
            sizes.append(("fidelity", len(self.fidelity), prompts))
        if self.latent_scores is not None:
            edges = len(self.forest.edges)
            sizes.append(("latent_scores", len(self.latent_scores), edges if edges else leaves))
        for name, rows, wanted in sizes:
            if rows != wanted:
                raise ValueError(f"{name}: {rows} rows; nearest valid: {wanted}, one for each that was grown")
        if self.drafts is not None and (not len(self.drafts) or len(self.drafts) % prompts):
            raise ValueError(f"drafts: {len(self.drafts)} for {prompts} prompts; nearest valid: {prompts}, a pool each")

    def to(self, device: torch.device | str) -> Rollouts:
        """With the forest on that device; all else stays on the CPU."""
        return replace(self, forest=self.forest.to(device))

    @staticmethod
    def join(parts: Sequence[Rollouts]) -> Rollouts:
        """One of several chunks, given in any order, in ascending order of slot.

        Raises ValueError for no part, slots that are in two parts or lie between those of another, parts of different
        iterations, grids or kinds, and what does not fit together otherwise.
        """
        if not parts:
            raise ValueError("parts = []: nothing to join; nearest valid: one Rollouts")
        ordered = sorted(parts, key=lambda part: part.slots[0])
        first = ordered[0]
        for part in ordered[1:]:
            if part.iteration != first.iteration:
                raise ValueError(f"iteration: {part.iteration} in one part; nearest valid: {first.iteration}")
            own, theirs = first.schedule, part.schedule
            if not torch.equal(own.sigmas, theirs.sigmas) or own.spread != theirs.spread:
                raise ValueError("schedule: parts walked different grids; nearest valid: parts of one iteration")
        slots = tuple(slot for part in ordered for slot in part.slots)
        for before, after in pairwise(slots):
            if after <= before:
                raise ValueError(f"slots: {after} comes after {before}; nearest valid: parts of neighbouring slots")
        latent = _all_or_none("latent_scores", [part.latent_scores for part in ordered])
        return Rollouts(
            slots=slots,
            iteration=first.iteration,
            schedule=first.schedule,
            forest=Forest.cat([part.forest for part in ordered]),
            scores=Scores.cat([part.scores for part in ordered]),
            signals=Signals.cat([part.signals for part in ordered]),
            broken=torch.cat([part.broken for part in ordered]),
            fidelity=_joined("fidelity", [part.fidelity for part in ordered]),
            drafts=_joined("drafts", [part.drafts for part in ordered]),
            latent_scores=Scores.cat(latent) if latent else None,
        )


def _joined(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    there = _all_or_none(name, parts)
    return torch.cat(there) if there else None


def _all_or_none(name: str, parts: Sequence[T | None]) -> list[T]:
    """All parts, or none where none is there."""
    there = [part for part in parts if part is not None]
    if there and len(there) < len(parts):
        raise ValueError(f"{name}: {len(there)} of {len(parts)} parts have it; nearest valid: all of them, or none")
    return there
