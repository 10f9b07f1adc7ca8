"""What a run writes, and what a finished run is.

`metrics.jsonl` and `evaluation.jsonl` are equal between two runs of one seed; wall times are in `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tempflow.core.credit import Advantage, CreditRule
from tempflow.core.forest import Forest
from tempflow.core.groups import moments
from tempflow.core.scores import Scores
from tempflow.evaluate.suite import Report
from tempflow.folder import claim, held
from tempflow.models.protocol import Model
from tempflow.train.context import Clock, Counter
from tempflow.train.experience import Advantages
from tempflow.train.guards import Alarm
from tempflow.train.identity import FILE, RUN, SUMMARY, Identity, check_new, go_on

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
        self._held = ExitStack()
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
        self._held.enter_context(held(folder))
        try:
            if not resumed:
                check_new(folder)  # another process may have begun and ended a run here meanwhile
            (folder / "config.yaml").write_text(config_yaml)
            (folder / FILE).write_text(json.dumps(identity.to_json(), indent=1) + "\n")
            for name in LINES:
                (folder / name).touch()
            (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        except ValueError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ValueError(f"output: {str(folder)!r} cannot be written ({error}); choose another folder") from error

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._held.close()

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
        """Takes back the lines written after a checkpoint with those sizes (without any, all of them), and that the run
        is finished.

        Raises ValueError when a file is shorter than it was.
        """
        if self._write:
            (self.folder / SUMMARY).unlink(missing_ok=True)
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
        samples = {n: [run.before.values(n).tolist(), run.after.values(n).tolist()] for n in run.before.scores.names}
        (self.folder / "samples.json").write_text(json.dumps(plain(samples)) + "\n")
        tested = zip(run.before.prompts, run.before.kinds, strict=True)
        told = [json.dumps({"prompt": prompt, "kind": kind}, ensure_ascii=False) + "\n" for prompt, kind in tested]
        (self.folder / "test_prompts.jsonl").write_text("".join(told), encoding="utf-8")
        whole = self.folder / f".{SUMMARY}.new"  # the last, and never half of it: by this file a run is finished
        whole.write_text(json.dumps(plain(summary), indent=1) + "\n")
        whole.replace(self.folder / SUMMARY)

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
        "alone_forwards": counter.alone,
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


PACKAGES = ("tempflow", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")


def environment() -> dict[str, object]:
    """Plain facts, ready for JSON."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def by_step(
    forest: Forest, advantage: Advantage, weight: Tensor, value: Tensor | None = None, group: Tensor | None = None
) -> list[dict[str, Any]]:
    """A line for every trained step, ascending; means are over its trained edges that have a valid score.

    weight [E]: as the loss has it. value [E] (`forest.backup` of the scores) and group [E] (`credit.group_index`):
    which edges are compared; without them there is no `spread`. A step without a valid edge has None for its means.

    step       i, from σ_i to σ_{i+1}
    edges      trained edges with a valid score
    failed     trained edges without
    live       share of `edges` whose group has spread, 0 … 1
    advantage  mean |A|
    spread     mean standard deviation (population) of the values in an edge's group, in the reward's unit
    weight     mean weight
    credit     mean weight · |A|: what the step gets
    """
    edges = forest.edges
    size, steps = advantage.flat(advantage.value.abs()).double(), edges.step
    trained, scale = edges.trained, advantage.flat(weight).double()
    spread = None
    if value is not None and group is not None:
        spread = moments(value, trained & advantage.ok, group, unbiased=False)[1]
    lines: list[dict[str, Any]] = []
    for step in steps[trained].unique().tolist():
        here = trained & (steps == step)
        valid = here & advantage.ok
        count = int(valid.sum())
        line: dict[str, Any] = {"step": step, "edges": count, "failed": int(here.sum()) - count}
        columns = {"live": advantage.live.double(), "advantage": size, "spread": spread, "weight": scale}
        columns["credit"] = scale * size
        line |= {
            name: column[valid].mean().item() if count else None
            for name, column in columns.items()
            if column is not None
        }
        lines.append(line)
    return lines


def steps_of(credit: CreditRule, scores: Scores, forest: Forest, advantages: Advantages) -> list[dict[str, Any]]:
    """`by_step` with the groups in which `credit` compared the leaves' scores."""
    value, _ = forest.backup(*scores.total(credit.reward_weights))
    return by_step(forest, advantages.advantage, advantages.weight, value, credit.groups(forest.edges))


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, the held-out scores before and after, what it cost, and the trained model."""

    folder: Path
    metric: str
    before: Report
    after: Report
    yardstick: tuple[float, Report] | None
    best_iteration: int
    counter: Counter
    seconds: float
    model: Model

    @property
    def last_line(self) -> str:
        """`held-out strict score: 0.41 -> 0.66 (+0.25), 9.8 min, 124608 forward-equivalents, 71312 forwards`."""
        a, b = self.before.mean(self.metric), self.after.mean(self.metric)
        label = {"shapes_strict": "strict score", "shapes": "graded score"}.get(self.metric, self.metric)
        minutes = f"{self.seconds / 60:.1f} min"
        spent = f"{self.counter.equivalents} forward-equivalents, {self.counter.forwards} forwards"
        return f"held-out {label}: {a:.2f} -> {b:.2f} ({b - a:+.2f}), {minutes}, {spent}"


def summary_table(run: Run, name: str) -> Table:
    """The held-out scores before and after, overall and by kind of prompt."""
    table = Table(title=f"{name}: held-out test, {len(run.before.scores)} pictures")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for metric in run.before.scores.names:
        after = run.after.by_kind(metric)
        rows = [(f"{metric} · {k}", b, after[k]) for k, b in run.before.by_kind(metric).items() if k]
        for label, b, a in [*rows, (metric, run.before.mean(metric), run.after.mean(metric))]:
            table.add_row(label, f"{b:.3f}", f"{a:.3f}", f"{a - b:+.3f}", end_section=label == metric)
    return table
