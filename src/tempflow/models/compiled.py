"""Compiled blocks (`model.compile`): which row counts have machine code of their own, and what making it takes.

A block is compiled for a number of rows, anew for each and for passes with and without gradients; of a CPU each takes
up to a minute. So few are: those that a run's full batches have. A batch a little smaller is filled up to one of them;
smaller ones are computed as they are without compilation. Which it is depends on the batch's own rows alone, so a run
that was interrupted goes on bit for bit.

The code of a pass without gradients is another than that of one with them, and their last bits differ. Ratios do not
see that: the trainer compares log-probs of one kind of pass (`core.objective.old`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FULL = 0.75
"""A batch is filled up to a compiled row count where it has this share of it: filling costs less than code saves."""

COUNTS = 64
"""How often torch may compile a block's code, which is one for all blocks of a kind: for each row count, with and
without gradients, by other weights. By torch's own 8 it gives up in silence."""

Velocity = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(x [B, *S], sigma [B], conditions [B, …]) -> [B, …]."""


@dataclass(frozen=True)
class RowCounts:
    """The row counts that there is compiled code for; empty: for any, without filling up."""

    counts: tuple[int, ...] = ()

    def of(self, rows: int) -> int:
        """The rows that such a batch is computed with: the next row count, or its own, uncompiled."""
        fits = [count for count in self.counts if FULL * count <= rows <= count]
        return min(fits, default=rows)

    def __call__(self, velocity: Velocity, x: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """velocity(x, sigma, conditions), of compiled blocks where a row count is near; the last row fills it up."""
        rows = len(x)
        if not self.counts or rows in self.counts:
            return velocity(x, sigma, conditions)
        wanted = self.of(rows)
        if wanted == rows:
            with Uncompiled():
                return velocity(x, sigma, conditions)
        more = wanted - rows
        filled = {name: _filled(tensor, more) for name, tensor in conditions.items()}
        return velocity(_filled(x, more), _filled(sigma, more), filled)[:rows]


class Uncompiled:
    """A context in which compiled blocks compute as they would without compilation; it can be entered again."""

    _inside: ClassVar[list[Any]] = []

    def __enter__(self) -> None:
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        self._inside.append(stance)

    def __exit__(self, *fault: object) -> None:
        self._inside.pop().__exit__(*fault)

    @classmethod
    def as_now(cls) -> AbstractContextManager[object]:
        """For what is computed again later: this context where we are in one, else none."""
        return cls() if cls._inside else nullcontext()


class Together:
    """Contexts as one, entered in their order."""

    def __init__(self, *contexts: AbstractContextManager[object]) -> None:
        self.contexts, self._entered = contexts, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self._entered = stack.pop_all()

    def __exit__(self, *fault: Any) -> None:
        self._entered.__exit__(*fault)


def _filled(tensor: Tensor, more: int) -> Tensor:
    return torch.cat([tensor, tensor[-1:].expand(more, *tensor.shape[1:])])


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device, counts: tuple[int, ...]) -> str:
    """Compiles the blocks, at their first call; "" or why they cannot be here, and stay as they are."""
    if why := _missing(device):
        return why
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    dynamo.recompile_limit = max(dynamo.recompile_limit, COUNTS)
    if device.type == "cpu":
        inductor.cpp.max_horizontal_fusion_size = 1  # more, and some blocks in bfloat16 are code that does not build
    for block in blocks:
        block.compile(dynamic=False if counts else None)
    return ""


def _missing(device: torch.device) -> str:
    """Compiles a line and runs it: there may be no compiler, or one without its headers."""
    try:
        torch.compile(_doubled, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # torch raises many kinds, some of them private
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


def _doubled(x: Tensor) -> Tensor:
    return x * 2


def compile_seconds() -> float:
    """What compilation has taken in this process so far, as torch keeps it; 0 where torch does not tell."""
    utils = sys.modules.get("torch._dynamo.utils")
    spent: Mapping[str, float] = getattr(utils, "cumulative_time_spent_ns", {})
    return sum(spent.get(name, 0.0) for name in ("entire_frame_compile", "entire_backward_compile")) / 1e9
