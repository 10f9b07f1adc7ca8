"""Where prompts come from: a split of the embedded `shapes` world, a text file, or a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from tempflow.shapes.prompts import SPLITS, specs

SHAPES = "shapes:"
SUFFIXES = (".txt", ".jsonl")
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Prompt:
    """A prompt and what else its line said (for rewards; "kind", where all have it, balances the draws)."""

    text: str
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])


def check_source(source: str) -> None:
    """Raises ValueError, naming the nearest valid source, unless `source` is "shapes:SPLIT", *.txt or *.jsonl.

    Looks at the name only, so that a configuration can be checked on a machine that lacks the files.
    """
    if source.startswith(SHAPES):
        split = source.removeprefix(SHAPES)
        if split not in SPLITS:
            nearest = get_close_matches(split, SPLITS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{source!r} names no split of the shapes world; nearest valid: '{SHAPES}{nearest}'")
    elif not source.endswith(SUFFIXES):
        nearest = f"{source.rpartition('.')[0] or source or 'prompts'}.txt"
        raise ValueError(f"{source!r} is neither 'shapes:SPLIT' nor a .txt or .jsonl file; nearest valid: {nearest!r}")


def load_prompts(source: str, root: str | Path = ".") -> tuple[Prompt, ...]:
    """All prompts of a source, in its order.

    source   "shapes:train" | "shapes:validation" | "shapes:test", whose metadata is {"kind": the task kind};
             a .txt file, one prompt a line; or a .jsonl file of {"prompt": …}, other keys becoming metadata.
             UTF-8, at most 64 MiB; blank lines are skipped
    root     folder that a relative path starts from

    Raises ValueError for another kind of source, a missing, oversized or empty file, and a line that cannot be read
    (named as file:line).
    """
    check_source(source)
    if source.startswith(SHAPES):
        split = next(s for s in SPLITS if s == source.removeprefix(SHAPES))
        return tuple(Prompt(spec.prompt, {"kind": spec.kind}) for spec in specs(split))
    path = Path(root) / source
    _check_file(path)
    prompts = tuple(_parse(path, number, line) for number, line in _lines(path))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; a file needs at least one line")
    return prompts


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is no file; {nearest_file(path, SUFFIXES)}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; the largest valid size is {MAX_BYTES}; split the file")


def nearest_file(path: Path, suffixes: tuple[str, ...]) -> str:
    """A hint for a missing file: the existing one with the likeliest name in the folder where it was looked for."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and p.suffix in suffixes)
    if not names:
        return f"{path.parent} holds no {' or '.join(suffixes)} file"
    return f"nearest valid: {path.parent / get_close_matches(path.name, names, n=1, cutoff=0.0)[0]}"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of the lines that are not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from error
            if line:
                yield number, line


def _parse(path: Path, number: int, line: str) -> Prompt:
    if path.suffix == ".txt":
        return Prompt(line)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        example = '{"prompt": "a red circle"}'
        raise ValueError(f"{path}:{number}: not JSON ({error}); a line looks like {example}") from error
    if not isinstance(record, dict):
        raise ValueError(f'{path}:{number}: a JSON {type(record).__name__}, not an object with a "prompt"')
    if "prompt" not in record:
        near = get_close_matches("prompt", [str(k) for k in record], n=1)
        raise ValueError(f'{path}:{number}: no "prompt"' + (f"; did you mean {near[0]!r}?" if near else ""))
    text = record.pop("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{path}:{number}: "prompt" is {text!r}; it must be a text that is not blank')
    return Prompt(text.strip(), record)
