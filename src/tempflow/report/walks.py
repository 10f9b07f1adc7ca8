"""Score and diversity by how many steps a model takes: of runs' own tests and of what `tempflow eval` wrote."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempflow.report.charts import number
from tempflow.report.runs import Evaluation, Line, RunData
from tempflow.report.scatter import Point, Scatter, scatter

LONGEST = 30
"""Letters of a model's name in a label."""


@dataclass(frozen=True)
class Row:
    """A model's test on a grid in so many steps.

    model                by which rows are of one model
    name                 what a label calls it
    colour               number of the page's palette
    reference            it is a run's reference: a student's teacher
    useful               steps that change the picture
    score                None where all failed
    interval, spread     95 %, of score and diversity, by prompt; None: not known
    diversity            None where one picture a prompt was drawn
    test                 which prompts and noises it was drawn of, as far as it is known
    """

    model: str
    name: str
    colour: int
    reference: bool
    grid: str
    steps: int
    useful: int
    guidance: float
    score: float | None
    interval: tuple[float, float] | None = None
    diversity: float | None = None
    spread: tuple[float, float] | None = None
    prompts: int = 0
    pictures: int = 0
    test: tuple[str, ...] = ()

    @property
    def walk(self) -> tuple[str, str, int, float]:
        return self.model, self.grid, self.steps, self.guidance


@dataclass(frozen=True)
class Walks:
    """What the page shows of rows: two figures (None: nothing to draw), the rows, and whether all were drawn of the
    same prompts and noises."""

    metric: str
    steps: Scatter | None
    diversity: Scatter | None
    rows: Sequence[Row]
    same_test: bool


def walks_of(runs: Sequence[RunData], evaluations: Sequence[Evaluation], metric: str) -> Walks | None:
    """Of runs' own tests and of evaluations; None where no evaluation is given and all took the same useful steps.

    Of two rows of one model, grid, steps and guidance the one with diversity, else with more pictures, else the first
    is shown. Raises ValueError for an evaluation that lacks the metric.
    """
    rows = rows_of(runs, evaluations, metric)
    if not evaluations and len({row.useful for row in rows}) < 2:
        return None
    same = len({row.test for row in rows}) < 2
    return Walks(metric, steps_figure(rows, metric), diversity_figure(rows, metric), rows, same)


def rows_of(runs: Sequence[RunData], evaluations: Sequence[Evaluation], metric: str) -> list[Row]:
    """A row for each model, grid, steps and guidance, references first. Raises as `walks_of`."""
    known = {_model(str(run.folder)): (run.label, place) for place, run in enumerate(runs)}
    references = {_reference(run) for run in runs} - {""}
    told = [*_tested(runs, metric), *(part for one in evaluations for part in _evaluated(one, metric))]
    best: dict[tuple[str, str, int, float], Row] = {}
    for what, test, line in told:
        model = _model(what)
        known.setdefault(model, (_shortened(what), len(known)))
        label, colour = known[model]
        name = f"{label} (reference)" if model in references else label
        row = _row(line, metric, (model, name, colour, model in references), test)
        before = best.get(row.walk)
        if before is None or _worth(row) > _worth(before):
            best[row.walk] = row
    return sorted(best.values(), key=lambda row: not row.reference)


def _worth(row: Row) -> tuple[bool, int]:
    return row.diversity is not None, row.pictures


def _tested(runs: Sequence[RunData], metric: str) -> Iterator[tuple[str, tuple[Any, ...], Line]]:
    """What model, of which test, and the report, of every test of a finished run that says how it walked."""
    for run in runs:
        model = run.config.get("model", {})
        began = _began(model)
        size = [model.get(key) for key in ("height", "width")]
        for when, what in (("before", began), ("yardstick", began), ("after", str(run.folder))):
            report = (run.summary or {}).get(when)
            if report and report.get("walk") and metric in report["mean"]:
                yield what, (run.config.get("data", {}).get("test"), *size, *_drawn(report)), report


def _evaluated(one: Evaluation, metric: str) -> Iterator[tuple[str, tuple[Any, ...], Line]]:
    """The same of an evaluation's rows. Raises ValueError for one without the metric."""
    for row in one.rows:
        if metric not in row["mean"]:
            raise ValueError(
                f"evaluations: {str(one.file)!r} has no score {metric!r}, by which the page judges, but "
                f"{', '.join(row['mean'])[:80]}; nearest valid: what tempflow eval wrote with --rewards {metric}"
            )
        yield str(row["what"]), (*one.test, *_drawn(row)), row


