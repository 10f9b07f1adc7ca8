"""Samples in a rollout's place: a plan of no steps, their scores, and that nothing walks it."""

from __future__ import annotations

import pytest
import torch

from tempflow.core import plan as P
from tempflow.core.dynamics import ODE
from tempflow.core.offline import NAME, OfflineSamples, finished
from tempflow.core.plan import Cost
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import linear

PAIR = OfflineSamples(("chosen", "rejected"), (1.0, 0.0))


def test_a_plan_of_samples_that_are_there() -> None:
    plan = finished(3)
    assert (plan.steps, plan.roots, plan.scored) == (0, 3, (0, 1, 2)) and plan.cost() == Cost(0, 3, 0)
    assert PAIR.plan(0, 0) is PAIR.plan(7, 4) == finished(2)
    with pytest.raises(ValueError, match=r"roots = 0: must be at least 1"):
        finished(0)


def test_nothing_walks_it() -> None:
    with pytest.raises(ValueError, match="steps"):
        rollout([finished(2)], ODE(), linear(1), lambda x, s, r: x, Noise(0), shape=(1,))


def test_a_plan_with_edges_has_steps_and_one_without_has_none() -> None:
    with pytest.raises(ValueError, match=r"parent = \(\): a plan needs at least one edge"):
        P.Plan(2, 1, (), (), (), (), (), (0,), ())
    with pytest.raises(ValueError, match=r"steps = 0: must be at least 1"):
        P.Plan(0, 1, (0,), (0,), (False,), (False,), (1.0,), (0,), ())
    for length in ("step", "stochastic", "trained", "scale"):
        with pytest.raises(ValueError, match=rf"len\({length}\)"):
            P.Plan(**{**vars_of(finished(1)), length: (1,)})  # type: ignore[arg-type]


def vars_of(plan: P.Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_its_leaves_stand_as_edges_prompt_by_prompt() -> None:
    forest = skeleton([PAIR.plan(0, s) for s in (4, 5)], (4, 5)).as_leaves()
    assert forest.steps == 0 and forest.nodes.shape[0] == 4
    assert forest.edges.child.tolist() == [0, 1, 2, 3] and forest.edges.prompt.tolist() == [4, 4, 5, 5]
    assert forest.edges.root.tolist() == [0, 1, 0, 1] and forest.edges.step.tolist() == [0] * 4
    assert bool(forest.edges.trained.all()) and not bool(forest.edges.stochastic.any())


def test_scores_are_the_keys_own_and_a_broken_sample_has_none() -> None:
    scores = PAIR.scored(torch.tensor([True, True, False, True]))
    assert scores.names == (NAME,) and scores.ok[:, 0].tolist() == [True, True, False, True]
    assert scores.value[[0, 1, 3], 0].tolist() == [1.0, 0.0, 0.0] and bool(scores.value[2, 0].isnan())


@pytest.mark.parametrize(
    ("keys", "scores", "message"),
    [
        ((), (), "keys: "),
        (("a", "a"), (1.0, 0.0), "keys: .*distinct"),
        (("",), (1.0,), "keys: "),
        (("a", "b"), (1.0,), "scores: .*must be 2 finite numbers"),
        (("a",), (float("nan"),), "scores: .*must be 1 finite"),
    ],
)
def test_bad_fields(keys: tuple[str, ...], scores: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OfflineSamples(keys, scores)
