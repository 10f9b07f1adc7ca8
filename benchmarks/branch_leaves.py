"""TempFlow's branch leaves as the clean samples of V-GRPO and DiffusionNFT, on `shapes` at the leaderboard's budget.

    python -m benchmarks.branch_leaves [--only NAME …] [--rates 2e-4 1e-4] [--seeds 0] [--table]

The plan, noise and budget are those of the leaderboard's `tempflow_grpo`, the loss its `v_grpo`'s or `diffusion_nft`'s.
Leaves are compared within a trunk ("seed": they differ by the branch that each took, at whatever step) or within a
prompt. A finished run is boiled down to a small file under benchmarks/branch_leaves, kept with the code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.leaderboard import METRIC, Board
from benchmarks.runs import affordable, base_hash, boiled, gain, run_all, table, tested, unpacked
from tempflow.algorithms.base import Algorithm
from tempflow.config import Config
from tempflow.core.credit import GroupZScore
from tempflow.recipes.zoo import ENTRIES, Entry
from tempflow.train.trainer import train

RESULTS = Path("benchmarks/branch_leaves")

KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v_grpo, within a trunk": ("v_grpo", ("prompt", "root")),
    "v_grpo, within a prompt": ("v_grpo", ("prompt",)),
    "diffusion_nft, within a prompt": ("diffusion_nft", ("prompt",)),
}
"""Whose loss, and which leaves are compared."""


def entry_of(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


def joined(kind: str) -> Algorithm:
    """The learner of that kind on TempFlow's forest."""
    name, by = KINDS[kind]
    forest, learner = (
        Board("").config(entry_of(n), 1e-4, 0).algorithm.build().seeded(0) for n in ("tempflow_grpo", name)
    )
    credit = learner.credit
    if by != ("prompt",):
        assert isinstance(credit, GroupZScore)
        credit = replace(credit, by=by)
    return replace(learner, name=f"branch_{name}", plan=forest.plan, dynamics=forest.dynamics, credit=credit)


def config(board: Board, kind: str, rate: float, seed: int) -> Config:
    """The run's configuration; what its algorithm is, only the object says."""
    algorithm, forest = joined(kind).seeded(seed), entry_of("tempflow_grpo")
    told = board.config(forest, rate, seed)
    iterations = affordable(algorithm, forest.prompts, board.budget)
    name = f"{kind.replace(', ', '-').replace(' ', '_')}-{rate:g}-{seed}"
    look = told.evaluation.model_copy(update={"every": max(1, round(iterations / 5))})
    output = str(Path("runs/branch_leaves") / board.base[:8] / name)
    return told.replace(name=name, iterations=iterations, evaluation=look, output=output)


def file_of(run: Config) -> Path:
    return RESULTS / f"{run.name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-4, 1e-4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    given = parser.parse_args()
    board, rows = Board(base_hash()), list[list[str]]()
    for kind in given.only:
        for rate in given.rates:
            for seed in given.seeds:
                run = config(board, kind, rate, seed)
                file = file_of(run)
                if not file.exists() and not given.table:
                    run_all([board.untrained()], resume=True)
                    begun = (Path(run.output) / "config.yaml").exists()
                    train(run, algorithm=joined(kind).seeded(seed), resume=begun)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(boiled(run, board.base, METRIC), separators=(",", ":")) + "\n")
                if file.exists():
                    rows.append([kind, f"{rate:g}", str(seed), *told_of(run, file)])
    print(table(["", "rate", "seed", "best validation", "strict before → after", "gain", "forward-equivalents"], rows))


def told_of(run: Config, file: Path) -> list[str]:
    result = json.loads(file.read_text())
    best, spent = result["best_validation"], result["cost"]["forward_equivalents"]
    if result["stopped"] is not None:
        return [f"{best:.3f}", result["stopped"], "–", f"{spent:,.0f}"]
    before, after = (unpacked(result[key], result["pictures"])[None] for key in ("before_bits", "after_bits"))
    mean, low, high = gain(after, before, tested(run))
    told = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [f"{best:.3f}", f"{np.mean(before):.3f} → {np.mean(after):.3f}", told, f"{spent:,.0f}"]


if __name__ == "__main__":
    main()
