"""Roles and phases: several networks with optimizers of their own in one iteration."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, Velocity, brightness, config, flow, same, two_roles
from test_state import Countdown, Killed, assert_equal, dies
from torch import nn

from tempflow.algorithms import Algorithm
from tempflow.algorithms.lesson import POLICY, Models, Role
from tempflow.algorithms.phase import NoisePhase
from tempflow.config.guards import GuardsConfig
from tempflow.core.cost import Cost
from tempflow.core.ema import Copy
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples
from tempflow.core.objective.edges import Loss
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.offline import OfflineSamples
from tempflow.core.schedule import linear
from tempflow.models.guidance import Guidance
from tempflow.report.page import write_report
from tempflow.request import asked
from tempflow.rewards.scoring import Scoring
from tempflow.train import checkpoint, trainer
from tempflow.train.display import Interrupted
from tempflow.train.guards import GuardError, Guards
from tempflow.train.parallel import World
from tempflow.train.state import load_learner, optimizer_tensors
from tempflow.train.trainer import Given, looked_at, train
from tempflow.train.update import learn, lessons, predictors, update
from tempflow.train.weights import own_copy


def quiet(bench: Bench, guards: GuardsConfig | None = None) -> Guards:
    return Guards(guards or GuardsConfig(), lambda iteration, alarms: None, bench.said.append)


def learned(bench: Bench, iteration: int = 0, guards: GuardsConfig | None = None) -> dict[str, float]:
    """An iteration of an algorithm without a rollout."""
    prompts = asked(PROMPTS)
    given = lessons(bench.context, prompts, iteration, None, ())
    metrics = learn(bench.context, prompts, given, bench.learners, bench.counter, bench.clock, quiet(bench, guards))
    for learner in bench.learners.values():
        learner.sets.update()
    return metrics


def apart() -> Bench:
    """Two roles without a rollout, whose reference knows another mean than the policy."""
    bench, teacher = Bench(algorithm=two_roles(rollout=False), rate=0.05), Velocity()
    with torch.no_grad():
        teacher.mean.bias.add_(torch.linspace(-0.6, 0.6, 8))
    bench.context = replace(bench.context, sets={**bench.context.sets, "reference": teacher})
    return bench


def masters(bench: Bench) -> dict[str, torch.Tensor]:
    named = ((role, learner.trainable.state()) for role, learner in bench.learners.items())
    return {f"{role}/{name}": value for role, state in named for name, value in state.items()}


def held(bench: Bench) -> dict[str, torch.Tensor]:
    """All roles' weights and moments."""
    return masters(bench) | {
        f"moments/{role}/{name}": value.clone()
        for role, learner in bench.learners.items()
        for name, value in optimizer_tensors(learner.optimizer, learner.trainable.names).items()
    }


