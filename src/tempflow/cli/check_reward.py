"""`tempflow check-reward`: what a reward does, before a run leans on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tempflow.cli.judge import scorer_of
from tempflow.cli.options import POSITIONAL, parse
from tempflow.cli.parse import writing
from tempflow.strict import Place, Strict


class CheckRewardOptions(Strict):
    """Look at a reward's scores: what it takes and gives, whether a score depends on anything but its own picture and
    prompt, how fast it is."""

    name: Annotated[str, POSITIONAL] = Field(
        min_length=1, description="which reward; its options as NAME:option=value,option=value"
    )
    pictures: Place = Field(
        default="",
        description='a .jsonl of {"prompt": …, "image": path}; empty = rendered `shapes`, some of another prompt',
    )
    count: int = Field(default=8, ge=2, le=1_000, description="most pictures")
    golden: Place = Field(default="", description="scores to compare with, as --write wrote them")
    write: Place = Field(default="", description="file for the scores of these pictures, as JSON")
    findings: Place = Field(default="", description="file for the findings, as JSON")


def check_reward_verb(args: Sequence[str]) -> int:
    options = parse(CheckRewardOptions, "check-reward", args)
    from rich.console import Console

    from tempflow.doctor.check import failed, table, to_json
    from tempflow.doctor.reward import reward_checks, sample_of
    from tempflow.folder import check_file, write_json
    from tempflow.rewards import build

    for field in ("write", "findings"):
        if getattr(options, field):
            check_file(Path(getattr(options, field)), field)
    scorer = scorer_of(options.name, {}, "name")
    reward = build(scorer.name, scorer.kind, scorer.options, scorer.frames)
    golden = Path(options.golden) if options.golden else None
    checks, figures = reward_checks(reward, sample_of(options.pictures, options.count), golden)
    Console().print(table(checks))
    for field, what in (("write", figures), ("findings", to_json(checks))):
        if getattr(options, field):
            with writing(field, getattr(options, field)):
                write_json(getattr(options, field), what, field)
    return 1 if failed(checks) else 0
