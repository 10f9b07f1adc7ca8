"""From judged pictures to the tables that a suite is reported by: means, 95 % intervals over prompts, failures.

A failed picture is in no mean; every row says how many of its values are missing for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tempflow.evaluate import geneval, unigenbench
from tempflow.evaluate.suites.readers import POINTS, QUESTIONS
from tempflow.request import Prompt
from tempflow.rewards.geneval_rules import TAGS
from tempflow.stats import Interval, interval, macro_interval

Value = float | tuple[float, ...] | None
"""What is said of a picture: a score; an answer for each of its prompt's questions; None: it failed."""


@dataclass(frozen=True)
class Judged:
    """A prompt, and what is said of each of its pictures."""

    prompt: Prompt
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Row:
    """A mean and its 95 % interval; NaN where there is no value.

    prompts  different ones that the mean is over
    count    values that it is over
    failed   values that are missing, of pictures that failed
    """

    label: str
    mean: float
    low: float
    high: float
    prompts: int
    count: int
    failed: int


@dataclass(frozen=True)
class Table:
    """title: what it is by; about: how its figures are made."""

    title: str
    about: str
    rows: tuple[Row, ...]


Figures = Callable[[Sequence[Judged]], tuple[Table, ...]]
"""The first row of the first table is the suite's score."""


@dataclass(frozen=True)
class Entry:
    """A value under a label, NaN of a picture that failed; the number of its prompt; its coarser label."""

    label: str
    value: float
    prompt: int
    group: str = ""


def row_of(label: str, entries: Sequence[Entry]) -> Row:
    """The mean over all values, and its interval over prompts."""
    values = [entry.value for entry in entries]
    return _row(label, entries, _mean(values), interval(values, clusters=[entry.prompt for entry in entries]))


def macro_row(label: str, entries: Sequence[Entry], mean: float, stratified: bool = False) -> Row:
    """`mean`, a mean over groups of their means, with the interval over prompts; stratified: a prompt has one group."""
    groups, prompts = [entry.group for entry in entries], [entry.prompt for entry in entries]
    values, strata = [entry.value for entry in entries], groups if stratified else None
    none = math.isnan(mean)
    bounds = (math.nan, math.nan) if none else macro_interval(values, groups, strata=strata, clusters=prompts)
    return _row(label, entries, mean, bounds)


def table_of(title: str, about: str, entries: Iterable[Entry], order: Sequence[str] = ()) -> Table:
    """A row for each label: those of `order`, then others as they come."""
    by_label: dict[str, list[Entry]] = {label: [] for label in order}
    for entry in entries:
        by_label.setdefault(entry.label, []).append(entry)
    return Table(title, about, tuple(row_of(label, found) for label, found in by_label.items() if found))


def to_json(table: Table) -> dict[str, Any]:
    """NaN becomes None."""
    rows = [{k: None if v != v else v for k, v in vars(row).items()} for row in table.rows]
    return {"title": table.title, "about": table.about, "rows": rows}


def text_of(tables: Sequence[Table]) -> str:
    """Plain text."""
    lines: list[str] = []
    for table in tables:
        cells = [(table.title, "mean", "95 % interval", "prompts", "values", "failed")]
        for r in table.rows:
            known = not math.isnan(r.mean)
            mean, bounds = (f"{r.mean:.4f}", f"[{r.low:.4f}, {r.high:.4f}]") if known else ("–", "–")
            cells.append((r.label, mean, bounds, str(r.prompts), str(r.count), str(r.failed)))
        wide = [max(len(cell[i]) for cell in cells) for i in range(6)]
        lines += ["  ".join(part.ljust(w) for part, w in zip(cell, wide, strict=True)).rstrip() for cell in cells]
        lines += [table.about, ""]
    return "\n".join(lines).rstrip()


# ------------------------------------------------------------------------------------------------------ suites' figures
def by_labels(score: str, about: str, labels: Mapping[str, str] | None = None) -> Figures:
    """Of suites with one score a picture: the mean over all pictures, and by what prompts say of themselves.

    labels  table's title → key of a prompt's metadata; a prompt that says nothing there is in no row
    """

    def figures(judged: Sequence[Judged]) -> tuple[Table, ...]:
        whole = Table("all", about, (row_of(score, list(_scores(judged, lambda prompt: score))),))
        tables = [whole]
        for title, key in (labels or {}).items():
            entries = _scores(judged, lambda prompt, key=key: _said(prompt, key))
            tables.append(table_of(title, "mean over the pictures of its prompts", entries))
        return tuple(table for table in tables if table.rows)

    return figures


