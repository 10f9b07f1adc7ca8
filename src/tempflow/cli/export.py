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
    form: Literal["lora", "peft", "comfyui", "merged"] | None = Field(
        default=None,
        description="a LoRA for diffusers, as a PEFT folder or for ComfyUI, or a whole pipeline "
        "(default: as the run trained)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the files (default: what the run computed in)"
    )
    push_to_hub: str = Field(
        default="", description="ORG/NAME to upload the folder to, as your own hub login allows; private if it is new"
    )
    dry_run: bool = Field(default=False, description="with --push-to-hub: write the folder and upload nothing")


def export_verb(args: Sequence[str]) -> int:
    options = parse(ExportOptions, "export", args)
    if not options.run:
        raise ConfigError("run: none given; nearest valid: tempflow export runs/NAME --output FOLDER")
    if not options.output:
        fits = f"{options.run.rstrip('/')}-export"
        raise ConfigError(f"output: none given; nearest valid: --output {cut(fits)}")
    if options.dry_run and not options.push_to_hub:
        raise ConfigError("dry_run: true, and nothing is to be pushed; nearest valid: --push-to-hub ORG/NAME")
    from tempflow.export import check_hub_name, export_run, push

    if options.push_to_hub:
        check_hub_name(options.push_to_hub)

    folder = export_run(
        Path(options.run),
        Path(options.output),
        weights=options.weights,
        checkpoint=options.checkpoint,
        form=options.form,
        dtype=options.dtype,
    )
    print(folder)
    if options.push_to_hub:
        print(push(folder, options.push_to_hub, dry=options.dry_run))
    return 0
