"""`tempflow train` and `tempflow cost`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tempflow.cli import fail
from tempflow.cli.parse import configured_with, runs_of, value_of, writing
from tempflow.folder import check_file, write_file
from tempflow.strict import ConfigError, Place, Strict, shown

if TYPE_CHECKING:
    from rich.console import Console

    from tempflow.config import Config
    from tempflow.cost import RunCost


class TrainOptions(Strict):
    """Train; every field of a configuration is an option."""

    resume: Place | None = Field(
        default=None, min_length=1, description="a run's folder: go on from its newest whole checkpoint"
    )
    allow_changes: bool = Field(
        default=False, description="with --resume: with another configuration than the run was started with"
    )


class CostOptions(Strict):
    """What a run will take, before it starts; every field of a configuration is an option."""

    measure: bool = Field(
        default=False, description="measure this machine for about ten seconds, and estimate the time with that"
    )
    ranks: int = Field(default=1, ge=1, le=65_536, description="processes that share the run: memory is one's")
    find_rows: Place | None = Field(
        default=None,
        min_length=1,
        description="a YAML file: search the largest rollout_rows and train_rows that fit into this machine's memory, "
        "and write the configuration with them there",
    )


def train_verb(args: Sequence[str]) -> int:
    """Trains, or goes on with a run: `--resume RUN`, with `--allow-changes` where its configuration may differ."""
    run = value_of(args, "--resume")
    config, options = configured_with(TrainOptions, "train", args, str(Path(run) / "config.yaml") if run else "")
    if options.allow_changes and options.resume is None:
        return fail("allow_changes: nothing is resumed; nearest valid: --resume RUN --allow-changes")
    if options.resume is not None:
        config = config.replace(output=options.resume)
    for above, run_config in runs_of(config):
        _check_places(run_config, above, new=options.resume is None)
    from tempflow.stages import train
    from tempflow.train.display import Interrupted
    from tempflow.train.guards import GuardError

    try:
        train(config, resume=options.resume is not None, allow_changes=options.allow_changes)
    except GuardError as error:
        return fail(str(error), 1)
    except Interrupted as stop:
        return int(str(stop.code))
    return 0


def _check_places(config: Config, above: str, new: bool) -> None:
    """Raises ConfigError, naming the field, for a prompt file that is missing or broken; of a `new` run also where
    another's baseline is not there. `above`: what stands in front of its fields."""
    from tempflow.train.build import prompt_sources, takes_sources

    before = config.evaluation.before
    if new and before and not Path(before).is_dir():
        raise ConfigError(f"{above}evaluation.before: {shown(before)} is no folder; nearest valid: a run's")
    try:
        prompt_sources(config, None, None, config.algorithm.build().reads, partial(takes_sources, config, None))
    except ValueError as error:
        raise ConfigError(f"{above}{error}") from error


def cost_verb(args: Sequence[str]) -> int:
    config, options = configured_with(CostOptions, "cost", args)
    if options.find_rows is not None:
        check_file(options.find_rows, "find_rows")
    from rich.console import Console

    from tempflow.config import Config
    from tempflow.cost import stages_table

    console = Console()
    if isinstance(config, Config):
        _show_cost(console, config, options)
        return 0
    if options.find_rows is not None:
        raise ConfigError(
            "find_rows: is for one run, and these are stages; nearest valid: a stage as a file of its own"
        )
    seconds, costs = 0.0, []
    for title, run in zip(config.titles, config.runs, strict=True):
        console.print(f"\n{title}: {run.algorithm.name}")
        here = run.with_model(start="")  # is not there yet, and costs nothing
        cost, took = _show_cost(console, here, options)
        seconds, costs = seconds + took, [*costs, cost]
    console.print(stages_table(config.titles, costs))
    if options.measure:
        from tempflow.measure import clock

        console.print(f"all stages: {clock(seconds)}")
    return 0


def _show_cost(console: Console, config: Config, options: CostOptions) -> tuple[RunCost, float]:
    """Prints what one run takes; its counts, and the seconds where they are measured."""
    from tempflow.cost import check_states, memory_of, run_cost

    check_states(config)
    cost = run_cost(config)
    if options.find_rows is not None:
        config = _with_rows(config, options.find_rows, options.ranks)
    console.print(cost.table())
    memory = memory_of(config, cost, options.ranks)
    console.print(f"memory of a rank: ? ({memory})" if isinstance(memory, str) else memory.table())
    if not options.measure:
        return cost, 0.0
    from tempflow.measure import measured

    found = measured(config)
    console.print(found.table(cost))
    return cost, sum(found.parts(cost).values())


def _with_rows(config: Config, file: str, ranks: int) -> Config:
    """The configuration with the rows that fit here, which is written to `file`: they are part of what a run is."""
    from tempflow.config import to_yaml
    from tempflow.measure import rows_that_fit

    rows = rows_that_fit(config, ranks)
    found = config.replace(rollout_rows=rows.rollout, train_rows=rows.train)
    head = f"# generator: tempflow cost --find-rows, on {rows.device}: {rows.how}\n"
    with writing("find_rows", file):
        write_file(file, head + to_yaml(found), "find_rows")
    print(f"rollout_rows {rows.rollout}, train_rows {rows.train}: {rows.how}")
    print(f"written to {file}; to train with them: tempflow train {file}")
    return found
