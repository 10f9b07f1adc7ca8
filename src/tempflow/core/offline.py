"""Samples that are there already and stand in a rollout's place: preference pairs, pictures with captions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tempflow.core.plan import Plan
from tempflow.core.scores import Scores

NAME = "given"
"""What the column of their scores is called."""


@dataclass(frozen=True)
class OfflineSamples:
    """Which of a prompt's own samples are trained on, and what each is worth.

    keys    what a prompt calls them ("chosen", "rejected"), one sample each, distinct
    scores  one for each key: what credit sees in the place of a reward's

    Raises ValueError for no key, a key that is empty or named twice, and scores that are not one finite number a key.
    """

    keys: tuple[str, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.keys or not all(self.keys) or len(set(self.keys)) < len(self.keys):
            raise ValueError(f"keys: {self.keys} must be distinct names, at least one; nearest valid: ('image',)")
        if len(self.scores) != len(self.keys) or not all(map(math.isfinite, self.scores)):
            raise ValueError(f"scores: {self.scores} must be {len(self.keys)} finite numbers, one for each of the keys")

    def plan(self, iteration: int, slot: int) -> Plan:
        """A prompt's forest: the samples as they are. The same object for every slot."""
        return finished(len(self.keys))

    def scored(self, ok: Tensor) -> Scores:
        """The scores of whole prompts' samples, in the keys' order; ok: bool [N·keys], which samples are any."""
        value = torch.tensor(self.scores, dtype=torch.float32, device=ok.device).repeat(len(ok) // len(self.keys))
        return Scores(value[:, None], ok[:, None], (NAME,))


@lru_cache(maxsize=64)
def finished(count: int) -> Plan:
    """`count` samples that are there already: roots at σ = 0, from which nothing is walked.

    Cost: 0 forwards, `count` leaves, 0 trained edges. Raises ValueError for a count below 1.
    """
    samples = tuple(range(count))
    return Plan(0, count, (), (), (), (), (), start=samples, scored=samples)
