"""Few-step students of a teacher: who learns how often, what it costs, what is refused, and whole runs on the toy."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, TokenFake, Velocity, brightness, config, same

from tempflow.algorithms import ALGORITHMS, Algorithm, dmd2, dp_dmd, opd, segment_matching
from tempflow.core.objective.distill import DistributionMatching, FlowMatching
from tempflow.core.objective.diversity import TaughtFirstStep
from tempflow.core.objective.imitation import OnPolicyMatching, SegmentMatching
from tempflow.core.schedule import explicit
from tempflow.core.times import UniformTimes
from tempflow.train.trainer import train
from tempflow.train.weights import Learner

STUDENTS: dict[str, Callable[..., Algorithm]] = {
    "segment_matching": segment_matching,
    "dmd2": dmd2,
    "dp_dmd": dp_dmd,
    "opd": opd,
}
FOUR = explicit((1, 0.75, 0.5, 0.25), 3.0)


def weights_of(bench: Bench) -> dict[str, dict[str, torch.Tensor]]:
    return {name: learner.trainable.state() for name, learner in bench.learners.items()}


def bench_of(name: str, model: Fake | None = None, **options: Any) -> Bench:
    """A student on four useful steps beside a teacher that knows another mean."""
    bench = Bench(model, STUDENTS[name](**{"steps": 4, **options}), rate=0.05)
    teacher = Velocity(shape=bench.model.shape)
    with torch.no_grad():
        teacher.mean.bias.add_(torch.linspace(-0.6, 0.6, 8))
    bench.context = replace(bench.context, schedule=FOUR, sets={**bench.context.sets, "reference": teacher})
    return bench


# ------------------------------------------------------------------------------------------------ what they are made of
def test_arguments_become_the_papers_losses() -> None:
    segments = segment_matching(teacher_guidance=2.0, parts=3, shift=1.0)
    assert segments.objective == SegmentMatching(3, 1.0, 2.0) and not segments.roles
    matching = dmd2()
    follows, student = matching.phases
    assert student.objective == DistributionMatching(strength=4.5) and student.objective.anchor == "clean"
    assert follows.objective.times == UniformTimes(low=0.02, high=0.98) and (follows.updates, student.updates) == (5, 1)
    diverse = dp_dmd()
    follows, student = diverse.phases
    assert isinstance(student.objective, TaughtFirstStep) and isinstance(follows.objective, FlowMatching)
    assert (student.objective.taught, student.objective.teacher_steps, student.objective.weight) == (5, 30, 0.05)
    assert dict(student.guidance) == {"reference": 3.5} and student.objective.matching.anchor == "noisy"
    assert follows.objective.times == student.objective.matching.times == UniformTimes(shift=3.0)
    assert follows.objective.samples.stop == "end" and (follows.updates, student.updates) == (5, 1)
    assert opd(power=2.0).objective == OnPolicyMatching(2.0, 4.5) and opd().steps == 10
    assert all(not ALGORITHMS[name]().rolls_out for name in STUDENTS)


# --------------------------------------------------------------------------------------------------------- an iteration
@pytest.mark.parametrize("kind", [Fake, TokenFake])
@pytest.mark.parametrize("name", STUDENTS)
def test_rows_are_the_costs_and_each_role_moves(name: str, kind: type[Fake]) -> None:
    """Guided rows count twice, as the negative prompt is asked too. `dmd2` stops early: at most."""
    bench = bench_of(name, kind(), turns=2)
    before = weights_of(bench)
    counted = list[int]()
    bench.context.sets["reference"].register_forward_hook(lambda module, given, out: counted.append(len(out)))
    bench.model.rows.clear()
    seen = bench.iterate()
    cost, counter = bench.context.algorithm.cost(0, len(PROMPTS)), bench.counter
    per_turn = [p.cost(4, None) for p in bench.context.algorithm.phases]
    want = sum(6 * 2 * c.alone for c in per_turn)
    assert counter.alone == sum(counted) == want > 0 and (cost.forwards, counter.rollout, counter.decodes) == (0, 0, 0)
    assert counter.train == cost.trained_edges == sum(6 * 2 * c.trained_edges for c in per_turn)
    others = sum(bench.model.rows) - counter.train
    assert others == counter.reference if name != "dmd2" else 0 < others <= counter.reference
    assert all(not same(before[role], after) for role, after in weights_of(bench).items())
    assert seen["updates"] == 2 and seen["loss"] > 0 and ("fake/error" in seen) == (name in ("dmd2", "dp_dmd"))


@pytest.mark.parametrize("name", ["dmd2", "dp_dmd"])
def test_a_students_update_comes_after_so_many_of_its_fake_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, order, step = bench_of(name, fake_updates=3, turns=2), list[str](), Learner.step
    roles = {id(learner): role for role, learner in bench.learners.items()}

    def noted(learner: Learner) -> None:
        order.append(roles[id(learner)])
        step(learner)

    monkeypatch.setattr(Learner, "step", noted)
    bench.iterate()
    assert order == (["fake"] * 3 + ["policy"]) * 2


@pytest.mark.parametrize("name", STUDENTS)
def test_minibatches_do_not_change_an_update(name: str) -> None:
    ends = []
    for rows in (64, 5):
        bench = bench_of(name)
        bench.context = replace(bench.context, train_rows=rows)
        bench.iterate()
        ends.append(weights_of(bench))
    for role, whole in ends[0].items():
        for key, value in whole.items():
            torch.testing.assert_close(value, ends[1][role][key], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("name", STUDENTS)
def test_a_run_from_its_configuration(name: str, tmp_path: Path) -> None:
    made = config(tmp_path / name, algorithm={"name": name, "steps": 3, "turns": 2}, iterations=2)
    run = train(made, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["loss"] > 0 and line["updates"] == 2 for line in lines)
    shown = {"segment_matching": "error_first", "opd": "error_last", "dmd2": "gap", "dp_dmd": "first_error"}
    assert all(shown[name] in line for line in lines)


# ------------------------------------------------------------------------------------------------------------- refusals
BAD: dict[str, Any] = {
    "steps": 0,
    "noises": 0,
    "teacher_guidance": float("nan"),
    "fake_updates": 0,
    "fake_rate": -1.0,
    "stop": "middle",
    "through": 0,
    "parts": 0,
    "shift": 0.0,
    "taught": 31,
    "teacher_steps": 4,
    "weight": -0.1,
    "power": float("inf"),
    "turns": 0,
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_bad_argument_is_named_in_one_line(name: str) -> None:
    arguments = inspect.signature(STUDENTS[name]).parameters
    assert arguments.keys() <= BAD.keys()
    for argument in arguments:
        with pytest.raises(ValueError) as caught:
            STUDENTS[name](**{argument: BAD[argument]})
        said = str(caught.value)
        assert said.startswith("taught: 5" if argument == "teacher_steps" else f"{argument}: ") and "\n" not in said


def test_one_step_leaves_dp_dmd_nothing_to_match() -> None:
    with pytest.raises(ValueError, match="steps: 1 must be at least 2, as what follows the first one is matched"):
        dp_dmd(steps=1)
