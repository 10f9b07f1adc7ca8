"""What can be evaluated: a pipeline, a training run, or a LoRA on its base; and how, where nothing else is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from tempflow.config import OWN_REWARD, Config, ScorerConfig, load_config
from tempflow.grid import OWN, SCHEDULER, Grid, Stated, grid_in
from tempflow.media import Size
from tempflow.models import EMBEDDED_MODELS, HUB_ID, Adapter, Family, Model, adapter_of, load, local_folder
from tempflow.models.family import check_asked, check_grid
from tempflow.models.guidance import Guidance, guidance_of
from tempflow.models.lora import ADAPTER_FILE, LORA_FILE
from tempflow.models.lora_files import PICKLED, load_lora, lora_file
from tempflow.models.pipeline_folder import settings_in
from tempflow.models.protocol import WalksGrids
from tempflow.rewards import names
from tempflow.rewards.compose import Composition

PIPELINE_FILE, CONFIG_FILE = "model_index.json", "config.yaml"


@dataclass(frozen=True)
class Source:
    """Where weights lie: a base that `models.load` takes, perhaps a LoRA on it, and the run that made them."""

    base: str
    revision: str | None = None
    lora: Path | None = None
    run: Path | None = None
    config: Config | None = None


@dataclass(frozen=True)
class Settings:
    """How a source is evaluated. `rewards` are all that score, `gold` those of them that it was not trained on, `total`
    the weights of the sum that it was trained on (None: not known), `compose` what was in place of a sum; `grid` is
    another than the weights carry where it isn't "own"."""

    prompts: str = "shapes:test"
    count: int = 504
    rewards: tuple[ScorerConfig, ...] = (ScorerConfig(name="shapes_strict"),)
    gold: tuple[str, ...] = ()
    total: Mapping[str, float] | None = None
    compose: Composition | None = None
    steps: int = 10
    grid: Stated = OWN
    guidance: float = 1.0
    guidance_options: Mapping[str, float | bool] = field(default_factory=dict[str, float | bool])
    seed: int = 1234
    size: Size = field(default_factory=lambda: Size(32, 32))
    dtype: str = "float32"
    device: str = "cpu"
    rows: int = 96
    threads: int | None = None


def find(what: str, base: str = "") -> Source:
    """The source that `what` means.

    what  an embedded model's name, a pipeline folder, or a hub id; a run's folder (config.yaml, and model/ with a
          pipeline or a LoRA); a LoRA's file or folder, with its `base`
    base  for a LoRA: an embedded model, a pipeline folder or a hub id; of a run's LoRA the default is what the run
          trained

    Looks at names only. Raises ValueError, naming the nearest valid source, for anything else.
    """
    place = Path(what).expanduser()
    pipeline = what in EMBEDDED_MODELS or (place / PIPELINE_FILE).is_file()
    if not pipeline and (place / CONFIG_FILE).is_file():
        return _run(place, base)
    if not pipeline and _looks_like_lora(place):
        return _lora(place, base)
    if base:
        inside = _near(place) if place.is_dir() and not pipeline else ""
        raise ValueError(f"base: {base!r} is for a LoRA, and {what!r} is none; {inside or 'nearest valid: no base'}")
    if not pipeline and (place.exists() or not HUB_ID.fullmatch(what) or _near(place)):
        raise ValueError(f"{what!r} is no pipeline, run or LoRA; {_near(place) or _offer()}")
    return Source(what)


def load_source(source: Source, *, dtype: str = "float32", device: str = "cpu", grid: Grid | None = None) -> Adapter:
    """The source's model, frozen, on the grid that its weights carry, or another. Raises what `models.load` and
    `models.lora_files.load_lora` raise."""
    model = load(source.base, revision=source.revision, dtype=dtype, device=device)
    if source.lora is not None:
        load_lora(model, source.lora)
        grid = grid or grid_in(source.lora)
    if grid is not None:
        on_grid(model, grid)
    return model


def on_grid(model: Model, grid: Grid) -> None:
    """States the grid that the model is to walk. Raises ValueError for one that it cannot."""
    if isinstance(model, WalksGrids):
        model.state_grid(grid)
    elif grid.how != SCHEDULER:
        raise ValueError(f"grid: {grid}, and {model.name[:60]!r} has a grid of its own; nearest valid: {OWN!r}")


def carried(source: Source) -> Grid:
    """The grid that the source's weights carry: a LoRA's, else its pipeline's. Raises ValueError for a file that cannot
    be read, and as `takes_sources` does."""
    own = None if source.lora is None else grid_in(source.lora)
    return own or grid_in(local_folder(source.base, source.revision)) or Grid()


def stated(source: Source, how: Stated) -> Grid:
    """The grid that `how` means for the source."""
    return carried(source) if how == OWN else Grid(how)


def check_walk(source: Source, how: Stated, steps: int) -> None:
    """Whether the source is drawn on that grid in these steps, before it is loaded. Raises ValueError, naming the
    field."""
    folder = local_folder(source.base, source.revision)
    family = adapter_of(source.base, folder).family
    check_grid(family, source.base, partial(settings_in, folder), stated(source, how), {"steps": steps})


