"""All that golden updates use of the library beyond its public calls, from where this revision or an older one has it.

When a name moves, its new home goes in front of its line in HOMES and the old one stays behind, so that the revision
before can still be driven. `tempflow.train`, `tempflow.Config` and the algorithms' names and arguments need no line.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HOMES = {
    "Conditioning": ("tempflow.models.protocol",),
    "Encoded": ("tempflow.models.protocol",),
    "TextInputs": ("tempflow.models.protocol",),
    "Schedule": ("tempflow.core.schedule",),
    "Scores": ("tempflow.core.scores",),
    "linear": ("tempflow.core.schedule",),
    "MetricJump": ("tempflow.core.metric_path",),
    "MetricPath": ("tempflow.core.metric_path",),
    "LatentReward": ("tempflow.latent_reward",),
    "ALGORITHMS": ("tempflow.algorithms",),
    "corrupt": ("tempflow.core.likelihood_proxy", "tempflow.core.surrogate"),
}
"""Each name's homes, the newest first."""

LOSSES = ("tempflow.core.objective",)
"""The package whose files the losses are in, the newest first."""

FIELDS = {"regularizers": "penalties"}
"""Fields of losses, and what an older revision calls them."""

SETS = {
    "policy": "weights",
    "average": "ema",
    "old": "set.old",
    "sampling": "set.sampling",
    "moving": "set.ema",
    "teacher": "set.teacher",
}
"""Weight sets, and their files in a checkpoint's folder of a role."""


def home(name: str) -> Any:
    """The module that has that name here. Raises ImportError that says what to add."""
    for module in HOMES[name]:
        found = _found(module)
        if hasattr(found, name):
            return found
    raise ImportError(f"{name}: is in none of {HOMES[name]}; add its new home to {__name__}.HOMES")


def losses() -> set[type]:
    """The dataclasses that losses are composed of, with those that carry a batch or a result."""
    package = next(found for name in LOSSES if (found := _found(name)) is not None)
    names = [f"{package.__name__}.{item.name}" for item in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(name) for name in names] + [home("corrupt")]
    return {
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and dataclasses.is_dataclass(item) and item.__module__ == module.__name__
    }


def taught(algorithm: Any, objective: Any) -> Any:
    """The algorithm with another loss."""
    return algorithm.taught(objective) if hasattr(algorithm, "taught") else replace(algorithm, objective=objective)


def guidance() -> Any:
    """The kind of guidance that a model says it has; None where models do not say."""
    found = _found("tempflow.models.guidance")
    return None if found is None else found.Guidance


def media(pictures: Tensor) -> Any:
    """Pictures, uint8 [N, H, W, 3], as a model decodes to them."""
    found = _found("tempflow.media")
    return pictures if found is None else found.Media.of(pictures)


def metric_jump(codes: Tensor) -> Any:
    """How tokens of that codebook jump."""
    return home("MetricJump").MetricJump(home("MetricPath").MetricPath(codes))


def scores(value: Tensor, name: str) -> Any:
    """One reward's scores of N pictures, those that are not finite failed."""
    return home("Scores").Scores(value[:, None], value.isfinite()[:, None], (name,))


def pictures(media: Any) -> Tensor:
    """And back."""
    return media if isinstance(media, Tensor) else media.pictures()


def _found(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home(name), name)


def weight_sets(run: Path, iteration: int) -> dict[str, dict[str, Tensor]]:
    """The weights after that iteration of the policy, of every other role and of all sets that move, by set and
    parameter. A role is called by its name, and a set that follows one by both.

    Raises ValueError for a file that is not known, so that no set is forgotten.
    """
    names = {file: name for name, file in SETS.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted((run / "checkpoints" / f"{iteration:06d}").glob("*/*.safetensors")):
        role, of_policy = file.parent.name, file.parent.name == "policy"
        if file.stem == "optimizer":
            continue
        if file.stem not in names:
            raise ValueError(f"{file.name}: is no weight set of {__name__}.SETS; nearest valid: add it there")
        name = names[file.stem]
        found[name if of_policy else role if name == "policy" else f"{role}/{name}"] = load_file(file)
    return found
