"""`tempflow eval`: scores of a model on fixed prompts and noise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.config import ScorerConfig
from tempflow.config.files import read_yaml
from tempflow.grid import OWN, WORDS, Stated, as_stated
from tempflow.strict import ConfigError, Place, Strict, cut, shown, validated

if TYPE_CHECKING:
    from tempflow.evaluate.compare import Row
    from tempflow.evaluate.source import Settings, Source
    from tempflow.evaluate.suite import Report
    from tempflow.models.protocol import Model
    from tempflow.request import Prompt
    from tempflow.rewards.protocol import Reward

GRID = 24
"""Prompts in the grid of pictures."""

Names = Annotated[tuple[str, ...], Field(strict=False)]

T = TypeVar("T")


def _listed(given: object) -> object:
    return given if isinstance(given, list | tuple) or given is None else [given]


Several = Annotated[tuple[T, ...], BeforeValidator(_listed)]
"""One value or more."""


def _within(values: tuple[float, ...], low: float, high: float) -> tuple[float, ...]:
    for value in values:
        if not low <= value <= high:
            near, sign = (low, "≥") if value < low else (high, "≤")
            raise ValueError(f"{shown(value)} must be {sign} {near}; nearest valid: {near}")
    return values


def grids(given: object) -> object:
    """One grid or more: words, numbers that are one grid's points, or lists of them, as text or as values."""
    items = list(given) if isinstance(given, list | tuple) else [given]
    items = [read_yaml(item) if isinstance(item, str) and item not in WORDS else item for item in items]
    if items and all(isinstance(item, int | float) for item in items):
        return (as_stated(items),)
    return tuple(as_stated(item) for item in items)


class WalkOptions(Strict):
    """How a source is drawn, beside what all rows share."""

    steps: Annotated[Several[int], AfterValidator(partial(_within, low=1, high=1000))] = Field(
        default=(), strict=False, description="sampler steps (as the weights say, else 10); each of several is a row"
    )
    grid: Annotated[tuple[Stated, ...], BeforeValidator(grids)] = Field(
        default=(),
        description="σ grid: own (what the weights carry, else the scheduler's), scheduler, useful (N steps that all "
        "count), or points before the shift (1 0.75 0.5 0.25); each of several is a row",
    )
    guidance: Annotated[Several[float], AfterValidator(partial(_within, low=1, high=math.inf))] = Field(
        default=(), strict=False, description="classifier-free guidance (1 = none); each of several is a row"
    )
    base: Place = Field(default="", description="what a LoRA is laid on: 'shapes', a pipeline folder or a hub id")


class EvalOptions(WalkOptions):
    """Score a model: fixed prompts, fixed noise, deterministic sampling. What is None is as the run's own test was, for
    a run; else as in brackets."""

    what: Annotated[Place, POSITIONAL] = Field(
        default="shapes", description="'shapes', a run's folder, a pipeline folder, a hub id, or a LoRA (with --base)"
    )
    prompts: Place | None = Field(default=None, description="shapes:SPLIT, a file or a folder of texts (shapes:test)")
    count: int | None = Field(
        default=None, ge=1, le=1_000_000, description="how many prompts; task kinds in turn (504)"
    )
    samples_per_prompt: int = Field(
        default=1, ge=1, le=10_000, description="pictures of each; from 2 their diversity is told"
    )
    rewards: Names = Field(
        default=(), description="what scores them, with options as NAME:option=value,option=value (shapes_strict)"
    )
    gold: Names = Field(default=(), description="more rewards, marked as not trained on")
    beside: Annotated[tuple[Place, ...], Field(strict=False)] = Field(
        default=(),
        description="more rows, on the same prompts and noises: WHAT or WHAT:option=value,… of base, steps, grid and "
        "guidance, as shapes:steps=4,grid=useful",
    )
    seed: int | None = Field(default=None, description="of the noise (1234)")
    height: int | None = Field(default=None, ge=1, le=16_384, description="pixels (32)")
    width: int | None = Field(default=None, ge=1, le=16_384, description="pixels (32)")
    frames: int | None = Field(default=None, ge=1, le=100_000, description="of a clip (1: a picture)")
    fps: float | None = Field(default=None, gt=0, description="frames a second of a clip (the model's own)")
    seconds: float | None = Field(default=None, gt=0, description="of sound (as long as the frames)")
    guidance_options: dict[str, float | bool] | None = Field(
        default=None, description="the family's further settings of guidance, {name: value}"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="to compute in (float32)")
    device: str | None = Field(default=None, description="auto, cpu, mps, cuda or cuda:N (cpu)")
    rows: int | None = Field(default=None, ge=1, description="most rows of a forward (96)")
    output: Place = Field(default="", description="file for the figures as JSON")
    pictures: Place = Field(default="", description=f"folder for grid.png: the first {GRID} prompts")


