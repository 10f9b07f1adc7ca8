"""A loaded machine: an iteration on `shapes` alone and beside busy processes; threads that wait as ours do, or spin.

    python -m benchmarks.loaded [--threads 2] [--busy 2] [--iterations 5] [--prompts 6] [--rounds 3]

Needs a machine of its own with as many cores as threads: it is about wall time. Threads that wait for each other spin
for a moment, then sleep (`tempflow.WAITING`); "spinning" is what OpenMP did before, by its own default of 300 000
turns. Quiet runs of both are made in turn; the busy ones of spinning only with --spinning, as they take minutes. Prints
medians over iterations, the first of a run left out, and two ratios: loaded to quiet, and quiet to quiet spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

OURS: Mapping[str, str] = {}
SPINNING: Mapping[str, str] = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
PHASES = ("rollout", "decode", "reward", "signals", "train")


def seconds(a: argparse.Namespace, waiting: Mapping[str, str], busy: int) -> list[float]:
    """Of the iterations of one run, after the first."""
    shutil.rmtree(a.out, ignore_errors=True)
    words = [
        "train",
        "shapes_tempflow",
        "--output",
        str(a.out),
        "--threads",
        str(a.threads),
        "--model.dtype",
        "float32",
    ]
    words += ["--iterations", str(a.iterations + 1), "--data.prompts-per-iteration", str(a.prompts)]
    words += ["--evaluation.every", "0", "--evaluation.validation-prompts", "6", "--evaluation.test-prompts", "6"]
    words += ["--checkpoint.every", "1000"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        subprocess.run(
            [sys.executable, "-m", "tempflow.cli", *words],
            check=True,
            env={**kept, **waiting},
            stdout=subprocess.DEVNULL,
        )
    finally:
        for process in beside:
            process.kill()
            process.wait()
    lines = [json.loads(line) for line in (a.out / "timings.jsonl").read_text().splitlines()]
    return [sum(line[phase] for phase in PHASES) for line in lines if "rollout" in line][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("threads", 2), ("busy", 2), ("iterations", 5), ("prompts", 6), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--spinning", action="store_true", help="load the machine beside spinning threads too")
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/loaded"))
    a = parser.parse_args()
    ours, spinning, loaded = list[float](), list[float](), list[float]()
    for _ in range(a.rounds):
        ours += seconds(a, OURS, 0)
        spinning += seconds(a, SPINNING, 0)
        loaded += seconds(a, OURS, a.busy)
    quiet, was, now = (statistics.median(s) for s in (ours, spinning, loaded))
    print(f"quiet: {quiet:.2f} s an iteration by our waiting, {was:.2f} s spinning: {quiet / was:.3f} times")
    print(f"with {a.busy} busy processes: {now:.2f} s, {now / quiet:.2f} times the quiet time")
    if a.spinning:
        then = statistics.median(seconds(a, SPINNING, a.busy))
        print(f"with {a.busy} busy processes: {then:.2f} s spinning, {then / was:.2f} times the quiet time")


if __name__ == "__main__":
    main()
