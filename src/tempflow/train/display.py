"""Progress for people: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tempflow.train.interrupt import let_go

if TYPE_CHECKING:
    from tempflow.train.loop import Run


class _Output:
    """Standard output, as it is when it is asked. Where the terminal or the reader has gone, nothing is said and the
    run goes on."""

    @property
    def _stream(self) -> TextIO:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # below what the live bar lays over it

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            let_go(self._stream)
            return len(text)

    def flush(self) -> None:
        let_go(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Display:
    """Use as a context manager around the iterations."""

    def __init__(self, name: str, iterations: int, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False, file=cast(IO[str], _Output()))
        self.name, self.iterations = name, iterations
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=iterations, note="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays, and stays one line however narrow the console is."""
        self.console.print(line, soft_wrap=True, markup=False)

    def doing(self, what: str) -> None:
        """What takes its time now, before there is an iteration to show."""
        self._bar.update(self._task, note=what)
        if not self.console.is_terminal:
            self.say(f"{self.name} {what} …")

    def advance(self, iteration: int, metrics: Mapping[str, float], evaluation: Mapping[str, Any]) -> None:
        """One iteration is done; without a terminal every evaluated one prints a line, and ten or more others do."""
        rewards = " ".join(
            f"{k.removeprefix('reward/')} {v:.3f}" for k, v in metrics.items() if k.startswith("reward/")
        )
        scores = " ".join(f"{k} {v:.3f}" for k, v in evaluation["mean"].items())
        learnt = f"reward {rewards}" if rewards else f"loss {metrics['loss']:.4g}"  # given samples have no reward
        note = f"{learnt} | validation {scores} | grad {metrics['grad_norm']:.3f}"
        self._bar.update(self._task, completed=iteration, note=note)
        if not self.console.is_terminal and (
            iteration % min(10, max(1, self.iterations // 10)) == 0 or evaluation["iteration"] == iteration
        ):
            self.say(f"{self.name} {iteration}/{self.iterations}  {note}")

    def summary(self, run: Run) -> None:
        """The table at the end, and the one line that says it all."""
        table = Table(title=f"{self.name}: held-out test, {len(run.before.scores)} pictures")
        for column in ("", "before", "after", "change"):
            table.add_column(column, justify="left" if not column else "right")
        for name in run.before.scores.names:
            after = run.after.by_kind(name)
            rows = [(f"{name} · {k}", b, after[k]) for k, b in run.before.by_kind(name).items() if k]
            for label, b, a in [*rows, (name, run.before.mean(name), run.after.mean(name))]:
                table.add_row(label, f"{b:.3f}", f"{a:.3f}", f"{a - b:+.3f}", end_section=label == name)
        self.console.print(table)
        self.say(f"best validation at iteration {run.best_iteration}; pictures, curve and model in {run.folder}")
        if run.yardstick is not None:
            guidance, report = run.yardstick
            self.say(f"yardstick: untrained with its best guidance, {guidance:g}: {report.mean(run.metric):.3f}")
        self.say(run.last_line)
