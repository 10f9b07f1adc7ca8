"""Equality of what two programs computed with the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Elsewhere kernels round by where a tensor lies in memory: on AVX2 the pipeline and we, or the pipeline twice, differ
by up to 4e-7 of the largest number, in some runs and not in others."""


def agree(a: Tensor, b: Tensor) -> bool:
    """Bit for bit where the arithmetic is reproducible; else to 1e-5 of the largest, pictures to one level."""
    if EXACT or a.dtype == torch.bool:
        return torch.equal(a, b)
    if not a.dtype.is_floating_point:
        return a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
