"""Runs one after the other: each is an ordinary run in a folder of its own, and starts from the weights that the one
before ended with, which are its best on validation.

    OUTPUT/config.yaml    what was given (`config.stages`)
    OUTPUT/1-NAME/        the first stage's run, as any other; OUTPUT/2-NAME/ the second's …
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tempflow.config import Config, Stages, to_yaml
from tempflow.folder import check, check_idle, claim, held, kind_of, write_file
from tempflow.grid import OWN, Grid
from tempflow.models import resolved_device
from tempflow.models.protocol import Model, WalksGrids
from tempflow.rewards import check_takes
from tempflow.rewards.protocol import prepare
from tempflow.train.build import asked_of, by_stream, check_guided, check_model, prepare_model, sharded
from tempflow.train.checkpoint import CheckpointError
from tempflow.train.display import Display, Interrupted
from tempflow.train.grids import on_grid
from tempflow.train.identity import RUN, STAGED, begun
from tempflow.train.parallel import World, joined
from tempflow.train.state import check_reference, finished
from tempflow.train.trainer import Given, LookedAt, Run, looked_at, train_run
from tempflow.train.weights import Trainable

if TYPE_CHECKING:
    from tempflow.algorithms import Algorithm
    from tempflow.rewards.protocol import Reward
    from tempflow.train.build import PromptsLike

FILE = "config.yaml"


@dataclass(frozen=True)
class _Place:
    """How a stage's folder stands: whether a run was begun there, and whether it is finished as it is configured."""

    begun: bool
    finished: bool


