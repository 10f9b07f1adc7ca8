"""What a run writes. `metrics.jsonl` and `evaluation.jsonl` are equal between two runs of one seed; wall times are in
`timings.jsonl`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tempflow.evaluate.suite import Report
from tempflow.folder import claim
from tempflow.train.environment import environment
from tempflow.train.guards import Alarm
from tempflow.train.identity import FILE, Identity, go_on
from tempflow.train.resume import LOCK, RUN, check_new
from tempflow.train.run import Run
from tempflow.train.setting import Clock, Counter

LINES = ("metrics.jsonl", "evaluation.jsonl", "steps.jsonl", "alarms.jsonl")
"""Written line by line; equal between two runs of one seed, however often they were resumed."""


class Records:
    """The run's folder, which is this run's alone until `close`.

    Raises ValueError when a new run is to go where something is already, another process is at work there, or the
    folder cannot be written.

    `identity`: what the run depends on; `go_on` is the command or the call that goes on with it. `resumed`: the folder
    holds the run that is gone on with; its lines stay until `cut`. `write`: whether this rank writes.
    """

    def __init__(
        self, folder: Path, config_yaml: str, identity: Identity, resumed: bool = False, write: bool = True
    ) -> None:
        self._lock = FileLock(folder / LOCK, timeout=0)
        self.identity, self.go_on = identity, go_on(folder, identity)
        if not resumed:
            check_new(folder, write)
        self.folder, self.evaluations, self._began, self._write = (
            folder,
            list[dict[str, Any]](),
            time.perf_counter(),
            write,
        )
        if not write:
            return
        claim(folder, RUN)
        try:
            self._lock.acquire()
            (folder / "config.yaml").write_text(config_yaml)
            (folder / FILE).write_text(json.dumps(identity.to_json(), indent=1) + "\n")
            for name in LINES:
                (folder / name).touch()
            (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        except Timeout as error:
            raise ValueError(
                f"output: another process is at work on the run in {str(folder)!r}; wait, or choose another folder"
            ) from error
        except OSError as error:
            self.close()
            raise ValueError(f"output: {str(folder)!r} cannot be written ({error}); choose another folder") from error

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.release()

    def iteration(self, iteration: int, metrics: Mapping[str, float], counter: Counter, clock: Clock) -> None:
        """One line each in metrics.jsonl and timings.jsonl."""
        self._append("metrics.jsonl", {"iteration": iteration, **metrics, **cost(counter)})
        self._append("timings.jsonl", {"iteration": iteration, **clock.seconds, "elapsed": self._elapsed()})

    def steps(self, iteration: int, steps: Sequence[Mapping[str, Any]]) -> None:
        """One line in steps.jsonl: the credit of every step."""
        self._append("steps.jsonl", {"iteration": iteration, "steps": list(steps)})

    def alarms(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        """A line in alarms.jsonl for each."""
        for alarm in alarms:
            self._append("alarms.jsonl", {"iteration": iteration, **asdict(alarm)})

    def evaluation(self, iteration: int, report: Report, counter: Counter) -> None:
        """One line in evaluation.jsonl; kept for the curve."""
        line = {"iteration": iteration, **cost(counter), **report.to_json()}
        self.evaluations.append(line)
        self._append("evaluation.jsonl", line)
        self._append("timings.jsonl", {"evaluation": iteration, "elapsed": self._elapsed()})

    def sizes(self) -> dict[str, int]:
        """Bytes written so far: what `cut` cuts back to."""
        return {name: (self.folder / name).stat().st_size for name in LINES} if self._write else {}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Takes back the lines written after a checkpoint with those sizes; without any, all of them.

        Raises ValueError when a file is shorter than it was.
        """
        if self._write:
            for name in LINES:
                file = self.folder / name
                size = sizes.get(name, 0)
                if file.stat().st_size < size:
                    raise ValueError(f"{file} has {file.stat().st_size} bytes, less than at its checkpoint: {size}")
                with file.open("r+b") as stream:
                    stream.truncate(size)
        lines = (self.folder / "evaluation.jsonl").read_text().splitlines()
        self.evaluations = [json.loads(line) for line in lines]

    def summary(self, run: Run, validation: float) -> None:
        """summary.json: before, after, cost. samples.json: each test picture's; test_prompts.jsonl: its prompt."""
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
        tested = zip(run.before.prompts, run.before.kinds, strict=True)
        told = [json.dumps({"prompt": prompt, "kind": kind}, ensure_ascii=False) + "\n" for prompt, kind in tested]
        (self.folder / "test_prompts.jsonl").write_text("".join(told), encoding="utf-8")

    def _elapsed(self) -> float:
        return round(time.perf_counter() - self._began, 3)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self._write:
            return
        file = self.folder / name
        before = file.stat().st_size if file.exists() else 0
        try:
            with file.open("a") as stream:
                stream.write(json.dumps(plain(line)) + "\n")
        except OSError:
            with file.open("r+b") as stream:  # no half lines
                stream.truncate(before)
            raise


def cost(counter: Counter) -> dict[str, int]:
    """The counter as plain figures."""
    return {
        "forward_equivalents": counter.equivalents,
        "forwards": counter.forwards,
        "rollout_forwards": counter.rollout,
        "draft_forwards": counter.draft,
        "train_forwards": counter.train,
        "reference_forwards": counter.reference,
        "old_forwards": counter.old,
        "latent_rows": counter.latent,
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
