"""What a finished run is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tempflow.evaluate.suite import Report
from tempflow.models.protocol import Model
from tempflow.train.setting import Counter


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
