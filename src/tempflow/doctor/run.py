"""What would stop a given configuration: its model, rewards, prompts, output folder and disk."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tempflow.config import Config, Stages
from tempflow.data.pictures import Pictures
from tempflow.data.prompts import load_prompts, with_sources
from tempflow.doctor.check import Check, by_stage
from tempflow.doctor.machine import gigabytes, is_offline
from tempflow.folder import check
from tempflow.models import EMBEDDED_MODELS, HUB_ID, adapter_of, place
from tempflow.models.family import check_asked
from tempflow.models.pipeline_folder import check_folder, licence_of, read_index, settings_in
from tempflow.models.precision import lack, nearest, needs_torchao
from tempflow.rewards import Note, check_takes
from tempflow.train.identity import RUN, STAGED, check_new

Notes = Mapping[str, Note]

REPORTS = 32 << 20
"""Bytes allowed for metrics, pictures and curves."""

OPEN = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc0-1.0", "cc-by-4.0")
"""Licences without conditions on use."""


def run_checks(config: Config | Stages, notes: Notes, environment: Mapping[str, str]) -> list[Check]:
    """Every check of a configuration; of stages those that find the same in each once, the others with the stage in
    front. `environment`: the process's, for the hub's settings."""
    if isinstance(config, Config):
        return [*_checks(config, notes, environment), output_check(Path(config.output)), disk_check(config)]
    first, *later = config.runs
    runs = [first, *(run.with_model(start="") for run in later)]  # what these start from is not there yet
    found = by_stage([_checks(run, notes, environment) for run in runs])
    return [*found, output_check(Path(config.output), STAGED), disk_check(config)]


def _checks(config: Config, notes: Notes, environment: Mapping[str, str]) -> list[Check]:
    """Those of a run that do not look at where it writes."""
    folder = model_folder(config)
    checks = [model_check(config, folder, offline=is_offline(environment)), *asked_check(config, folder)]
    checks += start_check(config)
    checks += [licence_check("model", config.model.path, licence_of(folder) if folder else "unknown")]
    for reward in (*config.rewards, *config.judges):
        kind = reward.kind or reward.name
        checks.append(licence_check("reward", reward.name, notes[kind].licence if kind in notes else "unknown"))
    return [*checks, *prompts_checks(config)]


def needed_extras(config: Config, notes: Notes, device: str = "cpu") -> dict[str, list[str]]:
    """Extra → what of the configuration needs it. `device`: the run's, "auto" resolved."""
    needs = {"diffusers": [f"model {config.model.path}"]}
    draft = config.algorithm.build().draft
    if draft is not None and needs_torchao(draft.precision, torch.device(device)):
        needs["quant"] = [f"drafts in {draft.precision}"]
    for name in dict.fromkeys(r.kind or r.name for r in (*config.rewards, *config.judges)):
        extra = notes[name].needs.removeprefix("tempflow").strip("[]") if name in notes else ""
        if extra:
            needs.setdefault(extra, []).append(f"reward {name}")
    return needs | {name: [f"tracker {name}"] for name in config.track.to}


