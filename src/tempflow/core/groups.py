"""Rows that belong together: dense group numbers, and moments over groups."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(code: Tensor) -> Tensor:
    """Equal codes numbered alike: 0, 1, … in ascending order of code. LongTensor [E] to LongTensor [E]."""
    ordered, order = torch.sort(code, stable=True)
    fresh = torch.zeros_like(code)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(code).index_copy_(0, order, fresh.cumsum(0))


def moments(value: Tensor, ok: Tensor, group: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and count of each row's group over its valid rows; float64 [E] each.

    `unbiased` divides by n−1. A group of one has standard deviation 0.
    """
    groups = int(group.max()) + 1 if len(group) else 0
    weight = ok.double()
    v = torch.where(ok, value, 0).double()
    zero = torch.zeros(groups, dtype=torch.float64, device=value.device)
    count = zero.index_add(0, group, weight)
    mean = zero.index_add(0, group, v) / count.clamp(min=1)
    square = zero.index_add(0, group, weight * (v - mean[group]).square())
    deviation = (square / (count - int(unbiased)).clamp(min=1)).sqrt()
    return mean[group], deviation[group], count[group]
