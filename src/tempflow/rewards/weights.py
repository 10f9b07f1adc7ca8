"""Weights of scorers: where they lie, and modules that take them whole or not at all. Safetensors only."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tempflow.names import HUB_ID, PATH, cut

FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
"""What is fetched of a hub's repository: weights, configurations, and the files of tokenizers."""

TOKENIZER = ("*.json", "*.txt", "*.model")
"""The same without weights."""

VOCABULARY = ("tokenizer.json", "vocab.*", "*.model")
"""Files of which a tokenizer has one at least."""

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MENTIONED = 3
"""Names of tensors in a message."""

Made = TypeVar("Made", bound=nn.Module)
_MAKING = Lock()


def folder_of(path: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The file or folder that `path` names; of a hub id ("owner/name", at `revision`) its snapshot, fetched if need be.

    files   patterns of what is fetched

    Raises ValueError for a path where nothing is and that is no hub id, a hub id that cannot be had (with
    HF_HUB_OFFLINE=1: that was not fetched before), and a revision of what lies on the disk; ImportError, naming the
    command to run, where a hub id is asked for without huggingface_hub.
    """
    place = Path(path).expanduser()
    if place.exists():
        if revision is not None:
            where = cut(path, PATH)
            raise ValueError(f"revision: {revision[:40]!r} of a place on the disk, {where!r}; nearest valid: null")
        return place
    if not HUB_ID.fullmatch(path):
        near = sorted(str(p) for p in place.parent.iterdir()) if place.parent.is_dir() else []
        close = difflib.get_close_matches(str(place), near, n=1, cutoff=0.0)
        hint = close[0] if close else "a folder, a file or a hub id (owner/name)"
        raise ValueError(f"path: {cut(path, PATH)!r} is not there, and no hub id; nearest valid: {hint}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        message = f"path: {path!r} is a hub id, which needs huggingface_hub: pip install 'tempflow[scorers]'"
        raise ImportError(message, name="huggingface_hub") from error
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # of the hub, of the network's library, of the disk: they differ by version
        why = cut(str(error), PATH)
        raise ValueError(f"path: {path!r} is not there, and as a hub id it cannot be had ({why})") from error


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit that a hub id means here and now: of its snapshot, which the hub is asked for where it can be, and its
    configuration is fetched for that. None for a place on the disk, and for what cannot be had, which who loads it
    says."""
    if not HUB_ID.fullmatch(path) or Path(path).expanduser().exists():
        return None
    try:
        return snapshot_of(folder_of(path, revision, ("config.json",)))
    except (ValueError, ImportError):
        return None


def snapshot_of(folder: Path) -> str | None:
    """The commit that a folder in the hub's cache is the snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def read_tensors(place: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU, of a safetensors file, or of a folder's weights: the files that its index lists, its
    model.safetensors, or the only safetensors file that it has.

    Raises ValueError for a pickle, a folder without weights or with several files and no index, a file that is missing
    or damaged, and a tensor that two files have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in _files(place):
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: {str(file)!r} is no safetensors, or damaged ({error}); get it again") from error
        twice = found.keys() & tensors.keys()
        if twice:
            raise ValueError(f"path: {str(file)!r} has {_listed(twice)}, which another file of the folder has too")
        found |= tensors
    return found


def metadata_of(place: Path) -> dict[str, str]:
    """What the head of a folder's or file's (first) safetensors says beside its tensors. Raises as `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    file = _files(place)[0]
    try:
        with safe_open(str(file), "pt") as tensors:
            return dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {str(file)!r} is no safetensors, or damaged ({error}); get it again") from error


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of transformers in a folder (or beside a file), or in a hub's repository. Nothing that it brings as
    code is run. Raises ValueError as `folder_of` does, and for a place without one."""
    from transformers import AutoTokenizer

    place = folder_of(path, revision, TOKENIZER)
    folder = place if place.is_dir() else place.parent
    if not any(file for pattern in VOCABULARY for file in folder.glob(pattern)):  # transformers would make one of none
        raise ValueError(f"tokenizer: {cut(path, PATH)!r} has no vocabulary ({', '.join(VOCABULARY)}); get it again")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what their parsers do
        why = cut(str(error), PATH)
        raise ValueError(f"tokenizer: {cut(path, PATH)!r} has none that can be loaded ({why})") from error


def unfilled(make: Callable[[], Made]) -> Made:
    """What `make` makes, with parameters on the meta device: neither drawn nor held in memory until `load_strict` gives
    them. Buffers are real. Raises ImportError, naming the command to run, without accelerate."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        message = "weights of scorers need accelerate: pip install 'tempflow[scorers]'"
        raise ImportError(message, name="accelerate") from error
    with _MAKING, init_empty_weights(include_buffers=False):  # it changes torch.nn.Module while it lasts
        return make()


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Gives `module` its tensors: each exactly once, in its shape, cast to the dtype that it has there.

    what    names the weights in messages, as in "path: 'folder'"

    Parameters may be on the meta device: they become the given tensors. A parameter that the module has under several
    names (tied weights) may be given under some of them. A buffer that the module does not save, as older versions of
    libraries did (positions counted up), may be given where it equals the module's own.

    Raises ValueError, naming the first few, for missing and unexpected tensors and other shapes; nothing is loaded
    then.
    """
    own = module.state_dict()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = {id(parameters[name]) for name in tensors if name in parameters}
    unsaved = {name: buffer for name, buffer in module.named_buffers() if name not in own}
    missing = [n for n in own if n not in tensors and id(parameters.get(n)) not in tied]
    unexpected = [n for n, t in tensors.items() if n not in own and not (n in unsaved and _equal(t, unsaved[n]))]
    shapes = [
        f"{n} {list(tensors[n].shape)} for {list(own[n].shape)}"
        for n in own
        if n in tensors and tensors[n].shape != own[n].shape
    ]
    faults = {"lacks": missing, "has unexpected": unexpected, "has other shapes:": shapes}
    told = [f"{fault} {_listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"{what}: does not fit {type(module).__name__}: it {'; it '.join(told)}")
    cast = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items() if name in own}
    module.load_state_dict(cast, strict=False, assign=any(t.is_meta for t in own.values()))


def _files(place: Path) -> list[Path]:
    """The safetensors files of a place."""
    if place.is_file():
        if place.suffix != ".safetensors":
            what = "a pickle, which is never read here" if place.suffix in PICKLES else "no safetensors"
            raise ValueError(f"path: {str(place)!r} is {what}; nearest valid: what scripts/convert_weights.py writes")
        return [place]
    whole, index = place / "model.safetensors", place / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({Path(str(name)).name for name in listed})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: {str(index)!r} cannot be read ({error}); get it again") from error
        for name in names:
            if not (place / name).is_file():
                raise ValueError(f"path: {str(place / name)!r} is missing; get it again")
        if names:
            return [place / name for name in names]
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        names = _listed(p.name for p in found)
        raise ValueError(f"path: {str(place)!r} has {names}; nearest valid: one of these files")
    pickled = sorted(p.name for p in place.glob("*") if p.suffix in PICKLES)
    hint = f"{pickled[0]} is a pickle, which is never read here" if pickled else "get it again"
    raise ValueError(f"path: {str(place)!r} has no safetensors ({hint}); scripts/convert_weights.py writes them")


def _equal(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and torch.equal(given.to(own.dtype), own)


def _listed(names: Iterable[str]) -> str:
    told = list(names)
    over = f" and {len(told) - MENTIONED} more" if len(told) > MENTIONED else ""
    return ", ".join(told[:MENTIONED]) + over
