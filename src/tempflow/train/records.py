"""What a run writes. `metrics.jsonl` and `evaluation.jsonl` are equal between two runs of one seed; wall times are in
`timings.jsonl`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempflow.evaluate.suite import Report
from tempflow.train.step import Clock, Counter

if TYPE_CHECKING:
    from tempflow.train.loop import Run


class Records:
    """The run's folder. Raises ValueError when it already holds a run."""

    def __init__(self, folder: Path, config_yaml: str) -> None:
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"output: {str(folder)!r} already holds a run; choose another folder or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.evaluations, self._began = folder, list[dict[str, Any]](), time.perf_counter()
        (folder / "config.yaml").write_text(config_yaml)
        (folder / "metrics.jsonl").touch()

    def iteration(self, iteration: int, metrics: Mapping[str, float], counter: Counter, clock: Clock) -> None:
        """One line each in metrics.jsonl and timings.jsonl."""
        self._append("metrics.jsonl", {"iteration": iteration, **metrics, **cost(counter)})
        self._append("timings.jsonl", {"iteration": iteration, **clock.seconds, "elapsed": self._elapsed()})

    def evaluation(self, iteration: int, report: Report, counter: Counter) -> None:
        """One line in evaluation.jsonl; kept for the curve."""
        line = {"iteration": iteration, **cost(counter), **report.to_json()}
        self.evaluations.append(line)
        self._append("evaluation.jsonl", line)
        self._append("timings.jsonl", {"evaluation": iteration, "elapsed": self._elapsed()})

    def summary(self, run: Run, validation: float) -> None:
        """summary.json: before, after, cost."""
        summary = {
            "metric": run.metric,
            "before": run.before.to_json(),
            "after": run.after.to_json(),
            "yardstick": run.yardstick and run.yardstick[1].to_json(),
            "best_iteration": run.best_iteration,
            "best_validation": validation,
            "cost": cost(run.counter),
            "seconds": run.seconds,
        }
        (self.folder / "summary.json").write_text(json.dumps(plain(summary), indent=1) + "\n")
        samples = {n: [run.before.values(n).tolist(), run.after.values(n).tolist()] for n in run.before.scores.names}
        (self.folder / "samples.json").write_text(json.dumps(plain(samples)) + "\n")

    def _elapsed(self) -> float:
        return round(time.perf_counter() - self._began, 3)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(plain(line)) + "\n")


def cost(counter: Counter) -> dict[str, int]:
    """The counter as plain figures."""
    return {
        "forwards": counter.forwards,
        "rollout_forwards": counter.rollout,
        "train_forwards": counter.train,
        "reference_forwards": counter.reference,
        "decodes": counter.decodes,
        "reward_calls": counter.reward_calls,
    }


def plain(value: Any) -> Any:
    """`value` with None for numbers that JSON has not (NaN, infinities), at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
