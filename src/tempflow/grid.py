"""Which σ grid samples are walked on, as a configuration states it and as a folder of weights carries it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OWN: Literal["own"] = "own"
SCHEDULER: Literal["scheduler"] = "scheduler"
USEFUL: Literal["useful"] = "useful"
WORDS = (OWN, SCHEDULER, USEFUL)

FILE = "tempflow_grid.json"
"""Lies in a pipeline's scheduler folder, or beside a LoRA."""

MOST_POINTS, MAX_BYTES = 1000, 2**16

Stated = Literal["own", "scheduler", "useful"] | tuple[float, ...]
"""A grid in a configuration: one of `WORDS`, or points before the model's own shift."""


@dataclass(frozen=True)
class Grid:
    """A grid, and what it was made for.

    how    "scheduler": the one that the folder's scheduler has for a number of steps. "useful": N steps from
           u = 1, (N−1)/N, …, 1/N to 0, all of which change the sample. Points u, 1 ≥ u_0 > u_1 > … > 0: a step from
           each, the last one to 0. The model's own shift makes σ of u, so shift 3 and N = 4 give 1, .9, .75, .5, 0
    steps  of what was trained on it and measured; None: not said

    Raises ValueError, beginning with "grid:", for another word, points that do not fall, or other steps than points.
    """

    how: Stated = SCHEDULER
    steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.how, str):
            if self.how not in (SCHEDULER, USEFUL):
                raise ValueError(
                    f"grid: {self.how[:40]!r} is no grid; nearest valid: {SCHEDULER!r}, {USEFUL!r} or points"
                )
            if self.steps is not None and self.steps < 1:
                raise ValueError(f"grid: {self.steps} steps are too few; nearest valid: 1")
        else:
            check_points(self.how)
            if self.steps not in (None, len(self.how)):
                raise ValueError(f"grid: {self.steps} steps of {len(self.how)} points; nearest valid: {len(self.how)}")

    def points(self, steps: int) -> tuple[float, ...] | None:
        """The u of a grid of so many steps; None: the scheduler's. Raises as `check_steps`."""
        self.check_steps("steps", steps)
        if self.how == SCHEDULER:
            return None
        return tuple((steps - i) / steps for i in range(steps)) if isinstance(self.how, str) else self.how

    def check_steps(self, field: str, steps: int) -> None:
        """Raises ValueError, naming the field, where the grid has points, and not so many."""
        if not isinstance(self.how, str) and steps != len(self.how):
            raise ValueError(
                f"{field}: {steps} steps, and the grid {self} has {_points(len(self.how))}, one a step; nearest valid: "
                f"{len(self.how)}"
            )

    @property
    def usual(self) -> int | None:
        """How many steps are taken where nothing is said; None: any."""
        return self.steps if isinstance(self.how, str) else len(self.how)

    def __str__(self) -> str:
        return self.how if isinstance(self.how, str) else f"({_listed(self.how)})"


def as_stated(given: object) -> Stated:
    """A grid as a configuration has it: one of `WORDS`, or a list of points. Raises ValueError for anything else."""
    if isinstance(given, list | tuple) and len(given) == 1 and isinstance(given[0], str):
        given = given[0]  # as the command line reads a word where several values may stand
    if isinstance(given, str) and given in WORDS:
        return given
    if not isinstance(given, list | tuple) or any(isinstance(u, bool) or not isinstance(u, int | float) for u in given):
        near = next((w for w in WORDS if isinstance(given, str) and given and w.startswith(given[0].lower())), OWN)
        what = f"{str(given)[:40]!r} is none of {', '.join(WORDS)}, nor a list of points"
        raise ValueError(f"{what}; nearest valid: {near}")
    points = tuple(float(u) for u in given)
    try:
        check_points(points)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("grid: ")) from None
    return points


def check_points(u: Sequence[float]) -> None:
    """Raises ValueError, beginning with "grid:", unless 1 ≥ u_0 > u_1 > … > 0."""
    if not 1 <= len(u) <= MOST_POINTS:
        raise ValueError(f"grid: {_points(len(u))}; nearest valid: 1 to {MOST_POINTS}, as [1, .75, .5, .25]")
    for i, value in enumerate(u):
        high = 1.0 if i == 0 else u[i - 1]
        if not (math.isfinite(value) and value > 0 and (value < high or (i == 0 and value == 1))):
            upto = "at most 1" if i == 0 else f"below the {high:g} before it"
            near = 1 if i == 0 else high / 2
            raise ValueError(f"grid: point {i} is {value:g}, and must be above 0 and {upto}; nearest valid: {near:g}")


def write_grid(grid: Grid, folder: Path) -> None:
    """Writes `FILE` into the folder."""
    how = grid.how if isinstance(grid.how, str) else list(grid.how)
    (folder / FILE).write_text(json.dumps({"grid": how, "steps": grid.usual}) + "\n", encoding="utf-8")


def read_grid(folder: Path) -> Grid | None:
    """What `write_grid` wrote there; None where nothing is. Raises ValueError, naming the file, for anything else."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        told = json.loads(file.read_text(encoding="utf-8"))
        how, steps = as_stated(told["grid"]), told.get("steps")
        if not (steps is None or isinstance(steps, int)):
            raise ValueError(f"steps: {str(steps)[:40]!r} is no whole number")
        return Grid(how, steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} states no grid ({error}); nearest valid: without that file") from error


def grid_in(place: Path) -> Grid | None:
    """What a folder of weights states: a pipeline's, a LoRA's (or its file), or a finished run's. None: nothing."""
    folder = place.parent if place.is_file() else place
    folder = folder / "model" if (folder / "config.yaml").is_file() else folder
    return read_grid(folder / "scheduler" if (folder / "scheduler").is_dir() else folder)


def _points(count: int) -> str:
    return f"{count} point{'' if count == 1 else 's'}"


def _listed(u: Sequence[float]) -> str:
    shown = [f"{value:g}" for value in u]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", shown[-1]])