def train(
    config: Config | Stages,
    *,
    model: Model | None = None,
    reward: Reward | Callable | Sequence[Reward | Callable] | None = None,
    prompts: PromptsLike | None = None,
    test_prompts: PromptsLike | None = None,
    algorithm: Algorithm | None = None,
    quiet: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
) -> Run:
    """Trains as `config` says, and returns the run: of stages the last one.

    `train.trainer.train` says what the arguments are, what a run writes and what is raised. Of stages:

    All are built and checked before the first begins, against the model too, which is loaded for that where several are
    to be run. Objects are every stage's; a model given so is put back to what it was before each. `algorithm` is
    refused. Errors name the stage: "stages.1.optimizer.kind: …", N from 0.

    A call goes on with what is in `config.output`: finished stages are passed over (the last one is tested again, for
    its result), one that was ended is gone on with, with and without `resume`, which demands that something is there.
    A stage that was begun and is configured otherwise now is refused, as a single run is; `allow_changes` goes on with
    it all the same. It ends as the uninterrupted one would have.
    """
    given = Given(model, reward, prompts, test_prompts, algorithm)
    if isinstance(config, Config):
        return train_run(config, given, quiet, resume, allow_changes)
    if algorithm is not None:
        raise ValueError("algorithm: an object is one run's, and these are stages; nearest valid: algorithms by name")
    try:
        with joined(resolved_device(config.runs[0].device)) as world:
            say = Display(config.name, 1, quiet or not world.first).say
            places = _checked(config, given, world, resume, allow_changes)
            world.wait()  # all have seen the folders as they were
            with _home(config, world.first):
                return _train(config, places, given, quiet, allow_changes, say)
    except KeyboardInterrupt:  # between two stages
        print("tempflow: interrupted", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None


def _train(
    stages: Stages,
    places: Sequence[_Place],
    given: Given,
    quiet: bool,
    allow_changes: bool,
    say: Callable[[str], None],
) -> Run:
    untrained = None if given.model is None else _Untrained.of(given.model)
    last, run = len(stages.runs) - 1, None
    for number, (config, place) in enumerate(zip(stages.runs, places, strict=True)):
        run = None  # lets go of the model before the next is loaded
        what = f"stage {number + 1} of {last + 1}, {stages.titles[number]}: {config.algorithm.name}, in {config.output}"
        if place.finished and number < last:
            say(f"{what}, is finished")
            continue
        say(what)
        if untrained is not None:
            untrained.put_back()
        with _naming(number):
            run = train_run(config, given, quiet, place.begun, allow_changes)
    assert run is not None
    return run


@dataclass(frozen=True, eq=False)
class _Untrained:
    """A model as it was given: copies of what is trained, and its σ grid."""

    model: Model
    weights: Mapping[str, Tensor]
    grid: Grid | None

    @staticmethod
    def of(model: Model) -> _Untrained:
        return _Untrained(model, Trainable(model.network).state(), _grid(model))

    def put_back(self) -> None:
        Trainable(self.model.network).load(self.weights)
        _walk(self.model, self.grid)


def _grid(model: Model) -> Grid | None:
    """The grid that a model was put on; None where none can be stated."""
    return model.stated_grid() if isinstance(model, WalksGrids) else None


def _walk(model: Model, grid: Grid | None) -> None:
    if isinstance(model, WalksGrids) and grid is not None:
        model.state_grid(grid)


# ------------------------------------------------------------------------------------------------------------- checking
def _checked(stages: Stages, given: Given, world: World, resume: bool, allow_changes: bool) -> list[_Place]:
    """How each stage stands, once nothing is in the way of any. Changes nothing."""
    home = Path(stages.output)
    if resume and kind_of(home) != STAGED:
        raise CheckpointError(f"resume: {stages.output!r} holds no stages; nearest valid: without, to start them")
    check(home, STAGED)
    check_idle(home)
    _check_others(home, stages)
    places, waiting = list[_Place](), list[tuple[int, LookedAt]]()
    for number, config in enumerate(stages.runs):
        folder = Path(config.output)
        with _naming(number):
            old = begun(folder)
            found = looked_at(config, given, world, old)
            if not _of_a_stage(config.model.reference, home):
                check_reference(found.config, found.algorithm)
            place = _Place(old, old and finished(folder, found.config, found.identity, allow_changes))
        places.append(place)
        waiting += [] if place.finished else [(number, found)]
    _check_loaded(waiting, given, world)
    return places


def _of_a_stage(place: str, home: Path) -> bool:
    """Whether that lies in the folder of all stages, so that it may be there only once a stage has ended."""
    return Path(place).expanduser().resolve().is_relative_to(home.resolve())


def _check_others(home: Path, stages: Stages) -> None:
    """Raises ValueError for the run of a stage in the folder that is none of these: one was renamed, moved or taken
    away."""
    known = {Path(config.output).name for config in stages.runs}
    there = sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []
    for path in there:
        if path.name not in known and re.fullmatch(r"\d+-.+", path.name) and kind_of(path) == RUN:
            raise ValueError(
                f"output: {stages.output!r} holds the stage {path.name!r}, which is not configured; nearest valid: "
                "another output, or that folder moved away"
            )


def _check_loaded(waiting: Sequence[tuple[int, LookedAt]], given: Given, world: World) -> None:
    """What rewards and the model say once they are loaded, of all stages behind the first that is still to be run: that
    one finds out at once."""
    if len(waiting) < 2:
        return
    if given.model is not None and sharded(waiting[0][1].config, world):
        raise ValueError("model: stages that share out a network load their own; nearest valid: model.path")
    for number, found in waiting:
        with _naming(number):
            prepare(*found.judges)
            if given.model is None:
                check_model(found.config)
    plain = waiting[0][1].config.with_model(start="", grid=OWN)
    model = prepare_model(plain, world) if given.model is None else given.model
    grid = _grid(model)
    for number, found in waiting:
        with _naming(number):
            on_grid(found.config, model)
            guidance, _ = asked_of(found.config, found.algorithm, model)
            check_guided(found.config, found.algorithm, guidance, model, found.prompts["train"][0])
            check_takes(found.rewards, model.makes, model.name)
            if given.reward is None:
                by_stream(found.config, found.algorithm, model, found.prompts["train"][0])
        _walk(model, grid)


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Around work for a stage: what is wrong names it in front."""
    try:
        yield
    except (ValueError, ImportError) as error:
        field = re.match(r"(\w+)[\w.]*(?=[:,])", str(error))
        inside = field is not None and field[1] in Config.model_fields and field[1] != "output"
        text = f"stages.{number}{'.' if inside else ': '}{error}"
        if isinstance(error, ImportError):
            raise ImportError(text, name=error.name) from error
        raise (CheckpointError if isinstance(error, CheckpointError) else ValueError)(text) from error


# -------------------------------------------------------------------------------------------------------------- folders
@contextmanager
def _home(stages: Stages, write: bool) -> Iterator[None]:
    """The folder of all stages, for this process alone and with what was given written down. `write`: whether this rank
    does that."""
    if not write:
        yield
        return
    with held(claim(stages.output, STAGED)) as home:
        write_file(home / FILE, f"# generator: tempflow train\n{to_yaml(stages)}")
        yield
