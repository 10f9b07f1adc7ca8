"""GDMD in the loop: interleaving is collecting first, what is counted, what a run records, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, Velocity, brightness, config, same
from torch import Tensor

from tempflow.algorithms import gdmd
from tempflow.algorithms.lesson import POLICY
from tempflow.config.guards import GuardsConfig
from tempflow.core.cost import Cost
from tempflow.core.ema import Copy
from tempflow.core.objective.distill import FlowMatching
from tempflow.core.objective.guided_targets import GuidedTargets
from tempflow.request import asked
from tempflow.train.guards import Guards
from tempflow.train.trainer import train
from tempflow.train.update import Scorer, learn, lessons, predictors, update

SMALL: dict[str, Any] = {"noises": 3, "teacher_guidance": 2.0, "turns": 3}


def bench(reward: Any = brightness, rate: float = 0.02, reward_weight: float = 1.0, **options: Any) -> Bench:
    """Another network is the teacher, as far from the policy as what it has still to learn."""
    made = Bench(algorithm=gdmd(reward_weight=reward_weight, **{**SMALL, **options}), reward=reward, rate=rate)
    teacher = Velocity()
    with torch.no_grad():
        teacher.mean.bias.add_(torch.linspace(-0.6, 0.6, 8))
    made.context = replace(made.context, sets={**made.context.sets, "reference": teacher})
    return made


def quiet() -> Guards:
    return Guards(GuardsConfig(), lambda iteration, alarms: None, lambda line: None)


def iterate(made: Bench, iteration: int = 0) -> dict[str, float]:
    prompts = asked(PROMPTS)
    given = lessons(made.context, prompts, iteration, None, ())
    metrics = learn(made.context, prompts, given, made.learners, made.counter, made.clock, quiet())
    for learner in made.learners.values():
        learner.sets.update()
    return metrics


def held(made: Bench, role: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.learners[role].trainable.named().items()}


# ------------------------------------------------------------------------------------------------------- the algorithm
def test_what_it_composes() -> None:
    algorithm = gdmd()
    fake, student = algorithm.phases
    assert (algorithm.steps, algorithm.turns, fake.updates, student.updates) == (4, 5, 1, 1), "fake : student = 1 : 1"
    assert (fake.role, student.role, algorithm.weight_sets) == ("fake", POLICY, {"old": Copy()})
    assert algorithm.plan is None and algorithm.networks == ("old", "fake", "reference")
    judged = student.objective
    assert isinstance(judged, GuidedTargets) and isinstance(fake.objective, FlowMatching)
    assert (judged.weights, judged.head, judged.mix, judged.spread, judged.strength) == ((1, 1), "nft", 1, None, 4.5)
    assert fake.objective.student == "old" and fake.objective.times == judged.times


def test_turn_by_turn_is_collecting_all_targets_first() -> None:
    """The paper's order: η updates of the fake with a target behind each, then η updates of the student."""
    options = {"spread": 0.05, "turns": 3}
    taken, collected = bench(**options), bench(**options)
    for made in (taken, collected):
        iterate(made)  # moves "old" away from the start
    before = held(taken, POLICY)
    iterate(taken, 1)

    prompts = asked(PROMPTS)
    given = lessons(collected.context, prompts, 1, None, ())
    judge = Scorer(collected.context, prompts, collected.clock)
    network = collected.learners["fake"].trainable.network
    snapshots = list[dict[str, Tensor]]()

    def run(place: int, turn: int) -> None:
        phase, lesson = collected.context.algorithm.phases[place], replace(given[place], turn=turn, judge=judge)
        models = predictors(collected.context, prompts, phase)
        learner, counter, clock = collected.learners[phase.role], collected.counter, collected.clock
        update(collected.context, phase, models, lesson, learner, counter, clock, quiet(), place, several=True)

    for turn in range(3):
        run(0, turn)
        snapshots.append({name: value.clone() for name, value in network.state_dict().items()})
    assert same(held(collected, POLICY), before)
    for turn in range(3):
        network.load_state_dict(snapshots[turn])
        run(1, turn)
    assert same(held(collected, POLICY), held(taken, POLICY)) and same(held(collected, "fake"), held(taken, "fake"))
    assert not same(held(taken, POLICY), before) and not same(snapshots[0], snapshots[2])


def test_costs_are_the_rows_and_samples_that_are_counted() -> None:
    made = bench()
    metrics = iterate(made)
    noises, cost = 6 * 3 * 3, made.context.algorithm.cost(0, 6)
    assert (metrics["updates"], metrics["fake/updates"]) == (3, 3)
    assert made.counter.train == cost.trained_edges == 2 * noises and made.counter.alone == 2 * noises
    assert made.counter.decodes == made.counter.reward_calls == 2 * noises
    assert made.counter.reference == noises * (5 + 4), "the old student's walk and the fake, at most"
    fake, student = (made.context.algorithm.taught_cost(phase, None) for phase in made.context.algorithm.phases)
    assert (fake, student) == (Cost(4 * 9, 0, 9), Cost(5 * 9, 2 * 9, 9, alone=2 * 9))