def of_geneval(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """GenEval's score, the mean over its six tags of the mean over a tag's pictures; and each tag's."""
    entries = list(_scores(judged, lambda prompt: _said(prompt, "tag")))
    entries = [Entry(e.label, e.value, e.prompt, e.label) for e in entries]
    told = geneval.tally((e.label, e.value) for e in entries)
    about = "mean over the six tags of the mean over a tag's pictures, as GenEval counts"
    about += f"; no score of {', '.join(told.missing)}, and so none of all" if told.missing else ""
    mean = math.nan if told.missing else told.overall
    return (
        Table("all", about, (macro_row("GenEval", entries, mean, stratified=True),)),
        table_of("tag", "mean over the pictures of its prompts", entries, TAGS),
    )


def of_unigenbench(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """UniGenBench's scores: the share of 1 among verdicts, pooled over pictures, by sub-dimension and by theme."""
    entries, verdicts = list[Entry](), list[tuple[list[str], list[int]]]()
    for number, (prompt, value) in enumerate_pictures(judged):
        points = [point["dimension"] for point in _dicts(prompt, POINTS)]
        if isinstance(value, tuple):
            verdicts.append((points, [int(v) for v in value]))
            pairs = list(zip(points, value, strict=True))
        else:
            pairs = [(point, math.nan) for point in points]
        entries += [Entry(point, value, number, unigenbench.theme_of(point)) for point, value in pairs]
    told = unigenbench.tally(verdicts)
    mean = told.overall if told.all else math.nan
    pooled = "share of verdicts that are 1, pooled over pictures: a prompt with more checkpoints counts for more"
    return (
        Table("all", "mean over the themes of their scores, as the leaderboard has it; the official code has none",
              (macro_row("UniGenBench", entries, mean),)),
        table_of("theme", pooled, [Entry(e.group, e.value, e.prompt) for e in entries]),
        table_of("sub-dimension", pooled, entries),
    )  # fmt: skip


def of_dpg_bench(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """DPG-Bench's score: the mean over pictures of the share of questions answered yes, where a question whose parent
    was answered no counts as no. Its script's categories count answers as they were given, whatever their parents."""
    whole, counted, given, detail = list[Entry](), list[Entry](), list[Entry](), list[Entry]()
    for number, (prompt, value) in enumerate_pictures(judged):
        questions = _dicts(prompt, QUESTIONS)
        raw = value if isinstance(value, tuple) else (math.nan,) * len(questions)
        holds = with_parents(questions, raw)
        whole.append(Entry("DPG-Bench", _mean(holds), number))
        for question, one, held in zip(questions, raw, holds, strict=True):
            counted.append(Entry(question["category"], held, number))
            given.append(Entry(question["category"], one, number))
            if question["detail"]:
                detail.append(Entry(question["detail"], one, number))
    about = "mean over pictures of the share of questions answered yes; one whose parent was answered no counts as no"
    tables = [Table("all", about, (row_of("DPG-Bench", whole),))]
    tables.append(table_of("category", "share of yes; a question whose parent was answered no counts as no", counted))
    as_given = "share of yes whatever a question's parents, as the official script prints its categories"
    tables.append(table_of("category, answers as given", as_given, given))
    tables.append(table_of("detailed category, answers as given", as_given, detail))
    return tuple(table for table in tables if table.rows)


def with_parents(questions: Sequence[Mapping[str, Any]], answers: Sequence[float]) -> tuple[float, ...]:
    """Answers, 0 where a parent's is 0, also by a parent's own parent. An answer of NaN leaves its children alone."""
    given = {question["id"]: answer for question, answer in zip(questions, answers, strict=True)}
    parents = {question["id"]: question["parents"] for question in questions}
    left, holds = dict(given), dict[int, float]()
    while left:  # parents come before their children; the reader has refused circles
        for number in [n for n in left if not set(parents[n]) & left.keys()]:
            no = any(holds[parent] == 0 for parent in parents[number])
            holds[number] = 0.0 if no else left[number]
            del left[number]
    return tuple(holds[question["id"]] for question in questions)


def of_gsb(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """Good, same, bad: what share of pairs the first model's picture wins, ties or loses; (G − B) ÷ (G + S + B)."""
    wins = [(number, value) for number, (_, value) in enumerate_pictures(judged)]
    shares: dict[str, Callable[[float], float]] = {
        "(G − B) ÷ (G + S + B)": lambda share: float(np.sign(share - 0.5)),
        "good": lambda share: float(share > 0.5),
        "same": lambda share: float(share == 0.5),
        "bad": lambda share: float(share < 0.5),
    }
    rows: list[Row] = []
    for label, of in shares.items():
        values = [(n, of(v) if isinstance(v, float) else math.nan) for n, v in wins]
        rows.append(row_of(label, [Entry(label, value, number) for number, value in values]))
    about = "good: over both orders the judge prefers the first model's picture; it contradicts itself, or ties: same"
    return (Table("pairs", about, tuple(rows)),)


# ---------------------------------------------------------------------------------------------------------------- parts
def enumerate_pictures(judged: Sequence[Judged]) -> Iterator[tuple[int, tuple[Prompt, Value]]]:
    """Each picture's prompt and value, with the number of its prompt; prompts of one text and kind are one."""
    numbers: dict[tuple[str, str], int] = {}
    for one in judged:
        number = numbers.setdefault((one.prompt.kind, one.prompt.text), len(numbers))
        for value in one.values:
            yield number, (one.prompt, value)


def _scores(judged: Sequence[Judged], label: Callable[[Prompt], str]) -> Iterator[Entry]:
    for number, (prompt, value) in enumerate_pictures(judged):
        if name := label(prompt):
            yield Entry(name, float(value) if isinstance(value, int | float) else math.nan, number)


def _row(label: str, entries: Sequence[Entry], mean: float, bounds: Interval) -> Row:
    known = [entry for entry in entries if not math.isnan(entry.value)]
    return Row(label, mean, *bounds, len({e.prompt for e in known}), len(known), len(entries) - len(known))


def _said(prompt: Prompt, key: str) -> str:
    said = prompt.kind if key == "kind" else prompt.metadata.get(key)
    return str(said).strip() if isinstance(said, str | int) and not isinstance(said, bool) else ""


def _dicts(prompt: Prompt, key: str) -> list[dict[str, Any]]:
    found = prompt.metadata[key]
    assert isinstance(found, list)
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
