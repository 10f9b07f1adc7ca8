"""Reads prompt files: texts, JSON, JSON lines, tables, folders of texts. What a record means is for `prompts`."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path

MAX_BYTES = 64 * 2**20
"""Of a file, or of all files of a folder."""

Record = object
"""A text, a mapping of keys to values, or something else that is no prompt."""

EXAMPLE = '{"prompt": "a red circle"}'
TABLES = {".csv": ",", ".tsv": "\t"}


def suffix_of(name: str) -> str:
    """ ".txt" of "prompts.TXT"; "" of a folder's name."""
    return "" if name.endswith("/") else Path(name).suffix.lower()


def records(path: Path) -> Iterator[tuple[str, Record]]:
    """(where, record) for every record of a file or folder, in its order; `where` names the file and the line.

    Raises ValueError, naming the file and the line, for what is missing, too large, or cannot be read.
    """
    return READERS[suffix_of(path.name) if path.is_file() else ""](path)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `records` reads: `path`, or the texts in that folder by name.

    Raises ValueError for a missing file, and for a folder that holds something else, which would not be read.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path} is no file; {nearest_file(path, tuple(READERS))}")
        return (path,)
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    for entry in inside:
        if not entry.is_file() or entry.suffix.lower() != ".txt":
            raise ValueError(f"{path} holds {entry.name!r}; nearest valid: a folder of .txt files alone, a prompt each")
    if not inside:
        raise ValueError(f"{path} holds no prompt; nearest valid: a .txt file in it for each prompt")
    return tuple(inside)


def nearest_file(path: Path, suffixes: tuple[str, ...]) -> str:
    """A hint for a missing file: the existing one with the likeliest name in the folder where it was looked for."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and p.suffix.lower() in suffixes)
    if not names:
        return f"{path.parent} holds no {listed(suffixes)} file"
    return f"nearest valid: {path.parent / get_close_matches(path.name, names, n=1, cutoff=0.0)[0]}"


def listed(words: tuple[str, ...]) -> str:
    """ "a, b or c"; empty words are left out."""
    named = [word for word in words if word]
    return " or ".join(filter(None, (", ".join(named[:-1]), named[-1])))


def short(value: object, limit: int = 60) -> str:
    """A value as messages show it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# -------------------------------------------------------------------------------------------------------------- bytes
def _text(path: Path, left: int | None = None) -> str:
    """What a file says: UTF-8, or UTF-16 and UTF-32 with a byte-order mark."""
    size, most = path.stat().st_size, MAX_BYTES if left is None else left
    if size > most:
        raise ValueError(f"{path} has {size} bytes; the largest valid size is {most}; split the file")
    raw = path.read_bytes()
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if raw.startswith(mark)), "utf-8-sig")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = raw[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n") - 1
        what = f"not {encoding.removesuffix('-sig').upper()} ({error.reason} at byte {column})"
        raise ValueError(f"{path}:{line}: {what}; nearest valid: the file saved as UTF-8") from error
    if "\0" in text:
        line = len(_lines(text[: text.index("\0")]))
        raise ValueError(f"{path}:{line}: holds a NUL character; nearest valid: the file saved as UTF-8 text")
    return text


def _lines(text: str) -> list[str]:
    """Lines by CR, LF or both; other separators of Unicode belong to the text."""
    return re.split(r"\r\n|\r|\n", text)


# -------------------------------------------------------------------------------------------------------------- forms
def _of_text(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_lines(_text(path)), start=1):
        if line.lstrip().startswith("{") and isinstance(_maybe_json(line), dict):
            raise ValueError(f"{path}:{number}: a JSON object in a text; nearest valid: '{path.with_suffix('.jsonl')}'")
        if line.strip():
            yield f"{path}:{number}", line


def _of_json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_lines(_text(path)), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}", f"a line looks like {EXAMPLE}")


def _of_json(path: Path) -> Iterator[tuple[str, Record]]:
    found = _json(_text(path), str(path), "a file of one object a line is named .jsonl")
    if not isinstance(found, list):
        kind = (
            f"object of {listed(tuple(map(short, list(found)[:6])))}"
            if isinstance(found, dict)
            else type(found).__name__
        )
        raise ValueError(f"{path}: a JSON {kind}, not a list; nearest valid: [{EXAMPLE}]")
    for number, record in enumerate(found, start=1):
        yield f"{path}: item {number}", record


def _of_table(path: Path) -> Iterator[tuple[str, Record]]:
    """Rows as mappings from the header's names; a row has a cell for each."""
    rows = csv.reader(io.StringIO(_text(path), newline=""), delimiter=TABLES[path.suffix.lower()], strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            cells = next(rows, None)
        except csv.Error as error:
            what = f"not {path.suffix[1:].upper()} ({error})"
            raise ValueError(
                f'{where}: {what}; nearest valid: a cell with quotes written as "a ""quoted"" word"'
            ) from error
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = [name for name, times in Counter(header).items() if times > 1]
            if twice:
                raise ValueError(f"{where}: two columns are called {short(twice[0])}; nearest valid: names that differ")
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: {len(cells)} cells for {len(header)} columns; quote cells that hold a separator"
            )
        yield where, dict(zip(header, cells, strict=True))


def _of_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    """Rows of a parquet file, as the hub's datasets are kept; what a row leaves empty is not there."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install 'tempflow[parquet]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            told = file.metadata
            size = sum(told.row_group(i).total_byte_size for i in range(told.num_row_groups))
            if size > MAX_BYTES:
                raise ValueError(f"{path} holds {size} bytes; the largest valid size is {MAX_BYTES}; split the file")
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _plain_row(row, f"{path}: row {number}")
    except (ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not parquet, or damaged ({told}); nearest valid: the file fetched anew") from error


def _plain_row(row: dict[str, object], where: str) -> Record:
    """What JSON can say of a row. Raises ValueError for a column of pictures or other bytes."""
    for name, value in row.items():
        held = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(held, bytes):
            raise ValueError(
                f"{where}: column {short(name)} holds bytes, and prompts name files; nearest valid: a column of paths"
            )
    return {name: value for name, value in row.items() if value is not None}


def _of_folder(path: Path) -> Iterator[tuple[str, Record]]:
    left = MAX_BYTES
    for file in files_of(path):
        yield str(file), {"prompt": _text(file, left), "file": file.name}
        left -= file.stat().st_size


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
    ".txt": _of_text,
    ".jsonl": _of_json_lines,
    ".json": _of_json,
    ".csv": _of_table,
    ".tsv": _of_table,
    ".parquet": _of_parquet,
    "": _of_folder,
}
"""By suffix; a folder has none."""


def _json(text: str, where: str, hint: str) -> Record:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {hint}") from error


def _maybe_json(text: str) -> Record:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's pairs; json itself would keep the last of two with one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {short(twice)} is there twice")
    return found
