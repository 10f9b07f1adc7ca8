"""Guidance: what a family makes of the prompt's prediction and the negative prompt's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

from tempflow.core.state import upcast
from tempflow.names import nearest


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, v = v_neg + guidance·(v_pos − v_neg); at 1 the negative branch is not asked.

    A family whose guidance is another thing has a frozen dataclass of its own: `guidance`, the main number, comes
    first, and every further field is an option with a default (`model.guidance_options`).

    Raises ValueError for a number that is not finite.
    """

    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: {self.guidance} is no number to multiply by; nearest valid: 1.0")

    @property
    def rows(self) -> int:
        """Rows of the network for each that is asked for."""
        return 1 if self.guidance == 1 else 2

    def call_options(self) -> Mapping[str, object]:
        """How a call of the pipeline is asked for the same, for model cards."""
        return {"guidance_scale": self.guidance}

    def at(self, guidance: float) -> Self:
        """The same with another main number."""
        return replace(self, guidance=guidance)

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The guided prediction, in float32 or better."""
        base, guided = upcast(negative), upcast(positive)
        return base + self.guidance * (guided - base)


def guidance_of(kind: type[Guidance], guidance: float, options: Mapping[str, object]) -> Guidance:
    """A family's guidance from a configuration. Raises ValueError, naming the field, for an option that is unknown
    or a value that is refused."""
    known = [f.name for f in fields(kind)][1:]
    for name in options:
        if name not in known:
            near = f"nearest valid: {nearest(name, known)}" if known else "this family has none; nearest valid: {}"
            raise ValueError(f"model.guidance_options: {name[:40]!r} is unknown; {near}")
    try:
        return kind(guidance, **options)  # pyright: ignore[reportCallIssue]
    except TypeError as error:
        raise ValueError(f"model.guidance_options: {error}") from error
    except ValueError as error:
        option = str(error).partition(":")[0]
        raise ValueError(f"model.guidance_options.{error}" if option in known else str(error)) from error


def guided(guidance: Guidance | float, kind: type[Guidance] = Guidance) -> Guidance:
    """A number as guidance of that kind, without options; plain classifier-free guidance where none is named."""
    return guidance if isinstance(guidance, Guidance) else kind(float(guidance))