@dataclass(frozen=True)
class Asked:
    """A row: what is drawn, and how."""

    what: str
    source: Source
    how: Settings


def eval_verb(args: Sequence[str]) -> int:
    rows, shares = _judged(parse(EvalOptions, "eval", args))
    report = rows[0].report
    if len(rows) == 1:
        walk = report.walk
        steps = f"{report.steps} steps" if walk is None else f"{report.steps} steps ({walk.useful} useful, {walk.grid})"
        print(report.table())
        print(f"{steps}, guidance {report.guidance:g}, seed {report.seed}; [95 % bootstrap intervals]")
    else:
        from tempflow.evaluate.compare import table

        print(table(rows))
        print(f"{report.distinct} prompts, {len(report.scores)} pictures a row, seed {report.seed}; ms: wall time a")
        print("picture, row after row (other work moves it); [95 % bootstrap intervals]")
    if shares:
        print(shares)
    return 0


def run_eval(options: EvalOptions) -> Report:
    """Scores a model as `options` say, and writes what they ask for; the report of the first row, where there are more.

    Raises ValueError for a source, a reward or prompts that are not there, before the model is loaded.
    """
    return _judged(options)[0][0].report


def _judged(options: EvalOptions) -> tuple[list[Row], str]:
    """The rows, and how the first source's prompts were used, where it isn't each of them once."""
    from tempflow.data.prompts import load_prompts, shared_out, unused_negatives, with_sources
    from tempflow.evaluate.source import Settings, check_rewards, check_source, check_walk, find, rows_of, takes_sources
    from tempflow.rewards import build
    from tempflow.rewards.protocol import check_prompts, prepare

    _check_outputs(options)
    source = find(options.what, options.base)
    if not options.rewards:
        check_rewards(source)
    # before anything is fetched: where a hub's weights carry a grid, the rows are known by its files alone
    run = source.config
    reads, named = ((), Settings.prompts) if run is None else (run.algorithm.build().reads, run.data.test)
    named = options.prompts or named
    loaded = with_sources(lambda s: load_prompts(named, uses=reads, sources=s), partial(takes_sources, source))
    rows = asked_rows(options)
    how = rows[0].how
    rewards = [build(s.name, s.kind, s.options, s.frames) for s in how.rewards]
    for row in rows:
        check_source(row.source, row.how.size, row.how.guidance, row.how.guidance_options)
        check_walk(row.source, row.how.grid, row.how.steps)
    import torch

    from tempflow.evaluate.suite import fixed_prompts

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    prompts = fixed_prompts(loaded, how.count)
    for reward in rewards:
        check_prompts(reward, [p.text for p in prompts], [p.told for p in prompts])
        prepare(reward)
    found = _drawn(options, rows, prompts, rewards)
    _write(options, how, found)
    unused = unused_negatives(prompts, lambda: rows_of(source, how.guidance, how.guidance_options))
    return found, "\n".join(filter(None, (shared_out(prompts, loaded), unused)))


