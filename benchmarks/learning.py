"""TempFlow-GRPO (its own weights; rectified ones) against Flow-GRPO (group std; global std), at equal compute.

    python -m benchmarks.learning --output runs/learning [--budget 370000] [--seeds 0 1 2]

Each method tries the same three learning rates (one seed, judged on validation; rectified TempFlow-GRPO takes the other
one's), then runs at its best rate with three seeds, judged once on test. Two runs go side by side, one thread each.
Finished runs are kept: start it again to go on. Prints the table and paired 95 % intervals, and draws the curves over
forward-equivalents, wall time and reward calls.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.runs import affordable, gain, lines, reach, run_all, samples, summary, tested
from tempflow.config import Config, parse_config
from tempflow.recipes.shapes import COMMON, OPTIMIZER, REWARDS
from tempflow.request import Prompt

RATES = (5e-5, 1e-4, 2e-4)
SEARCH_SEED = 100
METHODS = {
    "tempflow": ({"name": "tempflow_grpo", "seeds": 2, "branches": 6, **COMMON}, 6),
    "flow_group": ({"name": "flow_grpo", "group": 12, "std": "group", **COMMON}, 12),
    "flow_global": ({"name": "flow_grpo", "group": 12, "std": "global", **COMMON}, 12),
    "rectified": ({"name": "tempflow_grpo", "seeds": 2, "branches": 6, "weight": "rectified", **COMMON}, 6),
}
COLORS = dict(zip(METHODS, ("C3", "C0", "C2", "C1"), strict=True))
"""Method → algorithm and prompts per iteration: 1 500 forwards an iteration for TempFlow, 1 584 for Flow-GRPO."""


def config(method: str, rate: float, seed: int, budget: int, out: Path, dtype: str) -> Config:
    algorithm, prompts = METHODS[method]
    fields = {
        "name": f"{method}-{rate:g}-{seed}",
        "seed": seed,
        "iterations": 1,
        "output": str(out / f"{method}-{rate:g}-{seed}"),
        "threads": 1,
        "algorithm": algorithm,
        "model": {"dtype": dtype},
        "data": {"prompts_per_iteration": prompts},
        "rollout_rows": 192,
        "rewards": REWARDS,
        "optimizer": {**OPTIMIZER, "learning_rate": rate, "warmup_iterations": 5},
        "evaluation": {
            "every": 6,
            "validation_prompts": 240,
            "test_prompts": 1008,
            "metric": "shapes_strict",
            "seed": 4321,
        },
    }
    algorithm = parse_config(fields).algorithm.build().seeded(seed)
    return parse_config(fields | {"iterations": affordable(algorithm, prompts, budget)})


def best_rate(method: str, out: Path) -> float:
    scores = {r: summary(out / f"{method}-{r:g}-{SEARCH_SEED}")["best_validation"] for r in RATES}
    print(f"{method}: best validation score by rate: " + ", ".join(f"{r:g}: {s:.3f}" for r, s in scores.items()))
    return max(scores, key=lambda r: scores[r])


def draw(folders: dict[str, list[Path]], path: Path) -> None:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 3), ("forward_equivalents", "elapsed", "reward_calls"), strict=True):
        for method, runs in folders.items():
            curves, color = [], COLORS[method]
            for run in runs:
                evaluations = lines(run, "evaluation.jsonl")
                y = [e["mean"]["shapes_strict"] for e in evaluations]
                if unit == "elapsed":
                    x = [t["elapsed"] for t in lines(run, "timings.jsonl") if "evaluation" in t]
                else:
                    x = [e[unit] for e in evaluations]
                axes.plot(x, y, color=color, alpha=0.3, lw=1)
                curves.append((x, y))
            axes.plot(
                np.mean([c[0] for c in curves], 0), np.mean([c[1] for c in curves], 0), color=color, lw=2, label=method
            )
        axes.set(xlabel={"elapsed": "wall seconds, one thread, evaluation included"}.get(unit, unit.replace("_", " ")))
        axes.set(ylabel="validation strict score")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def compare(
    mine: str, theirs: str, after: dict[str, np.ndarray], folders: dict[str, list[Path]], prompts: Sequence[Prompt]
) -> None:
    """The test's difference with its interval, and what share of the other's cost reaches its best validation score."""
    mean, low, high = gain(after[mine], after[theirs], prompts)
    print(f"{mine} − {theirs}: {mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]")
    for unit in ("forward_equivalents", "reward_calls"):
        shares = []
        for a, b in zip(folders[mine], folders[theirs], strict=True):
            target = max(e["mean"]["shapes_strict"] for e in lines(b, "evaluation.jsonl"))
            shares.append(reach(a, target, unit) / reach(b, target, unit))
        print(f"  {unit.replace('_', ' ')} to reach {theirs}'s best validation score: {np.round(shares, 2)} of its own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--budget", type=int, default=370_000, help="of a run, in forward-equivalents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="bfloat16")
    a = parser.parse_args()
    searched = [m for m in METHODS if m != "rectified"]
    run_all([config(m, r, SEARCH_SEED, a.budget, a.out, a.dtype) for m in searched for r in RATES])
    rates = {m: best_rate(m, a.out) for m in searched}
    rates["rectified"] = rates["tempflow"]
    final = [config(m, rates[m], s, a.budget, a.out, a.dtype) for s in a.seeds for m in METHODS]
    run_all(final)
    folders = {m: [a.out / f"{m}-{rates[m]:g}-{s}" for s in a.seeds] for m in METHODS}
    before = samples(folders["tempflow"][0])[0]
    after = {m: np.stack([samples(f)[1] for f in folders[m]]) for m in METHODS}
    print(f"\nbase {before.mean():.3f} on {len(before)} test pictures")
    for method, values in after.items():
        runs = [summary(f) for f in folders[method]]
        cost = {k: np.mean([r["cost"][k] for r in runs]) for k in ("forward_equivalents", "decodes", "reward_calls")}
        each = " ".join(f"{v:.3f}" for v in values.mean(1))
        print(
            f"{method:12s} rate {rates[method]:g}: {values.mean():.3f} ({each}), "
            f"gain {values.mean() - before.mean():+.3f}; "
            + ", ".join(f"{v:.0f} {k}" for k, v in cost.items())
            + f", {np.mean([r['seconds'] for r in runs]):.0f} s"
        )
    for mine, theirs in itertools.product(("tempflow", "rectified"), ("flow_group", "flow_global")):
        compare(mine, theirs, after, folders, tested(final[0]))
    draw(folders, a.out / "curves.png")
    (a.out / "result.json").write_text(json.dumps({"rates": rates, "mean": {m: v.mean() for m, v in after.items()}}))


if __name__ == "__main__":
    main()
