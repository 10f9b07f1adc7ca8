"""The model card of an export: where the weights come from, what was measured, how to use them, the licence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tempflow.config import OWN_REWARD, Config
from tempflow.grid import FILE, SCHEDULER, Grid
from tempflow.models import EMBEDDED_MODELS, HUB_ID, Family, adapter_of, place
from tempflow.models.family import as_sigmas
from tempflow.models.guidance import Guidance, guidance_of
from tempflow.models.pipeline_folder import licence_of

HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail")
"""Names that a card's `license` may have; any other stands in `license_name`."""


@dataclass(frozen=True)
class Export:
    """What a card is about: the folder's name, its form and dtype, which weights, if not those measured, the ranks of
    a LoRA's layers (empty for full training), the σ grid, and the folder inside of a scheduler that has this grid by a
    number of steps alone ("": none has)."""

    name: str
    form: str
    dtype: str
    unmeasured: str | None
    ranks: tuple[int, ...] = ()
    grid: Grid = field(default_factory=Grid)
    few: str = ""

    @property
    def adapter(self) -> bool:
        """Whether it needs the base beside it."""
        return self.form != "merged"


def card(run: Path, config: Config, export: Export) -> str:
    """README.md as text. Figures come from the run's summary.json alone; without one the card says so."""
    parts = [
        _front_matter(config, licence(run, config), export.form),
        f"# {config.name}\n",
        _origin(run, config, export),
        _figures(_summary(run), config, export),
        f"## Use\n\n{_usage(config, export)}",
        *_grid(config, export),
        f"## Licence\n\n{_licence_text(licence(run, config))}",
    ]
    return "\n".join(parts)


# -------------------------------------------------------------------------------------------------------------- licence
def base_file(config: Config, name: str) -> Path | None:
    """A file of the base model, where it is on this machine: in its folder, or in the hub's cache."""
    path = config.model.path
    folder = place(path)
    if path not in EMBEDDED_MODELS and not folder.exists() and HUB_ID.fullmatch(path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, name, revision=config.model.revision)
        return Path(cached) if isinstance(cached, str) else None
    return folder / name if (folder / name).is_file() else None


def base_settings(config: Config, name: str) -> Mapping[str, Any] | None:
    """A JSON file of the base model, where it is on this machine."""
    file = base_file(config, name)
    return json.loads(file.read_text(encoding="utf-8")) if file else None


def family_of(config: Config) -> Family | None:
    """The base's family; None where its folder is not on this machine."""
    index = base_file(config, "model_index.json")
    return adapter_of(config.model.path, index.parent).family if index else None


def licence(run: Path, config: Config) -> str:
    """The base's licence: as the run wrote it down, else as the base's folder says, else "unknown"."""
    if (run / "model" / "licence.json").is_file():
        return licence_of(run / "model")
    found = base_file(config, "README.md") or base_file(config, "licence.json")
    return licence_of(found.parent) if found else "unknown"


def _licence_fields(config: Config, name: str) -> dict[str, str]:
    """The licence in a card's front matter: the base's own fields where it has a card."""
    file = base_file(config, "README.md")
    lines = file.read_text(encoding="utf-8", errors="replace").split("---\n") if file else []
    stated = yaml.safe_load(lines[1]) if len(lines) > 2 and not lines[0].strip() else None
    if isinstance(stated, Mapping) and "license" in stated:
        return {key: str(stated[key]) for key in ("license", "license_name", "license_link") if key in stated}
    if name == "unknown":
        return {}
    plain = name.lower()
    return {"license": plain} if plain in HUB_LICENCES else {"license": "other", "license_name": name}


def _licence_text(name: str) -> str:
    if name == "unknown":
        return "The base model's files name no licence. Look it up before you use or share these weights.\n"
    return f"These weights derive from the base model and carry its licence: {name}.\n"


# ----------------------------------------------------------------------------------------------------------------- text
def _front_matter(config: Config, name: str, form: str) -> str:
    family = family_of(config)
    fields: dict[str, Any] = {
        **_licence_fields(config, name),
        "library_name": "tempflow" if family and family.own else "diffusers",
        **({"pipeline_tag": family.task} if family else {}),
        "tags": ["tempflow", config.algorithm.name] + (["lora"] if form != "merged" else []),
    }
    if HUB_ID.fullmatch(config.model.path) and not Path(config.model.path).exists():
        fields |= {"base_model": config.model.path}
        fields |= {"base_model_relation": "adapter" if form != "merged" else "finetune"}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def base_name(config: Config) -> str:
    """As given for a hub id and `shapes`; of a folder its name alone, as its place says nothing elsewhere."""
    path = config.model.path
    return path if HUB_ID.fullmatch(path) and not Path(path).exists() else Path(path).name


def _summary(run: Path) -> Mapping[str, Any] | None:
    file = run / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _taught_by(config: Config) -> str:
    """What the rewards are to this run."""
    given = config.algorithm.build().offline
    return "reward" if given is None else f"taught by pictures on disk ({', '.join(given.keys)}); judged by"


