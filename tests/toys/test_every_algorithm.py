"""Every registered algorithm, through the real loop, closes at least half the gap to the toy's known optimum."""

from __future__ import annotations

import time

import line
import pytest
from mixture import Mixture, bench, gap_closed, mean_reward, train
from settings import build, toy

from tempflow.algorithms import ALGORITHMS
from tempflow.core.dynamics import ModelJump

ON_TOYS = sorted(name for name, make in ALGORITHMS.items() if not isinstance(make().dynamics, ModelJump))
"""Those of tokens have a toy of their own: tests/algorithms/test_udm_grpo.py."""


def loss_of(name: str) -> tuple[str, ...]:
    """What its objective is made of."""
    objective = build(ALGORITHMS[name], toy(name)).objective
    return (type(objective).__name__, type(getattr(objective, "clip", None)).__name__)


FIRST = {loss_of(name): name for name in (*reversed(ON_TOYS), "flow_grpo", "tempflow_grpo")}.values()
"""One algorithm for each kind of loss: the others' toys, of some seconds each, are slow tests."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else [pytest.mark.slow]) for n in ON_TOYS])
def test_closes_half_the_gap_of_the_mixture(name: str) -> None:
    settings = toy(name)
    algorithm = build(ALGORITHMS[name], settings)
    run, steps = bench(algorithm), 10 if algorithm.rolls_out else algorithm.steps  # a student walks its own grid
    before = mean_reward(Mixture(), steps=steps)
    started = time.process_time()
    train(run, settings.iterations, settings.repeat, settings.rate)
    seconds = time.process_time() - started
    closed = gap_closed(before, mean_reward(run.model, steps=steps))
    print(f"{name}: closed {closed:.2f} of the gap in {seconds:.1f} s of CPU")
    assert closed >= 0.5


@pytest.mark.parametrize("name", ON_TOYS)
def test_first_step_goes_the_right_way_on_the_line(name: str) -> None:
    # Adam's first step has the rate's length for any gradient that is not tiny: only its direction is the algorithm's
    world = (line.Line(), line.Height(), line.judge, line.drawn)
    run = bench(build(ALGORITHMS[name], toy(name)), *world, updates=1, rate=0.01)
    run.counter.scores, run.counter.score_squares = 2, 2.0  # a spread of 1: what a run knows once it has scored
    run.iterate(0, line.PROMPTS * 8)
    up, down = run.model.means
    steps = sum(phase.updates or 1 for phase in run.context.algorithm.phases if phase.role == "policy")
    steps *= run.context.algorithm.turns
    assert 0.009 < up < 0.0101 * steps and -0.0101 * steps < down < -0.009
