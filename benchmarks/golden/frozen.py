"""Golden updates as numbers: few for each weight set, which move when any weight does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.golden.drive import Outcome

FILE = Path(__file__).parents[2] / "tests" / "algorithms" / "golden.json"

TOLERANCE = 1e-6
"""Of the size of the change: CPUs differ in the last bits."""

Frozen = Mapping[str, Any]
"""One case: its rate, its losses, and by weight set, of each iteration, `numbers` of the change since the start."""


def numbers(change: Tensor) -> list[float]:
    """Its norm, and its products with three fixed directions: [W] → 4 numbers."""
    n = torch.arange(1, len(change) + 1, dtype=torch.float64)
    directions = torch.stack([(n * math.sqrt(prime)) % 1 - 0.5 for prime in (2, 3, 5)])
    return [float(change.double().norm()), *(directions @ change.double()).tolist()]


def frozen(outcome: Outcome, rate: float) -> dict[str, Any]:
    """The outcome as it is written to the file."""
    sets = {name: [numbers(w - weights[0]) for w in weights[1:]] for name, weights in outcome.weights.items()}
    return {"rate": rate, "loss": outcome.loss, "sets": sets}


def differences(got: Frozen, want: Frozen) -> list[str]:
    """What differs by more than the tolerance, a line each; a set without any change is one, too."""
    if got["sets"].keys() != want["sets"].keys():
        return [f"weight sets {sorted(got['sets'])}, not {sorted(want['sets'])}"]
    found: list[str] = []
    for name, iterations in want["sets"].items():
        for number, (ours, theirs) in enumerate(zip(got["sets"][name], iterations, strict=True), 1):
            size, apart = theirs[0], max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if not ours[0] > 0:
                found.append(f"{name} has not moved after iteration {number}")
            elif not apart <= TOLERANCE * size:
                found.append(f"{name} after iteration {number}: apart by {apart / size:.1e} of its change")
    for number, (ours, theirs) in enumerate(zip(got["loss"], want["loss"], strict=True), 1):
        if not math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=1e-8):  # a sum of both signs, often near 0
            found.append(f"loss of iteration {number}: {ours:.9g}, not {theirs:.9g}")
    return found


def read() -> dict[str, Frozen]:
    return json.loads(FILE.read_text())


def write(cases: Mapping[str, Frozen]) -> None:
    """A line for each case, so that a diff names what has changed."""
    lines = [f"{json.dumps(name)}: {json.dumps(cases[name])}" for name in sorted(cases)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
