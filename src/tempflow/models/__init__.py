"""Model adapters: one file per family."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tempflow.models.pipeline_folder import FAMILIES, check_family, check_folder
from tempflow.models.protocol import Conditioning, Model, Predict, Size
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.names import nearest

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = "auto"

__all__ = [
    "DTYPES",
    "FAMILIES",
    "SD3",
    "Conditioning",
    "Model",
    "Predict",
    "Size",
    "load",
    "local_folder",
    "resolved_device",
    "resolved_dtype",
    "shapes_folder",
]


def shapes_folder() -> Path:
    """Where the embedded pipeline lies."""
    return Path(str(resources.files("tempflow"))) / "shapes" / "weights"


def resolved_device(name: str) -> str:
    """`name` itself, once it is known to be here; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError, naming the nearest device that is here, for one that is not.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name[:40]!r} is no device; nearest valid: 'auto'") from error
    if device.type == "cuda" and not cuda:
        build = "" if torch.version.cuda else ", and this torch is built for CPUs alone"
        raise ValueError(f"device: {name!r}, but torch sees no CUDA device{build}; nearest valid: 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise ValueError(f"device: {name!r}, but there are {cuda} CUDA devices; nearest valid: 'cuda:{cuda - 1}'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {name!r}, but torch sees no MPS device; nearest valid: 'cpu'")
    return name


def resolved_dtype(dtype: str, device: str) -> str:
    """`dtype` itself; for "auto" bfloat16 where `device` has it in hardware, else float32.

    A CPU without such instructions emulates it, several times slower than float32.
    """
    if dtype != AUTO:
        return dtype
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and "get_capabilities" in dir(torch.cpu):  # torch 2.13 has it, 2.6 has not
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        fast = False
    return "bfloat16" if fast else "float32"


def load(path: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu") -> SD3:
    """The adapter for "shapes", a diffusers pipeline folder, or a hub id ("owner/name", at `revision`).

    `dtype` may be "auto" (`resolved_dtype`).

    Raises ValueError, naming the field and what would do, for a dtype that is not float32 or bfloat16, a folder that is
    no pipeline, a hub id that cannot be had, a pipeline class without an adapter, a scheduler that cannot be honoured,
    and a file of the pipeline that is missing, damaged or pickled; ImportError with the command to run when diffusers
    is missing.
    """
    dtype = resolved_dtype(dtype, device)
    if dtype not in DTYPES:
        raise ValueError(
            f"model.dtype: {dtype[:40]!r} is not one of {', '.join(DTYPES)}; nearest is {nearest(dtype, DTYPES)}"
        )
    folder = local_folder(path, revision)
    _check_libraries()
    return SD3.load(folder, path, DTYPES[dtype], device)


def local_folder(path: str, revision: str | None = None) -> Path:
    """The pipeline folder that `load` reads; of a hub id its snapshot, fetched if need be. Raises what `load` does."""
    folder = shapes_folder() if path == "shapes" else Path(path).expanduser()
    local = path == "shapes" or folder.exists() or not HUB_ID.fullmatch(path)
    if local:
        check_folder(path, folder)
        return folder
    _check_libraries()
    return _download(path, revision)


def _check_libraries() -> None:
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("models need diffusers and transformers: pip install 'tempflow[diffusers]'") from error


def _download(path: str, revision: str | None) -> Path:
    """The snapshot folder of a hub id; its class is looked at before gigabytes travel."""
    try:
        with quiet():
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

            index: Any = StableDiffusion3Pipeline.load_config(path, revision=revision)
        check_family(path, index["_class_name"])
        return Path(StableDiffusion3Pipeline.download(path, revision=revision, use_safetensors=True))
    except OSError as error:
        raise ValueError(
            f"model.path: {path!r} is no folder, and as a hub id it cannot be had ({error}); "
            "'shapes' comes with the package"
        ) from error
