"""`tempflow export`: a run's weights as a folder for diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tempflow.cli.options import POSITIONAL, parse
from tempflow.strict import ConfigError, Place, Strict, cut


class ExportOptions(Strict):
    """Write a run's weights as a folder that plain diffusers loads, with licence and model card."""

    run: Annotated[Place, POSITIONAL] = Field(default="", description="the run's folder")
    output: Place = Field(default="", description="the folder to write; new or empty")
    weights: Literal["best", "policy", "ema"] = Field(
        default="best", description="best on validation, as it was last, or the average"
    )
    checkpoint: int | None = Field(default=None, ge=0, description="an iteration that has a checkpoint")
    form: Literal["lora", "peft", "merged"] | None = Field(
        default=None,
        description="a LoRA for diffusers, one as a PEFT folder, or a whole pipeline (default: as the run trained)",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of the files (default: what the run computed in)"
    )


def export_verb(args: Sequence[str]) -> int:
    options = parse(ExportOptions, "export", args)
    if not options.run:
        raise ConfigError("run: none given; nearest valid: tempflow export runs/NAME --output FOLDER")
    if not options.output:
        fits = f"{options.run.rstrip('/')}-export"
        raise ConfigError(f"output: none given; nearest valid: --output {cut(fits)}")
    from tempflow.export import export_run

    folder = export_run(
        Path(options.run),
        Path(options.output),
        weights=options.weights,
        checkpoint=options.checkpoint,
        form=options.form,
        dtype=options.dtype,
    )
    print(folder)
    return 0
