"""TempFlow-GRPO against Flow-GRPO on `shapes`: how much compute to Flow-GRPO's final score, three seeds of each.

    python -m benchmarks.flagship [--jobs 2] [--table]

Four entries of the leaderboard (second edition), each with the best of three rates and three seeds, in its files. The
budget is three times the leaderboard's: at that one, 80,000, no form had gained anything on the validation prompts
(TempFlow, rectified, and Flow-GRPO with the global spread; rate 2e-4, one seed each). The target is the mean of a
Flow-GRPO form's last validations; a run's compute to it is read off its validation curve, on straight lines.
`--table` prints the tables: compute to the target, and paired test scores with intervals by prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.leaderboard import Board, Standing, difference, standing, work
from benchmarks.runs import base_hash, reached, table, tested
from tempflow.recipes.zoo import ENTRIES

BUDGET, VALIDATION = 240_000, 360
"""Forward-equivalents a run, and validation pictures, as many as the demo has."""

RIVALS = ("flow_grpo_group", "flow_grpo_global")
OURS = ("tempflow_grpo", "tempflow_grpo_rectified")
"""The paper's form, and the best that has been found."""

COMPARED = tuple(replace(entry, kind="paper") for entry in ENTRIES if entry.name in (*RIVALS, *OURS))
"""All with three seeds."""


def last(result: Mapping[str, Any]) -> float:
    """A run's last validation."""
    return next(score for _, score in reversed(result["curve"]) if score is not None)


def seconds_to(result: Mapping[str, Any], spent: float) -> float:
    """Processor seconds by then, as its share of the run's compute."""
    return np.nan if result["seconds"] is None else result["seconds"] * spent / result["curve"][-1][0]


def costs(rival: Standing, ours: Sequence[Standing]) -> list[list[str]]:
    """For each form of ours its compute to the rival's mean last validation, by seed, over the rival's whole."""
    if not rival.finals:
        return []
    target = float(np.mean([last(result) for result in rival.finals.values()]))
    whole = float(np.mean([result["curve"][-1][0] for result in rival.finals.values()]))
    start = float(np.mean([result["curve"][0][1] for result in rival.finals.values()]))
    reachable = target > start  # else all stand at it before they begin
    rows = list[list[str]]()
    for form in ours:
        spent = {seed: reached(result["curve"], target) for seed, result in sorted(form.finals.items())}
        timed = [seconds_to(form.finals[seed], cost) for seed, cost in spent.items() if np.isfinite(cost)]
        name = f"{rival.entry.name} at {rival.rate:g}: {start:.3f} → {target:.3f}, {len(rival.finals)} seeds"
        each = [f"{cost:,.0f} ({cost / whole:.2f})" if np.isfinite(cost) else "never" for cost in spent.values()]
        took = f"{np.mean(timed):,.0f}" if timed and reachable else "–"
        said = "; ".join(each) if reachable else "the rival has gained nothing"
        rows.append([name, f"{form.entry.name} at {form.rate:g}", said, took])
    return rows


def scores(rival: Standing, ours: Sequence[Standing], board: Board) -> list[list[str]]:
    """Paired differences of test scores."""
    found = [(form, difference(form, rival, tested(board.untrained()))) for form in ours]
    return [[f"{form.entry.name} − {rival.entry.name}", *told] for form, told in found if told is not None]


def page(board: Board) -> str:
    by_name = {entry.name: standing(board, entry) for entry in COMPARED}
    rivals, ours = ([by_name[name] for name in names if by_name[name].rate is not None] for names in (RIVALS, OURS))
    head = [
        "target: validation of",
        "form",
        "forward-equivalents to it (share of the rival's), by seed",
        "seconds, mean",
    ]
    whole = [
        [s.entry.name, f"{s.rate:g}", f"{len(s.search)} of 3 rates, {len(s.finals)} of 3 seeds"]
        for s in by_name.values()
        if s.rate
    ]
    return "\n\n".join(
        [
            table(["entry", "best rate", "there"], whole),
            table(head, [row for rival in rivals for row in costs(rival, ours)]),
            table(
                ["test score", "mean, 95 % interval by prompt and seed", ""],
                [row for rival in rivals for row in scores(rival, ours, board)],
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and run nothing")
    given = parser.parse_args()
    board = Board(base_hash(), budget=BUDGET, validation=VALIDATION)
    if not given.table:
        work(board, COMPARED, given.jobs)
    print(page(board))


if __name__ == "__main__":
    main()
