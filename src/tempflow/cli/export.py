"""`tempflow export`: a run's weights as a folder for diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tempflow.cli.parse import parse
from tempflow.strict import ConfigError, Strict, validated


class ExportOptions(Strict):
    """Write a run's weights as a folder that plain diffusers loads, with licence and model card."""

    run: Annotated[str, tyro.conf.Positional] = Field(default="", description="the run's folder")
    to: str = Field(default="", description="the folder to write; new or empty")
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
    options = validated(ExportOptions, parse(ExportOptions(), "export", args))
    if not options.run:
        raise ConfigError("run: none given; nearest valid: tempflow export runs/NAME --to FOLDER")
    if not options.to:
        raise ConfigError(f"to: none given; nearest valid: --to {options.run.rstrip('/')}-export")
    from tempflow.export import export_run

    folder = export_run(
        Path(options.run),
        Path(options.to),
        weights=options.weights,
        checkpoint=options.checkpoint,
        form=options.form,
        dtype=options.dtype,
    )
    print(folder)
    return 0
