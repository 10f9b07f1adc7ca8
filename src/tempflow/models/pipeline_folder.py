"""A pipeline's folder, looked at before gigabytes are loaded: what it is of, whether it is whole and can be honoured.

Each fault is one line with the field `model.path`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tempflow.models.family import Family, Settings
from tempflow.names import EMBEDDED_MODELS

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library → what the weights' file of one of its networks is called."""

EULER = "FlowMatchEulerDiscreteScheduler"


def read_index(path: str, folder: Path) -> dict[str, Any]:
    """The folder's model_index.json. Raises ValueError where there is none, or it names no pipeline class."""
    index = folder / INDEX
    if not index.is_file():
        near = sorted(str(p.parent) for p in folder.parent.glob(f"*/{INDEX}")) if folder.parent.is_dir() else []
        close = difflib.get_close_matches(str(folder), near, n=1, cutoff=0.0)
        hint = f"nearest pipeline folder: {close[0]}" if close else "'shapes' comes with the package"
        if path in EMBEDDED_MODELS:
            hint = f"this copy of the package lacks its weights: scripts/pretrain_{path}.py makes them"
        raise ValueError(f"model.path: {path!r} has no {INDEX}, so it is no diffusers pipeline folder; {hint}")
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        found = told["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path: {str(index)!r} names no pipeline class; write the folder anew") from error
    if isinstance(found, list):
        raise ValueError(_own_code(path, "the pipeline", found))
    return told


def check_folder(path: str, folder: Path, family: Family) -> tuple[str, ...]:
    """Looks at every part that a pipeline of `family` needs, at headers only. Returns the optional parts that it lacks.

    Raises ValueError for a part that is missing, damaged, pickled or of code of its own, and for a scheduler that
    cannot be honoured.
    """
    index = read_index(path, folder)
    for name, told in index.items():
        if (
            name not in family.unused
            and isinstance(told, list)
            and told
            and told[0] is not None
            and told[0] not in LIBRARIES
            and told[1:] != [family.own.get(name)]
        ):
            raise ValueError(_own_code(path, name, told))
    parts = {name: _part(index, name) for name in (*family.needed, *family.optional)}
    for name in family.needed:
        if parts[name] is None:
            others = f"only {family.may_be_null} may be null" if family.may_be_null else "get it again"
            raise ValueError(f"model.path: {path!r} has no {name} in its {INDEX}; {others}")
    for name, other in family.together:
        if parts[name] and not parts[other]:
            raise ValueError(f"model.path: {path!r} has a {name} and no {other}; nearest valid: both or neither")
    for name, part in parts.items():
        if part is not None:
            _check_part(path, folder / name, *part, family)
    return tuple(name for name in family.optional if parts[name] is None)


def _part(index: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """Library and class of a part; None where the index says null, in any of the ways that are met."""
    told = index.get(name)
    return None if not isinstance(told, list) or len(told) != 2 or None in told else (told[0], told[1])


def _own_code(path: str, name: str, told: list[Any]) -> str:
    code = ".".join(map(str, told))[:80]
    return (
        f"model.path: {path!r} brings code of its own for {name} ({code}), which is never run here; "
        f"nearest valid: a folder whose parts are all of {' and '.join(LIBRARIES)}"
    )


def _check_part(path: str, folder: Path, library: str, kind: str, family: Family) -> None:
    if not folder.is_dir():
        raise ValueError(f"model.path: {path!r} lacks the folder {folder.name} ({kind}); get it again")
    if folder.name == "scheduler":
        family.scheduler(path, kind, _json(folder / "scheduler_config.json"))
    elif folder.name not in family.weightless and not folder.name.startswith(("tokenizer", "feature_extractor")):
        _json(folder / "config.json")
        tensor_names(folder, WEIGHTS.get(library, WEIGHTS["diffusers"]))


def weight_files(folder: Path, stem: str) -> list[Path]:
    """A network's safetensors files: one, or those of its index. Raises ValueError for an index that cannot be read."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file() and not whole.is_file():
        told = _json(index).get("weight_map")
        files = [folder / Path(str(name)).name for name in sorted(set(told.values()))] if isinstance(told, dict) else []
    else:
        files = [whole]
    return files or [whole]


def tensor_names(folder: Path, stem: str) -> set[str]:
    """Names of the tensors in a network's safetensors files, by their headers. Raises ValueError for a file that is
    missing, damaged or pickled."""
    names: set[str] = set()
    for file in weight_files(folder, stem):
        if not file.is_file():
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            others = sorted(p.name for p in folder.glob("*.safetensors"))
            hint = f"there is {others[0]}, which is not read; get it by this name" if others else "get it again"
            if pickled:
                hint = (
                    f"{pickled[0]} is a pickle, which is not read: where you trust it, load the pipeline by diffusers "
                    "and write it by save_pretrained(FOLDER, safe_serialization=True)"
                )
            raise ValueError(f"model.path: {str(file)!r} is missing; {hint}")
        try:
            with safe_open(str(file), "pt") as tensors:
                names |= set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model.path: {str(file)!r} is no safetensors, or damaged ({error}); get it again"
            ) from error
    return names


def settings_in(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of the folder; None where there is none. Raises ValueError for one that cannot be read."""
    return _json(folder / name) if (folder / name).is_file() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"model.path: {str(file)!r} {problem}; get it again") from error
    if not isinstance(told, dict):
        raise ValueError(f"model.path: {str(file)!r} is no mapping of fields; get it again")
    return told


