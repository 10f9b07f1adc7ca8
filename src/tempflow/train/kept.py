"""The parts of a run as plain tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempflow.config import Config
from tempflow.core.scores import Scores
from tempflow.evaluate.suite import Report
from tempflow.train.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, optimizer_tensors
from tempflow.train.weightsets import Trainable, WeightSet

Yardstick = tuple[float, Report]


@dataclass(frozen=True, eq=False)
class Looks:
    """What the untrained model showed: its test report, the grid's pictures, and the yardstick if one was asked for."""

    before: Report
    grid: Tensor
    yardstick: Yardstick | None


def optimizer_of(config: Config, trainable: Trainable) -> torch.optim.Optimizer:
    """AdamW on the masters."""
    o = config.optimizer
    return torch.optim.AdamW(
        trainable.masters,
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True,
    )


def kept_tensors(
    trainable: Trainable, average: WeightSet | None, optimizer: torch.optim.Optimizer, looks: Looks
) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by file: the run's own, no copies."""
    reports = {"before": looks.before} | ({"yardstick": looks.yardstick[1]} if looks.yardstick else {})
    seen = {f"{name}/value": r.scores.value for name, r in reports.items()}
    seen |= {f"{name}/ok": r.scores.ok for name, r in reports.items()}
    files = {WEIGHTS: trainable.named(), "looks": seen | {"grid": looks.grid}}
    moments = optimizer_tensors(optimizer, trainable.names)
    if moments:  # none before the first update
        files[OPTIMIZER] = moments
    if average is not None:
        files[AVERAGE] = average.named()
    return files


def described(looks: Looks) -> dict[str, Any]:
    """What is no tensor in `looks`, for JSON."""
    guidance = None if looks.yardstick is None else looks.yardstick[0]
    return {"before": _facts(looks.before), "yardstick": looks.yardstick and _facts(looks.yardstick[1]), "at": guidance}


def restored(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Looks:
    """What `described` and `kept_tensors` were given."""
    yardstick = None
    if facts["yardstick"] is not None:
        yardstick = (facts["at"], _report(facts["yardstick"], tensors, "yardstick"))
    return Looks(_report(facts["before"], tensors, "before"), tensors["grid"], yardstick)


def _facts(report: Report) -> dict[str, Any]:
    return {
        "names": list(report.scores.names),
        "prompts": list(report.prompts),
        "kinds": list(report.kinds),
        "gold": list(report.gold),
        "steps": report.steps,
        "guidance": report.guidance,
        "seed": report.seed,
    }


def _report(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Report:
    scores = Scores(tensors[f"{name}/value"], tensors[f"{name}/ok"], tuple(facts["names"]))
    prompts, kinds, gold = tuple(facts["prompts"]), tuple(facts["kinds"]), tuple(facts["gold"])
    return Report(scores, prompts, kinds, facts["steps"], facts["guidance"], facts["seed"], gold=gold)