def asked_rows(options: EvalOptions) -> list[Asked]:
    """What `options` ask for: the source on each of the grids, in each number of steps, at each guidance; then what is
    to stand beside it, on the same prompts and noises. Looks at names and small files only. Raises ValueError."""
    from tempflow.evaluate.source import find, settings

    source = find(options.what, options.base)
    how = chosen(options, settings(source))
    rows = _product(Asked(options.what, source, how), options)
    for text in options.beside:
        what, own = beside_of(text)
        other = find(what, own.base)
        usual = settings(other)
        drawn = {name: getattr(usual, name) for name in ("steps", "guidance", "guidance_options")}
        rows += _product(Asked(what, other, replace(how, **drawn, grid=OWN)), own)
    return rows


def _product(row: Asked, options: WalkOptions) -> list[Asked]:
    """That row on each grid, in each number of steps, at each guidance."""
    from tempflow.evaluate.source import stated

    return [
        replace(row, how=replace(row.how, grid=grid, steps=steps, guidance=guidance))
        for grid in options.grid or (row.how.grid,)
        for steps in options.steps or ((stated(row.source, grid).usual if options.grid else None) or row.how.steps,)
        for guidance in options.guidance or (row.how.guidance,)
    ]


def beside_of(text: str) -> tuple[str, WalkOptions]:
    """WHAT or WHAT:option=value,…, where commas inside brackets are a list's. Raises ConfigError, naming the field."""
    what, colon, rest = text.rpartition(":")
    if not colon or "=" not in rest:
        return text, WalkOptions()
    pairs = [part.partition("=") for part in re.split(r",(?![^\[]*\])", rest)]
    try:
        return what, validated(WalkOptions, {key: read_yaml(value) for key, _, value in pairs})
    except ConfigError as error:
        raise ConfigError("\n".join(f"beside: {cut(text)}: {line}" for line in str(error).splitlines())) from None


def _drawn(
    options: EvalOptions, rows: Sequence[Asked], prompts: Sequence[Prompt], rewards: Sequence[Reward]
) -> list[Row]:
    """Draws and scores them, one model loaded at a time."""
    from tempflow.evaluate.compare import Row
    from tempflow.evaluate.source import guidance_for, load_source, on_grid, stated
    from tempflow.evaluate.suite import evaluate
    from tempflow.models import resolved_device

    found, model, loaded = list[Row](), None, None
    for number, (what, source, how) in enumerate((row.what, row.source, row.how) for row in rows):
        if model is None or source != loaded:
            model = None  # before the next takes its place in memory
            model, loaded = load_source(source, dtype=how.dtype, device=resolved_device(how.device)), source
        if len(rows) > 1 or how.grid != OWN:
            on_grid(model, stated(source, how.grid))
        report = evaluate(
            model,
            prompts,
            rewards,
            steps=how.steps,
            guidance=guidance_for(model, how),
            seed=how.seed,
            size=how.size,
            rows=how.rows,
            total=how.total,
            compose=how.compose,
            gold=how.gold,
            samples_per_prompt=options.samples_per_prompt,
        )
        found.append(Row(what, report))
        if options.pictures:
            name = "grid.png" if len(rows) == 1 else f"grid-{number + 1}.png"
            _draw_grid(options, how, model, prompts[:GRID], name)
    return found


USUAL = ("prompts", "count", "guidance_options", "seed", "dtype", "device", "rows")
ROWS = ("grid", "steps", "guidance")
SIZE = ("height", "width", "frames", "fps", "seconds")
"""Options that lie over what is usual for the source."""


