"""Linear layers in few bits: torch's own 8-bit integers on a CPU, torchao's formats on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Converter = Callable[[nn.Linear], nn.Module]
"""A plain linear layer -> the layer that stands in for it; the plain one is not used again."""

TINY = 1e-12
"""Least size of a row or a weight's row; what is smaller is as good as 0."""


class Int8Linear(nn.Module):
    """x W^T + b in 8-bit integers on a CPU: a scale for every row of W and for every row of x.

    torch's kernel scales all rows of a call alike, so that a row would depend on its neighbours, and a run on
    `rollout_rows` and on ranks. Rows are therefore brought to [−1, 1] one by one, and one more row spans that range.
    Inputs have 7 bits of it, as without VNNI the sums of 8 overflow.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(TINY) / 127
        zero = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13 says that its quantised tensors will go; `lack` looks for them
            integers = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(integers, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.span = torch.zeros(weight.shape[1])
        self.span[0], self.span[-1] = -1.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] -> float32 [..., out]; a row that is not finite stays so."""
        rows = x.flatten(0, -2)
        size = rows.abs().amax(1, keepdim=True).clamp_min_(TINY)
        unit = rows.new_empty(len(rows) + 1, rows.shape[1])
        torch.div(rows, size, out=unit[:-1])
        unit[-1] = self.span
        out = torch.ops.quantized.linear_dynamic(unit, self.packed, True)[:-1] * size
        return (out if self.bias is None else out.add_(self.bias)).view(*x.shape[:-1], -1)


def torchao_converter(precision: str) -> Converter:
    """torchao's own conversion to "int8", "float8" or "nvfp4", weights and inputs both; it makes its own demands on the
    device (`precision.check_precision` has asked before).

    int8 and float8 scale every row by itself. nvfp4 has a scale for each 16 numbers and one for the whole call, so that
    a row depends a little on its neighbours. float8 and nvfp4 have not been run by us; int8 has on a CPU, for its
    errors alone. Raises ImportError without torchao.
    """
    try:
        from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"draft_precision: {precision!r} needs torchao: pip install 'tempflow[quant]'") from error
    scheme = _scheme(precision)

    def convert(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(linear)
        quantize_(holder, scheme)
        return holder[0]

    return convert


def _scheme(precision: str) -> Any:
    if precision == "int8":
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
        )

        return Int8DynamicActivationInt8WeightConfig()
    if precision == "float8":
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
        )

        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    from torchao.prototype.mx_formats import (  # pyright: ignore[reportMissingImports]
        NVFP4DynamicActivationNVFP4WeightConfig,
    )

    return NVFP4DynamicActivationNVFP4WeightConfig()
