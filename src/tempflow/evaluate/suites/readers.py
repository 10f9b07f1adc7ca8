"""The suites' own files: prompts with what judges and tables need. Nobody's prompts come with the package.

Every reader raises ValueError, naming the file, the row and the column, for what cannot be read, and OSError where
there is no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tempflow.data.files import files_of, records
from tempflow.data.prompts import load_prompts
from tempflow.request import Prompt
from tempflow.strict import cut, nearest, shown

NUMBER = "index"
"""Under which of a prompt's metadata a suite says its number, by which pictures are named; else it is its place."""

QUESTIONS, POINTS = "questions", "points"
"""Where a DPG-Bench prompt's metadata have its questions, and a UniGenBench prompt's its checkpoints."""

Row = tuple[str, Mapping[str, str]]
"""Where a row stands, and its cells by column."""


def number_of(prompt: Prompt, place: int) -> int:
    """A prompt's number: the suite's own, or its place from 0."""
    said = prompt.metadata.get(NUMBER)
    return said if isinstance(said, int) and not isinstance(said, bool) else place


# -------------------------------------------------------------------------------------------------------------- readers
def read_prompts(file: str) -> tuple[Prompt, ...]:
    """Any source of prompts: `data.prompts.load_prompts`."""
    return load_prompts(file)


def read_drawbench(file: str) -> tuple[Prompt, ...]:
    """DrawBench: a CSV with columns Prompts, Category."""
    rows = _with_columns(file, _rows(file, ".csv"), ("Prompts", "Category"))
    return tuple(Prompt(_text(row, "Prompts", at), {"Category": _text(row, "Category", at)}) for at, row in rows)


def read_partiprompts(file: str) -> tuple[Prompt, ...]:
    """PartiPrompts: a TSV with columns Prompt, Category, Challenge. As published its quotes are characters, which
    enclose nothing."""
    rows = _with_columns(file, _raw_rows(file), ("Prompt", "Category", "Challenge"))
    kinds = ("Category", "Challenge")
    return tuple(Prompt(_text(row, "Prompt", at), {k: _text(row, k, at) for k in kinds}) for at, row in rows)


def read_dpg_bench(folder: str, questions: str) -> tuple[Prompt, ...]:
    """DPG-Bench: a folder of texts ITEM.txt, and the CSV of their questions.

    questions  a CSV with columns item_id, proposition_id, dependency, question (or question_natural_language),
               category (or category_broad) and perhaps category_detailed. A dependency is the propositions that a
               question makes sense after, with commas; 0: none
    """
    asked = _dpg_questions(questions)
    found: list[Prompt] = []
    for prompt in load_prompts(folder.rstrip("/") + "/"):
        item = Path(str(prompt.metadata["file"])).stem
        if item not in asked:
            raise ValueError(f"{questions}: no question of item {item!r}, whose text lies in {folder}; "
                             f"nearest valid: {nearest(item, asked)}")  # fmt: skip
        found.append(Prompt(prompt.text, {"item": item, QUESTIONS: asked.pop(item)}))
    if asked:
        raise ValueError(f"{questions}: {len(asked)} items without a text in {folder}, such as {next(iter(asked))!r}; "
                         "nearest valid: all texts, and --count for the first of them")  # fmt: skip
    return tuple(found)


def read_unigenbench(file: str) -> tuple[Prompt, ...]:
    """UniGenBench: a CSV with columns index, prompt_en, sub_dims_en; or prompt, sub_dims, and perhaps index.

    The last is JSON: {"Testpoints": ["Attribute - Color", …], "Testpoint Description": ["the bench is red", …]}.
    """
    rows = list(_rows(file, ".csv"))
    there = rows[0][1].keys() if rows else ()
    names = ("prompt", "sub_dims") if "prompt" in there else ("prompt_en", "sub_dims_en")
    found: list[Prompt] = []
    for place, (at, row) in enumerate(_with_columns(file, iter(rows), names)):
        index = _whole(row[NUMBER], NUMBER, at) if NUMBER in row else place
        points = _points(row[names[1]], f"{at}: {names[1]}")
        found.append(Prompt(_text(row, names[0], at), {NUMBER: index, POINTS: points}))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------- parts
def _points(text: str, where: str) -> list[dict[str, str]]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({cut(str(error))})") from None
    keys = ("Testpoints", "Testpoint Description")
    lists: list[Any] = [told.get(key) if isinstance(told, dict) else None for key in keys]
    example = '{"Testpoints": ["Attribute - Color"], "Testpoint Description": ["the bench is red"]}'
    for name, given in zip(keys, lists, strict=True):
        if not isinstance(given, list) or not given or not all(isinstance(x, str) and x.strip() for x in given):
            raise ValueError(f"{where}: {name!r} is {shown(given)}, no list of texts; nearest valid: {example}")
    dimensions, descriptions = lists
    if len(dimensions) != len(descriptions):
        raise ValueError(f"{where}: {len(descriptions)} descriptions of {len(dimensions)} test points")
    return [{"dimension": d.strip(), "description": t.strip()} for d, t in zip(dimensions, descriptions, strict=True)]


