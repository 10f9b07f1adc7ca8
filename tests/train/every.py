"""A short run of every registered algorithm, by its golden case: whole, stopped and gone on with, on ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from fake import Light
from kinds import patchy
from test_state import Countdown, Killed, dies

from benchmarks.golden import frozen
from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import HUGE, built, trained
from tempflow.algorithms import ALGORITHMS, Algorithm
from tempflow.train.guards import Guards
from tempflow.train.parallel import World
from tempflow.train.records import Run

ITERATIONS = 3

NAMES = {name: next(key for key, case in CASES.items() if case.algorithm == name) for name in ALGORITHMS}
NAMES |= {"rtdmd_cold_start": "rtdmd, cold start", "two_rewards": "flow_grpo, two rewards"}
"""Every algorithm with a golden case of it, and what two of them are beside that."""


def from_noises(algorithm: Algorithm) -> bool:
    """Whether a role of it learns from starting noises: students, and what takes a reward's gradient."""
    return not all(phase.keeps for phase in algorithm.phases)


def made(name: str) -> Algorithm:
    return built(CASES[NAMES[name]])


def kind(made: Algorithm) -> tuple[bool, ...]:
    """What its runs have to keep and to put back: a rollout, other roles, sets that follow, scores, gradients of
    these."""
    scores = any(phase.cost(made.steps, None).leaves for phase in made.phases if not phase.keeps)
    return made.rolls_out, bool(made.roles), bool(made.weight_sets), scores, made.through_rewards


def go(name: str, folder: Path, resume: bool = False, **fields: Any) -> Run:
    """The run, in `folder`. Its steps are linear in the gradients, with moments: ranks, which add these up in another
    order, then end where one process does. Scores fail by prompt and picture, not by the place in a call."""
    case = CASES[NAMES[name]]
    rate = frozen.read()[NAMES[name]]["rate"]
    optimizer = {"learning_rate": HUGE * rate, "beta1": 0.5, "eps": HUGE, "max_grad_norm": 1e9, "ema_decay": 0.5}
    settings: dict[str, Any] = {
        "iterations": ITERATIONS,
        "output": str(folder),
        "optimizer": {"updates_per_iteration": 2, "warmup_iterations": 1, **optimizer},
        "evaluation": {"every": 0, "validation_prompts": 2, "test_prompts": 2, "steps": 2, "metric": "reward"},
        "checkpoint": {"every": 1, "keep": ITERATIONS + 1},
    }
    judge = Path.cwd() / "judge"  # a stand-in is loaded from it
    judge.mkdir(exist_ok=True)
    reward: Any = {"light": Light(dark=("fog",)), "both": None}.get(case.reward, patchy)
    return trained(case, rate, judge, reward=reward, resume=resume, **settings, **fields)


@contextlib.contextmanager
def dying(iteration: int) -> Iterator[None]:
    """Inside, the process is gone when that iteration, from 1, has moved all roles and nobody has been told."""
    wrapped = Countdown(iteration, dies).wrap(Guards.update)
    with mock.patch.object(Guards, "update", wrapped), contextlib.suppress(Killed):
        yield


def on_ranks(target: Path, mode: str, names: Sequence[str], world: World) -> None:
    """Each run killed in its second iteration, and gone on with; on this rank of several."""
    for name in names:
        print(name, flush=True)  # names the one that fails
        own = target / f"{name}_{world.rank}"  # where an offline one's pictures are
        own.mkdir(parents=True)
        with contextlib.chdir(own):
            with dying(2):
                go(name, target / name, parallel={"mode": mode})
            world.wait()
            go(name, target / name, resume=True, parallel={"mode": mode})