# ---------------------------------------------------------------------------------------------------------- the network
def test_a_copy_has_trained_parameters_of_its_own_and_shares_the_rest() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    copy = own_copy(network)
    for (name, mine), (_, theirs) in zip(network.named_parameters(), copy.named_parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad
        assert (mine is theirs) == name.startswith("0."), name
    assert network[1].running_mean is copy[1].running_mean
    x = torch.ones(4, 2)
    copy(x).sum().backward()
    assert network[2].weight.grad is None and copy[2].weight.grad is not None


def test_where_a_lora_is_trained_a_role_is_a_second_lora_on_one_base() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    copy = own_copy(network)
    shared = {id(p) for p in network.parameters()} & {id(p) for p in copy.parameters()}
    assert shared == {id(p) for p in network.parameters() if not p.requires_grad} and len(shared) == 4
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    x = torch.ones(1, 4)
    assert torch.equal(network(x), base(x)) and not torch.equal(copy(x), network(x))


# --------------------------------------------------------------------------------------------------------- an iteration
def test_each_role_learns_by_its_own_phases_and_all_is_counted() -> None:
    bench = apart()
    before, metrics = masters(bench), learned(bench)
    after = masters(bench)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (metrics["updates"], metrics["fake/updates"]) == (1, 2) and {"gap", "fake/error"} <= metrics.keys()
    assert (metrics["trained_edges"], metrics["fake/trained_edges"]) == (6 * 3, 6 * 3 * 2)
    counter, cost = bench.counter, bench.context.algorithm.cost(0, 6)
    assert counter.train == cost.trained_edges == 18 + 36 and (cost.forwards, counter.rollout) == (0, 0)
    assert counter.reference == 18 * 5 + 36 * 4
    slow = bench.learners["fake"].sets.sets["slow"]
    assert slow.updates == 1 and not same(slow.named(), bench.learners["fake"].trainable.named())


def test_a_phase_moves_its_role_alone() -> None:
    for role in (POLICY, "fake"):
        bench = apart()
        lessons_of = lessons(bench.context, asked(PROMPTS), 0, None, ())
        phases = zip(bench.context.algorithm.phases, lessons_of, strict=True)
        phase, lesson = next((phase, lesson) for phase, lesson in phases if phase.role == role)
        before, learner = masters(bench), bench.learners[role]
        update(
            bench.context,
            phase,
            predictors(bench.context, asked(PROMPTS), phase),
            lesson,
            learner,
            bench.counter,
            bench.clock,
            quiet(bench),
        )
        moved = {name for name, value in masters(bench).items() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if name.startswith(f"{role}/")}


def test_noises_are_functions_of_role_update_slot_and_number() -> None:
    bench = Bench(algorithm=two_roles(rollout=False))
    student, fake = bench.context.algorithm.phases
    lesson = lessons(bench.context, asked(PROMPTS), 0, None, ())[0]
    whole = fake.batch(lesson, fake.items(lesson))  # type: ignore[attr-defined]
    assert len(whole) == 6 * 3 * 2 == len(whole.x.flatten(1).unique(dim=0))
    some = fake.items(lesson).where(torch.arange(36) % 5 == 2)
    part = fake.batch(lesson, some)  # type: ignore[attr-defined]
    rows = (torch.arange(36) % 5 == 2).nonzero()[:, 0]
    assert torch.equal(part.x, whole.x[rows]) and part.ids == tuple(whole.ids[int(r)] for r in rows)
    other = student.batch(lesson, student.items(lesson))  # type: ignore[attr-defined]
    assert not any(bool((x == whole.x).flatten(1).all(1).any()) for x in other.x)
    left = replace(lesson, skip=(1, 4))
    assert set((fake.items(left).row % 18 // 3).tolist()) == {0, 2, 3, 5}


@pytest.mark.parametrize(("role", "whole"), [("fake", 1), (POLICY, 0)])
def test_what_is_not_finite_in_one_role_moves_none(role: str, whole: int) -> None:
    """Where the policy's phase comes first, it has stepped when the fake score's second update breaks; where the fake's
    comes first, that has stepped twice when the policy's only one does. `whole`: updates that do not break."""
    bench = apart()
    phases = sorted(bench.context.algorithm.phases, key=lambda phase: phase.role == role)
    bench.context = replace(bench.context, algorithm=replace(bench.context.algorithm, phases=tuple(phases)))
    learned(bench)
    before = held(bench)
    calls = iter(range(100))

    def breaks(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor | None:
        trained = out.requires_grad and next(calls) >= whole
        return out * torch.nan if trained else None

    handle = bench.learners[role].trainable.network.register_forward_hook(breaks)
    skip = GuardsConfig.model_validate({"non_finite": {"action": "skip", "patience": 3}})
    assert learned(bench, 1, skip)["updates"] == 0 and same(before, held(bench))
    assert any("nan" in line for line in bench.said) and next(calls) > whole
    calls = iter(range(100))
    stop = GuardsConfig.model_validate({"non_finite": {"action": "stop"}})
    with pytest.raises(GuardError):
        learned(bench, 1, stop)
    assert same(before, held(bench))
    handle.remove()
    learned(bench, 1)
    assert not same(before, held(bench))


def test_student_and_fake_score_in_turn_take_the_student_to_its_teacher() -> None:
    """Gaussian data whose mean another network knows, by whose velocity alone the student is taught."""
    bench = apart()
    goal = bench.context.sets["reference"].get_parameter("mean.bias").detach()
    away = float((bench.model.network.mean.bias - goal).norm())
    for iteration in range(40):
        learned(bench, iteration)
    assert float((bench.model.network.mean.bias - goal).norm()) < 0.15 * away


# --------------------------------------------------------------------------------------------------------------- a run
def go(folder: Path, rollout: bool = True, resume: bool = False) -> Path:
    options: dict[str, Any] = {
        "iterations": 5,
        "optimizer": {"updates_per_iteration": 2, "ema_decay": 0.7},
        "checkpoint": {"every": 2},
    }
    run = train(
        config(folder, **options),
        model=Fake(),
        reward=brightness,
        prompts=PROMPTS,
        algorithm=two_roles(rollout),
        quiet=True,
        resume=resume,
    )
    return run.folder


@pytest.mark.parametrize("rollout", [True, False])
def test_a_killed_run_of_two_roles_resumes_bitwise(
    rollout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(tmp_path / "whole" / "toy", rollout)
    for left in (4, 13):
        folder = tmp_path / str(left) / "toy"
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Records, "_append", Countdown(left, dies).wrap(trainer.Records._append))
            with pytest.raises(Killed):
                go(folder, rollout)
        assert_equal(whole, go(folder, rollout, resume=True))
    kept = checkpoint.read(checkpoint.newest(whole)).tensors
    assert {"policy/weights", "policy/optimizer", "fake/weights", "fake/optimizer", "fake/set.slow"} <= kept.keys()
    assert not same(dict(kept["policy/weights"]), dict(kept["fake/weights"]))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["fake/updates"] == 2 and line["fake/loss"] > 0 for line in lines)
    assert all(("fake.2/loss" in line, "policy.2/gap" in line) == (rollout, rollout) for line in lines)


def test_a_report_and_the_counts_know_both_roles(tmp_path: Path) -> None:
    folder = go(tmp_path / "toy", rollout=False)
    page = write_report([folder], tmp_path / "page.html").read_text()
    for title in ("loss", "gradient norm (before clipping)", "fake: loss", "fake: gradient norm (before clipping)"):
        assert f">{title}<" in page, title
    summary = json.loads((folder / "summary.json").read_text())["cost"]
    assert summary["rollout_forwards"] == 0 < summary["train_forwards"] == 5 * 3 * (3 + 6)
    assert [line["steps"] for line in map(json.loads, (folder / "steps.jsonl").read_text().splitlines())] == [[]] * 5


def test_a_checkpoint_without_a_role_is_refused(tmp_path: Path) -> None:
    folder = go(tmp_path / "toy")
    newest = checkpoint.newest(folder)
    saved = checkpoint.read(newest)
    tensors = {name: part for name, part in saved.tensors.items() if not name.startswith("fake/")}
    bench = Bench(algorithm=two_roles())
    with pytest.raises(checkpoint.CheckpointError, match="fake/weights is missing, and 'fake' learns"):
        load_learner("fake", bench.learners["fake"], tensors, {})


# ------------------------------------------------------------------------------------------------------------- refusals
MATCHING, FOLLOWS = NoisePhase(DistributionMatching(), 3), NoisePhase(FlowMatching(), 3, role="fake")

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no phase of the policy": ({"phases": (FOLLOWS,)}, "phases: none is of the policy"),
    "a role that is missing": ({"roles": ()}, "phases: 'fake' is no role; nearest valid: Role('fake') in `roles`"),
    "a role without a phase": ({"phases": (NoisePhase(FlowMatching(learner="policy"), 1),)}, "learns in no phase"),
    "two of a name": ({"roles": (Role("fake"), Role("fake"))}, "must be distinct"),
    "a set without a rule": ({"phases": (NoisePhase(DistributionMatching(teacher="old"), 1), FOLLOWS)}, "'old' has no"),
    "a fake score without role and phase": ({"phases": (MATCHING,), "roles": ()}, "'fake' has no rule and is no role"),
    "a draft without a plan": ({"offline": OfflineSamples(("image",), (1.0,))}, "offline: is a rollout's"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_parts_that_do_not_fit_are_refused(kind: str) -> None:
    change, message = REFUSED[kind]
    parts: dict[str, Any] = {"name": "x", "phases": (MATCHING, FOLLOWS), "steps": 4, "roles": (Role("fake"),)}
    assert Algorithm(**parts).networks == ("reference", "fake")
    assert Algorithm(**parts).compared == frozenset(), "no guard can hold its velocities to the reference's"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Algorithm(**{**parts, **change})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "policy"}, "'policy' is taken"),
        ({"name": ""}, "is taken or no name"),
        ({"name": "a/b"}, "is taken or no name"),
        ({"name": "fake", "rate": 0.0}, "rate 0.0 must be finite and above 0"),
        ({"name": "fake", "betas": (0.9, 1.0)}, r"betas \(0.9, 1.0\) must be in"),
    ],
)
def test_a_role_s_fields_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Role(**given)
    assert Role("fake", weight_sets={"old": Copy()}).rate == 1.0