# ---------------------------------------------------------------------------------------------------------------- model
def model_folder(config: Config) -> Path | None:
    """Where the model lies on this machine, hub cache included; None where it does not."""
    path = config.model.path
    folder = place(path)
    if path in EMBEDDED_MODELS or folder.exists() or not HUB_ID.fullmatch(path):
        return folder if (folder / "model_index.json").is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(path, "model_index.json", revision=config.model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def model_check(config: Config, folder: Path | None, offline: bool) -> Check:
    path = config.model.path
    if folder is None and HUB_ID.fullmatch(path) and not Path(path).expanduser().exists():
        if offline:
            advice = "unset HF_HUB_OFFLINE, or give a folder"
            return Check("model", "fails", f"{path} is not in the hub's cache", advice)
        advice = "its licence may have to be accepted on the hub first"
        return Check("model", "warning", f"{path} will be downloaded (not tried)", advice)
    if folder is None:
        advice = "give a folder with model_index.json, or 'shapes'"
        return Check("model", "fails", f"{path} is no pipeline folder", advice)
    try:
        found = read_index(path, folder)["_class_name"]
        check_folder(path, folder, adapter_of(path, folder).family)
    except ValueError as error:
        fault, _, advice = str(error).removeprefix("model.path: ").rpartition("; ")
        return Check("model", "fails", fault, advice)
    return Check("model", "ok", f"{path}, a {found}")


def asked_check(config: Config, folder: Path | None) -> list[Check]:
    """Whether the model draws what is asked for, by its folder alone; nothing where that is not here or not known."""
    if folder is None:
        return []
    try:
        family = adapter_of(config.model.path, folder).family
    except ValueError:  # `model_check` says why
        return []
    from tempflow.train.build import build_reward, check_streams
    from tempflow.train.gradients import check_gradients
    from tempflow.train.grids import with_grid

    m = config.model
    try:
        with config.naming("model"):
            check_asked(family, m.path, partial(settings_in, folder), config.size, m.guidance, m.guidance_options)
        with config.naming("algorithm"):
            config.algorithm.build().check_states(family.tokens, m.path)
        with_grid(config, config.algorithm.build())
        rewards, algorithm = [build_reward(r) for r in config.rewards], config.algorithm.build()
        check_takes(rewards, family.makes, m.path)
        check_streams(config, algorithm, family.streams, m.path)
        check_gradients(config, algorithm, None, rewards, own=True)
    except (ValueError, ImportError) as error:
        fault, _, advice = str(error).rpartition("; ")
        return [Check("size and guidance", "fails", fault or str(error), advice or "other settings of model")]
    return [Check("size and guidance", "ok", f"{config.size}, guidance {m.guidance:g}")]


def start_check(config: Config) -> list[Check]:
    """Whether what `model.start` names can be read; nothing where it names nothing."""
    if not config.model.start:
        return []
    from tempflow.train.state import check_start, read_starts

    try:
        check_start(read_starts(config.model.starts, "model.start"), config.model.training)
    except (ValueError, OSError) as error:
        return [Check("model.start", "fails", str(error), "a run's folder, or a LoRA's file or folder")]
    return [Check("model.start", "ok", " and ".join(config.model.starts))]


def licence_check(kind: str, name: str, licence: str) -> Check:
    label = f"licence of {kind} {Path(name).name if kind == 'model' else name}"
    if licence.lower() in OPEN:
        return Check(label, "ok", licence)
    if licence == "unknown":
        return Check(label, "warning", "unknown", "look it up before you share what you train")
    return Check(label, "warning", licence, "has conditions: read them before you share what you train")


def draft_checks(config: Config, device: str) -> list[Check]:
    """Whether `device` ("auto" resolved) has the precision of the run's drafts; nothing where there are none."""
    draft = config.algorithm.build().draft
    if draft is None:
        return []
    place = torch.device(device)
    missing = lack(draft.precision, place)
    if missing:
        advice = f"--algorithm.draft-precision {nearest(draft.precision, place)}"
        return [Check("drafts", "fails", f"{draft.precision} {missing}", advice)]
    return [Check("drafts", "ok", f"{draft.precision} on {device}")]


# -------------------------------------------------------------------------------------------------------------- prompts
def prompts_checks(config: Config) -> list[Check]:
    """A check for each of the three sources, and one of the training pictures where the algorithm takes such."""
    reads = config.algorithm.build().reads
    checks = [_prompts_check(config, field, reads) for field in ("train", "validation", "test")]
    return checks if not reads or checks[0].state != "ok" else [*checks, _pictures_check(config)]


def _pictures_check(config: Config) -> Check:
    algorithm = config.algorithm.build()
    assert algorithm.offline is not None
    keys, prompts = algorithm.offline.keys, load_prompts(config.data.train, uses=algorithm.reads)
    try:
        Pictures.beside(config.data.train, keys, config.size).check(prompts)
    except (ValueError, OSError) as error:
        return Check("pictures", "fails", str(error), f"name {' and '.join(keys)} in every line of data.train")
    return Check("pictures", "ok", f"{len(prompts) * len(keys)} headers fit")


def _prompts_check(config: Config, field: str, reads: tuple[str, ...]) -> Check:
    from tempflow.train.build import takes_sources

    name, source = f"data.{field}", dict(config.data)[field]
    try:
        found = with_sources(
            lambda sources: load_prompts(source, uses=reads, sources=sources), partial(takes_sources, config, None)
        )
        return Check(name, "ok", f"{source}, {len(found)} prompts")
    except (ValueError, OSError) as error:
        return Check(name, "fails", str(error), "give a file or folder of prompts (docs/prompts.md), or shapes:SPLIT")


# --------------------------------------------------------------------------------------------------------------- output
def output_check(output: Path, kind: str = RUN) -> Check:
    """Whether a new run, or stages, new or gone on with, may take the folder, and can write there. Writes one temporary
    file, and removes it."""
    try:
        check_new(output) if kind == RUN else check(output, kind)
    except ValueError as error:
        return Check("output", "fails", str(error).removeprefix("output: "), "another --output or --name")
    place = existing(output)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("output", "fails", f"{place} cannot be written: {error.strerror}", "another --output")
    return Check("output", "ok", f"{output}{'' if place == output else ' (new)'}, writable")


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def disk_check(config: Config | Stages) -> Check:
    """Free space against what the run, or all stages, will write at most at a time."""
    runs = [config] if isinstance(config, Config) else config.runs
    folder = model_folder(runs[0])  # stages train one model
    free = shutil.disk_usage(existing(Path(runs[0].output))).free
    if folder is None:
        found = f"{gigabytes(free)} free; what the run writes is unknown without the model's folder"
        return Check("disk", "warning", found)
    counts = [config.checkpoint.keep + 2 for config in runs]  # the newest, the best, and one while it is written
    kept = sum(counts)
    try:
        need = sum(written_bytes(config, folder, count) for config, count in zip(runs, counts, strict=True))
    except ValueError:  # `model_check` says why
        found = f"{gigabytes(free)} free; what the run writes is unknown for a model without an adapter"
        return Check("disk", "warning", found)
    found = f"{gigabytes(free)} free, about {gigabytes(need)} to be written ({kept} checkpoints at most)"
    if need > free:
        return Check("disk", "fails", found, "an --output on a larger disk")
    if need > free / 2:
        return Check("disk", "warning", found, "more than half of what is free")
    return Check("disk", "ok", found)


def written_bytes(config: Config, folder: Path, kept: int) -> int:
    """Bytes of `kept` checkpoints (policy, AdamW's two moments, and the average if there is one, in float32), of model/
    at the end, and of reports."""
    family = adapter_of(config.model.path, folder).family
    network = {f"{part}.{n}": s for part in family.networks for n, s in weight_shapes(folder / part).items()}
    if config.model.training == "lora":
        trained = lora_size(network, config.model.lora_rank, family.lora_targets)
        model = 4 * trained
    else:
        trained = sum(map(math.prod, network.values()))
        every = sum(math.prod(s) for part in folder.iterdir() if part.is_dir() for s in weight_shapes(part).values())
        model = every * (2 if config.model.dtype == "bfloat16" else 4)
    sets = 3 + (config.optimizer.ema_decay > 0)
    return kept * sets * 4 * trained + model + REPORTS


def lora_size(network: Mapping[str, Sequence[int]], rank: int, targets: Sequence[str]) -> int:
    """Numbers in a LoRA: rank·(in + out) for each targeted layer."""
    ends = tuple(f".{target}.weight" for target in targets)
    return sum(rank * sum(shape) for name, shape in network.items() if name.endswith(ends) and len(shape) == 2)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all tensors in a folder's safetensors files, by their headers alone."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes
