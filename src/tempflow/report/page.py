"""The page: what stands on it, and how it is put together. One file, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempflow.folder import check_file, write_file
from tempflow.report import charts, figures
from tempflow.report.charts import Chart, Series
from tempflow.report.figures import Change
from tempflow.report.runs import Evaluation, RunData, read_evaluation, read_runs, read_suite
from tempflow.report.walks import walks_of

if TYPE_CHECKING:
    from jinja2 import Environment

STATUS = {
    "finished": "finished",
    "running": "still running",
    "stopped": "stopped before its end",
}
AXES = {
    "forward_equivalents": "forward-equivalents",
    "minutes": "minutes",
    "reward_calls": "reward calls",
    "iteration": "iteration",
}
"""What learning is drawn over: name in the data → on the page."""

PANELS = {
    "kl": "KL to the starting model",
    "clip_fraction": "clip fraction",
    "outside_clip": "ratio outside the clip range",
    "grad_norm": "gradient norm (before clipping)",
    "zero_variance": "zero-variance share of edges",
    "log_ratio_abs": "|log ratio|, mean",
    "log_ratio_max": "|log ratio|, largest",
    "rollout_gap_max": "rollout against training, roundings",
    "loss": "loss",
    "failed_rewards": "failed rewards",
    "trained_edges": "trained edges",
}
LOG = {"log_ratio_abs", "log_ratio_max", "kl"}
COSTS = (
    "forward_equivalents",
    "forwards",
    "rollout_forwards",
    "draft_forwards",
    "train_forwards",
    "reference_forwards",
    "old_forwards",
    "latent_rows",
    "decodes",
    "reward_calls",
)
CREDIT = {
    "credit": ("credit", "mean weight · |A|"),
    "live": ("live", "share of edges whose group has spread"),
    "advantage": ("|A|", "mean |advantage|"),
    "spread": ("spread", "standard deviation of the edges' values within their group"),
    "weight": ("weight", "mean loss weight"),
}


def write_report(
    folders: Sequence[Path], out: Path, suites: Sequence[Path] = (), evaluations: Sequence[Path] = ()
) -> Path:
    """Writes one self-contained HTML page about the runs in `folders`; returns `out`.

    suites       folders that `tempflow suite` wrote, whose tables the page shows too
    evaluations  files that `tempflow eval --output` wrote, whose rows stand in the figures over steps and diversity

    Raises ValueError for a folder without a run or a suite, a file without an evaluation, a broken file, or an `out`
    that is not named .html or is there and no page of ours; ImportError with the command to run where jinja2 is
    missing.
    """
    check_page(out)
    told, judged = [read_suite(suite) for suite in suites], [read_evaluation(file) for file in evaluations]
    return write_file(out, render(read_runs(folders), datetime.now().astimezone(), told, judged), "output")


def check_page(out: Path) -> None:
    """Raises ValueError for what is not named .html, or is there and no page of ours."""
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"output: {str(out)!r} is a page; nearest valid: {str(out.with_suffix('.html'))!r}")
    check_file(out, "output")


def environment() -> Environment:
    """Renders our templates; whatever is put into them is escaped. Raises ImportError without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the report page needs jinja2: pip install 'tempflow[report]'") from error
    jinja = Environment(
        loader=PackageLoader("tempflow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["number"] = charts.number
    jinja.filters["legend"] = _legend
    return jinja


def render(
    runs: Sequence[RunData],
    now: datetime,
    suites: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The page about `runs` as text, with what `read_suite` gives of suites and `read_evaluation` of evaluations.
    Whatever comes from a file is escaped."""
    return (
        environment()
        .get_template("page.html")
        .render(
            suites=suites,
            walks=walks_of(runs, evaluations, runs[0].metric),
            title=" · ".join(run.label for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
            now=now.strftime("%Y-%m-%d %H:%M %Z"),
            metric=runs[0].metric,
            runs=[told_of(run, i) for i, run in enumerate(runs)],
            learning=_learning(runs),
            training=_training(runs),
            run_legend=[(run.label, place, True) for place, run in enumerate(runs)],
            differences=figures.differences(runs) if len(runs) > 1 else [],
            same_test=all(figures.same_test(runs[0], run) for run in runs),
            against=[figures.against(runs[0], run, runs[0].metric) if run is not runs[0] else None for run in runs],
            compared=_whiskers([figures.held_out(run, runs[0].metric) for run in runs]),
        )
    )


def _legend(strokes: Sequence[charts.Stroke]) -> list[tuple[str, int, bool]]:
    """Label, colour and whether it stands out, strongest first."""
    return [(s.label, s.colour, not s.faint) for s in sorted(strokes, key=lambda stroke: stroke.faint)]


def told_of(run: RunData, place: int = 0) -> dict[str, Any]:
    """What templates are told of a run. `place`: its colour among several."""
    done, planned = run.iterations
    gained, lost = figures.moved(run, run.metric)
    scores = list(run.summary["before"]["mean"]) if run.summary else []
    scores.sort(key=lambda name: name != run.metric)
    return {
        "place": place,
        "label": run.label,
        "folder": str(run.folder),
        "metric": run.metric,
        "status": run.status,
        "status_text": STATUS[run.status],
        "done": done,
        "planned": planned,
        "minutes": run.minutes,
        "algorithm": str(run.config.get("algorithm", {}).get("name", "–")),
        "model": str(run.config.get("model", {}).get("path", "–")),
        "seed": str(run.config.get("seed", "–")),
        "headline": figures.held_out(run, run.metric),
        "validation": _validation(run),
        "yardstick": _yardstick(run),
        "best_iteration": run.summary["best_iteration"] if run.summary else None,
        "tasks": {score: _whiskers(_rows(run, score)) for score in scores},
        "gained": gained,
        "lost": lost,
        "picture": base64.b64encode(run.picture).decode() if run.picture else None,
        "credit": _credit(run),
        "phases": _phases(run),
        "costs": _costs(run),
        "config_text": run.config_text,
        "environment": figures.flat(run.environment) if run.environment else {},
        "alarms": run.alarms,
        "alarm_columns": list(dict.fromkeys(key for line in run.alarms for key in line)),
    }


def _rows(run: RunData, score: str) -> list[Change]:
    whole = figures.held_out(run, score)
    return [*figures.by_task(run, score), *([whole] if whole else [])]


def _whiskers(rows: Sequence[Change | None]) -> list[tuple[Change | None, charts.Whisker | None]]:
    """Each change with its mark, all on one scale."""
    known = [row for row in rows if row is not None]
    marks = iter(charts.whiskers([(row.change, row.low, row.high) for row in known]))
    return [(row, None if row is None else next(marks)) for row in rows]


def _validation(run: RunData) -> dict[str, Any] | None:
    """First, best and last validation."""
    known = [(e["iteration"], v) for e in run.evaluations if (v := e["mean"].get(run.metric)) is not None]
    if not known:
        return None
    best = max(known, key=lambda pair: pair[1])
    return {"first": known[0][1], "last": known[-1][1], "best": best[1], "best_iteration": best[0]}


def _yardstick(run: RunData) -> dict[str, Any] | None:
    told = run.summary.get("yardstick") if run.summary else None
    return {"guidance": told["guidance"], "score": told["mean"].get(run.metric)} if told else None


def _learning(runs: Sequence[RunData]) -> dict[str, Chart]:
    """Validation over each axis; of one run also by task."""
    metric, made = runs[0].metric, {}
    for axis, label in AXES.items():
        series: list[Series] = []
        for place, run in enumerate(runs):
            x = _axis(run, axis)
            if len(runs) == 1 and run.evaluations:
                tasks = [task for task in run.evaluations[0]["by_kind"].get(metric, {}) if task]
                for colour, task in enumerate(tasks if len(tasks) > 1 else [], 1):
                    y = [e["by_kind"].get(metric, {}).get(task) for e in run.evaluations]
                    series.append(Series(task, x, y, colour, faint=True))
            y = [e["mean"].get(metric) for e in run.evaluations]
            series.append(Series(run.label if len(runs) > 1 else "all", x, y, place))
        chart = charts.line_chart(f"validation {metric}", series, label, width=900, height=320)
        if chart is not None:
            made[label] = chart
    return made


def _axis(run: RunData, axis: str) -> list[float]:
    """Where each evaluation stands; minutes are None-free: an evaluation without a time stands at the run's last."""
    if axis != "minutes":
        return [float(e.get(axis, 0)) for e in run.evaluations]
    times = {line["evaluation"]: line["elapsed"] / 60 for line in run.timings if "evaluation" in line}
    return [times.get(e["iteration"], run.minutes) for e in run.evaluations]


def _training(runs: Sequence[RunData]) -> list[Chart]:
    """A panel for every figure of metrics.jsonl, rewards first."""
    keys = list(dict.fromkeys(key for run in runs for line in (*run.metrics[:1], *run.metrics[-1:]) for key in line))
    rewards = [key for key in keys if key.startswith(("reward/", "reward_std/"))]
    rest = [key for key in keys if key not in (*PANELS, *rewards, *COSTS, "iteration") and not key.endswith("updates")]
    panels: list[Chart] = []
    for key in [*rewards, *(key for key in PANELS if key in keys), *rest]:
        series = [
            Series(run.label, [m["iteration"] for m in run.metrics], [_value(m.get(key)) for m in run.metrics], place)
            for place, run in enumerate(runs)
        ]
        chart = charts.line_chart(_title(key), series, "iteration", log=key in LOG, smooth=True)
        if chart is not None:
            panels.append(chart)
    return panels


def _title(key: str) -> str:
    """A figure's title; that of another role's than the policy bears the role's name."""
    role, _, name = key.rpartition("/")
    if name in PANELS:
        return f"{role}: {PANELS[name]}" if role else PANELS[name]
    return key.replace("reward_std/", "spread of reward ").replace("reward/", "reward ")


def _value(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _credit(run: RunData) -> list[dict[str, Any]]:
    """A heat map of each figure that steps.jsonl has."""
    maps: list[dict[str, Any]] = []
    for key, (name, meaning) in CREDIT.items():
        lines = [
            (int(line["iteration"]), {int(s["step"]): float(s[key]) for s in line["steps"] if s.get(key) is not None})
            for line in run.steps
        ]
        heat = charts.heat_map(lines, limit=1.0 if key == "live" else None)
        if heat is not None:
            maps.append({"name": name, "meaning": meaning, "heat": heat})
    return maps


def _phases(run: RunData) -> list[dict[str, Any]]:
    seconds = figures.wall_time(run)
    whole = sum(seconds.values())
    return [
        {"name": name, "seconds": s, "share": 100 * s / whole if whole else 0.0} for name, s in seconds.items() if s > 0
    ]


def _costs(run: RunData) -> dict[str, float]:
    last: Mapping[str, Any] = run.summary["cost"] if run.summary else run.metrics[-1] if run.metrics else {}
    return {key: float(last[key]) for key in COSTS if key in last}
