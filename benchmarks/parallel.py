"""Two gloo ranks against one process on `shapes`, a thread each, in turn in one go.

    python -m benchmarks.parallel [--iterations 6] [--prompts 12] [--output runs/parallel]

Runs the same training with torchrun on one and on two ranks and compares the seconds of the iterations (start-up,
evaluation and saving left out). Needs two free cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tempflow.folder import remove


def seconds(out: Path, ranks: int, mode: str, iterations: int, prompts: int) -> float:
    """Median seconds of an iteration after the first."""
    folder = out / f"{mode}-{ranks}"
    remove(folder, "run")
    words = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "tempflow.cli",
        ),
        *("train", "shapes_tempflow", "--output", str(folder), "--iterations", str(iterations), "--threads", "1"),
        *("--data.prompts-per-iteration", str(prompts), "--parallel.mode", mode, "--model.dtype", "float32"),
        *("--evaluation.every", "0", "--evaluation.validation-prompts", "12", "--evaluation.test-prompts", "12"),
        *("--checkpoint.every", "1000"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    phases = ("rollout", "decode", "reward", "signals", "train")
    return statistics.median(sum(line[p] for p in phases) for line in lines[1:] if "rollout" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/parallel"))
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=12)
    a = parser.parse_args()
    one = seconds(a.out, 1, "ddp", a.iterations, a.prompts)
    for mode in ("ddp", "fsdp"):
        two = seconds(a.out, 2, mode, a.iterations, a.prompts)
        print(f"{mode}: one rank {one:.2f} s an iteration, two ranks {two:.2f} s: {one / two:.2f} times as fast")


if __name__ == "__main__":
    main()
