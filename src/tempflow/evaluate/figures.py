"""The figures of an evaluation: means, their intervals, diversity; as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.models.finite import told
from tempflow.stats import Interval, interval


@dataclass(frozen=True)
class Walk:
    """How a picture was drawn: on which σ grid (as `tempflow.grid` states it), how many of its steps change the picture
    (`Schedule.useful`), and how many forwards of the network it took."""

    grid: str
    useful: int
    forwards: int


@dataclass(frozen=True, eq=False)
class Report:
    """Scores of one model on one list of prompts.

    scores              a row per picture; the `samples_per_prompt` pictures drawn for a prompt follow each other
    prompts             the text of each row's prompt; a text that comes again is the same prompt again
    kinds               the task kind of each row
    gold                names of the rewards that the model was not trained on
    diversity           float64 [prompts]: mean feature distance between a prompt's pictures
                        (`diversity.within_groups`), NaN with fewer than two that are any; None with one drawn a prompt
    broken              LongTensor [N], which rows are no pictures and why (`models.finite`); None: all are
    walk                the grid and what it cost; None: not known
    seconds             a picture, of wall time, for drawing and decoding it in its batch; None: not measured

    Raises ValueError for a gold name that is no reward's, naming the nearest, and for rows that don't share out.
    """

    scores: Scores
    prompts: tuple[str, ...]
    kinds: tuple[str, ...]
    steps: int
    guidance: float
    seed: int
    gold: tuple[str, ...] = ()
    samples_per_prompt: int = 1
    diversity: Tensor | None = None
    broken: Tensor | None = None
    walk: Walk | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in self.gold:
            if name not in self.scores.names:
                near = get_close_matches(name, self.scores.names, n=1, cutoff=0.0)[0]
                raise ValueError(f"gold: {name!r} is none of the rewards scored; nearest valid: {near!r}")
        rows = len(self.scores)
        for name, labels in (("kinds", self.kinds), ("prompts", self.prompts)):
            if len(labels) != rows:
                raise ValueError(f"{name} has {len(labels)} entries; nearest valid: {rows}, one per picture")
        prompts, over = divmod(len(self.scores), self.samples_per_prompt)
        if over:
            raise ValueError(f"samples_per_prompt: {self.samples_per_prompt} does not divide {len(self.scores)} rows")
        if self.diversity is not None and len(self.diversity) != prompts:
            raise ValueError(f"diversity has {len(self.diversity)} entries; nearest valid: {prompts}, one per prompt")

    def values(self, name: str) -> np.ndarray:
        """float64 [N], NaN where failed: for paired comparisons."""
        return self.scores.value[:, self.scores.names.index(name)].double().numpy()

    def mean(self, name: str) -> float:
        """Mean over valid rows; NaN when there is none."""
        column = self.scores.names.index(name)
        ok = self.scores.ok[:, column]
        return float(self.scores.value[ok, column].mean()) if bool(ok.any()) else float("nan")

    def by_kind(self, name: str) -> dict[str, float]:
        """Mean by task kind, in order of first appearance."""
        column = self.scores.names.index(name)
        found: dict[str, float] = {}
        for kind, rows in self._rows.items():
            value, ok = self.scores.value[rows, column], self.scores.ok[rows, column]
            found[kind] = float(value[ok].mean()) if bool(ok.any()) else float("nan")
        return found

    def interval(self, name: str) -> Interval:
        """95 % bootstrap interval of `mean`: prompts are resampled, each with its pictures; kinds keep their share."""
        return interval(self.values(name), strata=self.kinds, clusters=self._clusters)

    def intervals_by_kind(self, name: str) -> dict[str, Interval]:
        """95 % bootstrap interval of each mean of `by_kind`."""
        values = self.values(name)
        return {
            kind: interval(values[rows], clusters=[self.prompts[row] for row in rows])
            for kind, rows in self._rows.items()
        }

    @property
    def distinct(self) -> int:
        """How many different prompts there are: what the interval's width depends on."""
        return len(set(self._clusters))

    @property
    def failed(self) -> int:
        """Pictures that at least one reward failed on."""
        return int((~self.scores.ok).any(1).sum())

    @property
    def faults(self) -> list[str]:
        """A line for each way in which pictures are none."""
        return [] if self.broken is None else told(self.broken, self.prompts)

    def valid(self, name: str) -> int:
        """Of how many pictures `mean` is the mean."""
        return int(self.scores.ok[:, self.scores.names.index(name)].sum())

    def to_json(self) -> dict[str, Any]:
        """Figures ready for JSON, but for NaN where no score is valid. Without the wall time, which no two share."""
        names = self.scores.names
        told: dict[str, Any] = {
            "count": len(self.scores),
            "prompts": self.distinct,
            "failed": self.failed,
            "valid": {n: self.valid(n) for n in names},
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "samples_per_prompt": self.samples_per_prompt,
            "gold": list(self.gold),
            "mean": {n: self.mean(n) for n in names},
            "interval": {n: list(self.interval(n)) for n in names},
            "by_kind": {n: self.by_kind(n) for n in names},
            "by_kind_interval": {n: {k: list(i) for k, i in self.intervals_by_kind(n).items()} for n in names},
        }
        if self.walk is not None:
            told["walk"] = asdict(self.walk)
        if self.diversity is not None:
            mean, bounds, by_kind = self._diversity(self.diversity.numpy())
            told["diversity"] = {"mean": mean, "interval": list(bounds), "by_kind": by_kind}
        return told

    def table(self) -> str:
        """Plain text: a row per kind, a column per reward (mean and 95 % interval); below, how many scores failed and
        why pictures are none, if any.

        n counts pictures, prompts the different prompts that they are of.
        """
        names = self.scores.names
        sizes = {kind: (len(rows), len({self.prompts[row] for row in rows})) for kind, rows in self._rows.items()}
        columns = [(self.by_kind(n), self.intervals_by_kind(n)) for n in names]
        head = ["kind", "n", "prompts", *(f"{n} (gold)" if n in self.gold else n for n in names)]
        rows = [
            [k, str(n), str(distinct), *(with_interval(means[k], bounds[k]) for means, bounds in columns)]
            for k, (n, distinct) in sizes.items()
        ]
        rows = rows if list(sizes) != [""] else []
        whole = (with_interval(self.mean(n), self.interval(n)) for n in names)
        rows.append(["all", str(len(self.scores)), str(self.distinct), *whole])
        if self.diversity is not None:
            mean, bounds, by_kind = self._diversity(self.diversity.numpy())
            head.append("diversity")
            for row in rows:
                row.append(with_interval(mean, bounds) if row is rows[-1] else f"{by_kind[row[0]]:.3f}")
        width = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in [head, *rows]]
        for name in names:
            count, valid = len(self.scores), self.valid(name)
            if valid < count:
                lines.append(f"{name}: {count - valid} of {count} scores failed; its mean is of the other {valid}")
        return "\n".join([*lines, *self.faults])

    def spread(self) -> tuple[float, Interval] | None:
        """Mean diversity within a prompt and its 95 % interval; None with one picture a prompt."""
        return None if self.diversity is None else self._diversity(self.diversity.numpy())[:2]

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        return _places(self.kinds)

    @property
    def _clusters(self) -> list[tuple[str, str]]:
        """Which prompt each row is of; one text under two kinds is two prompts."""
        return list(zip(self.kinds, self.prompts, strict=True))

    def _diversity(self, distance: np.ndarray) -> tuple[float, Interval, dict[str, float]]:
        """Mean over prompts, its 95 % interval, and means by kind."""
        kinds, clusters = self.kinds[:: self.samples_per_prompt], self._clusters[:: self.samples_per_prompt]
        by_kind = {kind: _mean(distance[rows]) for kind, rows in _places(kinds).items()}
        return _mean(distance), interval(distance, strata=kinds, clusters=clusters), by_kind


def _mean(values: np.ndarray) -> float:
    """Of those that are known; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _places(kinds: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        places.setdefault(kind, []).append(i)
    return places


def with_interval(mean: float, bounds: Interval) -> str:
    """A mean with its interval, as tables have it."""
    return "–" if math.isnan(mean) else f"{mean:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
