"""`tempflow sample`: pictures of prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.grid import OWN, Stated, as_stated
from tempflow.strict import Place, Strict


class SampleOptions(Strict):
    """Draw a picture of each prompt, without noise on the way."""

    path: Annotated[Place, POSITIONAL] = Field(
        default="shapes", description="'shapes' or 'shapes_tokens' (embedded), a pipeline folder, or a hub id"
    )
    prompt: Annotated[tuple[str, ...], Field(strict=False)] = Field(default=(), description="texts to draw")
    prompts: Place = Field(default="", description="more of them: shapes:SPLIT, a file or a folder of texts")
    count: int | None = Field(
        default=None, ge=1, le=1_000_000, description="pictures, of the prompts in turn (one of each)"
    )
    steps: int | None = Field(default=None, ge=1, le=1000, description="sampler steps (as the weights say, else 10)")
    grid: Annotated[Stated, BeforeValidator(as_stated)] = Field(
        default=OWN,
        description="σ grid: own (what the weights carry, else the scheduler's), scheduler, useful (N steps that all "
        "count), or points before the shift, one a step",
    )
    guidance: float = Field(default=1.0, ge=1, description="classifier-free guidance; 1 = none")
    guidance_options: dict[str, float | bool] = Field(
        default={}, description="the family's further settings of guidance, {name: value}"
    )
    seed: int = Field(default=0, description="of the noise")
    height: int = Field(default=32, ge=1, le=16_384, description="pixels")
    width: int = Field(default=32, ge=1, le=16_384, description="pixels")
    frames: int = Field(default=1, ge=1, le=100_000, description="of a clip; 1 = a picture")
    fps: float | None = Field(default=None, gt=0, description="frames a second of a clip (the model's own)")
    seconds: float | None = Field(default=None, gt=0, description="of sound (as long as the frames)")
    device: str = Field(default="cpu", description="auto, cpu, mps, cuda or cuda:N")
    output: Place = Field(default="samples", min_length=1, description="folder for the pictures")
    base: Place = Field(default="", description="what a LoRA is laid on; a run's own, where it says")


def sample_verb(args: Sequence[str]) -> int:
    for path in run_sample(parse(SampleOptions, "sample", args)):
        print(path)
    return 0


def run_sample(options: SampleOptions) -> list[Path]:
    """Draws what `options` say; the pictures' paths. Says how often prompts are drawn, where it isn't once.

    Raises ValueError where nothing is asked for, or a prompt is blank.
    """
    from tempflow.data.prompts import as_prompts, load_prompts, shared_out, unused_negatives, with_sources
    from tempflow.evaluate.source import Settings, check_source, check_walk, find, rows_of, stated, takes_sources

    pool = [*(as_prompts(options.prompt) if options.prompt else ())]
    if options.prompts:
        draws = partial(takes_sources, find(options.path, options.base))
        pool += with_sources(lambda sources: load_prompts(options.prompts, sources=sources), draws)
    if not pool:
        raise ValueError("prompt: none given; nearest valid: --prompt 'a red circle', or --prompts shapes:validation")
    chosen = [pool[n % len(pool)] for n in range(options.count or len(pool))]
    if shares := shared_out(chosen, pool):
        print(f"prompts: {shares}", file=sys.stderr)
    if unused := unused_negatives(
        chosen, lambda: rows_of(find(options.path, options.base), options.guidance, options.guidance_options)
    ):
        print(f"prompts: {unused}", file=sys.stderr)
    from tempflow.evaluate.suite import sample_path
    from tempflow.media import Size
    from tempflow.models import resolved_device

    device = resolved_device(options.device)
    size = Size(options.height, options.width, options.frames, options.fps, options.seconds)
    source = find(options.path, options.base)
    guidance = check_source(source, size, options.guidance, options.guidance_options)
    grid = stated(source, options.grid)
    steps = options.steps or grid.usual or Settings.steps
    check_walk(source, options.grid, steps)
    with writing("output", options.output):
        return sample_path(
            options.path,
            chosen,
            steps=steps,
            guidance=guidance,
            seed=options.seed,
            size=size,
            device=device,
            out=Path(options.output),
            grid=None if options.grid == OWN else grid,
            base=options.base,
        )
