"""`tempflow eval`: scores of a model on fixed prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.config import ScorerConfig
from tempflow.config.files import read_yaml
from tempflow.strict import ConfigError, Place, Strict, shown, validated

if TYPE_CHECKING:
    from tempflow.evaluate.source import Settings
    from tempflow.evaluate.suite import Report
    from tempflow.models.protocol import Model
    from tempflow.request import Prompt

GRID = 24
"""Prompts in the grid of pictures."""

Names = Annotated[tuple[str, ...], Field(strict=False)]


class EvalOptions(Strict):
    """Score a model: fixed prompts, fixed noise, deterministic sampling. What is None is as the run's own test was, for
    a run; else as in brackets."""

    what: Annotated[Place, POSITIONAL] = Field(
        default="shapes", description="'shapes', a run's folder, a pipeline folder, a hub id, or a LoRA (with --base)"
    )
    base: Place = Field(default="", description="what a LoRA is laid on: 'shapes', a pipeline folder or a hub id")
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
    steps: int | None = Field(default=None, ge=1, le=1000, description="sampler steps (10)")
    guidance: float | None = Field(default=None, ge=1, description="classifier-free guidance (1 = none)")
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


def eval_verb(args: Sequence[str]) -> int:
    report, shares = _judged(parse(EvalOptions, "eval", args))
    print(report.table())
    print(f"{report.steps} steps, guidance {report.guidance:g}, seed {report.seed}; [95 % bootstrap intervals]")
    if shares:
        print(shares)
    return 0


def run_eval(options: EvalOptions) -> Report:
    """Scores a model as `options` say, and writes what they ask for.

    Raises ValueError for a source, a reward or prompts that are not there, before the model is loaded.
    """
    return _judged(options)[0]


def _judged(options: EvalOptions) -> tuple[Report, str]:
    """The report, and how the source's prompts were used, where it isn't each of them once."""
    from tempflow.data.prompts import load_prompts, shared_out, unused_negatives, with_sources
    from tempflow.evaluate.source import check_rewards, check_source, find, rows_of, settings, takes_sources
    from tempflow.rewards import build
    from tempflow.rewards.protocol import check_prompts, prepare

    _check_outputs(options)
    source = find(options.what, options.base)
    if not options.rewards:
        check_rewards(source)
    how = chosen(options, settings(source))
    reads = () if source.config is None else source.config.algorithm.build().reads
    rewards = [build(s.name, s.kind, s.options, s.frames) for s in how.rewards]
    loaded = with_sources(lambda s: load_prompts(how.prompts, uses=reads, sources=s), partial(takes_sources, source))
    check_source(source, how.size, how.guidance, how.guidance_options)
    import torch

    from tempflow.evaluate.source import guidance_for, load_source
    from tempflow.evaluate.suite import evaluate, fixed_prompts
    from tempflow.models import resolved_device

    device = resolved_device(how.device)

    if how.threads is not None:
        torch.set_num_threads(how.threads)
    prompts = fixed_prompts(loaded, how.count)
    for reward in rewards:
        check_prompts(reward, [p.text for p in prompts], [p.told for p in prompts])
        prepare(reward)
    model = load_source(source, dtype=how.dtype, device=device)
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
    _write(options, how, report)
    if options.pictures:
        _draw_grid(options, how, model, prompts[:GRID])
    unused = unused_negatives(prompts, lambda: rows_of(source, how.guidance, how.guidance_options))
    return report, "\n".join(filter(None, (shared_out(prompts, loaded), unused)))


USUAL = ("prompts", "count", "steps", "guidance", "guidance_options", "seed", "dtype", "device", "rows")
SIZE = ("height", "width", "frames", "fps", "seconds")
"""Options that lie over what is usual for the source."""


def chosen(options: EvalOptions, usual: Settings) -> Settings:
    """`usual` with what `options` give laid over it. Raises ValueError for a gold reward that the run trained on."""
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


def _write(options: EvalOptions, how: Settings, report: Report) -> None:
    from tempflow.folder import write_json
    from tempflow.train.records import plain

    if options.output:
        told = {"what": options.what, "base": options.base or None, "prompts": how.prompts, "dtype": how.dtype}
        told |= {name: getattr(how.size, name) for name in SIZE} | {"guidance_options": dict(how.guidance_options)}
        told |= report.to_json()
        with writing("output", options.output):
            write_json(options.output, plain(told))


def _draw_grid(options: EvalOptions, how: Settings, model: Model, prompts: Sequence[Prompt]) -> None:
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
        grid(strips, texts, folder / "grid.png")
