"""Checkpoints: everything that a run is, written so that no moment of dying can spoil it.

A checkpoint is a folder `RUN/checkpoints/000040` of safetensors and JSON files and a manifest of their sha256 sums. A
role's tensors lie in a folder of its name: `policy/weights`, its optimizer, its other weight sets. All is written to a
temporary folder, flushed to disk file by file, and renamed into place; then, if it is the best, the pointer `best` is
renamed over the old one. Reading checks every sum once; a folder that does not match is never used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tempflow.algorithms.lesson import POLICY

FOLDER, MANIFEST, STATE = "checkpoints", "manifest.json", "state.json"
BEST = "best"
WEIGHTS, AVERAGE, OPTIMIZER = (f"{POLICY}/{name}" for name in ("weights", "ema", "optimizer"))
"""Names of the policy's files, without suffix; other roles have theirs in folders of their own."""

_SETS = {"policy": WEIGHTS, "ema": AVERAGE}

FORMAT = 3
READS = (2, 3)
"""Formats that are read: 2 had one role, and its facts outside `roles`."""

MAX_JSON_BYTES = 2**28


class CheckpointError(ValueError):
    """There is no checkpoint that can be used; the message says what was found."""


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint that was read and checked: its folder, the JSON state, and tensors by file (without suffix)."""

    path: Path
    state: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def save(
    run: Path,
    iteration: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    best: bool,
    keep: int,
    first: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint, and points to it if it is the best; then removes all but the `keep` newest and the best.

    `tensors`: file name (without suffix, `ROLE/NAME` or `NAME`) → tensors. Sharded ones are written by all ranks, the
    rest by the first, which alone copies them to the CPU, a file at a time. All ranks call this, with
    whether they are the `first` and how to `wait` for all. Returns the folder. Raises OSError when the disk does not
    take it; older checkpoints are untouched then.
    """
    root = run / FOLDER
    target = root / f"{iteration:06d}"
    temporary = root / f".{target.name}.new"
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait()
    try:
        for name, part in tensors.items():
            file = temporary / f"{name}.safetensors"
            if first:
                file.parent.mkdir(exist_ok=True)
            if any(isinstance(t, DTensor) for t in part.values()):
                save_sharded(part, file, first, wait)
            elif first:
                save_file({k: v.detach().cpu().contiguous() for k, v in part.items()}, file)
        if first:
            _finish(temporary, target, {"format": FORMAT, "iteration": iteration, **state})
            if best:
                _point(root, BEST, target.name)
            _remove_old(root, keep)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    wait()
    return target