def _drawn(report: Line) -> tuple[Any, ...]:
    """How many prompts, different ones too, and from which noise."""
    return int(report["count"]) // int(report.get("samples_per_prompt", 1)), report.get("prompts"), report.get("seed")


def _row(told: Line, metric: str, who: tuple[str, str, int, bool], test: tuple[Any, ...]) -> Row:
    walk, spread = told["walk"], told.get("diversity") or {}
    return Row(
        *who,
        grid=_shortened(str(walk["grid"])),
        steps=int(told["steps"]),
        useful=int(walk["useful"]),
        guidance=float(told["guidance"]),
        score=_known(told["mean"][metric]),
        interval=_bounds(told.get("interval", {}).get(metric)),
        diversity=_known(spread.get("mean")),
        spread=_bounds(spread.get("interval")),
        prompts=int(told.get("prompts") or 0),
        pictures=int(told["count"]),
        test=tuple(map(str, test)),
    )


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _bounds(given: Any) -> tuple[float, float] | None:
    ends = [_known(value) for value in given] if isinstance(given, list | tuple) else []
    return (ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None


def _model(what: str) -> str:
    """By which a model is known, whatever path leads to it."""
    place = Path(what).expanduser()
    if place.name == "model" and (place.parent / "config.yaml").is_file():
        place = place.parent
    return str(place.resolve()) if place.exists() else what


def _reference(run: RunData) -> str:
    """The model that a run's teacher is, or that its KL holds to."""
    model = run.config.get("model", {})
    named = str(model.get("reference", "base"))
    return _model({"base": str(model.get("path", "")), "start": _began(model)}.get(named, named))


def _began(model: Line) -> str:
    """What a run's training started from; of a mean all of it."""
    start = model.get("start") or model.get("path", "")
    return " and ".join(map(str, start)) if isinstance(start, list | tuple) else str(start)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


# ---------------------------------------------------------------------------------------------------------- the figures
def steps_figure(rows: Sequence[Row], metric: str) -> Scatter | None:
    """Score over useful steps. Rows of a model and guidance are joined; the label stands at the last."""
    points: list[Point] = []
    for row, line, label in _in_lines([row for row in rows if row.score is not None]):
        points += _point(row, float(row.useful), line, label, (None, None))
    return scatter(metric, points, "useful steps", whole=True)


def diversity_figure(rows: Sequence[Row], metric: str) -> Scatter | None:
    """Score over diversity, joined in the same way; labels name the steps too where a model has rows of several."""
    shown = [row for row in rows if row.score is not None and row.diversity is not None]
    several = {row.model for row in shown if any(o.model == row.model and o.steps != row.steps for o in shown)}
    points: list[Point] = []
    for row, line, label in _in_lines(shown):
        steps = f"{row.steps} steps" if row.model in several else ""
        points += _point(row, row.diversity, line, ", ".join(filter(None, (label, steps))), row.spread)
    return scatter(metric, points, "diversity")


def _point(
    row: Row, x: float | None, line: str, label: str, spread: tuple[float | None, float | None] | None
) -> list[Point]:
    """The row's marker; none where there is nothing to draw."""
    if row.score is None or x is None:
        return []
    ends = (*(row.interval or (None, None)), *(spread or (None, None)))
    return [Point(x, row.score, line, row.colour, _title(row), label, row.reference, *ends)]


def _in_lines(rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
    """Rows line by line: the row, its line's name, and the line's label at its last row.

    A line is a model with one guidance, by ascending steps; where it has a number of steps on several grids, on each.
    """
    lines: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        alike = [o for o in rows if (o.model, o.guidance) == (row.model, row.guidance)]
        apart = len({o.steps for o in alike}) < len(alike)
        lines.setdefault((row.model, row.guidance, row.grid if apart else ""), []).append(row)
    for (model, guidance, grid), line in lines.items():
        varied = len({row.guidance for row in rows if row.model == model}) > 1
        parts = (line[0].name, f"guidance {guidance:g}" if varied else "", f"grid {grid}" if grid else "")
        *before, last = sorted(line, key=lambda row: row.useful)
        yield from ((row, repr((model, guidance, grid)), "") for row in before)
        yield last, repr((model, guidance, grid)), ", ".join(filter(None, parts))


def _title(row: Row) -> str:
    useful = "" if row.useful == row.steps else f" ({row.useful} useful)"
    score = _with_interval(row.score, row.interval)
    spread = "" if row.diversity is None else f", diversity {_with_interval(row.diversity, row.spread)}"
    return f"{row.name}, {row.steps} steps{useful}, guidance {row.guidance:g}: {score}{spread}"


def _with_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    return number(value) + (f" ({number(bounds[0])} … {number(bounds[1])})" if bounds else "")
