"""A run's weights as a folder for diffusers or ComfyUI: a LoRA or a pipeline, with its licence and a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.config import Config, load_config
from tempflow.export.card import Export, base_file, base_name, card, family_of, licence
from tempflow.folder import check
from tempflow.grid import SCHEDULER, USEFUL, Grid, grid_in, write_grid
from tempflow.models import DTYPES, HUB_ID, adapter_of, load
from tempflow.models.comfyui import comfyui_tensors
from tempflow.models.family import Family
from tempflow.models.lora import LORA_FILE, Lora, lora_bytes, merge, paired, ranks_of, write_lora, write_peft
from tempflow.models.pipeline_folder import EULER, INDEX, few_step_scheduler
from tempflow.models.protocol import WalksGrids
from tempflow.models.quiet import quiet

Form = Literal["lora", "peft", "comfyui", "merged"]
Which = Literal["best", "policy", "ema"]

LICENCE_TEXTS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt")
SMALL_FILES = 16 << 20
"""Bytes allowed for tokenizers and configurations, when disk space is checked."""


def export_run(
    run: Path,
    to: Path,
    *,
    weights: Which = "best",
    checkpoint: int | None = None,
    form: Form | None = None,
    dtype: str | None = None,
) -> Path:
    """Writes weights of the run in the folder `run` to the new folder `to`, which it returns.

    weights     "best" on validation, the "policy" as it was last, or its average "ema"
    checkpoint  an iteration that has a checkpoint, whose "best" is what the run evaluates by. None: a finished run's
                best weights come from `run`/model, a stopped run's from its best checkpoint, others from the newest
    form        "lora": one file for `pipe.load_lora_weights(to)`, the scale multiplied into B. "peft": the same LoRA as
                `PeftModel.from_pretrained(pipe.transformer, to)` reads it. "comfyui": the same LoRA as one file in
                ComfyUI's names of layers, called as the folder. "merged": a pipeline folder for `from_pretrained(to)`;
                of a LoRA run it holds W + scale·B·A, summed in float32. None: "lora" for a LoRA run, "merged" for one
                that trained fully
    dtype       "float32" or "bfloat16"; None: the one that the run computed and was judged in

    Raises ValueError for a folder that holds no run, weights or a checkpoint that it does not have, a form that does
    not fit, a target that is not empty or lies inside a model's folder, or too little disk space; OSError where files
    cannot be read or written. `to` appears complete or not at all. The σ grid that the run walked goes with the
    weights: in the model card, and as `grid.FILE`.
    """
    config = run_config(run)
    form = _form(config, form)
    dtype = _dtype(dtype or config.model.dtype)
    check(to, None, "output")
    source, grid, few = _source(run, weights, checkpoint), run_grid(run, config), ""
    with _finished(to) as partial:
        lora = _lora(source, config, weights) if config.model.training == "lora" else {}
        if form == "merged":
            few = _write_pipeline(source, config, weights, lora, partial, dtype, grid)
        elif form == "comfyui":
            tensors = _comfyui(config, lora, dtype)
            _check_space(partial, sum(t.nbytes for t in tensors.values()))
            save_file(tensors, partial / f"{to.name}.safetensors", metadata={"format": "pt"})
        else:
            _check_space(partial, lora_bytes(lora, DTYPES[dtype]))
            if form == "peft":
                write_peft(lora, partial, base_name(config), DTYPES[dtype])
            else:
                write_lora(lora, partial, DTYPES[dtype], _part(source, config))
        ranks = tuple(sorted(set(ranks_of(lora).values())))
        if form != "merged" and (grid.how != SCHEDULER or config.model.grid == SCHEDULER):
            write_grid(grid, partial)  # also where the run left a grid that its base carries
        told = Export(to.name, form, dtype, _unmeasured(source, weights), ranks, grid, few)
        _write_papers(run, config, partial, told)
    return to


# -------------------------------------------------------------------------------------------------------- what is asked
def run_config(run: Path) -> Config:
    """The configuration of the run in a folder. Raises ValueError, naming the nearest run, where there is none."""
    file = run / "config.yaml"
    if not file.is_file():
        runs = [str(found.parent) for found in sorted(run.parent.glob("*/config.yaml"))]
        close = get_close_matches(str(run), runs, n=1, cutoff=0.0)
        hint = f"nearest run: {close[0]}" if close else f"{run.parent} holds no run"
        raise ValueError(f"run: {str(run)!r} has no config.yaml, so it is no run's folder; {hint}")
    return load_config(file)


def run_grid(run: Path, config: Config) -> Grid:
    """The grid that the run walked, and the steps that it was measured in."""
    if isinstance(config.model.grid, str) and config.model.grid not in (SCHEDULER, USEFUL):
        return grid_in(run / "model") or Grid()  # of a model that was given as an object, as it was saved
    return Grid(config.model.grid, None if config.model.grid == SCHEDULER else config.evaluation.steps)


def _form(config: Config, form: Form | None) -> Form:
    if config.model.training == "lora":
        return form or "lora"
    if form not in (None, "merged"):
        raise ValueError(f"form: {form!r}, but this run trained the whole network; nearest valid: 'merged'")
    return "merged"


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        close = get_close_matches(dtype, DTYPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}; nearest valid: {close!r}")
    return dtype


def _source(run: Path, weights: Which, checkpoint: int | None) -> Path:
    """`run`/model, or the folder of a checkpoint."""
    if checkpoint is not None:
        return _checkpoint(run, checkpoint)
    model = run / "model"
    if weights == "best" and model.is_dir() and (run / "summary.json").is_file():
        return model
    from tempflow.train.checkpoint import BEST, FOLDER, newest, pointed

    if weights != "best":
        return newest(run)
    if model.is_dir() and not (run / FOLDER).is_dir():
        return model  # of a run that was stopped before its first checkpoint
    return pointed(run, BEST) or newest(run)


def _checkpoint(run: Path, iteration: int) -> Path:
    folders = [p for p in (run / "checkpoints").glob("*") if p.name.isdigit()]
    there = {int(folder.name): folder for folder in folders}
    if iteration not in there:
        close = min(there, key=lambda n: abs(n - iteration), default=None)
        hint = f"{str(run)!r} has no checkpoints" if close is None else f"nearest valid: {close}"
        raise ValueError(f"checkpoint: {iteration} is not there; {hint}")
    return there[iteration]


def _tensors(source: Path, weights: Which) -> dict[str, Tensor]:
    """A checkpoint's float32 weights by parameter name."""
    from tempflow.train.checkpoint import read_weights

    return read_weights(source, weights)


