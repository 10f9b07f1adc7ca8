"""Scores of UniGenBench from its judge's verdicts (arXiv 2508.20751; code CodeGoat24/UniGenBench, eval/*_eval.py).

A prompt has checkpoints, each of a dimension such as "Attribute - Color"; a judge says 1 or 0 to each for every
picture. A dimension's score is the share of 1 among all its verdicts, pooled over pictures: a prompt with more
checkpoints counts for more. The primary dimension is what stands before the first dash. The official code prints no
overall score; the leaderboard's is the mean of the primaries (second-hand).
"""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POINTS, VERDICTS = "testpoint", "result_json"


@dataclass(frozen=True)
class Tally:
    """Verdicts of 1 among all, by dimension.

    right, all  counts by dimension, as the checkpoints name it
    skipped     what was wrong with each picture that was left out, by its number from 1: it is no zero
    """

    right: Mapping[str, int]
    all: Mapping[str, int]
    skipped: Mapping[int, str]

    @property
    def dimensions(self) -> dict[str, float]:
        """Score of each dimension, 0 … 1."""
        return {name: self.right.get(name, 0) / count for name, count in self.all.items()}

    @property
    def primary(self) -> dict[str, float]:
        """Score of each primary dimension: pooled over its verdicts, not a mean of its dimensions."""
        right, every = Counter[str](), Counter[str]()
        for name, count in self.all.items():
            every[theme_of(name)] += count
            right[theme_of(name)] += self.right.get(name, 0)
        return {name: right[name] / count for name, count in every.items()}

    @property
    def overall(self) -> float:
        """Mean of the primary dimensions. Raises ValueError without any verdict."""
        if not self.all:
            raise ValueError(f"no verdict: all {len(self.skipped)} rows were left out")
        return sum(self.primary.values()) / len(self.primary)


def tally(verdicts: Iterable[tuple[Sequence[str], Sequence[int]]]) -> Tally:
    """Counts (checkpoints, verdicts) of pictures; one whose verdicts do not answer its checkpoints is left out."""
    right, every, skipped = Counter[str](), Counter[str](), dict[int, str]()
    for number, (points, scores) in enumerate(verdicts, 1):
        if wrong := _wrong(points, scores):
            skipped[number] = wrong
            continue
        for point, score in zip(points, scores, strict=True):
            every[point.strip()] += 1
            right[point.strip()] += score
    return Tally(dict(right), dict(every), skipped)


def read_verdicts(file: str | Path) -> Tally:
    """The tally of a result file as the official scripts write it: CSV with `testpoint` and `result_json` columns.

    Raises ValueError where a column is missing or the file is no CSV, and OSError where it cannot be read.
    """
    with Path(file).open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        missing = [name for name in (POINTS, VERDICTS) if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"{file}: no column {missing[0]!r}; it has {', '.join(rows.fieldnames or ()) or 'none'}")
        try:
            return tally(_parsed(row) for row in rows)
        except csv.Error as error:  # such as a cell above the module's limit of 128 KiB
            raise ValueError(f"{file}, line {rows.line_num}: {error}") from error


def _parsed(row: Mapping[str, str | None]) -> tuple[list[str], list[int]]:
    """Nothing for what cannot be read."""
    try:
        points, found = ast.literal_eval(row[POINTS] or ""), json.loads(row[VERDICTS] or "")
        return list(points), list(found["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return [], []


def _wrong(points: Sequence[str], scores: Sequence[int]) -> str | None:
    if not points:
        return "no checkpoints, or none that can be read"
    if len(points) != len(scores):
        return f"{len(scores)} verdicts for {len(points)} checkpoints"
    other = [s for s in scores if isinstance(s, bool) or s not in (0, 1)]
    if other or not all(isinstance(p, str) for p in points):
        return f"verdict {other[0]!r} is neither 0 nor 1" if other else "a checkpoint is not text"
    return None


def theme_of(name: str) -> str:
    """The primary dimension of a dimension's name."""
    return name.split("-", 1)[0].strip()
