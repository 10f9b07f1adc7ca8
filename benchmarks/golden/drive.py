"""Drives one case through `tempflow.train` and reads the weights of every set out of the run's checkpoints."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor

import tempflow
from benchmarks.golden import library, model
from benchmarks.golden.cases import COMMON, Case

ITERATIONS = 2
"""Each of two updates: old log-probs, weight sets that follow and ratios away from 1 all take part."""

HUGE = 2.0**60
"""AdamW's eps. With it, and without averages, a step is rate · gradient: the gradient's size shows, which plain AdamW
hides, and with a rate that is a power of two there is nothing that two CPUs could round differently."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a case trained to.

    weights  set → the weights it starts with and has after each iteration, [iterations + 1, W]
    loss     of each iteration
    """

    weights: dict[str, Tensor]
    loss: list[float]


def drive(
    case: Case,
    rate: float,
    dtype: torch.dtype = torch.float64,
    change: Callable[[tempflow.Algorithm], tempflow.Algorithm] | None = None,
) -> Outcome:
    """Trains the case.

    rate    step = rate · gradient, a power of two; a case with an optimizer of its own has that
    dtype   what the network computes in
    change  made to the algorithm before the run
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name), _quick():
        run = trained(case, rate, Path(name), dtype, change)
        kept = [library.weight_sets(run.folder, iteration) for iteration in range(ITERATIONS + 1)]
        metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    sets = {name: torch.stack([_flat(sets[name]) for sets in kept]) for name in kept[0]}
    return Outcome(sets, [line["loss"] for line in metrics])


def trained(
    case: Case,
    rate: float,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    change: Callable[[tempflow.Algorithm], tempflow.Algorithm] | None = None,
    reward: Any = None,
    resume: bool = False,
    **fields: object,
) -> tempflow.Run:
    """The case's run in `folder`/run, with the others as for `drive`; an offline one reads pictures that it draws into
    the working directory.

    reward  instead of the case's own
    fields  of the configuration, instead of the cases' own
    """
    algorithm = built(case, str(folder))
    rewards = {
        "worth": model.worth,
        "patchy": model.patchy,
        "both": [model.worth, model.evenness],
        "light": model.Light(),
    }
    with _latent_reward():
        return tempflow.train(
            tempflow.Config.model_validate({**_fields(case, rate, folder), **fields}),
            model=model.Tokens(dtype) if case.tokens else model.Generator(dtype),
            reward=rewards[case.reward] if reward is None else reward,
            prompts=model.pictures(Path()) if case.offline else model.PROMPTS,
            test_prompts=model.PROMPTS,
            algorithm=algorithm if change is None else change(algorithm),
            quiet=True,
            resume=resume,
        )


def built(case: Case, judge: str = ".") -> tempflow.Algorithm:
    """Its algorithm. judge: the folder of a latent reward, where it wants one."""
    make = library.ALGORITHMS[case.algorithm]
    known = inspect.signature(make).parameters
    fields = {name: value for name, value in COMMON.items() if name in known} | dict(case.fields)
    if "reward" in known:
        fields["reward"] = judge
    algorithm = make(**fields)
    objective = algorithm.objective
    for path, value in case.objective.items():
        objective = _replaced(objective, path.split("."), value)
    return library.taught(algorithm, objective)


def _replaced(part: Any, path: Sequence[str], value: Any) -> Any:
    """The part with the field at that path changed; a number is a place in a tuple."""
    if not path:
        return value
    name, *rest = path
    if not name.isdigit() and not hasattr(part, name):
        name = library.FIELDS[name]
    if isinstance(part, tuple):
        return tuple(_replaced(p, rest, value) if place == int(name) else p for place, p in enumerate(part))
    return replace(part, **{name: _replaced(getattr(part, name), rest, value)})


def rate_for(case: Case) -> float:
    """The power of two at which the first iteration moves the weights by about a tenth: ratios leave 1, losses bend,
    and float32's rounding of the weights is small beside it."""
    small = 2.0**-10
    rate = small * 2.0 ** round(math.log2(0.1 / _moved(case, small)))
    while _moved(case, rate) > 0.2:  # it is not linear in the rate
        rate /= 2
    return rate


def _moved(case: Case, rate: float) -> float:
    weights = drive(case, rate).weights["policy"]
    return float((weights[1] - weights[0]).norm())


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _fields(case: Case, rate: float, folder: Path) -> dict[str, object]:
    plain = {"learning_rate": HUGE * rate, "beta1": 0.0, "eps": HUGE, "max_grad_norm": 1e9}
    return {
        "name": "golden",
        "iterations": ITERATIONS,
        "seed": 3,
        "output": str(folder / "run"),
        "threads": 1,
        "rollout_rows": 16,
        "train_rows": 16,
        "algorithm": {"name": case.algorithm},  # the object that `built` gives takes its place
        "model": {"height": 4, "width": 4, "guidance": case.guidance},
        "data": {"prompts_per_iteration": 3},
        "optimizer": {"updates_per_iteration": 2, **(case.optimizer or plain)},
        "evaluation": {"every": 0, "validation_prompts": 1, "test_prompts": 1, "steps": 1, "metric": "reward"},
        "checkpoint": {"every": 1, "keep": ITERATIONS + 1},
        "guards": {"kl": {"action": "off"}, "clip_fraction": {"action": "off"}},
    }


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Without the plot at a run's end, for which matplotlib takes longer than all of the training, without waiting for
    the disk, and without the text of a configuration that nobody reads."""
    plot = "matplotlib.figure"
    kept = sys.modules.get(plot)
    sys.modules[plot] = None  # type: ignore[assignment]  (so an import of it fails)
    try:
        with mock.patch.object(os, "fsync", lambda handle: None), mock.patch.object(yaml, "safe_dump", _no_yaml):
            yield
    finally:
        del sys.modules[plot]
        if kept is not None:
            sys.modules[plot] = kept


def _no_yaml(tree: object, **options: object) -> str:
    return ""


@contextlib.contextmanager
def _latent_reward() -> Iterator[None]:
    """A latent reward of the golden model stands in for one from disk."""

    class Loaded:
        def requires_grad_(self, on: bool) -> Loaded:
            return self

        def eval(self) -> Loaded:
            return self

        def check_fits(self, network: object) -> None:
            pass

    class Reward:
        @staticmethod
        def load(folder: str, device: str = "cpu") -> Loaded:
            return Loaded()

    room = library.home("LatentReward")
    with mock.patch.multiple(room, LatentReward=Reward, bind=lambda generator, reward, condition: model.judged):
        yield