def guidance_for(model: Model, how: Settings) -> Guidance | float:
    """The family's guidance as `how` says; its number alone where that is all that is said."""
    return guidance_of(model.guidance, how.guidance, how.guidance_options) if how.guidance_options else how.guidance


def takes_sources(source: Source) -> bool:
    """Whether its model draws from pictures too. Raises ValueError for a base that is not there or has no adapter."""
    return family_of(source).sources


def check_source(source: Source, size: Size, guidance: float, options: Mapping[str, object]) -> Guidance:
    """Whether the source draws what is asked for, before it is loaded; its family's guidance. Raises ValueError, naming
    the field, and as `takes_sources` does."""
    folder = local_folder(source.base, source.revision)
    family = adapter_of(source.base, folder).family
    return check_asked(family, source.base, partial(settings_in, folder), size, guidance, options)


def rows_of(source: Source, guidance: float, options: Mapping[str, object]) -> int:
    """Rows of its network that this guidance takes for each."""
    return guidance_of(family_of(source).guidance, guidance, options).rows


def family_of(source: Source) -> Family:
    """Raises ValueError for a base that is not there or has no adapter."""
    return adapter_of(source.base, local_folder(source.base, source.revision)).family


def settings(source: Source) -> Settings:
    """A run's own test, which its summary's "after" came from; for other sources the package's defaults."""
    if source.config is None:
        return Settings(steps=carried(source).usual or Settings.steps)
    c = source.config
    weights, compose = {name: weight for name, weight in c.reward_weights.items() if weight}, c.compose()
    judges = (*c.rewards, *c.judges)
    return Settings(
        prompts=c.data.test,
        count=c.evaluation.test_prompts,
        rewards=judges,
        gold=tuple(scorer.name for scorer in judges if scorer.name not in weights),
        total=weights,
        compose=None if compose is None else compose.judging(c.reward_weights),
        steps=c.evaluation.steps,
        guidance=c.evaluation.guidance,
        guidance_options=c.model.guidance_options,
        seed=c.evaluation.seed,
        size=c.size,
        dtype=c.model.dtype,
        device=c.device,
        rows=c.rollout_rows,
        threads=c.threads,
    )


def check_rewards(source: Source) -> None:
    """Raises ValueError where the run was scored by something that its configuration cannot name: a Python function."""
    summary = source.run / "summary.json" if source.run else None
    if summary is None or not summary.is_file():
        return
    try:
        scored = json.loads(summary.read_text(encoding="utf-8"))["after"]["mean"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(summary)!r} is no run's summary ({error}); nearest valid: with --rewards") from error
    config = source.config
    known = () if config is None else (scorer.name for scorer in (*config.rewards, *config.judges))
    own = [name.partition("/")[0] for name in scored if name != OWN_REWARD]
    own = [name for name in own if name not in {*names(), *known}]
    if own:
        raise ValueError(
            f"rewards: this run was scored by {own[0]!r}, which was given as an object and has no name to call it by; "
            "nearest valid: --rewards shapes_strict"
        )


def _run(run: Path, base: str) -> Source:
    config, model = load_config(run / CONFIG_FILE), run / "model"
    if (model / PIPELINE_FILE).is_file():
        if base:
            raise ValueError(
                f"base: {base!r} is for a LoRA, and {str(run)!r} trained all of it; nearest valid: no base"
            )
        return Source(str(model), run=run, config=config)
    if (model / LORA_FILE).is_file():
        revision = None if base else config.model.revision
        return Source(base or config.model.path, revision, model / LORA_FILE, run, config)
    raise ValueError(
        f"{str(run)!r} is a run without a pipeline or a {LORA_FILE} in model/: it has not finished; "
        f"nearest valid: its base, {config.model.path!r}"
    )


def _looks_like_lora(place: Path) -> bool:
    """A weights' file, or a folder of such: also a pickled one, to be told what is wrong with it."""
    weights = (".safetensors", *PICKLED)
    return place.suffix in weights or any(place.glob("*.safetensors")) or (place / "adapter_config.json").is_file()


def _lora(place: Path, base: str) -> Source:
    if not place.exists():
        raise ValueError(f"{str(place)!r} is no file; {_near(place) or _offer()}")
    try:
        file = lora_file(place)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from error
    if base:
        return Source(base, lora=file)
    run = next((p for p in (place.parent, place.parent.parent) if (p / CONFIG_FILE).is_file()), None)
    nearest = f"the run's folder, {str(run)!r}" if run else "--base shapes"
    raise ValueError(f"base: none given, and {str(place)!r} is a LoRA, which needs one; nearest valid: {nearest}")


def _near(place: Path) -> str:
    """A hint: the source inside `place`, or the one beside it with the likeliest name; "" where there is none."""
    signs = (PIPELINE_FILE, CONFIG_FILE, LORA_FILE, ADAPTER_FILE)
    for folder in (place, place.parent):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        known = [str(p) for p in inside if any((p / sign).is_file() for sign in signs)]
        if known:
            return f"nearest valid: {get_close_matches(str(place), known, n=1, cutoff=0.0)[0]!r}"
    return ""


def _offer() -> str:
    return "nearest valid: 'shapes', which comes with the package"
