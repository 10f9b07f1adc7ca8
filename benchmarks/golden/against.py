"""Two trees of the library on one CPU: each trains every case in a process of its own, then all weights are compared.

The cases and what drives them are this tree's for both, so that they are the same; `library` knows what has moved.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tempflow
from benchmarks.golden import frozen
from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import drive

ROOT = Path(__file__).parents[2]
SECONDS = "seconds.txt"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def dump(folder: Path, names: Sequence[str]) -> int:
    """Writes the weights of each case to NAME.safetensors, in float32; why one failed, to NAME.txt. The status is 0.

    SECONDS has the processor time of all cases together, imports apart.
    """
    print(f"{Path(tempflow.__file__).parent}: {len(names)} cases", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    rates = {name: case["rate"] for name, case in frozen.read().items()}
    for name in names:
        try:
            outcome = drive(CASES[name], rates[name], torch.float32)
            loss = torch.tensor(outcome.loss, dtype=torch.float64)
            save_file({**outcome.weights, "loss": loss}, folder / f"{name}.safetensors")
        except Exception:
            (folder / f"{name}.txt").write_text(traceback.format_exc())
    (folder / SECONDS).write_text(str(time.process_time() - began))
    return 0


def compare(revision: str, names: Sequence[str]) -> int:
    """Prints, by case, whether that revision's weights are this tree's; 0 where all are, to the last bit."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for tree, name in ((_unpacked(revision, folder), "old"), (ROOT, "new")):
            _run(tree / "src", folder / name, names)
        told = {name: difference(folder / "old", folder / "new", name) for name in names}
    for name, line in told.items():
        print(f"{name}: {line or 'bitwise equal'}")
    bad = sum(line is not None for line in told.values())
    print(f"{len(names) - bad} of {len(names)} cases bitwise equal to {revision}")
    return int(bad > 0)


def race(revision: str, names: Sequence[str], pairs: int) -> int:
    """Prints the processor time of this tree over that revision's: the median of interleaved pairs, with quartiles.

    The golden model is so small that nearly all of it is what the library itself takes.
    """
    ratios = list[float]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        trees = {"old": _unpacked(revision, folder), "new": ROOT}
        for pair in range(pairs + 1):
            for name in ("old", "new") if pair % 2 else ("new", "old"):
                _run(trees[name] / "src", folder / name, names)
            old, new = (float((folder / name / SECONDS).read_text()) for name in ("old", "new"))
            ratios += [new / old] if pair else []  # the first pair finds cold disks
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{len(names)} cases, {pairs} pairs: {middle:.3f} of {revision}'s time ({low:.3f} … {high:.3f})")
    return 0


def _unpacked(revision: str, folder: Path) -> Path:
    """A tree with that revision's `src`."""
    packed = subprocess.run(["git", "archive", revision, "src"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder / "before", filter="data")
    return folder / "before"


def _run(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Dumps the cases with the library in `source`, and the cases of this tree."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)])}
    words = [sys.executable, "-P", "-m", "benchmarks.golden", "--dump", str(folder), "--only", *names]
    subprocess.run(words, cwd=ROOT, env=environment, check=True)


def difference(old: Path, new: Path, name: str) -> str | None:
    """How a case's dumps differ; None where every bit is the same."""
    for which, folder in (("before", old), ("now", new)):
        fault = folder / f"{name}.txt"
        if fault.exists():
            return f"cannot be run {which}: {fault.read_text().strip().splitlines()[-1]}"
    before, now = (load_file(folder / f"{name}.safetensors") for folder in (old, new))
    if before.keys() != now.keys():
        return f"weight sets {sorted(before)} before, {sorted(now)} now"
    apart = {key: _apart(before[key], now[key]) for key in before if not _same(before[key], now[key])}
    return "; ".join(f"{key} apart by {size:.2g}" for key, size in apart.items()) or None


def _same(a: Tensor, b: Tensor) -> bool:
    """To the last bit: NaN is NaN, and −0 is not 0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _apart(a: Tensor, b: Tensor) -> float:
    return float("inf") if a.shape != b.shape else float((a.double() - b.double()).abs().max())