# -------------------------------------------------------------------------------------------------------------- writing
def _lora(source: Path, config: Config, weights: Which) -> Lora:
    try:
        if source.name == "model":
            tensors = load_file(source / LORA_FILE)
            part = next(iter(tensors), "").partition(".")[0]  # every name begins with the network's
            return paired(tensors, 1.0, f"{part}.")  # `save` has multiplied the scale in
        return paired(_tensors(source, weights), config.model.lora_alpha / config.model.lora_rank)
    except ValueError as error:
        raise ValueError(f"run: {error}") from error


def _comfyui(config: Config, lora: Lora, dtype: str) -> dict[str, Tensor]:
    """The LoRA's tensors in ComfyUI's names, by the base's configuration."""
    from tempflow.models.diffusers_model import DiffusersModel

    index = base_file(config, INDEX)
    if index is None:
        raise ValueError(
            f"form: 'comfyui' needs the configuration of {config.model.path!r}, which is not on this machine; "
            "nearest valid: 'lora'"
        )
    adapter = adapter_of(config.model.path, index.parent)
    shapes = adapter.layers_in(index.parent, config.model.path) if issubclass(adapter, DiffusersModel) else {}
    naming = adapter.comfyui(list(shapes)) if issubclass(adapter, DiffusersModel) else None
    if naming is None:
        raise ValueError(
            f"form: 'comfyui' of {adapter.family.title}, and what ComfyUI calls its layers is not known here; "
            "nearest valid: 'lora'"
        )
    return comfyui_tensors(lora, naming, shapes, DTYPES[dtype])


def _part(source: Path, config: Config) -> str:
    """What the pipeline calls the network: as the run's own LoRA has it, else as its base."""
    family = family_of(config)
    if source.name != "model":
        return Family.networks[0] if family is None else family.networks[0]
    with safe_open(str(source / LORA_FILE), "pt") as file:
        return next(iter(file.keys())).partition(".")[0]


