"""Models side by side, or one on several grids: a row each, of the same prompts and noises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempflow.evaluate.figures import Report, with_interval


@dataclass(frozen=True)
class Row:
    """A model, as the user calls it, and what it drew."""

    what: str
    report: Report


def table(rows: Sequence[Row]) -> str:
    """Plain text, a row each: its grid, steps and how many of them change the picture, guidance, forwards and wall
    milliseconds a picture, every reward's mean and, with several pictures a prompt, diversity, with 95 % intervals."""
    first = rows[0].report
    names = first.scores.names
    head = ["model", "grid", "steps", "useful", "guidance", "forwards", "ms", *names]
    head += ["diversity"] if first.diversity is not None else []
    lines = [head, *(_cells(row, names) for row in rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip() for line in lines]
    for number, row in enumerate(rows, 1):
        lost = [(name, len(row.report.scores) - row.report.valid(name)) for name in names]
        text += [f"row {number}: {count} scores of {name} failed, and are in no mean" for name, count in lost if count]
        text += [f"row {number}: {fault}" for fault in row.report.faults]
    return "\n".join(text)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As `Report.to_json`, with the model's name and the seconds that a picture took."""
    return [{"what": row.what, **row.report.to_json(), "seconds_per_picture": row.report.seconds} for row in rows]


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    report = row.report
    walk, spread = report.walk, report.spread()
    grid, useful, forwards = ("?", "?", "?") if walk is None else (walk.grid, str(walk.useful), str(walk.forwards))
    taken = "?" if report.seconds is None else f"{1000 * report.seconds:.3g}"
    means = [(report.mean(name), report.interval(name)) for name in names] + ([spread] if spread else [])
    how = [row.what, grid, str(report.steps), useful, f"{report.guidance:g}", forwards, taken]
    return how + [with_interval(mean, bounds) for mean, bounds in means]