def test_a_reward_of_no_weight_and_equal_scores_leave_distribution_matching() -> None:
    """At the first update of an iteration; later ones have the "nft" head's pull to the old student besides."""
    alone, equal = bench(turns=1, reward_weight=0.0), bench(lambda images, prompts: [0.5] * len(images), turns=1)
    for made in (alone, equal):
        for iteration in range(3):
            iterate(made, iteration)
    for name, value in held(alone, POLICY).items():
        torch.testing.assert_close(value, held(equal, POLICY)[name])


def test_the_spread_is_that_of_all_scores_of_the_run() -> None:
    scores = list[float]()

    def watched(images: Any, prompts: Any) -> list[float | None]:
        found = brightness(images, prompts)
        scores.extend(value for value in found if value is not None)
        return found

    made = bench(watched)
    first = iterate(made)
    wanted = torch.tensor(scores, dtype=torch.float64)
    assert made.counter.scores == len(scores) == 2 * 6 * 3 * 3
    assert made.counter.spread == pytest.approx(float(wanted.std(unbiased=False)), rel=1e-5)
    assert first["failed_rewards"] == 0 and 0 < first["optimality"] < 1


def test_a_failed_score_is_left_out_and_does_not_spoil_the_metrics() -> None:
    calls = iter(range(10**6))
    made = bench(lambda images, prompts: [None if next(calls) % 3 == 0 else v for v in brightness(images, prompts)])
    metrics = iterate(made)
    assert 0.3 < metrics["failed_rewards"] < 1 and made.counter.scores == 2 * 2 * 6 * 3
    assert all(value == value for value in metrics.values())  # no NaN
    assert 0 < metrics["reward"] < 1 and 0 < metrics["target_reward"] < 1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_student_goes_to_its_teacher(weight: float) -> None:
    made = bench(rate=0.01, turns=5, reward_weight=weight)
    goal = made.context.sets["reference"].get_parameter("mean.bias").detach()
    away = [float((made.model.network.mean.bias.detach() - goal).norm())]
    for iteration in range(8):
        iterate(made, iteration)
        away.append(float((made.model.network.mean.bias.detach() - goal).norm()))
    assert away[-1] < 0.5 * away[0] and away == sorted(away, reverse=True)


# --------------------------------------------------------------------------------------------------------------- a run
def test_a_run_says_what_it_scored_and_is_resumed_bitwise(tmp_path: Path) -> None:
    def go(folder: Path, iterations: int, resume: bool = False) -> Path:
        algorithm = {"name": "gdmd", "steps": 4, "noises": 2, "turns": 2, "teacher_guidance": 2.0}
        settings = config(
            folder, iterations=iterations, algorithm=algorithm, checkpoint={"every": 1}, evaluation={"every": 0}
        )
        made = train(
            settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=resume, allow_changes=resume
        )
        return made.folder

    whole = go(tmp_path / "whole" / "toy", 3)
    parted = go(tmp_path / "parted" / "toy", 1)
    go(parted, 3, resume=True)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, parted)]
    assert lines[0] == lines[1]
    last = json.loads(lines[0][-1])
    assert {"reward", "target_reward", "failed_rewards", "optimality", "moved", "fake/error"} <= last.keys()
    assert last["decodes"] == last["reward_calls"] == 3 * 2 * 3 * 2 * 2


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps: 0 must be at least 1; nearest valid: 1"),
        ({"noises": 0}, "noises: 0 must be at least 1"),
        ({"turns": 0}, "turns: 0 must be at least 1"),
        ({"fake_rate": 0.0}, "fake_rate: 0.0 must be finite and above 0"),
        ({"matching_weight": -1.0}, "matching_weight: -1.0 must be finite and at least 0; nearest valid: 1.0"),
        ({"reward_weight": float("nan")}, "reward_weight: nan must be finite and at least 0; nearest valid: 1.0"),
        ({"matching_weight": 0.0, "reward_weight": 0.0}, "matching_weight, reward_weight: 0 and 0 teach nothing"),
        ({"head": "grpo"}, "head: 'grpo' is not one of nft, signed"),
        ({"mix": -1.0}, "mix: -1.0 must be finite and above 0"),
        ({"spread": 0.0}, "spread: 0.0 must be finite and above 0"),
        ({"normaliser": "mean"}, "normaliser: 'mean' is not one of clean, noisy, none"),
    ],
)
def test_bad_arguments_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gdmd(**fields)
    assert "\n" not in str(caught.value)


def test_without_a_reward_it_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = config(tmp_path / "toy", algorithm={"name": "gdmd"}, model={"path": "not/there"})
    with pytest.raises(ValueError, match=r"reward: \[\] leaves nothing to learn from") as caught:
        train(settings, reward=[], prompts=PROMPTS, quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "toy").exists()
    with pytest.raises(ValueError, match=r"\[\] leaves nothing to learn from"):
        config(tmp_path / "toy", algorithm={"name": "gdmd"}, rewards=[])