def _write_pipeline(
    source: Path, config: Config, weights: Which, lora: Lora, folder: Path, dtype: str, grid: Grid
) -> str:
    """Writes it; the name of the folder inside whose scheduler has the grid by a number of steps alone, "" for none."""
    m = config.model
    if m.training == "full" and source.name == "model":
        model = load(str(source), dtype=dtype)
    elif m.training == "full":
        model = load(m.path, revision=m.revision, dtype=dtype)
        _replace(model.network, _tensors(source, weights))
    else:
        model = load(m.path, revision=m.revision)
        try:
            merge(model.network, lora)
        except ValueError as error:
            raise ValueError(f"run: {error}") from error
        model.to_dtype(DTYPES[dtype])
    _check_space(folder, model.nbytes)
    if isinstance(model, WalksGrids):
        model.state_grid(grid)
    model.save(str(folder))
    scheduler = getattr(getattr(model, "pipe", None), "scheduler", None)
    points = None if grid.usual is None else grid.points(grid.usual)
    found = None if points is None or type(scheduler).__name__ != EULER else few_step_scheduler(scheduler, points)
    if found is None:
        return ""
    name = f"scheduler_{grid.usual}_steps"
    found.save_pretrained(folder / name)
    return name


@torch.no_grad()
def _replace(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        _parameter(network, name).copy_(value)


def _parameter(network: nn.Module, name: str) -> nn.Parameter:
    try:
        return network.get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"run: its weight {name!r} is not in the base model; is model.path still the same?") from error


def _check_space(folder: Path, size: int) -> None:
    free, need = shutil.disk_usage(folder).free, size + SMALL_FILES
    if free < need:
        raise ValueError(
            f"output: {need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; nearest valid: a folder on "
            "another disk (bfloat16 is half of float32, and a LoRA is far smaller than a pipeline)"
        )


def _write_papers(run: Path, config: Config, folder: Path, export: Export) -> None:
    """Licence texts, licence.json and the model card."""
    for text in LICENCE_TEXTS:
        file = base_file(config, text)
        if file is not None:
            shutil.copyfile(file, folder / text)
    (folder / "licence.json").write_text(json.dumps({"licence": licence(run, config)}) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(run, config, export), encoding="utf-8")


def _unmeasured(source: Path, weights: Which) -> str | None:
    """Which weights they are, where they are not those that the run's summary speaks of."""
    measured = source.name == "model" and (source.parent / "summary.json").is_file()
    if measured:
        return None
    return f"{weights} weights of {'the stopped run' if source.name == 'model' else f'checkpoint {source.name}'}"


@contextmanager
def _finished(to: Path) -> Iterator[Path]:
    """A folder beside `to` that takes its place at the end, or leaves nothing behind."""
    to = to.resolve()  # what a link points to
    partial = to.with_name(f".{to.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with quiet():
            yield partial
        if to.is_dir():
            to.rmdir()  # empty, as was checked; one that has been filled since makes this fail, and stays
        partial.rename(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------------- the hub
def check_hub_name(name: str) -> None:
    """Raises ValueError where `name` is no "ORG/NAME"."""
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"push_to_hub: {name[:60]!r} is no repository; nearest valid: 'ORG/NAME'")


def push(folder: Path, name: str, dry: bool = False) -> str:
    """Uploads an exported folder to the hub's repository `name`, which is made, private, where it is not there. Returns
    a line that says what was done; with `dry`, what would be, and nothing is sent.

    Raises ValueError in one line for a name that is none, or where the hub refuses; ImportError where huggingface_hub
    is missing.
    """
    check_hub_name(name)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    what = f"{len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB"
    if dry:
        return f"dry run: {what} of {folder} would go to {name}; nothing was sent"
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("push_to_hub needs huggingface_hub: pip install 'tempflow[diffusers]'") from error
    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        place = hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message=f"Upload {folder.name}")
    except (OSError, ValueError) as error:  # the hub's own errors are both kinds
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"push_to_hub: {name!r} cannot be written ({type(error).__name__}: {told}); nearest valid: a repository of "
            f"yours, after `hf auth login`. The folder is whole: {folder}"
        ) from error
    return f"{what} are at {place}"
