"""RTDMD-like: both stages, what each phase learns from, limits, counts, a run; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, Velocity, brightness, config
from torch import Tensor

from tempflow.algorithms import Algorithm, flow_cps, rtdmd
from tempflow.algorithms.flow_cps import UnscaledRatio
from tempflow.algorithms.phase import EdgePhase, NoisePhase
from tempflow.config.guards import GuardsConfig
from tempflow.core.cost import Cost
from tempflow.core.dynamics import CPS
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples
from tempflow.core.times import LogitNormalTimes, UniformTimes
from tempflow.request import asked
from tempflow.train.guards import Guards
from tempflow.train.trainer import train
from tempflow.train.update import learn, lessons

SMALL: dict[str, Any] = {"group": 6, "noises": 2, "teacher_guidance": 2.0, "clip": 0.02, "fake_updates": 3}


def bench(algorithm: Algorithm | None = None, rate: float = 0.02, **options: Any) -> Bench:
    """Another network is the teacher."""
    made = Bench(algorithm=algorithm or rtdmd(**{**SMALL, **options}), rate=rate)
    teacher = Velocity()
    with torch.no_grad():
        teacher.mean.bias.add_(torch.linspace(-0.6, 0.6, 8))
    sets = {**made.context.sets, "reference": teacher} if "reference" in made.context.sets else made.context.sets
    made.context = replace(made.context, sets=sets)
    return made


def held(made: Bench, role: str = "policy") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.learners[role].trainable.named().items()}


def test_the_second_stage_composes_what_the_code_has() -> None:
    algorithm = rtdmd()
    fake, edges, matching = algorithm.phases
    step, samples = CPS(0.9), OwnSamples("end", CPS(0.9))
    assert (algorithm.steps, algorithm.dynamics, fake.role, fake.updates) == (4, step, "fake", 10)
    assert isinstance(fake, NoisePhase) and fake.objective == FlowMatching(LogitNormalTimes(), samples)
    assert isinstance(edges, EdgePhase) and isinstance(edges.objective.ratio, UnscaledRatio)
    assert (edges.objective.clip.low, edges.objective.clip.high) == (1e-5, 1e-5)
    assert edges.objective.weight_sets == ("policy",), "no KL"
    assert matching.objective == DistributionMatching(samples=samples, strength=4.5, weight=1e-3)
    assert matching.objective.last == 1 and matching.objective.times == UniformTimes(low=0.02, high=0.98)
    assert (algorithm.credit.by, algorithm.credit.scale) == (("prompt", "step"), "global")  # type: ignore[attr-defined]


def test_two_of_the_first_three_steps_are_trained_and_the_last_draws_no_noise() -> None:
    algorithm = rtdmd()
    seen = set[tuple[int, ...]]()
    for iteration in range(40):
        plans = algorithm.plans(iteration, 3)
        assert plans[0] is plans[2] and plans[0].cost() == Cost(96, 24, 48)
        at = zip(plans[0].step, plans[0].stochastic, plans[0].trained, strict=True)
        noisy = {(i, noise) for i, noise, _ in at}
        assert noisy == {(0, True), (1, True), (2, True), (3, False)}
        seen.add(tuple(sorted({i for i, use in zip(plans[0].step, plans[0].trained, strict=True) if use})))
    assert seen == {(0, 1), (0, 2), (1, 2)}


def test_a_cold_start_is_dmd2_by_noisy_steps() -> None:
    cold = rtdmd(stage="cold_start", turns=2)
    fake, matching = cold.phases
    samples = OwnSamples("random", CPS(0.9))
    assert cold.plan is None and cold.turns == 2 and (fake.role, fake.updates) == ("fake", 10)
    assert fake.objective == FlowMatching(LogitNormalTimes(), samples)
    assert matching.objective == DistributionMatching(samples=samples, strength=4.5)
    assert [phase.cost(4, None) for phase in cold.phases] == [Cost(80, 0, 20), Cost(8, 0, 2, alone=4)]


def test_the_reward_s_part_is_flow_cps() -> None:
    """Without the matching phase, which comes after it: the fake before it moves no policy. Minibatches are of another
    order."""
    ours = bench(train_steps=None)
    whole = ours.context.algorithm
    ours.context = replace(ours.context, algorithm=replace(whole, phases=whole.phases[:2]))
    theirs = bench(flow_cps(steps=4, group=6, noise_level=0.9, clip=0.02))
    for iteration in range(2):
        ours.iterate(iteration)
        theirs.iterate(iteration)
    for name, value in held(ours).items():
        torch.testing.assert_close(value, held(theirs)[name], rtol=0, atol=1e-6)
    assert not torch.equal(next(iter(held(ours).values())), Velocity().mean.weight)


@pytest.mark.parametrize("weight", [1e-3, 1.0])
def test_matching_moves_the_policy_by_its_weight_and_by_the_last_step_alone(weight: float) -> None:
    """Its gradient is `weight` times that of weight 1, and none reaches what the noisy steps said."""
    one = bench(matching_weight=weight)
    phase = one.context.algorithm.phases[2]
    assert isinstance(phase, NoisePhase)
    lesson = lessons(one.context, asked(PROMPTS), 0, None, ())[0]
    batch = phase.batch(lesson, phase.items(lesson))
    said = torch.zeros(4, requires_grad=True)  # at each step

    def student(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        step = (lesson.schedule.sigmas[:4] - sigma[0].float()).abs().argmin()
        return 0.3 * x + said[step]

    models = {"policy": student, "fake": lambda x, s, r: 0.5 * x, "reference": lambda x, s, r: 0.1 * x}
    found = [
        torch.autograd.grad(replace(phase.objective, weight=w)(models, batch).value, said)[0] for w in (weight, 1.0)
    ]
    torch.testing.assert_close(found[0], weight * found[1])
    assert found[1][:3].eq(0).all() and found[1][3].abs() > 1e-3


def test_costs_are_the_rows_that_are_counted() -> None:
    made = bench()
    metrics = made.iterate()
    cost, fake = made.context.algorithm.cost(0, 6), 6 * 2 * 3
    assert (made.counter.rollout, made.counter.decodes) == (cost.forwards, cost.leaves) == (6 * 24, 6 * 6)
    assert made.counter.train == cost.trained_edges == 6 * 12 + fake + 12
    assert made.counter.reference == 4 * fake + 4 * 12 and made.counter.alone == 2 * 12
    assert (metrics["updates"], metrics["fake/updates"], metrics["policy.2/updates"]) == (1, 3, 1)
    assert metrics["rollout_gap_max"] == 0 and metrics["log_ratio_max"] == 0


def test_a_cold_start_takes_the_student_to_its_teacher() -> None:
    made = bench(stage="cold_start", noises=4, rate=0.03, turns=2)
    goal = made.context.sets["reference"].get_parameter("mean.bias").detach()
    prompts, guards = asked(PROMPTS), Guards(GuardsConfig(), lambda iteration, alarms: None, lambda line: None)
    away = [float((made.model.network.mean.bias.detach() - goal).norm())]
    for iteration in range(12):
        given = lessons(made.context, prompts, iteration, None, ())
        learn(made.context, prompts, given, made.learners, made.counter, made.clock, guards)
        away.append(float((made.model.network.mean.bias.detach() - goal).norm()))
    assert away[-1] < 0.5 * away[0]


def test_a_run_of_both_stages(tmp_path: Path) -> None:
    """The second begins with the weights that the first ended with, and both keep the fake."""
    given: dict[str, Any] = {"evaluation": {"every": 0}, "iterations": 2}
    fields = {"name": "rtdmd", "noises": 2, "fake_updates": 2, "teacher_guidance": 2.0}
    cold = config(tmp_path / "cold", algorithm={**fields, "stage": "cold_start"}, **given)
    first = train(cold, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    second = config(tmp_path / "rl", algorithm={**fields, "group": 4}, **given)
    run = train(second, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    lines = [[json.loads(line) for line in (r.folder / "metrics.jsonl").read_text().splitlines()] for r in (first, run)]
    assert {"gap", "gradient", "fake/error"} <= lines[0][-1].keys() and "reward/brightness" not in lines[0][-1]
    assert {"reward/brightness", "policy.2/gap", "fake/error"} <= lines[1][-1].keys()
    assert lines[0][-1]["rollout_forwards"] == 0 < lines[1][-1]["rollout_forwards"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": "warm"}, "stage: 'warm' is not one of 'reinforce', 'cold_start'"),
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"train_steps": 4}, "train_steps: 4 must be in 1 … 3; nearest valid: 3"),
        ({"group": 1}, "group: 1 must be at least 2"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0"),
        ({"noise_level": 1.5}, "noise_level"),
        ({"fake_updates": 0}, "fake_updates: 0 must be at least 1"),
        ({"fake_rate": -1.0}, "fake_rate: -1.0 must be finite and above 0"),
        ({"matching_weight": 0.0}, "matching_weight: 0.0 must be finite and above 0"),
        ({"log_prob": "x"}, "log_prob: 'x' is not one of"),
        ({"std": "x"}, "std: 'x' is not one of"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0"),
        ({"turns": 2}, "turns: 2, and a phase learns from a rollout, once; nearest valid: 1"),
    ],
)
def test_bad_arguments_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rtdmd(**fields)
    assert "\n" not in str(caught.value)
