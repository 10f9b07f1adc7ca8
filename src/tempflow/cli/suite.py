"""`tempflow suite`: a suite that people report, of a model or of pictures in a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.strict import Place, Strict

if TYPE_CHECKING:
    from tempflow.evaluate.suites.figures import Table
    from tempflow.evaluate.suites.run import Job

DRAWN = ("steps", "guidance", "guidance_options", "seed", "height", "width", "dtype", "device", "rows")
"""Options that lie over what is usual for the source."""


class SuiteOptions(Strict):
    """Draw pictures of a suite's prompts, have them judged, and write its tables and a page. A run that was ended goes
    on where its output is. Suites: geneval, geneval2, ocr, drawbench, partiprompts, dpg_bench, unigenbench, diversity,
    gsb. How pictures are drawn is, where nothing is said, as a run's own test, else as in brackets."""

    name: Annotated[str, POSITIONAL] = Field(min_length=1, description="which suite")
    what: Annotated[Place, POSITIONAL] = Field(
        default="shapes",
        description="'shapes', a run, a pipeline folder, a hub id, a LoRA (with --base), or a folder of pictures",
    )
    base: Place = Field(default="", description="what a LoRA is laid on")
    against: Place = Field(default="", description="gsb: what is compared with, of the same kinds")
    against_base: Place = Field(default="", description="what that LoRA is laid on")
    prompts: Place = Field(default="", description="the suite's own file, or any source of prompts where it has none")
    questions: Place = Field(default="", description="dpg_bench: the CSV of its questions")
    scorer: str = Field(default="", description="another reward than the suite's, where a reward judges")
    options: dict[str, Any] = Field(default={}, description="the scorer's settings: --options.url http://…")
    samples: int | None = Field(default=None, ge=1, le=1_000, description="pictures a prompt (the suite's own number)")
    count: int | None = Field(default=None, ge=1, description="use the first prompts only")
    steps: int | None = Field(default=None, ge=1, le=1000, description="sampler steps (10)")
    guidance: float | None = Field(default=None, ge=1, description="classifier-free guidance (1 = none)")
    guidance_options: dict[str, float | bool] | None = Field(
        default=None, description="the family's further settings of guidance, {name: value}"
    )
    seed: int | None = Field(default=None, description="of the noise (1234)")
    height: int | None = Field(default=None, ge=1, le=16_384, description="pixels (32)")
    width: int | None = Field(default=None, ge=1, le=16_384, description="pixels (32)")
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="to compute in (float32)")
    device: str | None = Field(default=None, description="auto, cpu, mps, cuda or cuda:N (cpu)")
    rows: int | None = Field(default=None, ge=1, description="most rows of a forward (96)")
    output: Place = Field(default="", description="folder for pictures, scores and tables (suites/NAME)")


def suite_verb(args: Sequence[str]) -> int:
    from tempflow.evaluate.suites.figures import text_of

    options = parse(SuiteOptions, "suite", args)
    tables, page = run_suite(options)
    print(text_of(tables))
    print(f"wrote {page}")
    return 0


def run_suite(options: SuiteOptions) -> tuple[tuple[Table, ...], Path]:
    """Runs what `options` say; the tables, and the page about them.

    Raises ValueError, before a model is loaded, for an unknown suite, files that cannot be read, options that do not
    fit, and an output that has other results; RewardError where a judge is not there.
    """
    from tempflow.evaluate.suites.run import run
    from tempflow.report.suites import write_suite

    job = job_of(options)
    with writing("output", job.output):
        tables = run(job, lambda line: print(line, file=sys.stderr))
        return tables, write_suite(job.output)


def job_of(options: SuiteOptions) -> Job:
    """What `options` mean. Loads no weights and asks no server."""
    from tempflow.evaluate.suites.run import WITHOUT_EFFECT, Job, samples_of, side_of, stamp
    from tempflow.evaluate.suites.table import read, scorer_of, suite_of
    from tempflow.rewards import commits, maker, places

    suite = suite_of(options.name)
    if bool(options.against or options.against_base) != suite.pairs:
        near = "--against, what it is compared with" if suite.pairs else "tempflow suite gsb"
        what = "none given" if suite.pairs else f"{options.name!r} compares nothing"
        raise ValueError(f"against: {what}; nearest valid: {near}")
    prompts = read(suite, options.prompts, options.questions)
    scorer = scorer_of(suite, options.scorer, options.options)
    given = {name: value for name, value in options if value is not None and name in DRAWN}
    sides = [side_of(options.what, options.base, given)]
    if suite.pairs:
        sides.append(side_of(options.against, options.against_base, given))
    if given and all(side.folder is not None for side in sides):
        name = next(iter(given))
        raise ValueError(f"{name}: the pictures are there, and none is drawn; nearest valid: without")
    kind = options.scorer or suite.scorer
    said: dict[str, Any] = {"scorer": kind or options.name, "options": {**suite.preset, **options.options}}
    make = maker(kind) if suite.own is None else suite.own
    named = places(make, said["options"])
    said["files"] = {name: stamp([Path(place)]) for name, place in named.items() if Path(place).exists()}
    said["files"] |= commits(make, said["options"])
    said["options"] = {k: v for k, v in said["options"].items() if k not in WITHOUT_EFFECT}
    return Job(
        options.name,
        suite,
        prompts,
        len(prompts) if options.count is None else min(options.count, len(prompts)),
        samples_of(suite, sides, options.samples),
        tuple(sides),
        scorer,
        Path(options.output or f"suites/{options.name}"),
        said,
    )