# -------------------------------------------------------------------------------------------------------------- loading
def pipeline_class(path: str, kind: str) -> Any:
    """A pipeline class of diffusers. Raises ValueError where the diffusers that is installed lacks it."""
    import diffusers

    if kind not in dir(diffusers):
        raise ValueError(
            f"model.path: {path!r} is a {kind}, which diffusers {diffusers.__version__} lacks; nearest valid: "
            "pip install --upgrade diffusers"
        )
    return getattr(diffusers, kind)


def check_packages(path: str, index: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Raises ImportError, with the command, where the class of one of `parts` needs a package that is not here."""
    import transformers

    for name in parts:
        library, kind = _part(index, name) or ("", "")
        backends: Sequence[str] = (
            getattr(getattr(transformers, kind, None), "_backends", ()) if library == "transformers" else ()
        )
        missing: list[str] = [PACKAGES.get(backend, backend) for backend in backends if find_spec(backend) is None]
        if missing:
            raise ImportError(
                f"model.path: {path!r} has a {kind} ({name}), which needs {' and '.join(missing)}: "
                f"pip install {' '.join(missing)}"
            )


PACKAGES = {"vision": "pillow"}
"""What transformers calls a package by another name."""

LOADING_FAULTS = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError,
)  # fmt: skip
"""What the libraries are known to raise over a folder that they cannot load."""


def cannot_load(path: str, error: Exception) -> str:
    """One line about what diffusers or transformers raised, without advice that does not hold here."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        text = "it brings code of its own, which is never run here"
    return f"model.path: {path!r} cannot be loaded: {text[:300]} ({type(error).__name__})"


@contextmanager
def readable_index(folder: Path) -> Iterator[Path]:
    """`folder` itself, or, where its index says a plain null for a part, a folder of links whose index says what
    diffusers can read."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if None not in index.values():
        yield folder
        return
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        for entry in folder.resolve().iterdir():
            if entry.name != INDEX:
                (place / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        told = {name: value for name, value in index.items() if value is not None}
        (place / INDEX).write_text(json.dumps(told), encoding="utf-8")
        yield place


def check_names(path: str, folder: Path, network: nn.Module) -> None:
    """Raises ValueError where the files' tensors are not those of the network, which diffusers fills in at random."""
    there = tensor_names(folder, WEIGHTS["diffusers"])
    wanted = set(network.state_dict())
    if any(old in name for name in there for old in OLD_NAMES):
        return  # diffusers itself renames these
    for names, problem in ((wanted - there, "lacks"), (there - wanted, "has an unknown")):
        if names:
            raise ValueError(
                f"model.path: {path!r} {problem} {sorted(names)[0]!r} in {folder.name} ({len(names)} of its tensors); "
                "get it again"
            )


OLD_NAMES = (".query.", ".key.", ".value.", ".proj_attn.")
"""What attention layers of older autoencoders are called."""


# ------------------------------------------------------------------------------------------------------------ scheduler
CANNOT = {
    "stochastic_sampling": "its steps draw noise of their own, and an ODE step is walked here",
    "invert_sigmas": "its σ run from 0 to 1, and those walked here from 1 to 0",
}
"""Settings of the Euler scheduler that change more than the σ grid; every other one is in the grid that it gives."""


def check_flow_match_euler(path: str, kind: str, config: Mapping[str, Any]) -> None:
    """For families that are walked by Euler steps of flow matching: raises ValueError, naming class and setting, for a
    scheduler whose samples would not be the pipeline's."""
    if kind != EULER:
        raise ValueError(
            f"model.path: {path!r} has the scheduler {kind!r}, whose steps are not those walked here; nearest valid: "
            f"{EULER!r} in its {INDEX} and scheduler/scheduler_config.json"
        )
    for setting, why in CANNOT.items():
        if config.get(setting):
            raise ValueError(
                f"model.path: {path!r} has a {EULER} with {setting} {config[setting]!r}: {why}; "
                f"nearest valid: {setting} false in scheduler/scheduler_config.json"
            )


CONVERTS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings of the Euler scheduler by which it goes through other σ than those of given points."""


def euler_grid(settings: Settings, more: Sequence[str] = ()) -> str:
    """`Family.own_grid` of families that are walked by the Euler scheduler. `more`: further settings, for which the
    pipeline does not give it the points."""
    config = settings("scheduler/scheduler_config.json") or {}
    return next((f"its scheduler has {name}, a grid of its own" for name in (*CONVERTS, *more) if config.get(name)), "")


NEAR = 64
"""How many numbers beside the real solution are tried for one whose rounding agrees."""


def few_step_scheduler(scheduler: Any, u: Sequence[float]) -> Any:
    """A scheduler whose own grid of N steps is, to the last bit, the given one's through points u; None: none is found.

    Between its smallest σ and 1 the scheduler spaces its points evenly, shifts them, and, with `shift_terminal`,
    stretches 1 − σ linearly. Of N evenly spaced points from 1 to 1/N the wanted 1 − σ is k/(1 − ck), k = 0 … 1, and so
    is the stretched one, for the shift that solves (b − 1)(1 − m)/b = c, where m is that smallest σ. What is left is
    rounding, for which numbers beside the solution are tried.
    """
    config, count = scheduler.config, len(u)
    even = [(count - i) / count for i in range(count)]
    if config.get("use_dynamic_shifting") or config.get("shift_terminal") or list(u) != even or count < 2:
        return None
    fresh = lambda **changed: type(scheduler).from_config(config, **changed)  # noqa: E731
    wanted = fresh()
    wanted.set_timesteps(sigmas=list(u))
    last, shift, trained = float(wanted.sigmas[-2]), float(config.shift), int(config.num_train_timesteps)
    curve, low, high = (shift - 1) * (count - 1) / (count * shift), 1e-3, 1e3
    for _ in range(100):
        b = (low + high) / 2
        smallest = b / (trained + b - 1)
        low, high = (b, high) if (b - 1) * (1 - smallest) / b < curve else (low, b)
    for i in range(2 * NEAR):
        near = b * (1 + (i // 2) * (-1) ** i * 2.0**-24)
        found = fresh(shift=near, shift_terminal=last)
        found.set_timesteps(count)
        if torch.equal(found.sigmas, wanted.sigmas) and torch.equal(found.timesteps, wanted.timesteps):
            return found
    return None


# -------------------------------------------------------------------------------------------------------------- licence
def licence_of(folder: Path) -> str:
    """The licence of the weights: `license` in the README's front matter ("other": its `license_name`), else the
    `licence` that `licence.json` names, else "unknown"."""
    card, record = folder / "README.md", folder / "licence.json"
    stated = _front_matter(card.read_text(errors="replace")) if card.is_file() else {}
    licence = stated.get("license", "")
    if licence == "other":
        licence = stated.get("license_name", licence)
    if not licence and record.is_file():
        licence = str(json.loads(record.read_text()).get("licence", ""))
    return licence or "unknown"


def _front_matter(text: str) -> dict[str, str]:
    """The plain `key: value` lines between the two `---` that open a model card."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, colon, value = line.partition(":")
        if colon and not key.startswith((" ", "-", "#")):
            fields[key.strip()] = value.strip().strip("\"'")
    return fields
