"""A reward server in a process of its own, for benchmarks, and what it serves there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

SECONDS = "BENCHMARK_SECONDS"
"""The environment variable that says how long `slow` takes for a picture."""

_seen = np.zeros(1 << 24, np.bool_)


def number(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """The number that a picture's first pixel holds; None, so failed, for one that was scored before."""
    found: list[float | None] = []
    for image in images:
        red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
        which = red + 256 * green + 65536 * blue
        found.append(None if _seen[which] else float(which))
        _seen[which] = True
    return found


def slow(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A picture's mean level, after a while."""
    time.sleep(float(os.environ[SECONDS]) * len(images))
    return [float(np.asarray(image).mean()) / 255 for image in images]


@contextmanager
def served(function: str, *options: str, environment: dict[str, str] | None = None) -> Iterator[tuple[str, str, int]]:
    """A server of a function here: its URL, the file with its token, and its process."""
    with tempfile.TemporaryDirectory() as folder:
        token = str(Path(folder) / "token")
        words = ["serve-reward", "--function", f"{__file__}:{function}", "--token-file", token, *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "tempflow.cli", *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), token, process.pid
        finally:
            process.terminate()
            process.wait()
