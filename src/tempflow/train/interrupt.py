"""SIGTERM, Ctrl-C and a terminal that goes: finish the batch at hand, keep everything, leave."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TextIO

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
