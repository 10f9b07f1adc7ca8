"""Where results go. A verb writes only into a folder that it made, that was empty, or that carries its mark; it
replaces and deletes only what it wrote itself.

One process at a time writes into a folder: whoever does holds its lock, the file `.lock` (`held`).

A folder's mark is the file `.tempflow.json`, which names what the folder is: `{"tempflow": "run"}`. A sealed folder,
one that is replaced as a whole, lists its files and their contents there too. A single file of ours says so in its
first lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

MARKER = ".tempflow.json"
PIPELINE = "model_index.json"
"""By which a folder of diffusers is known."""

REPLACED = ("model", "checkpoints")
"""Folders in a run's that the run deletes and writes anew."""

FILE_MARKS = (b'"generator": "tempflow"', b'name="generator" content="tempflow"', b"# generator: tempflow")
"""What a JSON file, a page or a configuration of ours has in its first `HEAD` bytes."""

LOCK = ".lock"
"""Held while a process writes into a folder; the system lets go of it when the process ends, however it ends."""

ASKING = 2.0
"""Seconds that `check_idle` gives others that ask at the same time, each for a moment."""

HEAD = 1024
MAX_BYTES = 2**24
"""Of a marker."""


# -------------------------------------------------------------------------------------------------------------- folders
def check(path: str | Path, kind: str | None, field: str = "output") -> None:
    """Raises ValueError, naming `field` and the nearest valid path, unless `claim` would take the folder.

    path   may be missing, empty, or marked as a folder of this kind
    kind   "run", "samples", …; None: only a missing or empty folder will do

    Changes nothing, so it can be called before expensive work.
    """
    place = Path(path)
    _check_above(place, field)
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        what = "is a file" if place.exists() else "is a link to nothing"
        raise ValueError(f"{field}: {str(path)!r} {what}; nearest valid: {free(place)!r}")
    if kind is not None and kind_of(place) == kind:
        return
    names = contents(place, field)
    if names:
        listed = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        why = f"it holds {listed}" + ("" if kind is None else f", and has no {MARKER} of a {kind} folder")
        raise ValueError(f"{field}: {str(path)!r} is not empty; nearest valid: {free(place)!r} ({why})")


def claim(path: str | Path, kind: str, field: str = "output") -> Path:
    """Makes the folder, if need be, and marks it as one of `kind`. Returns it.

    Raises ValueError as `check` does, and where the folder cannot be written.
    """
    place = Path(path)
    check(place, kind, field)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if kind_of(place) != kind:
            _mark(place, {"tempflow": kind})
    except OSError as error:
        raise ValueError(f"{field}: {str(path)!r} cannot be written ({error}); choose another folder") from error
    return place


@contextmanager
def held(path: str | Path, field: str = "output", wait: float = 0.0) -> Iterator[Path]:
    """While it lasts no other process that asks has the folder, which is there (`claim`). Gives the folder.

    Of a run's ranks the first alone asks. The file that is locked stays behind; it holds nobody up. Raises ValueError,
    naming `field`, where another process is at work in the folder for more than `wait` seconds, or the folder cannot be
    written.
    """
    place = Path(path)
    lock = FileLock(place / LOCK, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{field}: another process is at work in {str(path)!r}; wait until it has ended, or choose another folder, "
            f"such as {free(place)!r}"
        ) from None
    except OSError as error:
        raise ValueError(f"{field}: {str(path)!r} cannot be written ({error}); choose another folder") from error
    try:
        yield place
    finally:
        lock.release()


def check_idle(path: str | Path, field: str = "output") -> None:
    """Raises ValueError as `held` does, before expensive work, where another process is at work in the folder now.
    Several processes that only ask, as the ranks of a run do, are not in each other's way."""
    if (Path(path) / LOCK).is_file():
        with held(path, field, ASKING):
            pass


def kind_of(path: Path) -> str | None:
    """What the folder's mark says that it is; None without a mark."""
    kind = _marker(path).get("tempflow")
    return kind if isinstance(kind, str) else None


def contents(path: Path, field: str = "output") -> list[str]:
    """Names in a folder, sorted, its mark left out. Raises ValueError for a folder that cannot be read."""
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.name != MARKER)
    except OSError as error:
        raise ValueError(f"{field}: {str(path)!r} cannot be read ({error}); choose another folder") from error


def remove(path: str | Path, kind: str, field: str = "output") -> None:
    """Deletes a folder that is marked as one of `kind`, or is empty; nothing is done where there is none.

    Raises ValueError for any other.
    """
    place = Path(path)
    check(place, kind, field)
    if place.is_symlink():
        raise ValueError(f"{field}: {str(path)!r} is a link, which is not followed; nearest valid: {free(place)!r}")
    if place.exists():
        shutil.rmtree(place)


# ------------------------------------------------------------------------------------------------------- sealed folders
def seal(folder: Path, kind: str) -> None:
    """Marks a finished folder as one of `kind` and lists its files, so that `put` may take it away as a whole.

    Reads all of them once, for their sums.
    """
    _mark(folder, {"tempflow": kind, "files": {name: _noted(folder / name) for name in _files(folder)}})


