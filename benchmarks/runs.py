"""Shared by the experiments: run configurations two side by side, resumably, and compare them pairwise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tempflow.config import Config, to_yaml


def run_all(configs: Sequence[Config], side_by_side: int = 2) -> None:
    """Runs each configuration in a process of its own; one that has a summary already is left as it is."""

    def one(config: Config) -> None:
        folder = Path(config.output)
        if (folder / "summary.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(to_yaml(config))
        with folder.with_suffix(".log").open("w") as log:
            code = subprocess.call([sys.executable, "-m", "tempflow.cli", "train", str(file)], stdout=log, stderr=log)
        last = folder.with_suffix(".log").read_text().strip().splitlines()[-1:]
        print(f"{folder.name}: {'' if code == 0 else f'exit {code}: '}{last[0] if last else ''}", flush=True)

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(one, configs))


def lines(folder: str | Path, name: str) -> list[dict]:
    """The lines of a run's JSONL file."""
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def summary(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


def samples(folder: str | Path, metric: str = "shapes_strict") -> np.ndarray:
    """[2, N]: per test picture, before and after."""
    return np.array(json.loads((Path(folder) / "samples.json").read_text())[metric], float)


def paired_interval(a: np.ndarray, b: np.ndarray, draws: int = 10000) -> tuple[float, float, float]:
    """Mean of a − b and its 95 % bootstrap interval; seeds and pictures are drawn.

    a, b: [seeds, N], on the same pictures.
    """
    rng = np.random.default_rng(0)
    d = a - b
    seeds = rng.integers(0, len(d), (draws, len(d)))
    means = np.empty(draws)
    for i in range(draws):
        picture = rng.integers(0, d.shape[1], d.shape[1])
        means[i] = d[seeds[i]][:, picture].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(d.mean()), float(low), float(high)


def reach(folder: str | Path, target: float, unit: str = "forwards", metric: str = "shapes_strict") -> float:
    """Cost (`forwards` or `reward_calls`) at which the validation curve first reaches `target`, interpolated."""
    previous = None
    for line in lines(folder, "evaluation.jsonl"):
        point = (line[unit], line["mean"][metric])
        if point[1] >= target:
            if previous is None or point[1] == previous[1]:
                return point[0]
            share = (target - previous[1]) / (point[1] - previous[1])
            return previous[0] + share * (point[0] - previous[0])
        previous = point
    return float("inf")
