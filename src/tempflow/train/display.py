"""Progress for people, in a terminal or as plain lines; and signals: SIGTERM, Ctrl-C, a terminal that goes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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


HEARD = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Interrupted(SystemExit):
    """Somebody asked the run to stop; nothing is wrong.

    Its `code` is 128 + the signal's number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 129 where the
    terminal went. A program that does not catch it ends with that status, without a traceback.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


class Interrupt:
    """A context in which the first SIGTERM, SIGINT or SIGHUP is remembered, and a second SIGINT acts at once.

    SIGHUP is left alone where it is ignored: so `nohup` has it. Outside the main thread, where signals cannot be
    caught, it never asks.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._kept: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in HEARD:
                if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                    self._kept[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raises Interrupted once it was asked for."""
        if self.asked:
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        """With the signal that came; where another process had it, as after SIGTERM."""
        return Interrupted(signal.SIGTERM if self.number is None else self.number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.number = number


def let_go(stream: TextIO) -> None:
    """Flushes. Where nobody can read the stream any more, what is left in it goes nowhere, now and later: Python would
    try again at its end, and give a status of its own."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
