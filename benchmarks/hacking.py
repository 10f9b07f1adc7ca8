"""How far direct reward gradients hack the scorer that they climb: its score and the verifier's, side by side.

    python -m benchmarks.hacking [--seeds 0 1 2] [--only refl draft srpo] [--iterations 60] [--output runs/hacking]
    python -m benchmarks.hacking --table

The recipes `shapes_refl`, `shapes_draft` and `shapes_srpo` as they stand, in float32 on one thread: they train on
`shapes_scorer`, a network that was trained on the verifier, and every validation (360 pictures, ten steps) is judged by
it and by the verifier. What the scorer says rises, whatever the pictures become; the verifier says what is left of it.

A run is gone on with where it was left; a finished one is boiled down to a small file under benchmarks/hacking, kept
with the code. `--table` prints the page's table of what is there and draws the figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.runs import lines, run_all, summary, table
from tempflow.config import Config
from tempflow.recipes import shapes_draft, shapes_refl, shapes_srpo

METHODS = {"refl": "ReFL", "draft": "DRaFT-1", "srpo": "SRPO's alignment step"}
MADE = {"refl": shapes_refl, "draft": shapes_draft, "srpo": shapes_srpo}
COLUMNS = {"shapes_scorer": "the scorer", "shapes": "the verifier, graded", "shapes_strict": "the verifier, strict"}
COLORS = dict(zip(COLUMNS, ("C3", "C0", "C2"), strict=True))
RESULTS, IMAGE = Path("benchmarks/hacking"), Path("docs/img/hacking.png")


def config(method: str, seed: int, iterations: int, out: Path) -> Config:
    """The recipe, to be validated ten times; its last weights are as good as any to it, so the test is short."""
    made = MADE[method]()
    evaluation = made.evaluation.model_copy(update={"every": max(1, iterations // 10), "test_prompts": 1})
    return made.replace(
        name=f"{method}-{seed}",
        seed=seed,
        threads=1,
        iterations=iterations,
        output=str(out / f"{method}-{seed}"),
        evaluation=evaluation,
    )


def boiled(run: Config) -> dict[str, Any]:
    """What is kept of a finished run: its scores by validation."""
    seen, told = lines(run.output, "evaluation.jsonl"), summary(run.output)
    return {
        "iterations": run.iterations,
        "iteration": [line["iteration"] for line in seen],
        "forward_equivalents": [line["forward_equivalents"] for line in seen],
        **{name: [round(line["mean"][name], 6) for line in seen] for name in COLUMNS},
        "stopped": told.get("stopped"),
        "seconds": told["seconds"],
    }


def file_of(method: str, seed: int) -> Path:
    return RESULTS / f"{method}-{seed}.json"


def told(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row for each method and judge: the scores before, at the scorer's last, and the verifier's best on the way."""
    rows = list[list[str]]()
    for method, found in results.items():
        for name, called in COLUMNS.items():
            before, last = (np.array([run[name][place] for run in found]) for place in (0, -1))
            best = np.array([max(run[name]) for run in found])
            each = ", ".join(f"{x:.3f}" for x in last)
            rows.append([METHODS[method], called, *(f"{x.mean():.3f}" for x in (before, best, last)), each])
    return table(["", "judged by", "before", "best on the way", "at the end", "each seed"], rows)


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    figure = Figure(figsize=(4.2 * len(results), 3.6), layout="constrained")
    for axes, (method, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for name, called in COLUMNS.items():
            for number, run in enumerate(found):
                shown = {"label": called} if number == 0 else {}
                axes.plot(run["iteration"], run[name], color=COLORS[name], alpha=0.7, lw=1.5, **shown)
        axes.set(title=METHODS[method], xlabel="iteration", ylabel="validation score", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=["refl", "draft"])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    a = parser.parse_args()
    for seed in () if a.table else a.seeds:
        for method in a.only:
            run = config(method, seed, a.iterations, a.out)
            run_all([run], 1, resume=True)
            RESULTS.mkdir(parents=True, exist_ok=True)
            file_of(method, seed).write_text(json.dumps(boiled(run)) + "\n")
    there = {m: [json.loads(file_of(m, s).read_text()) for s in a.seeds if file_of(m, s).exists()] for m in METHODS}
    there = {method: found for method, found in there.items() if found}
    print(told(there))
    draw(there, IMAGE)


if __name__ == "__main__":
    main()
