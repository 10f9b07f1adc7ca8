"""Model adapters: one file per family."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path

import torch

from tempflow.models.protocol import Conditioning, Model, Predict, Size
from tempflow.models.sd3 import SD3

FAMILIES = {"StableDiffusion3Pipeline": "Stable Diffusion 3 / 3.5 (and the embedded `shapes`)"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

__all__ = ["DTYPES", "FAMILIES", "SD3", "Conditioning", "Model", "Predict", "Size", "load", "shapes_folder"]


def shapes_folder() -> Path:
    """Where the embedded pipeline lies."""
    return Path(str(resources.files("tempflow"))) / "shapes" / "weights"


def load(path: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu") -> SD3:
    """The adapter for "shapes", a diffusers pipeline folder, or a hub id.

    Raises ValueError for a dtype that is not float32 or bfloat16, a folder that is no pipeline (naming the nearest
    folder that is one) or a pipeline class without an adapter; ImportError with the command to run when diffusers is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = shapes_folder() if path == "shapes" else Path(path)
    if path == "shapes" or folder.exists() or path.startswith((".", "/", "~")):
        _check_folder(path, folder)
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("models need diffusers and transformers: pip install 'tempflow[diffusers]'") from error
    return SD3.load(folder if folder.exists() else path, path, revision, DTYPES[dtype], device)


def _check_folder(path: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        near = sorted(str(p.parent) for p in folder.parent.glob("*/model_index.json")) if folder.parent.is_dir() else []
        close = difflib.get_close_matches(str(folder), near, n=1, cutoff=0.0)
        hint = f"; nearest pipeline folder: {close[0]}" if close else "; 'shapes' is always there"
        raise ValueError(f"model.path: {path!r} has no model_index.json, so it is no diffusers pipeline folder{hint}")
    found = json.loads(index.read_text()).get("_class_name")
    if found not in FAMILIES:
        raise ValueError(f"model.path: {path!r} is a {found}; supported are {', '.join(FAMILIES)}")