def _rewards(config: Config, summary: Mapping[str, Any] | None) -> str:
    """The rewards by weight; those that were given in Python are named by what the run measured."""
    named = [f"`{r.name}`" + (f" × {r.weight:g}" if r.weight != 1 else "") for r in config.rewards]
    measured = list(summary["before"]["mean"]) if summary else []
    if measured and not {r.name for r in config.rewards} <= set(measured):
        named = [f"`{name}`" for name in measured if name not in (OWN_REWARD, *config.evaluation.gold)]
    return ", ".join(named)


def _origin(run: Path, config: Config, export: Export) -> str:
    m, summary = config.model, _summary(run)
    trained = f"a LoRA of {_ranks(config, export)}" if m.training == "lora" else "the whole network"
    if m.start:
        trained += f", from {'the mean of ' if len(m.starts) > 1 else ''}{', '.join(Path(p).name for p in m.starts)}"
    if export.form == "merged" and m.training == "lora":
        trained += ", merged into the base"
    revision = f" at {m.revision}" if m.revision else ""
    lines = [
        f"- base: {base_name(config)}{revision}",
        f"- trained: {trained}, by `{config.algorithm.name}` with tempflow, in {m.dtype}",
        f"- {_taught_by(config)}: {_rewards(config, summary)}",
        f"- length: {_length(config, summary, export)}",
        f"- these files: {export.dtype}",
    ]
    return "\n".join(lines) + "\n"


def _ranks(config: Config, export: Export) -> str:
    """Rank and alpha of the LoRA that was trained, which may be another's (`model.start`)."""
    scale, ranks = config.model.lora_alpha / config.model.lora_rank, export.ranks or (config.model.lora_rank,)
    if len(ranks) == 1:
        return f"rank {ranks[0]}, alpha {scale * ranks[0]:g}"
    return f"ranks {', '.join(map(str, ranks))} and scale {scale:g}"


def _length(config: Config, summary: Mapping[str, Any] | None, export: Export) -> str:
    if export.unmeasured is not None:
        return f"{export.unmeasured}, of a run of {config.iterations} iterations"
    best = summary["best_iteration"] if summary else "?"
    untrained = " (the untrained model: no later weights were better on validation)" if best == 0 else ""
    return f"{config.iterations} iterations; the weights are those after iteration {best}{untrained}"


def _figures(summary: Mapping[str, Any] | None, config: Config, export: Export) -> str:
    if summary is None or export.unmeasured is not None:
        return "Held-out scores of these weights were not measured.\n"
    before, after, metric = summary["before"], summary["after"], summary["metric"]
    means = [(name, before["mean"][name], after["mean"].get(name)) for name in before["mean"]]
    rows = [f"| {n}{' (metric)' if n == metric else ''} | {_number(a)} | {_number(b)} |" for n, a, b in means]
    notes = f"{after['count']} held-out prompts, one picture each; {after['steps']} steps, guidance "
    notes += f"{after['guidance']:g}, noise seed {after['seed']}, in {config.model.dtype}"
    if after["failed"] or before["failed"]:
        notes += f"; scores failed on {before['failed']} pictures before and {after['failed']} after"
    if export.dtype != config.model.dtype or (export.form == "merged" and config.model.training == "lora"):
        notes += ". Measured before conversion to this form and dtype"
    return "\n".join(["| mean score | before | after |", "|---|---|---|", *rows, "", notes + ".", ""])


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


# ------------------------------------------------------------------------------------------------------------------ use
def _usage(config: Config, export: Export) -> str:
    """Lines that draw a picture as the run's evaluation did, by diffusers alone; for ComfyUI, where the file goes."""
    if export.form == "comfyui":
        return _comfyui_usage(config, export)
    imports, family = ["import torch", "from diffusers import DiffusionPipeline"], family_of(config)
    base = json.dumps(base_name(config))
    if family is not None and family.own:
        return _own_usage(config, export)
    if export.adapter and config.model.path == "shapes":
        imports, base = [*imports, "from tempflow.models import shapes_folder"], "shapes_folder()"
    revision = f", revision={json.dumps(config.model.revision)}" if config.model.revision else ""
    dtype = f"torch_dtype=torch.{export.dtype}"
    if export.adapter:
        peft = export.form == "peft"
        name = json.dumps(export.name)
        imports = [*imports, "from peft import PeftModel"] if peft else imports
        part = f"pipe.{family.networks[0] if family else 'transformer'}"
        put = f"{part} = PeftModel.from_pretrained({part}, {name})"
        loading = [
            f"pipe = DiffusionPipeline.from_pretrained({base}, {dtype}{revision})",
            put if peft else f"pipe.load_lora_weights({name})",
        ]
    else:
        loading = [f"pipe = DiffusionPipeline.from_pretrained({json.dumps(export.name)}, {dtype})"]
    if family is not None and family.sampler:
        imports[1] += f", {family.sampler.partition('.')[0]}"
        loading.append(f"pipe.scheduler = {family.sampler}  # as it was trained")
    e = config.evaluation
    size, m = f"height={config.model.height}, width={config.model.width}", config.model
    guidance = Guidance(e.guidance) if family is None else guidance_of(family.guidance, e.guidance, m.guidance_options)
    more = {} if family is None else family.call_options(partial(base_settings, config))
    said = {name: f"{v:g}" if isinstance(v, float) else repr(v) for name, v in guidance.call_options().items()}
    said |= {name: repr(value) for name, value in more.items()}
    named = "".join(f", {name}={value}" for name, value in said.items())
    options = f"{_steps(config, export)}, {size}{named}"
    drawing = [f'image = pipe("a red circle", {options}).images[0]', 'image.save("picture.png")']
    if family is not None and family.makes != "picture":
        imports = [*imports, "from diffusers.utils import export_to_video"]
        drawing = [f'frames = pipe("a red circle", {options}, num_frames={m.frames}).frames[0]']
        drawing += [f'export_to_video(frames, "clip.mp4", fps={m.fps or 16:g})']
    if m.guidance_options:
        drawing = [f"# the run's guidance had further settings: {json.dumps(m.guidance_options)}", *drawing]
    return "\n".join(["```python", *imports, "", *loading, *drawing, "```", ""])


