"""A whole iteration of the demo against an earlier revision, every side in turn in one run.

    python -m benchmarks.iteration [--before REVISION] [--dtypes float32 bfloat16] [--guidance 1 2] [--threads 1]

Sides: the earlier revision's source as it stood, this one, and this one with `model.compile`. Each round runs all of
them, a fresh process each; an iteration's seconds are those of its phases, the first iteration of a run left out, and
compiling apart. The first round compiles into an empty cache, later ones find it there. Prints medians, ratios to the
earlier revision, and bfloat16 over float32. How far the loop is from the bare network: benchmarks/floor.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.loaded import PHASES

BEFORE = "4b026bb"
"""The revision before compiled blocks were made fit for the loop."""


@dataclass(frozen=True)
class Side:
    """What is timed: its name, the source it runs, and what it adds to the command."""

    name: str
    source: Path
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def source_of(revision: str, folder: Path) -> Path:
    """That revision's package, unpacked into `folder`."""
    packed = subprocess.run(["git", "archive", revision, "src"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def lines_of(side: Side, dtype: str, guidance: float, a: argparse.Namespace, out: Path) -> list[dict[str, float]]:
    """The timings of one run's iterations."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["train", "demo", "--output", str(out), "--threads", str(a.threads), "--iterations", str(a.iterations + 1)]
    words += ["--model.dtype", dtype, "--model.guidance", f"{guidance:g}", "--checkpoint.every", "1000"]
    words += ["--evaluation.every", "0", "--evaluation.validation-prompts", "6", "--evaluation.test-prompts", "6"]
    words += ["--evaluation.yardstick", "[]", "--rollout-rows", "144", *side.words]  # all pictures of an iteration
    environment = {**os.environ, **side.environment, "PYTHONPATH": str(side.source)}
    done = subprocess.run(
        [sys.executable, "-m", "tempflow.cli", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{side.name}: {done.stderr.strip()[-500:]}")
    lines = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    return [line for line in lines if "rollout" in line]


def measured(sides: list[Side], dtype: str, guidance: float, a: argparse.Namespace, out: Path) -> dict[str, float]:
    """Prints the sides' figures; returns the median seconds of an iteration of each."""
    took: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    compiling: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(a.rounds):
        for side in sides:
            lines = lines_of(side, dtype, guidance, a, out)
            took[side.name] += lines[1:]
            compiling[side.name].append(sum(line.get("compile", 0.0) for line in lines))
    print(f"\n{dtype}, guidance {guidance:g}, {a.threads} threads: seconds of an iteration, median of {a.rounds} runs")
    whole: dict[str, float] = {}
    for side in sides:
        each = {phase: statistics.median(line.get(phase, 0.0) for line in took[side.name]) for phase in PHASES}
        whole[side.name] = statistics.median(sum(line.get(p, 0.0) for p in PHASES) for line in took[side.name])
        told = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in each.items())
        ratio = whole[sides[0].name] / whole[side.name]
        first, *later = compiling[side.name]
        made = f"; compiled in {first:.0f} s, from its cache in {statistics.median(later or [first]):.1f} s"
        print(f"  {side.name}: {whole[side.name]:.2f} ({told}): {ratio:.3f}x{made if first else ''}", flush=True)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 2.0])
    for name, value in (("threads", 1), ("iterations", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        before, now = source_of(a.before, folder), Path("src").resolve()
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        sides = [
            Side(f"at {a.before}", before),
            Side("now", now),
            Side("now, compiled", now, ("--model.compile", "true"), cache),
        ]
        took = {
            (dtype, guidance): measured(sides, dtype, guidance, a, folder / "run")
            for dtype in a.dtypes
            for guidance in a.guidance
        }
    for guidance in a.guidance if len(a.dtypes) == 2 else ():
        for side in sides:
            half, single = (took[dtype, guidance][side.name] for dtype in ("bfloat16", "float32"))
            print(f"bfloat16 / float32, guidance {guidance:g}, {side.name}: {half / single:.2f} of the time")


if __name__ == "__main__":
    main()
