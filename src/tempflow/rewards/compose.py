"""Several rewards become one: a sum or a product of scores, gates, and prompts that are left out for their failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tempflow.core.groups import dense
from tempflow.core.scores import Scores
from tempflow.rewards.protocol import RewardError

COLUMN = "reward"
"""The column of what several rewards become."""


@dataclass(frozen=True)
class Composition:
    """What several rewards become, as a further column "reward"; the others stay as they are.

    weights     name → its factor in a sum, its exponent in a product; those of weight 0 take no part
    how         "sum": Σ w·r; "product": Π r^w, of scores that are not negative
    gates       name → least: a row that this reward scores lower gets `gated`, whatever the others say
    gated       see `gates`
    drop_above  a prompt of which a larger share of rows has a failed score of those that take part is failed as a whole

    A row is valid if the score of every reward that takes part, as a factor or as a gate, is.
    """

    weights: Mapping[str, float]
    how: Literal["sum", "product"] = "sum"
    gates: Mapping[str, float] = field(default_factory=dict[str, float])
    gated: float = 0.0
    drop_above: float = 1.0

    @property
    def adds(self) -> bool:
        """Whether it adds a column; a sum without gates is left to who weighs the rewards."""
        return self.how != "sum" or bool(self.gates)

    def judging(self, weights: Mapping[str, float] | None) -> Composition | None:
        """The same where a model is evaluated, by other weights, a picture at a time; None where it adds nothing."""
        return replace(self, weights=weights or self.weights, drop_above=1.0) if self.adds else None

    def __call__(self, scores: Scores, groups: Sequence[int]) -> Scores:
        """`scores` of N rows, of the prompts `groups`, with what they become.

        Raises RewardError for a negative score in a product, ValueError for a name that no reward has.
        """
        if self.adds:
            value, ok = self._total(scores)
            scores = Scores.stack([scores, Scores(value[:, None], ok[:, None], (COLUMN,))])
        if self.drop_above >= 1 or not len(scores):
            return scores
        valid = scores.ok[:, -1] if self.adds else scores.total(self.weights)[1]
        group = dense(torch.as_tensor(groups))
        failed = torch.zeros(int(group.max()) + 1).index_add(0, group, (~valid).float()) / group.bincount()
        kept = (failed <= self.drop_above)[group]
        return Scores(scores.value, scores.ok & kept[:, None], scores.names)

    def _total(self, scores: Scores) -> tuple[Tensor, Tensor]:
        value, ok = scores.total(self.weights) if self.how == "sum" else self._product(scores)
        for name, least in self.gates.items():
            column = scores.names.index(name)
            ok = ok & scores.ok[:, column]
            value = torch.where(scores.value[:, column] < least, self.gated, value)
        return value, ok

    def _product(self, scores: Scores) -> tuple[Tensor, Tensor]:
        ok = scores.total(self.weights)[1]
        value = torch.ones(len(scores), dtype=torch.float64)
        for name, weight in self.weights.items():
            if not weight:
                continue
            column = scores.value[:, scores.names.index(name)].double()
            if bool((column[ok] < 0).any()):
                raise RewardError(
                    f"composition.how: 'product', but reward {name!r} gave {float(column[ok].min()):.4g}, "
                    "which is below 0; nearest valid: 'sum'"
                )
            value = value * column**weight
        value = value.float()
        return value, ok & value.isfinite()
