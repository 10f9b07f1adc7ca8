"""Embeddings of prompts: kept in memory, and on disk where a folder is given, each bounded in bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

Row = Mapping[str, Tensor]
"""What one prompt was encoded to: tensors [L, …] or [d] by name, on the CPU."""

MEMORY = 8 << 30
"""Bytes of embeddings kept in memory: 3 000 prompts of SD 3.5 in bfloat16 (2.7 MB each)."""

MARK = ".tempflow-embeddings"
"""The file that says whose folder it is."""

SUFFIX = ".safetensors"

SUM = re.compile("[0-9a-f]{64}")


@dataclass(eq=False)
class Embeddings:
    """Rows by key, the oldest dropped first once they take more than `memory` bytes, on disk (1/64 over) `disk`.

    folder   where rows are kept for other runs and ranks; None: in memory alone
    content  what every row there depends on beside its key: the encoders' weights, libraries, dtype (`digest`)

    Any number of processes may share a folder: a file is written under a name of its own and then renamed, and one that
    cannot be read is made anew. Raises ValueError where the folder holds files that no cache of ours wrote.
    """

    memory: int = MEMORY
    folder: Path | None = None
    content: str = ""
    disk: int = 64 << 30
    _rows: dict[str, Row] = field(init=False, default_factory=dict[str, Row])
    _written: int = field(init=False, default=0)  # bytes since the folder was last looked over

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder = self.folder.expanduser()
        mark = self.folder / MARK
        # the mark is looked for last: another process may be making the folder, and the mark is what it makes first
        full = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if full and not mark.exists():
            raise ValueError(
                f"model.cache: {str(self.folder)!r} holds something else; nearest valid: a new or empty folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        self._bound(self.folder)

    def rows(
        self,
        keys: Sequence[str],
        encode: Mapping[str, Callable[[], Row]],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Row]:
        """The rows of those keys; `encode` makes the ones that are nowhere yet, each once, in the keys' order, inside
        one `around`."""
        found = {key: self._rows.pop(key) if key in self._rows else self._from_disk(key) for key in dict.fromkeys(keys)}
        with nullcontext() if all(row is not None for row in found.values()) else around():
            kept = {key: self._made(key, encode[key]) if row is None else row for key, row in found.items()}
        self._rows |= kept  # the newest last
        held = sum(map(_bytes, self._rows.values()))
        for oldest in list(self._rows):
            if held <= self.memory:
                break
            held -= _bytes(self._rows.pop(oldest))
        return [kept[key] for key in keys]

    def _made(self, key: str, encode: Callable[[], Row]) -> Row:
        row = {name: tensor.detach().cpu().contiguous() for name, tensor in encode().items()}
        self._to_disk(key, row)
        return row

    def clear(self) -> None:
        """Forgets what is in memory, and the folder: the encoders have changed."""
        self._rows, self.folder = {}, None

    def __len__(self) -> int:
        """Rows in memory."""
        return len(self._rows)

    def _file(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(f"{self.content}\0{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def _from_disk(self, key: str) -> Row | None:
        file = self._file(key)
        if file is None:
            return None
        try:
            # opened once: another process may delete it at any moment, and torch, opening again, says RuntimeError
            row = load(file.read_bytes())
            os.utime(file)  # the least used go first
        except (SafetensorError, OSError, ValueError):
            return None
        return row

    def _to_disk(self, key: str, row: Row) -> None:
        file = self._file(key)
        if file is None or self.folder is None or not all(bool(t.isfinite().all()) for t in row.values()):
            return
        file.parent.mkdir(exist_ok=True)
        with NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            place = Path(part.name)
        try:
            save_file(dict(row), place)
            place.replace(file)
        finally:
            place.unlink(missing_ok=True)
        self._written += _bytes(row)
        if self._written > self.disk // 64:
            self._bound(self.folder)

    def _bound(self, folder: Path) -> None:
        """Deletes the files of ours that were not used for longest, down to `disk` bytes."""
        self._written = 0
        known: list[tuple[float, int, Path]] = []
        for file in folder.glob(f"??/*{SUFFIX}"):
            with suppress(OSError):  # another process has just deleted it
                told = file.stat()
                known.append((told.st_mtime, told.st_size, file))
        over = sum(size for _, size, _ in known) - self.disk
        for _, size, file in sorted(known):
            if over <= 0:
                return
            file.unlink(missing_ok=True)
            over -= size


def _bytes(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())


def digest(folder: Path, parts: Sequence[str], facts: Sequence[object]) -> str:
    """What embeddings of a pipeline's folder depend on: every file of those parts, by content, and `facts`.

    A file of the hub's cache is a link to one that is called by its sum, which saves reading it.
    """
    total = hashlib.sha256()
    for part in sorted(parts):
        for file in sorted(p for p in (folder / part).rglob("*") if p.is_file()):
            sum_of = file.resolve().name
            if not (file.is_symlink() and SUM.fullmatch(sum_of)):
                with file.open("rb") as opened:
                    sum_of = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{part}/{file.name}\0{sum_of}\0".encode())
    total.update(repr([str(fact) for fact in facts]).encode())
    return total.hexdigest()


def stacked(rows: Sequence[Row], beside: Sequence[Row] = ()) -> dict[str, Tensor]:
    """[N, …] by name; what is shorter than the longest of `rows` and `beside` ends in zeros (False, in a mask)."""
    return {
        name: torch.stack([_padded(row[name], [r[name].shape for r in (*rows, *beside)]) for row in rows])
        for name in rows[0]
    }


def _padded(tensor: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
    longest = [max(sides) for sides in zip(*shapes, strict=True)]
    if list(tensor.shape) == longest:
        return tensor
    out = tensor.new_zeros(longest)
    out[tuple(slice(side) for side in tensor.shape)] = tensor
    return out