@pytest.mark.parametrize("name", ["dmd2", "dp_dmd", "gdmd", "rtdmd"])
def test_several_roles_are_not_sharded(name: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", algorithm={"name": name}, parallel={"mode": "fsdp"})
    said = f"^parallel.mode: 'fsdp' shares out one network, and {name} trains 2; nearest valid: 'ddp'$"
    with pytest.raises(ValueError, match=said):
        looked_at(settings, Given(Fake(), brightness, PROMPTS), World(0, 2), resume=False)


def test_a_rollout_is_asked_for_where_a_phase_learns_from_one() -> None:
    with pytest.raises(ValueError, match="plan: trains none of its edges"):
        Algorithm("x", (flow().first,), 4)


def test_a_role_starts_as_the_policy_does_or_as_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = dict(Fake().network.named_parameters())
    first = train(
        config(tmp_path / "first", iterations=2),
        model=Fake(),
        algorithm=two_roles(),
        reward=brightness,
        prompts=PROMPTS,
        test_prompts=PROMPTS,
    )
    trained, begun = checkpoint.best_weights(first.folder), dict[str, dict[str, torch.Tensor]]()
    step = trainer.Trainer.train_step

    def watched(self: Any, *rest: Any) -> Any:
        begun.update({name: learner.trainable.state() for name, learner in self.learners.items()})
        return step(self, *rest)

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    for start, want in (("policy", trained), ("reference", base)):
        algorithm = replace(two_roles(), roles=(Role("fake", start=start),))  # pyright: ignore[reportArgumentType]
        settings = config(tmp_path / start, iterations=1, model={"start": str(first.folder)})
        train(settings, model=Fake(), algorithm=algorithm, reward=brightness, prompts=PROMPTS, test_prompts=PROMPTS)
        assert same(begun["policy"], trained) and not same(trained, dict(base))
        assert all(torch.equal(value, want[name]) for name, value in begun["fake"].items()), start
    with pytest.raises(ValueError, match="role fake: start 'teacher' is not one of policy, reference"):
        Role("fake", start="teacher")  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------------------------- turns, guidance, scores
@dataclass(frozen=True)
class Scored:
    """Has its samples scored and pulls them to brighter ones; asks the reference with a guidance of its own."""

    weight_sets = ("policy", "reference")
    guidance = MappingProxyType({"reference": 3.0})

    def cost(self, steps: int) -> Cost:
        return Cost(steps, 1, 1, alone=2)

    def __call__(self, models: Models, batch: NoiseBatch) -> Loss:
        x = OwnSamples()(models["policy"], batch, 1)
        value, ok = batch.scored(x)
        sigma = torch.full((len(x),), 0.5, dtype=torch.float64)
        teacher = models["reference"](x.detach(), sigma, batch.rows)
        loss = torch.where(ok, -value, 0.0)[:, None, None, None] * x
        return Loss(loss.mean(), {"reward": value, "failed_rewards": (~ok).float(), "said": teacher.flatten(1).mean(1)})


def scored(turns: int = 2, **options: Any) -> Bench:
    follows = NoisePhase(FlowMatching(), 3, role="fake")
    phases = (follows, NoisePhase(Scored(), 2))
    return Bench(algorithm=Algorithm("scored", phases, 4, roles=(Role("fake"),), turns=turns), **options)


def test_phases_take_turns_each_from_noises_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, order, ids = scored(turns=3), list[str](), list[Any]()
    loss = NoisePhase.loss

    def watched(phase: NoisePhase, models: Models, lesson: Any, batch: Any, *rest: Any) -> Loss:
        order.append(phase.role)
        ids.extend((phase.role, *one) for one in phase.batch(lesson, batch).ids)
        return loss(phase, models, lesson, batch, *rest)

    monkeypatch.setattr(NoisePhase, "loss", watched)
    metrics = learned(bench)
    assert order == ["fake", POLICY] * 3 and len(set(ids)) == len(ids) == 3 * 6 * (3 + 2)
    # records tell of the policy's first phase without a prefix, wherever it stands
    assert (metrics["updates"], metrics["fake/updates"]) == (3, 3) and metrics["trained_edges"] == 3 * 6 * 2
    assert next(iter(metrics)) == "reward" and 0 < metrics["reward"] < 1
    counter, cost = bench.counter, bench.context.algorithm.cost(0, 6)
    assert counter.train == cost.trained_edges == 3 * 6 * (2 + 3) and counter.alone == 3 * 6 * 2 * 2
    assert counter.decodes == counter.reward_calls == 3 * 6 * 2
    assert counter.equivalents == counter.reference + 3 * counter.train + counter.alone


def test_a_network_is_asked_with_the_phase_s_guidance_and_others_with_the_run_s() -> None:
    bench = scored(guidance=Guidance(1.5))
    asked_with = dict[tuple[str, float], int]()
    plain = bench.model.predictor

    def predictor(condition: Any, guidance: Guidance, *, network: Any = None) -> Any:
        names = [name for name, of in bench.context.sets.items() if of is network]
        key = (names[0] if names else POLICY, guidance.guidance)
        asked_with[key] = asked_with.get(key, 0) + 1
        return plain(condition, guidance, network=network)

    bench.model.predictor = predictor  # pyright: ignore[reportAttributeAccessIssue]
    matching = bench.context.algorithm.phases[1]
    predictors(bench.context, asked(PROMPTS), matching)
    assert {("reference", 3.0), (POLICY, 1.5), ("fake", 1.5)} <= asked_with.keys()
    asked_with.clear()
    predictors(bench.context, asked(PROMPTS))
    assert {guidance for _, guidance in asked_with} == {1.5}


def test_a_failed_score_is_no_score_and_all_failed_stop_before_a_role_moves() -> None:
    answers = iter(range(10**6))
    bench = scored(reward=lambda images, prompts: [None if next(answers) % 3 else 0.5 for _ in images])
    metrics = learned(bench)
    assert 0 < metrics["failed_rewards"] < 1
    bench = scored(reward=lambda images, prompts: [None] * len(images))
    before = held(bench)
    with pytest.raises(GuardError, match="iteration 1: all rewards failed"):
        learned(bench)
    assert same(before, held(bench))


def test_a_single_phase_that_scores_is_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rewards that all fail in a later iteration, when moments alone would move the weights, and by an interruption
    between two updates."""
    alone = Algorithm("alone", (NoisePhase(Scored(), 2, updates=3),), 4)
    worth = [0.5]
    bench = Bench(algorithm=alone, reward=lambda images, prompts: [worth[0]] * len(images))
    learned(bench)
    before = held(bench)
    worth[0] = None  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(GuardError, match="all rewards failed"):
        learned(bench, 1)
    assert same(before, held(bench))
    worth[0], submit = 0.5, Scoring.submit
    updated = bench.learners[POLICY].optimizer.step
    steps = list[int]()

    def step(*rest: Any) -> Any:
        steps.append(len(steps))
        return updated(*rest)

    def leave() -> None:
        if len(steps) == 2:
            raise Interrupted(2)

    bench.learners[POLICY].optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(Scoring, "submit", lambda self, *rest: leave() or submit(self, *rest))
    with pytest.raises(Interrupted):
        learned(bench, 1)
    assert len(steps) == 2 and same(before, held(bench))


def test_a_loss_that_scores_needs_a_judge_and_turns_need_noises() -> None:
    batch = NoiseBatch(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), ((0,),), 0, linear(4))
    with pytest.raises(ValueError, match="judge: None, and the loss has samples scored; nearest valid: a run with"):
        batch.scored(batch.x)
    with pytest.raises(ValueError, match="turns: 2, and a phase learns from a rollout, once; nearest valid: 1"):
        replace(flow(), turns=2)
    with pytest.raises(ValueError, match="turns: 0 must be at least 1"):
        replace(two_roles(rollout=False), turns=0)
