"""Scores: what rewards say about leaves (or edges).  A failed score is failed; it is never 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """N rows scored by R rewards.

    value  float32[N, R], any real unit, larger is better; failed cells are NaN (whatever was passed in them)
    ok     bool[N, R], on the same device; False = that reward failed on that row
    names  the R rewards, distinct

    Raises ValueError on another shape, dtype or device, and when a cell said to be ok is not finite.
    """

    value: Tensor
    ok: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        value, ok = self.value, self.ok
        if value.dtype != torch.float32:
            raise ValueError(f"value has dtype {value.dtype}; nearest valid: torch.float32")
        if ok.dtype != torch.bool:
            raise ValueError(f"ok has dtype {ok.dtype}; nearest valid: torch.bool")
        if value.ndim != 2 or value.shape[1] != len(self.names):
            raise ValueError(
                f"value has shape {list(value.shape)}; nearest valid: [N, {len(self.names)}], a column per name"
            )
        if ok.shape != value.shape:
            raise ValueError(f"ok has shape {list(ok.shape)}; nearest valid: {list(value.shape)}, that of value")
        if ok.device != value.device:
            raise ValueError(f"ok is on {ok.device}; nearest valid: {value.device}, where value is")
        if not self.names or len(set(self.names)) != len(self.names):
            nearest = tuple(dict.fromkeys(self.names)) or ("reward",)
            raise ValueError(f"names = {self.names}: at least one name, all distinct; nearest valid: {nearest}")
        bad = ok & ~torch.isfinite(value)
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"value[{row}, {column}] ({self.names[column]}) = {float(value[row, column])} although ok; "
                "nearest valid: a finite value, or ok = False"
            )
        object.__setattr__(self, "value", value.masked_fill(~ok, math.nan))

    def __len__(self) -> int:
        return self.value.shape[0]

    def select(self, rows: Tensor) -> Scores:
        """The rows given by an index (LongTensor) or a mask (BoolTensor[N])."""
        return Scores(self.value[rows], self.ok[rows], self.names)

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """The same rewards on more rows, one part after the other.  ValueError if names differ."""
        if not parts:
            raise ValueError("parts = []: nothing to join; nearest valid: one Scores")
        for part in parts:
            if part.names != parts[0].names:
                raise ValueError(f"names = {part.names} differ from the first part's; nearest valid: {parts[0].names}")
        return Scores(torch.cat([p.value for p in parts]), torch.cat([p.ok for p in parts]), parts[0].names)

    @staticmethod
    def stack(parts: Sequence[Scores]) -> Scores:
        """More rewards on the same rows, column after column.  ValueError if row counts differ or a name repeats."""
        if not parts:
            raise ValueError("parts = []: nothing to join; nearest valid: one Scores")
        for part in parts:
            if len(part) != len(parts[0]):
                raise ValueError(
                    f"part {part.names} has {len(part)} rows; nearest valid: {len(parts[0])}, as the first"
                )
        return Scores(
            torch.cat([p.value for p in parts], dim=1),
            torch.cat([p.ok for p in parts], dim=1),
            tuple(name for p in parts for name in p.names),
        )

    def total(self, weights: Mapping[str, float] | None = None) -> tuple[Tensor, Tensor]:
        """Weighted sum over rewards: (value float32[N], ok bool[N]).

        `weights`: name -> finite weight; None = 1 for each.  Names left out or of weight 0 take no part.  A row is ok
        only if every reward that takes part is and the sum is finite; else its value is NaN.  ValueError on an unknown
        name, a non-finite weight, or when no reward takes part.
        """
        used = self._weights(weights)
        columns = [self.names.index(name) for name in used]
        ok = self.ok[:, columns].all(dim=1)
        factor = torch.tensor(list(used.values()), dtype=torch.float32, device=self.value.device)
        # A weighted sum by rows, not a matrix product: its rounding must not depend on how many rows there are.
        value = (self.value[:, columns] * factor).sum(dim=1)
        ok = ok & value.isfinite()  # two finite scores may have a sum that is not
        return value.masked_fill(~ok, math.nan), ok

    def _weights(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        given: Mapping[str, float] = dict.fromkeys(self.names, 1.0) if weights is None else weights
        for name, weight in given.items():
            if name not in self.names:
                nearest = get_close_matches(name, self.names, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"weights names {name!r}, which is no reward of {self.names}; nearest valid: {nearest!r}"
                )
            if not math.isfinite(weight):
                raise ValueError(f"weights[{name!r}] = {weight}: must be finite; nearest valid: 1.0")
        used = {name: float(given[name]) for name in self.names if given.get(name, 0.0) != 0.0}
        if not used:
            raise ValueError(
                f"weights = {dict(given)}: no reward takes part; nearest valid: {{{self.names[0]!r}: 1.0}}"
            )
        return used
