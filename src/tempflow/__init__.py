"""tempflow: RL post-training for flow-matching and diffusion generators.

The public names below are imported when they are first used, so that `import tempflow` and `tempflow --help` are quick.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""How torch's threads on a CPU wait for each other: they spin for some microseconds, then sleep. By default they spin
for milliseconds, and where other work takes a core, the one that is waited for does not get to run: an iteration then
takes tens of times as long. Waking a thread takes longer than most waits, so asleep at once is slower on a quiet
machine (docs/evidence.md). GNU's OpenMP reads the count, Intel's the policy, when torch is first imported."""

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():  # what the user has set stands
    os.environ.update(WAITING)

if TYPE_CHECKING:
    from tempflow import algorithms, core, data, evaluate, models, recipes, rewards, shapes
    from tempflow.algorithms import Algorithm
    from tempflow.config import Config, Stages, load_config, load_stages, to_yaml
    from tempflow.core.forest import Forest
    from tempflow.core.plan import Cost, Plan
    from tempflow.core.rollout import Noise, rollout
    from tempflow.core.schedule import Schedule
    from tempflow.core.scores import Scores
    from tempflow.data.prompts import load_prompts
    from tempflow.media import Media, Size
    from tempflow.request import Prompt
    from tempflow.stages import train
    from tempflow.train.trainer import Run

_HOMES = {
    "Algorithm": "tempflow.algorithms",
    "Config": "tempflow.config",
    "Stages": "tempflow.config",
    "load_config": "tempflow.config",
    "load_stages": "tempflow.config",
    "to_yaml": "tempflow.config",
    "Forest": "tempflow.core.forest",
    "Cost": "tempflow.core.plan",
    "Plan": "tempflow.core.plan",
    "Noise": "tempflow.core.rollout",
    "rollout": "tempflow.core.rollout",
    "Schedule": "tempflow.core.schedule",
    "Scores": "tempflow.core.scores",
    "Prompt": "tempflow.request",
    "Media": "tempflow.media",
    "Size": "tempflow.media",
    "load_prompts": "tempflow.data.prompts",
    "Run": "tempflow.train.trainer",
}
_ROOMS = ("algorithms", "core", "data", "evaluate", "models", "recipes", "rewards", "shapes")

__all__ = [
    "Algorithm",
    "Config",
    "Cost",
    "Forest",
    "Media",
    "Noise",
    "Plan",
    "Prompt",
    "Run",
    "Schedule",
    "Scores",
    "Size",
    "Stages",
    "algorithms",
    "core",
    "data",
    "evaluate",
    "load_config",
    "load_prompts",
    "load_stages",
    "models",
    "recipes",
    "rewards",
    "rollout",
    "shapes",
    "to_yaml",
    "train",
]


class _TrainRoom(ModuleType):
    """`tempflow.train` is a room and, by its public name, the function that trains: the room can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("tempflow.stages").train(*args, **kwargs)


# The room's own file is empty: this imports nothing more.
importlib.import_module("tempflow.train").__class__ = _TrainRoom


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("tempflow")
    if name in _HOMES:
        return importlib.import_module(_HOMES[name]).__dict__[name]
    if name in _ROOMS:
        return importlib.import_module(f"tempflow.{name}")
    raise AttributeError(f"module 'tempflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