def chosen(options: EvalOptions, usual: Settings) -> Settings:
    """`usual` with what `options` give laid over it, but for what makes several rows. Raises ValueError for a gold
    reward that the run trained on."""
    trained = usual.total or {}
    for name in options.gold:
        if name in trained:
            raise ValueError(f"gold: {shown(name)} is what this run trained on; nearest valid: --rewards {name}")
    own = {scorer.name: scorer for scorer in usual.rewards}
    named = [scorer_of(text, own) for text in options.rewards]
    named += [scorer_of(text, own, "gold") for text in options.gold]
    rewards = tuple({s.name: s for s in (*(() if options.rewards else usual.rewards), *named)}.values())
    names, gold = [s.name for s in rewards], {s.name for s in named[len(options.rewards) :]}
    untrained = {name for name in names if name not in trained} if usual.total is not None else gold
    given = {name: value for name, value in options if value is not None and name in USUAL}
    given |= {name: getattr(options, name)[0] for name in ROWS if len(getattr(options, name)) == 1}
    size = {name: value for name, value in options if value is not None and name in SIZE}
    return replace(
        usual,
        **given,
        size=replace(usual.size, **size),
        rewards=rewards,
        gold=tuple(name for name in names if name in untrained),
        total=usual.total if set(trained) <= set(names) else None,
        compose=usual.compose if set(trained) <= set(names) else None,
    )


def scorer_of(text: str, own: Mapping[str, ScorerConfig], field: str = "rewards") -> ScorerConfig:
    """A reward as the command line names it: one of a run's `own`, or NAME, or NAME:option=value,option=value.

    Raises ConfigError, naming the field, for a reward or an option that is unknown.
    """
    if text in own:
        return own[text]
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")] if "=" in rest else []
    given = {"name": name if pairs else text, "options": {key: read_yaml(value) for key, _, value in pairs}}
    try:
        return validated(ScorerConfig, given)
    except ConfigError as error:
        lines = (f"{field}: {line.removeprefix('name: ')}" for line in str(error).splitlines())
        raise ConfigError("\n".join(lines)) from None


def _check_outputs(options: EvalOptions) -> None:
    """Before work is done that could not be written down, or only over what is not ours."""
    from tempflow.evaluate.suite import FOLDER
    from tempflow.folder import check, check_file, check_idle

    output = Path(options.output)
    if options.output and (output.is_dir() or not output.parent.is_dir()):
        fits = f"{output.stem or 'eval'}.json"
        raise ValueError(f"output: {options.output!r} is no place for a file; nearest valid: {fits!r}")
    if options.output:
        check_file(output)
    if options.pictures:
        check(options.pictures, FOLDER, "pictures")
        check_idle(options.pictures, "pictures")


def _write(options: EvalOptions, how: Settings, rows: Sequence[Row]) -> None:
    from tempflow.folder import write_json
    from tempflow.train.records import plain

    if options.output:
        told = {"what": options.what, "base": options.base or None, "prompts_from": how.prompts}
        told |= {name: getattr(how.size, name) for name in SIZE}
        told |= {"dtype": how.dtype, "guidance_options": dict(how.guidance_options)}
        told |= rows[0].report.to_json()
        if len(rows) > 1:
            from tempflow.evaluate.compare import to_json

            told["rows"] = to_json(rows)
        with writing("output", options.output):
            write_json(options.output, plain(told))


def _draw_grid(options: EvalOptions, how: Settings, model: Model, prompts: Sequence[Prompt], name: str) -> None:
    from tempflow.evaluate.grid import grid
    from tempflow.evaluate.source import guidance_for
    from tempflow.evaluate.suite import FOLDER, draw_strips
    from tempflow.folder import claim, held

    texts = [prompt.text for prompt in prompts]
    strips = draw_strips(
        model,
        prompts,
        steps=how.steps,
        guidance=guidance_for(model, how),
        seed=how.seed,
        size=how.size,
        rows=how.rows,
        samples_per_prompt=options.samples_per_prompt,
    )
    with writing("pictures", options.pictures), held(claim(options.pictures, FOLDER, "pictures"), "pictures") as folder:
        grid(strips, texts, folder / name)
