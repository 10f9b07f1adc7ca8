"""A made-up run's folder, of whatever is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

TASKS = ("single", "two", "count")
SCORES = range(30)
HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'


def make_run(
    folder: Path,
    name: str = "toy",
    iterations: int = 6,
    seed: int = 0,
    noise: int = 1234,
    finished: bool = True,
    prompts: bool = True,
    shuffled: bool = False,
    steps: bool = True,
    hostile: bool = False,
) -> Path:
    """`shuffled`: the test's tasks do not come by turns; `hostile`: all texts hold HTML."""
    folder.mkdir(parents=True)
    evil = HOSTILE if hostile else ""
    config: dict[str, Any] = {
        "name": name + evil,
        "seed": seed,
        "iterations": 6,
        "output": str(folder),
        "algorithm": {"name": "tempflow_grpo", "seeds": 2, "note": evil},
        "model": {"path": "shapes" + evil, "height": 32, "width": 32},
        "data": {"test": "shapes:test"},
        "evaluation": {"metric": "strict", "test_prompts": 30, "steps": 10, "guidance": 1.0, "seed": noise},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    random, elapsed = np.random.default_rng(seed), 3.0
    counts = dict.fromkeys(("rollout_forwards", "train_forwards", "reference_forwards", "decodes", "reward_calls"), 0)
    timings: list[Any] = [{"evaluation": 0, "elapsed": elapsed}]
    metrics, evaluations, credit = [], [evaluation(0, 0.3, {"forward_equivalents": 0, "forwards": 0, **counts})], []
    for i in range(1, iterations + 1):
        cost = {"forward_equivalents": 12_345 * i, "forwards": 7_000 * i, **dict.fromkeys(counts, 100 * i)}
        metrics.append(
            {
                "iteration": i, "reward/strict": 0.3 + 0.02 * i, "reward_std/strict": 0.2, "failed_rewards": 0,
                "zero_variance": 0.1, "clip_fraction": 0.02 * i, "grad_norm": float(random.random()),
                "log_ratio_abs": 10.0**-i, "kl": None if i == 2 else 0.001 * i, "loss": -0.001, **cost,
            }
        )  # fmt: skip
        elapsed += 4.5
        timings.append({"iteration": i, "rollout": 2.0, "train": 2.0, "elapsed": elapsed})
        line = [{"step": s, "edges": 9, "failed": 0, "live": 0.9, "advantage": 0.5, "spread": 0.1 * s, "weight": 1.0,
                 "credit": 1.0 / (1 + s)} for s in range(4)]  # fmt: skip
        credit.append({"iteration": i, "steps": line})
        if i % 2 == 0:
            elapsed += 1.0
            timings.append({"evaluation": i, "elapsed": elapsed})
            evaluations.append(evaluation(i, 0.3 + 0.04 * i, cost))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evaluation.jsonl", evaluations)
    write_lines(folder / "timings.jsonl", timings)
    if steps:
        write_lines(folder / "steps.jsonl", credit)
    if finished:
        finish(folder, seed, shuffled, prompts, evil, metrics[-1])
    return folder


def finish(folder: Path, seed: int, shuffled: bool, prompts: bool, evil: str, cost: dict[str, Any]) -> None:
    kinds = [TASKS[i % 3] for i in SCORES]
    if shuffled:
        kinds = sorted(kinds)
    before = [round(0.2 + 0.02 * i, 4) for i in SCORES]
    after = [round(b + (0.25 if i % 5 else -0.1) + 0.05 * seed, 4) for i, b in enumerate(before)]
    samples = {"strict": [before, after], "graded": [before, before]}
    means = [{n: float(np.mean(pair[w])) for n, pair in samples.items()} for w in (0, 1)]
    tasks = [
        {n: {t: float(np.mean([v for v, k in zip(p[w], kinds, strict=True) if k == t])) for t in TASKS}
         for n, p in samples.items()} for w in (0, 1)
    ]  # fmt: skip
    report = [{"count": 30, "failed": 0, "mean": m, "by_kind": t} for m, t in zip(means, tasks, strict=True)]
    summary = {"metric": "strict", "before": report[0], "after": report[1], "yardstick": None, "best_iteration": 4}
    summary |= {"best_validation": 0.46, "seconds": 90.0}
    summary["cost"] = {k: v for k, v in cost.items() if k.endswith(("equivalents", "forwards", "decodes", "calls"))}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples.json").write_text(json.dumps(samples))
    if prompts:
        lines = [{"prompt": f"{i} circles{evil}", "kind": kind} for i, kind in enumerate(kinds)]
        write_lines(folder / "test_prompts.jsonl", lines)
    Image.new("RGB", (120, 60), "teal").save(folder / "before_after.png")
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "9.9.9" + evil}, "device": "cpu"}))
    if evil:
        write_lines(folder / "alarms.jsonl", [{"iteration": 3, "guard": evil, "message": evil}])


def evaluation(iteration: int, mean: float, cost: dict[str, Any]) -> dict[str, Any]:
    kinds = {task: mean + 0.1 * i for i, task in enumerate(TASKS)}
    return {"iteration": iteration, **cost, "mean": {"strict": mean}, "by_kind": {"strict": kinds}}


def write_lines(file: Path, lines: list[Any]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
