"""Model adapters: one file per family.

A new file here is a new family: its `PIPELINES = {"pipeline class": "adapter class"}` says what it serves, and its
`TRUNKS`, where it has one, of which networks a latent reward can be made. Other packages add families by entry points
of the group "tempflow.models", named by the pipeline class.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from tempflow.devices import DTYPES, resolved_device, resolved_dtype
from tempflow.models.family import Adapter, Family
from tempflow.models.pipeline_folder import check_folder, read_index
from tempflow.models.protocol import Conditioning, Model, Predict, Trunk
from tempflow.models.quiet import quiet
from tempflow.models.tools import ASKED, TakesTools, Tools
from tempflow.names import EMBEDDED_MODELS, HUB_ID, nearest
from tempflow.registry import Declared

OFF = Tools()

ADAPTERS: Mapping[str, type[Adapter]] = Declared(__name__, "PIPELINES", group="tempflow.models")
"""Pipeline class → the adapter that serves it. Listing them imports none."""

TRUNKS: Mapping[str, type[Trunk]] = Declared(__name__, "TRUNKS")
"""Class of a network → its early blocks, for latent rewards."""

__all__ = [
    "ADAPTERS",
    "DTYPES",
    "EMBEDDED_MODELS",
    "TRUNKS",
    "Adapter",
    "Conditioning",
    "Family",
    "Model",
    "Predict",
    "adapter_for",
    "adapter_of",
    "load",
    "local_folder",
    "place",
    "resolved_device",
    "resolved_dtype",
    "shapes_folder",
    "tokens_folder",
]


def shapes_folder() -> Path:
    """Where the embedded pipeline lies."""
    return place("shapes")


def tokens_folder() -> Path:
    """Where the embedded pipeline of tokens lies."""
    return place("shapes_tokens")


def place(path: str) -> Path:
    """The folder of an embedded model, by its name; else `path`, as a folder."""
    if path in EMBEDDED_MODELS:
        return Path(str(resources.files("tempflow"))) / "shapes" / EMBEDDED_MODELS[path]
    return Path(path).expanduser()


def adapter_of(path: str, folder: Path) -> type[Adapter]:
    """The adapter of the pipeline in `folder`, by its model_index.json; `path` is what the user called it.

    Raises ValueError where that names no pipeline class, or one without an adapter.
    """
    return _adapter(path, read_index(path, folder)["_class_name"])


def _adapter(path: str, pipeline: object) -> type[Adapter]:
    if not isinstance(pipeline, str) or pipeline not in ADAPTERS:
        raise ValueError(f"model.path: {path!r} is a {str(pipeline)[:60]}; supported are {', '.join(ADAPTERS)}")
    return adapter_for(pipeline)


def adapter_for(pipeline: str) -> type[Adapter]:
    """The adapter of a pipeline class that is in `ADAPTERS`. Raises ValueError for a class that says no family."""
    adapter = ADAPTERS[pipeline]
    if not isinstance(getattr(adapter, "family", None), Family):
        raise ValueError(f"PIPELINES: {pipeline!r}: {adapter!r:.80} has no `family`; nearest valid: a models.Family")
    return adapter


def load(
    path: str, *, revision: str | None = None, dtype: str = "float32", device: str = "cpu", tools: Tools = OFF
) -> Adapter:
    """The adapter for "shapes" or "shapes_tokens", a diffusers pipeline folder, or a hub id ("owner/name", at
    `revision`).

    `dtype` may be "auto" (`resolved_dtype`). Of `tools`, what concerns loading is done here: the rest is `equip`'s.

    Raises ValueError, naming the field and what would do, for an unknown dtype, a folder that is
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
    adapter = adapter_of(path, folder)
    if tools == OFF:
        return adapter.load(folder, path, DTYPES[dtype], device)
    if not issubclass(adapter, TakesTools):
        raise ValueError(f"model: {path!r} takes none of {', '.join(ASKED)}; nearest valid: off")
    return adapter.load_with(folder, path, DTYPES[dtype], device, tools)


def local_folder(path: str, revision: str | None = None) -> Path:
    """The pipeline folder that `load` reads; of a hub id its snapshot, fetched if need be. Raises what `load` does."""
    folder = place(path)
    local = path in EMBEDDED_MODELS or folder.exists() or not HUB_ID.fullmatch(path)
    if local:
        check_folder(path, folder, adapter_of(path, folder).family)
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
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            index: Any = DiffusionPipeline.load_config(path, revision=revision)
        unused = dict.fromkeys(_adapter(path, index["_class_name"]).family.unused)
        return Path(DiffusionPipeline.download(path, revision=revision, use_safetensors=True, **unused))
    except OSError as error:
        raise ValueError(
            f"model.path: {path!r} is no folder, and as a hub id it cannot be had ({error}); "
            "'shapes' comes with the package"
        ) from error