class Writer:
    """Writes checkpoints, one at a time: while the run waits, or, `behind`, while its next iteration runs. Behind, the
    tensors are copied to the CPU first, and a fault is raised by the next `save` or `settle`."""

    def __init__(self, behind: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if behind else None
        self._pending: Future[Path] | None = None

    def save(
        self,
        run: Path,
        iteration: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: bool,
        keep: int,
        first: bool = True,
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        """See `save` of this module."""
        self.settle()
        if self._pool is None:
            save(run, iteration, tensors, state, best=best, keep=keep, first=first, wait=wait)
            return
        held = {file: {n: t.detach().to("cpu", copy=True) for n, t in part.items()} for file, part in tensors.items()}
        told = copy.deepcopy(dict(state))
        self._pending = self._pool.submit(save, run, iteration, held, told, best=best, keep=keep)

    def settle(self) -> None:
        """Waits for what is being written. Raises OSError when the disk did not take it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread; a fault is nobody's any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def _finish(temporary: Path, target: Path, state: Mapping[str, Any]) -> None:
    """State and manifest, everything flushed, renamed into place."""
    (temporary / STATE).write_text(json.dumps(state) + "\n")
    paths = sorted(temporary.rglob("*"))
    files = {p.relative_to(temporary).as_posix(): p for p in paths if p.is_file()}
    sums = {name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for name, p in files.items()}
    (temporary / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")
    for path in (*paths, temporary / MANIFEST, temporary):
        _flush(path)
    if os.path.lexists(target):  # the same iteration, written by the run that was resumed before it
        if not _is_ours(target):
            raise OSError(f"{target} is no checkpoint of this run and is not replaced; move it away")
        target.rename(_aside(target))
    temporary.rename(target)
    _flush(target.parent)


def save_sharded(tensors: Mapping[str, Tensor], file: Path, first: bool, wait: Callable[[], None]) -> None:
    """Every rank writes its parts by torch's distributed checkpoint, as safetensors; then they are made one file."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    folder = file.with_suffix(".parts")
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True, enable_consolidation=True)
    save_parts(dict(tensors), storage_writer=writer)
    wait()
    if first:
        (whole,) = folder.glob("*.safetensors")
        whole.rename(file)
        shutil.rmtree(folder)
    wait()


def newest(run: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The newest checkpoint that is whole; `say` is told of each one that is not and therefore passed over.

    Raises CheckpointError, naming what is there, when none is.
    """
    root = run / FOLDER
    found = sorted((p for p in root.glob("*") if _is_name(p.name)), reverse=True) if root.is_dir() else []
    for path in found:
        fault = damage(path)
        if fault is None:
            return path
        say(f"checkpoint {path} is damaged ({fault}); the one before it is used")
    if found:
        raise CheckpointError(f"{run}: all {len(found)} checkpoints are damaged; nothing to resume from")
    there = ", ".join(sorted(p.name for p in run.iterdir())[:8]) if run.is_dir() else "no such folder"
    raise CheckpointError(f"{run} holds no checkpoint ({there}); nearest valid: a run's folder, such as runs/demo")


def pointed(run: Path, pointer: str) -> Path | None:
    """The checkpoint that `best` names; None where there is none, or it is damaged."""
    file = run / FOLDER / pointer
    if not file.is_file():
        return None
    name = file.read_text().strip()
    path = run / FOLDER / name
    return path if _is_name(name) and damage(path) is None else None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when every byte is as it was written."""
    try:
        sums = json.loads(_bounded(path / MANIFEST))
        for name, want in sums.items():
            file = path / name
            if not (file.is_file() and file.resolve().is_relative_to(path.resolve())):
                return f"{name} is missing"
            if file.stat().st_size != want["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {want['bytes']}"
            if sha256(file) != want["sha256"]:
                return f"{name} has another sha256"
        if STATE not in sums:
            return f"{STATE} is not in the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error}"
    return None


def read_newest(run: Path, say: Callable[[str], None] = lambda line: None) -> Saved:
    """State and tensors of `newest`, whose sums are not checked again."""
    return _read(newest(run, say))


def read(path: Path) -> Saved:
    """A checkpoint's state and tensors. Raises CheckpointError when it is damaged or of another format."""
    _check(path)
    return _read(path)


def _check(path: Path) -> None:
    fault = damage(path)
    if fault is not None:
        raise CheckpointError(f"{path} is damaged: {fault}")


def _read(path: Path) -> Saved:
    state = json.loads(_bounded(path / STATE))
    if state.get("format") not in READS:
        raise CheckpointError(f"{path} has format {state.get('format')}; this version reads {FORMAT}")
    if state["format"] == 2:
        facts = {"followers": {}, "average_updates": 0, "loss_scale": [1.0, 0]}
        state["roles"] = {POLICY: {name: state.get(name, value) for name, value in facts.items()}}
    files = {p.relative_to(path).with_suffix("").as_posix(): p for p in sorted(path.rglob("*.safetensors"))}
    try:
        tensors = {name: load_file(file) for name, file in files.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Saved(path, state, tensors)


def read_weights(path: Path, which: str) -> dict[str, Tensor]:
    """Float32 weights of the policy by parameter name: "policy", its average "ema", or "best", which is what the run
    evaluates by ("ema" if there is one). Raises CheckpointError for a damaged checkpoint and ValueError for another
    set."""
    _check(path)
    return _weights(path, which)


def _weights(path: Path, which: str) -> dict[str, Tensor]:
    there = {name: file for name, file in _SETS.items() if (path / f"{file}.safetensors").is_file()}
    name = ("ema" if "ema" in there else "policy") if which == "best" else which
    if name not in there:
        raise ValueError(f"weights: {which!r} is not in {path}; nearest valid: {', '.join([*there, 'best'])}")
    return load_file(path / f"{there[name]}.safetensors")


def best_weights(run: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """A run's best weights so far; `say` is told when they are not there and those of the newest whole checkpoint stand
    in. Raises CheckpointError when it has none."""
    path = pointed(run, BEST)
    if path is None:
        say("the best checkpoint is damaged or missing: the newest whole one is used")
    return _weights(newest(run, say) if path is None else path, "best")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bounded(path: Path) -> str:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def _is_name(name: str) -> bool:
    return re.fullmatch(r"\d{6,}", name) is not None


def _point(root: Path, pointer: str, name: str) -> None:
    temporary = root / f".{pointer}"
    temporary.write_text(name + "\n")
    _flush(temporary)
    temporary.replace(root / pointer)
    _flush(root)


def _remove_old(root: Path, keep: int) -> None:
    best = root / BEST
    kept = {best.read_text().strip()} if best.is_file() else set[str]()
    names = sorted(p.name for p in root.iterdir() if _is_ours(p))
    for name in names[:-keep]:
        if name not in kept:
            (root / name).rename(_aside(root / name))
    for leftover in root.glob(".[0-9]*"):  # these, and those of a run that died while it wrote or removed
        if re.fullmatch(r"\.\d{6,}\.(new|old)", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether it is a checkpoint, whole or not; what else somebody has put there is left alone."""
    return _is_name(path.name) and (path / MANIFEST).is_file() and not path.is_symlink()


def _aside(path: Path) -> Path:
    """A free name for what is to be removed: if that is cut short, no half checkpoint bears the name of a whole one."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
