"""What the page says in numbers: held-out change with its interval, wall time by phase, prompts that changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tempflow.report.runs import Line, RunData
from tempflow.stats import interval

DRAWS = 10_000


@dataclass(frozen=True)
class Change:
    """A score before and after on the same pictures; low … high is the change's 95 % interval, None where unknown."""

    label: str
    count: int
    before: float
    after: float
    low: float | None
    high: float | None

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def sure(self) -> bool:
        """The interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired(
    label: str,
    before: Sequence[float | None],
    after: Sequence[float | None],
    prompts: Sequence[Line] | None,
    draws: int = DRAWS,
) -> Change:
    """The mean change over pairs and its paired bootstrap interval: prompts are resampled, kinds keep their shares.

    prompts: a line for each pair with its prompt's text and kind. A pair with a failed score (None) is left out of all
    figures. Without prompts, or with fewer than two different ones, there is no interval. The interval tells how the
    change would vary over other test prompts, not over other training runs.
    """
    a, b = np.array(before, dtype=float), np.array(after, dtype=float)
    both = np.isfinite(a) & np.isfinite(b)
    n = int(both.sum())
    if n == 0:
        return Change(label, 0, math.nan, math.nan, None, None)
    low = high = None
    clusters = [] if prompts is None else [(str(p.get("kind", "")), str(p.get("prompt", ""))) for p in prompts]
    if len({c for c, ok in zip(clusters, both, strict=False) if ok}) > 1:
        change = np.where(both, b - a, np.nan)
        low, high = interval(change, draws, strata=[kind for kind, _ in clusters], clusters=clusters)
    return Change(label, n, float(a[both].mean()), float(b[both].mean()), low, high)


def held_out(run: RunData, score: str) -> Change | None:
    """All test pictures of a finished run; None while it is not finished or does not know the score."""
    if run.summary is None or score not in run.summary["before"]["mean"]:
        return None
    if score in run.samples:
        return paired("all", run.samples[score][0], run.samples[score][1], _prompts(run, score))
    before, after = (_number(run.summary[when]["mean"][score]) for when in ("before", "after"))
    return Change("all", int(run.summary["before"]["count"]), before, after, None, None)


def same_test(first: RunData, run: RunData) -> bool:
    """Both drew the same test pictures: prompts, noise and sampler are equal, so that results compare in pairs."""

    def test(run: RunData) -> tuple[Any, Any]:
        keys = ("test_prompts", "steps", "guidance", "seed")
        evaluation = run.config.get("evaluation", {})
        model = run.config.get("model", {})
        drawn = [evaluation.get(key) for key in keys] + [model.get(key) for key in ("height", "width")]
        return run.config.get("data", {}).get("test"), drawn

    return test(first) == test(run)


def against(first: RunData, run: RunData, score: str) -> Change | None:
    """How much better `run` ended than `first`, in pairs; None where their test pictures are not the same."""
    if score not in first.samples or score not in run.samples or not same_test(first, run):
        return None
    mine, theirs = run.samples[score][1], first.samples[score][1]
    return paired("against", theirs, mine, _prompts(run, score)) if len(mine) == len(theirs) else None


def across(first: RunData, last: RunData, score: str) -> Change | None:
    """From before `first` to after `last`, in pairs; None where their test pictures are not the same."""
    if score not in first.samples or score not in last.samples or not same_test(first, last):
        return None
    before, after = first.samples[score][0], last.samples[score][1]
    return paired("all", before, after, _prompts(last, score)) if len(before) == len(after) else None


def by_task(run: RunData, score: str) -> list[Change]:
    """A row for each task kind, empty where there is only one."""
    if run.summary is None:
        return []
    tasks: Mapping[str, Any] = run.summary["before"]["by_kind"].get(score, {})
    if len(tasks) < 2:
        return []
    prompts = _prompts(run, score)
    if prompts is not None:
        before, after = run.samples[score]
        kinds = [str(line.get("kind", "")) for line in prompts]
        rows = {task: [i for i, kind in enumerate(kinds) if kind == task] for task in tasks}
        return [
            paired(task, [before[i] for i in r], [after[i] for i in r], [prompts[i] for i in r])
            for task, r in rows.items()
        ]
    later = run.summary["after"]["by_kind"][score]
    return [Change(task, 0, _number(tasks[task]), _number(later.get(task)), None, None) for task in tasks]


def _prompts(run: RunData, score: str) -> Sequence[Line] | None:
    """The line of each test picture's prompt; None where the run does not say."""
    return run.prompts if score in run.samples and len(run.prompts) == len(run.samples[score][0]) else None


@dataclass(frozen=True)
class Moved:
    """A test prompt and its score before and after."""

    prompt: str
    before: float
    after: float


def moved(run: RunData, score: str, most: int = 6) -> tuple[list[Moved], list[Moved]]:
    """The test prompts that gained most and that lost most; empty where the run did not write its prompts."""
    pair, prompts = run.samples.get(score), _prompts(run, score)
    if pair is None or prompts is None:
        return [], []
    rows = [
        Moved(str(line.get("prompt", "")), a, b)
        for line, a, b in zip(prompts, pair[0], pair[1], strict=True)
        if a is not None and b is not None
    ]
    rows.sort(key=lambda row: row.before - row.after)
    gained = [row for row in rows if row.after > row.before][:most]
    return gained, [row for row in reversed(rows) if row.after < row.before][:most]


def wall_time(run: RunData) -> dict[str, float]:
    """Seconds by phase: those that the run clocked, `validation`, and `other` (what is left of an iteration)."""
    phases: dict[str, float] = {}
    before = 0.0
    for line in run.timings:
        passed, before = line["elapsed"] - before, line["elapsed"]
        if "evaluation" in line:
            name = "validation" if line["evaluation"] else "start"
            phases[name] = phases.get(name, 0.0) + passed
            continue
        clocked = {k: float(v) for k, v in line.items() if k not in ("iteration", "elapsed") and _is_number(v)}
        for name, seconds in (clocked | {"other": max(0.0, passed - sum(clocked.values()))}).items():
            phases[name] = phases.get(name, 0.0) + seconds
    return dict(sorted(phases.items(), key=lambda item: -item[1]))


def flat(tree: Any, path: str = "") -> dict[str, str]:
    """Leaves of a tree of mappings and lists by their dotted paths."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(i), item) for i, item in enumerate(tree)]
    else:
        return {path: "–" if tree is None else str(tree)}
    return {k: v for key, value in items for k, v in flat(value, f"{path}.{key}" if path else key).items()}


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Configuration fields in which the runs differ, with each run's value; names and folders apart."""
    flats = [flat(run.config) for run in runs]
    keys = [key for key, _ in groupby(sorted(key for f in flats for key in f)) if key not in ("name", "output")]
    rows = [(key, [f.get(key, "") for f in flats]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan
