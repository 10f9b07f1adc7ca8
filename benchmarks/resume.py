"""Kills one run with SIGKILL at random moments, resumes it each time, and compares it with the uninterrupted run.

    python -m benchmarks.resume --output runs/resume [--kills 20] [--iterations 60] [--seed 0]

A checkpoint is written after every iteration, so that many kills fall into saving. Both runs are on `shapes`, one
thread each. Prints at what each kill struck, and whether metrics, evaluations, step-wise credit, weights, optimizer
and pictures are equal bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tempflow.folder import remove
from tempflow.train import checkpoint

FILES = ("metrics.jsonl", "evaluation.jsonl", "steps.jsonl", "samples.json", "before_after.png")


def command(folder: Path, iterations: int) -> list[str]:
    return [
        *(sys.executable, "-m", "tempflow.cli", "train", "shapes_tempflow", "--output", str(folder)),
        *("--iterations", str(iterations), "--threads", "1", "--data.prompts-per-iteration", "2"),
        *("--checkpoint.every", "1", "--evaluation.every", "20", "--evaluation.validation-prompts", "12"),
        *("--evaluation.test-prompts", "12"),
    ]


def strike(folder: Path, iterations: int, wait: float) -> str | None:
    """Starts or resumes the run and kills it after `wait` seconds of work; None when it ended before."""
    words = command(folder, iterations)
    if (folder / "config.yaml").exists():
        words = [sys.executable, "-m", "tempflow.cli", "train", "--resume", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    metrics = folder / "metrics.jsonl"
    before = done(metrics)
    while process.poll() is None and done(metrics) <= before:
        time.sleep(0.02)  # starting up is not worth killing at
    time.sleep(wait)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"the run ended with status {process.returncode}")
        return None
    process.kill()
    process.wait()
    saving = list((folder / checkpoint.FOLDER).glob(".[0-9]*")) if (folder / checkpoint.FOLDER).exists() else []
    return f"after iteration {done(metrics)}{', while saving' if saving else ''}"


def done(metrics: Path) -> int:
    """Iterations that are written down."""
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/resume"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    whole, killed = a.out / "whole", a.out / "killed"
    for folder in (whole, killed):
        remove(folder, "run")
    subprocess.run(command(whole, a.iterations), check=True, stdout=subprocess.DEVNULL)
    rng, kills, saving = random.Random(a.seed), 0, 0
    while kills < a.kills:
        where = strike(killed, a.iterations, rng.uniform(0, 2.5))
        if where is None:
            raise SystemExit(f"the run ended after {kills} kills; give it more --iterations")
        kills += 1
        saving += "saving" in where
        print(f"kill {kills:2d}: {where}", flush=True)
    subprocess.run([sys.executable, "-m", "tempflow.cli", "train", "--resume", str(killed)], check=True)
    ends = [checkpoint.newest(folder) for folder in (whole, killed)]
    names = [*FILES, *(f"{checkpoint.FOLDER}/{ends[0].name}/{p.name}" for p in sorted(ends[0].glob("*.safetensors")))]
    names += [str(p.relative_to(whole)) for p in sorted((whole / "model").rglob("*.safetensors"))]
    for name in names:
        print(f"{'equal    ' if digest(whole / name) == digest(killed / name) else 'DIFFERENT'} {name}")
    same = all(digest(whole / name) == digest(killed / name) for name in names)
    print(f"{kills} kills, {saving} of them while saving: {'bitwise equal' if same else 'NOT equal'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