def _own_usage(config: Config, export: Export) -> str:
    """The command line that draws a picture as the run's evaluation did, where no library has the networks."""
    e, m = config.evaluation, config.model
    options = {"guidance": f"{e.guidance:g}"} if e.guidance != 1 else {}
    options |= {"base": base_name(config)} if export.adapter else {}
    options |= {f"guidance-options.{name.replace('_', '-')}": f"{v:g}" for name, v in m.guidance_options.items()}
    more = "".join(f" --{name} {value}" for name, value in options.items())
    return (
        "No library has its networks; tempflow draws it:\n\n```bash\n"
        f'tempflow sample {export.name} --prompt "a red circle" --steps {e.steps} --height {m.height} --width {m.width}'
        f"{more}\n```\n"
    )


def _steps(config: Config, export: Export) -> str:
    """What of the call makes the σ grid."""
    points, family = export.grid.points(config.evaluation.steps), family_of(config)
    if points is None:
        return f"num_inference_steps={config.evaluation.steps}"
    call = (as_sigmas if family is None else family.grid_call)(points, partial(base_settings, config))
    return ", ".join(f"{name}={value!r}" for name, value in call.items())


def _grid(config: Config, export: Export) -> list[str]:
    """The section about the σ grid, where it is not the scheduler's."""
    steps = config.evaluation.steps
    points = export.grid.points(steps)
    if points is None:
        return []
    sigmas = _sigmas(config, points)
    useful = "" if sigmas is None else f", {sum(sigma >= 0.02 for sigma in sigmas)} of which change the picture"
    through = "" if sigmas is None else f" (σ = {', '.join(f'{sigma:.4g}' for sigma in sigmas)})"
    told = (
        f"## Grid\n\nThese weights were trained and measured on a σ grid of {steps} steps{useful}: from u = "
        f"{', '.join(f'{u:.4g}' for u in points)} to 0, before the pipeline's own shift{through}. "
    )
    family = family_of(config)
    if family is None or not family.own:
        told += (
            f"A call with `num_inference_steps={steps}` and no points walks the scheduler's own grid, and the weights "
            "were not trained on that. "
        )
    told += f"tempflow reads the grid from `{FILE}`.\n\n"
    if export.few:
        told += (
            f"For programs that take a number of steps alone, the scheduler in `{export.few}/` has this grid, bit for "
            f"bit, as its own of {steps} steps (and no other number): `pipe.scheduler = type(pipe.scheduler)"
            f'.from_pretrained({json.dumps(export.name)}, subfolder="{export.few}")`, then no points.\n'
        )
    elif not export.adapter and not (family and family.own):
        told += "No setting of the scheduler is known that gives this grid by a number of steps alone.\n"
    return [told]


def _sigmas(config: Config, points: Sequence[float]) -> list[float] | None:
    """What a constant shift makes of points, and the final 0; None where the shift is another, or not known here."""
    told = base_settings(config, "scheduler/scheduler_config.json") or {}
    shift = told.get("flow_shift", told.get("shift"))
    if shift is None or any(told.get(name) for name in ("use_dynamic_shifting", "shift_terminal")):
        return None
    return [*(shift * u / (1 + (shift - 1) * u) for u in points), 0.0]


def _comfyui_usage(config: Config, export: Export) -> str:
    e, m = config.evaluation, config.model
    return (
        f"Copy `{export.name}.safetensors` to ComfyUI's `models/loras`, and load it behind the base model by the node "
        f"LoraLoaderModelOnly at strength 1. The run's evaluation drew {m.width} × {m.height} in {e.steps} steps at "
        f"guidance {e.guidance:g}, as the base's diffusers pipeline counts them"
        + (".\n" if export.grid.how == SCHEDULER else ", on the σ below (`SamplerCustom` takes them as SIGMAS).\n")
    )