def _dpg_questions(file: str) -> dict[str, list[dict[str, object]]]:
    """Each item's questions, by proposition: a parent may come after its child."""
    rows = list(_rows(file, ".csv"))
    there = rows[0][1].keys() if rows else ()
    text = "question" if "question" in there else "question_natural_language"
    kind = "category" if "category" in there else "category_broad"
    needed = ("item_id", "proposition_id", "dependency", text, kind)
    found: dict[str, dict[int, dict[str, object]]] = {}
    for at, row in _with_columns(file, iter(rows), needed):
        number = _whole(row["proposition_id"], "proposition_id", at)
        parents = [_whole(part, "dependency", at) for part in row["dependency"].split(",")]
        item = found.setdefault(_text(row, "item_id", at), {})
        if number in item or number < 1:
            what = "is there twice" if number in item else "is no number of a question"
            raise ValueError(f"{at}: proposition_id: {number} {what} for item {row['item_id']!r}")
        item[number] = {
            "id": number,
            "parents": [parent for parent in parents if parent],
            "question": _text(row, text, at),
            "category": _text(row, kind, at),
            "detail": row.get("category_detailed", "").strip(),
        }
    for item, questions in found.items():
        _check_parents(file, item, questions)
    return {item: [questions[number] for number in sorted(questions)] for item, questions in found.items()}


def _check_parents(file: str, item: str, questions: Mapping[int, Mapping[str, object]]) -> None:
    """Raises ValueError for a parent that is not there, and where questions depend on themselves."""
    left = {number: set(_ints(question["parents"])) for number, question in questions.items()}
    lost = next((p for parents in left.values() for p in parents if p not in left), None)
    if lost is not None:
        near = nearest(str(lost), [*map(str, left), "0"])
        raise ValueError(f"{file}: dependency: item {item!r} has no proposition {lost}; nearest valid: {near}")
    while free := [number for number, parents in left.items() if not parents & left.keys()]:
        for number in free:
            del left[number]
    if left:
        raise ValueError(f"{file}: dependency: in item {item!r} proposition {min(left)} depends on itself")


def _ints(given: object) -> Sequence[int]:
    return given if isinstance(given, list) else []


def _rows(file: str, suffix: str) -> Iterator[Row]:
    """Rows of a table with a header. Raises ValueError for a file of another kind."""
    path = Path(file).expanduser()
    if path.suffix.lower() != suffix:
        raise ValueError(f"prompts: {file!r} is no {suffix} file; nearest valid: {str(path.with_suffix(suffix))!r}")
    for where, row in records(path):
        assert isinstance(row, dict)
        yield where, row


def _raw_rows(file: str) -> Iterator[Row]:
    """Rows of a TSV in which quotes are characters like others."""
    path = Path(file).expanduser()
    if path.suffix.lower() != ".tsv":
        raise ValueError(f"prompts: {file!r} is no .tsv file; nearest valid: {str(path.with_suffix('.tsv'))!r}")
    (there,) = files_of(path)
    try:
        lines = [line.rstrip("\r") for line in there.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); nearest valid: the file saved as UTF-8") from error
    header = [cell.strip() for cell in lines[0].split("\t")]
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != len(header):
            raise ValueError(f"{path}:{number}: {len(cells)} cells for {len(header)} columns")
        yield f"{path}:{number}", dict(zip(header, cells, strict=True))


def _with_columns(file: str, rows: Iterator[Row], needed: Sequence[str]) -> Iterator[Row]:
    """The rows. Raises ValueError for a column that is not there, and for no rows."""
    empty = True
    for at, row in rows:
        missing = [name for name in needed if name not in row]
        if missing:
            there = ", ".join(map(shown, row))
            raise ValueError(f"{file}: no column {missing[0]!r}; nearest valid: {nearest(missing[0], row)} of {there}")
        empty = False
        yield at, row
    if empty:
        raise ValueError(f"{file}: no rows; nearest valid: a table with the columns {', '.join(needed)}")


def _text(row: Mapping[str, str], column: str, where: str) -> str:
    text = row[column].strip()
    if not text:
        raise ValueError(f"{where}: {column} is empty; nearest valid: a text")
    return text


def _whole(text: str, column: str, where: str) -> int:
    """A number ≥ 0. pandas writes some as "3.0"."""
    digits = text.strip().removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise ValueError(f"{where}: {column}: {shown(text)} is no whole number; nearest valid: 0")
    return int(digits)