def foreign(path: Path) -> str | None:
    """What in the way of `put` was not written by us, or was changed since: a path in the folder, or the folder itself;
    None: nothing is."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        return path.name
    ours = _marker(path).get("files")
    known = ours if isinstance(ours, dict) else {}
    return next((f"{path.name}/{name}" for name in _files(path) if not _is_noted(path / name, known.get(name))), None)


def put(fresh: Path, target: Path) -> None:
    """Puts the sealed folder `fresh` in the place of `target`, of which there is never half.

    Raises ValueError where `target` holds something that we did not write; it is left as it is then.
    """
    fault = foreign(target)
    if fault is not None:
        raise ValueError(f"{target.parent / fault} was not written by tempflow and is not replaced; move it away")
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- single files
def check_file(path: str | Path, field: str = "output") -> None:
    """Raises ValueError, naming `field` and the nearest valid path, unless the file is new or one of ours.

    A device such as /dev/stdout is fine: writing replaces nothing there.
    """
    place = Path(path)
    _check_above(place, field)
    if place.is_dir():
        raise ValueError(f"{field}: {str(path)!r} is a folder, no place for a file; nearest valid: {free(place)!r}")
    if place.is_symlink() and not place.exists():
        raise ValueError(f"{field}: {str(path)!r} is a link to nothing; nearest valid: {free(place)!r}")
    if place.is_file() and place.stat().st_size and not _is_ours(place):
        raise ValueError(
            f"{field}: {str(path)!r} was not written by tempflow and is not replaced; nearest valid: {free(place)!r}"
        )


def write_file(path: str | Path, text: str, field: str = "output") -> Path:
    """Writes a text that has one of `FILE_MARKS` in its head; makes the folders above. A file is written whole or not
    at all, whoever else writes it. Raises ValueError as `check_file` does."""
    place = Path(path)
    assert any(mark in text[:HEAD].encode() for mark in FILE_MARKS)
    check_file(place, field)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and not place.is_file():  # a device
        place.write_text(text, encoding="utf-8")
        return place
    target = place.resolve()  # a link stays one
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
    return place


def write_json(path: str | Path, value: dict[str, Any], field: str = "output") -> Path:
    """`value` as JSON that says who wrote it. See `write_file`."""
    return write_file(path, json.dumps({"generator": "tempflow", **value}, indent=1) + "\n", field)


# ---------------------------------------------------------------------------------------------------------------- parts
def free(path: Path) -> str:
    """A path like this one where nothing is yet, outside every folder that is not to be written into."""
    place = path if path.name not in ("", "..") else path.resolve()
    home = _closed(place)
    if home is not None:
        place = home.with_name(f"{home.name}-{place.name}")
        if not os.path.lexists(place):
            return str(place)
    if not place.name:  # the root of the file system
        return "runs/new"
    suffix = place.suffix if place.is_file() else ""
    stem = place.name.removesuffix(suffix)
    return next(str(p) for n in count(2) if not os.path.lexists(p := place.with_name(f"{stem}-{n}{suffix}")))


def _check_above(path: Path, field: str) -> None:
    """Raises ValueError for a path inside a file, a model's folder, or what a run deletes and writes anew."""
    closed = _closed(path)
    if closed is not None:
        raise ValueError(
            f"{field}: {str(path)!r} lies in {str(closed)!r}, which is not to be written into; "
            f"nearest valid: {free(path)!r}"
        )
    for above in path.absolute().parents:
        if os.path.lexists(above):
            if not above.is_dir():
                raise ValueError(
                    f"{field}: {str(path)!r} cannot be written ([Errno 20] Not a directory: {str(above)!r}); "
                    "choose another folder"
                )
            return


def _closed(path: Path) -> Path | None:
    """The folder around `path` that others than its writer must leave as it is; None where there is none."""
    place = path.resolve()
    for above in place.parents:
        if (above / PIPELINE).is_file() or "files" in _marker(above):
            return above
        inside = place.relative_to(above).parts
        if inside[0] in REPLACED and kind_of(above) == "run":
            return above / inside[0]
    return None


def _marker(folder: Path) -> dict[str, Any]:
    """What the folder's mark says; empty without one that can be read."""
    file = folder / MARKER
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return {}
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(folder: Path, said: dict[str, Any]) -> None:
    (folder / MARKER).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> Iterator[str]:
    """Paths inside the folder of all files and links in it, its mark left out. Links are not followed."""
    for place, names, files in os.walk(folder):
        names.sort()
        linked = [name for name in names if Path(place, name).is_symlink()]
        for name in sorted([*files, *linked]):
            file = Path(place, name)
            inside = file.relative_to(folder).as_posix()
            if inside != MARKER:
                yield inside


def _noted(file: Path) -> dict[str, Any]:
    """What a seal says of a file."""
    found = file.lstat()
    return {"bytes": found.st_size, "time": found.st_mtime_ns, "sha256": _sha256(file)}


def _is_noted(file: Path, noted: object) -> bool:
    """Whether a file is what the seal says of it. Its bytes are read only where its time is another, as in a copy.

    Seals of old say a size alone.
    """
    if file.is_symlink():
        return False
    found = file.stat()
    if not isinstance(noted, dict):
        return found.st_size == noted
    if found.st_size != noted.get("bytes"):
        return False
    return found.st_mtime_ns == noted.get("time") or _sha256(file) == noted.get("sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_ours(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    return any(mark in head for mark in FILE_MARKS)
