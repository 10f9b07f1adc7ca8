"""RATS' loss: official numbers, its gate's table, its limits, and where shaping alone comes to rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian_toy import GRID, Affine, Steps, bearing, law, noises, rows_asked
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.distill import nearest_nodes
from tempflow.core.objective.matching import NegativeAware
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.objective.shaping import GatedShaping
from tempflow.core.schedule import refined
from tempflow.core.state import StateLayout

MEAN, STD = 0.7, 0.5
NFT = NegativeAware()


def models(**other: Any) -> dict[str, Any]:
    return {"policy": Affine(-0.4, 1.2), "old": Affine(-0.4, 1.2), "teacher": Affine(MEAN, STD), **other}


class Judge:
    """Scores in turn: of the student's ends, then of the teacher's."""

    def __init__(self, own: list[float], teacher: list[float]) -> None:
        self.values, self.seen = [own, teacher], list[Tensor]()

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        assert not x.requires_grad
        value = torch.tensor(self.values[len(self.seen)], dtype=torch.float64)
        self.seen.append(x)
        return value.nan_to_num(), ~value.isnan()


def judged(own: list[float], teacher: list[float], spread: float | None = 0.5, **other: Any) -> NoiseBatch:
    return noises(len(own), judge=Judge(own, teacher), spread=spread, **other)


def by_hand(given: NoiseBatch, roles: dict[str, Any], parts: int, square: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over nodes of how far apart both walks' clean samples are, and both ends."""
    size, fine = len(given), refined(GRID, parts, 3.0).sigmas
    z, clean = given.x, list[Tensor]()
    for i in range(4 * parts):
        v = law(z, fine[i].expand(size), MEAN, STD)
        clean += [z - fine[i] * v] if i % parts == 0 else []
        z = z - (fine[i] - fine[i + 1]) * v
    x, apart = given.x, list[Tensor]()
    for k in range(4):
        v = roles["policy"](x, GRID.sigmas[k].expand(size), given.rows)
        mine = (x - GRID.sigmas[k] * v).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(mine, clean[k].flatten(1))
        apart.append(1 - cosine + square * (mine - clean[k].flatten(1)).square().mean(1))
        x = (x - (GRID.sigmas[k] - GRID.sigmas[k + 1]) * v).detach()
    return torch.stack(apart).mean(0), x, z


def test_shaping_gate_and_ends_are_the_hand_written_loops() -> None:
    own, teacher = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4], [0.6, 0.4, 0.2, 0.1, 0.9, 0.5]
    roles, given = models(), judged(own, teacher)
    objective = GatedShaping(2.0, 0.3, 0.8, parts=3)
    loss = objective(roles, given)
    got = torch.autograd.grad(loss.value, list(roles["policy"].parameters()))
    apart, x, z = by_hand(given, roles, 3, 0.3)
    gap = torch.tensor(teacher, dtype=torch.float64) - torch.tensor(own, dtype=torch.float64)
    want = (2.0 * torch.sigmoid(gap / (0.8 * 0.5)) * apart).mean()
    torch.testing.assert_close(loss.value, want, rtol=1e-9, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, list(roles["policy"].parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for seen, end in zip(given.judge.seen, (x, z), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(seen, end, rtol=1e-12, atol=1e-12)
    assert loss.metrics["reward"].tolist() == own and loss.metrics["teacher_reward"].tolist() == teacher
    assert set(loss.metrics) == {"reward", "teacher_reward", "failed_rewards", "gate", "shaping"}


def test_the_gate_s_table() -> None:
    """½ between equals, monotone in the gap, near 1 and near 0 at its ends, without gradient, by the scores' spread."""
    teacher = [-50.0, -1.0, 0.0, 0.5, 1.0, 50.0]
    gate = GatedShaping(parts=1)(models(), judged([0.0] * 6, teacher, 1.0)).metrics["gate"]
    assert gate[2] == 0.5 and bool((gate.diff() > 0).all()) and not gate.requires_grad
    assert 0 < float(gate[0]) < 1e-20 and float(gate[5]) > 1 - 1e-15
    torch.testing.assert_close(gate[1] + gate[4], torch.ones((), dtype=gate.dtype))
    wide = GatedShaping(parts=1)(models(), judged([0.0] * 6, [2 * value for value in teacher], 2.0)).metrics["gate"]
    warm = GatedShaping(parts=1, temperature=2.0)(models(), judged([0.0] * 6, [2 * value for value in teacher], 1.0))
    torch.testing.assert_close(wide, gate)
    torch.testing.assert_close(warm.metrics["gate"], gate)
    unknown = GatedShaping(parts=1)(models(), judged([0.0] * 6, teacher, None)).metrics["gate"]
    assert unknown.tolist() == [0.5] * 6, "no spread is known in a run's first turn"


def test_a_teacher_that_is_the_student_shapes_nothing() -> None:
    roles = models(teacher=Affine(-0.4, 1.2))
    assert float(GatedShaping(parts=1)(roles, judged([0.0] * 6, [1.0] * 6)).metrics["shaping"].abs().max()) < 1e-12
    grid = refined(GRID, 1)
    assert torch.equal(grid.sigmas, GRID.sigmas) and nearest_nodes(GRID, grid).tolist() == [0, 1, 2, 3, 4]
    assert nearest_nodes(GRID, refined(GRID, 12, 3.0)).tolist() == [0, 12, 24, 36, 48]


def test_without_weight_it_is_the_reward_s_loss_alone() -> None:
    """DiffusionNFT's, on the student's own samples, with advantages from the mean of their prompt."""
    own = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4]
    roles, given = models(), judged(own, [0.0] * 6)
    loss = GatedShaping(0.0, reward=NFT, parts=1)(roles, given)
    value = torch.tensor(own, dtype=torch.float64)
    rows = given.rows
    mean = torch.stack([value[rows == row].mean() for row in rows])
    keep = 0.5 + ((value - mean) / 0.5 / 10).clamp(-0.5, 0.5)
    torch.testing.assert_close(loss.metrics["optimality"], keep, rtol=1e-12, atol=0)
    got = torch.autograd.grad(loss.value, list(roles["policy"].parameters()))
    shaped = GatedShaping(1.0, parts=1)(models(), judged(own, [0.0] * 6)).value
    both = GatedShaping(1.0, reward=NFT, parts=1)(models(), judged(own, [0.0] * 6)).value
    torch.testing.assert_close(both, loss.value + shaped, rtol=1e-12, atol=0)
    # while the student is old the gradient is that of advantage times error: none where all are worth the same
    assert max(float(g.abs()) for g in got) > 1e-3
    roles = models()
    flat = GatedShaping(0.0, reward=NFT, parts=1)(roles, judged([0.4] * 6, [0.0] * 6)).value
    assert max(float(g.abs()) for g in torch.autograd.grad(flat, list(roles["policy"].parameters()))) < 1e-12


def test_a_far_better_teacher_leaves_pure_distillation() -> None:
    roles, given = models(), judged([0.0] * 6, [1e3] * 6)
    loss = GatedShaping(parts=2)(roles, given)
    torch.testing.assert_close(loss.value, by_hand(given, roles, 2, 1.0)[0].mean(), rtol=1e-12, atol=0)


def test_failed_scores_shape_nothing_and_are_no_score() -> None:
    nan = float("nan")
    roles, given = models(), judged([0.1, nan, 0.2, 0.9, 0.3, 0.4], [0.6, 0.4, nan, 0.1, 0.9, 0.5])
    loss = GatedShaping(reward=NFT, parts=1)(roles, given)
    assert (loss.metrics["gate"] == 0).tolist() == [False, True, True, False, False, False]
    assert loss.metrics["failed_rewards"].tolist() == [0, 1, 1, 0, 0, 0]
    keep = loss.metrics["optimality"]
    assert keep[1] == 0.5, "and the others of its prompt are compared without it"
    torch.testing.assert_close(keep[3] - 0.5, torch.tensor((0.9 - 0.65) / 5, dtype=torch.float64))
    value = float(loss.value.detach())
    other = judged([0.1, 7.0, 0.2, 0.9, 0.3, 0.4], [0.6, 0.4, -3.0, 0.1, 0.9, 0.5])
    other.judge.values = given.judge.values  # type: ignore[union-attr]
    assert GatedShaping(reward=NFT, parts=1)(models(), other).value.item() == pytest.approx(value)
    spoilt = models()
    last = GatedShaping(reward=NFT, parts=1)(spoilt, judged([nan] * 6, [nan] * 6))
    assert bool(last.value.isfinite()) and float(last.metrics["gate"].sum()) == 0


def test_the_student_alone_bears_gradients_and_rows_are_counted() -> None:
    roles, given = models(), judged([0.0, 1.0] * 3, [0.5] * 6)
    objective = GatedShaping(parts=3, reward=NFT)
    assert bearing(roles, objective(roles, given).value) == {"policy"}
    assert rows_asked(roles) == {"policy": (0, 6 * 8), "old": (6 * 4, 0), "teacher": (6 * 12, 0)}
    assert objective.cost(4) == Cost(12 + 4, 2, 8) and objective.weight_sets == ("policy", "teacher", "old")
    guided = replace(objective, strength=2.0, reward=None)
    assert guided.cost(4) == Cost(0, 2, 4, alone=24) and dict(guided.guidance) == {"teacher": 2.0}


def test_prompts_do_not_know_of_each_other_and_held_elements_teach_nothing() -> None:
    own, teacher = [0.1, 0.5, 0.2, 0.9, 0.3, 0.4], [0.6, 0.4, 0.2, 0.1, 0.9, 0.5]
    objective, given = GatedShaping(parts=2, reward=NFT), judged(own, teacher)
    whole, part = objective(models(), given), slice(0, 6, 2)
    some = replace(
        given, x=given.x[part], rows=given.rows[part], ids=given.ids[part], judge=Judge(own[part], teacher[part])
    )
    few = objective(models(), some)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(values[part], few.metrics[name])
    free = torch.ones(1, 2, 3, dtype=torch.bool)
    free[:, 0] = False
    held = judged(own, teacher, layout=StateLayout(free, torch.full((1, 2, 3), 0.25)))
    want, roles = objective(models(), held).value, models()
    broken: dict[str, Any] = {
        name: (lambda x, s, r, m=model: torch.cat([torch.full_like(x[:, :1], torch.nan), m(x, s, r)[:, 1:]], 1))
        for name, model in roles.items()
    }
    again = judged(own, teacher, layout=held.layout)
    torch.testing.assert_close(objective(broken, again).value, want)


def test_shaping_alone_ends_in_the_teachers_last_prediction() -> None:
    """At rest every clean sample of the student is the teacher's at that σ. Its own last step goes to the last of them,
    E[x0 | x_.5] of the teacher's path, which is narrower than the teacher's law: that much is the reward's to mend."""
    student = Steps()
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=30, tolerance_grad=1e-13, tolerance_change=0)
    teacher = Affine(MEAN, STD)

    def indifferent(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), dtype=torch.float64), torch.ones(len(x), dtype=torch.bool)

    def closure() -> Tensor:
        optimizer.zero_grad()
        given = noises(8, shape=(3,), judge=indifferent, spread=1.0)
        loss = GatedShaping(parts=4)({"policy": student, "teacher": teacher}, given).value
        loss.backward()
        return loss

    for _ in range(3):  # states move with the student
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    x = noises(40, 9, (3,)).x
    fine = refined(GRID, 4, 3.0)
    with torch.no_grad():
        z, mine = x, x
        for i in range(12):
            z = z - (fine.sigmas[i] - fine.sigmas[i + 1]) * law(z, fine.sigmas[i].expand(40), MEAN, STD)
        for k in range(4):
            v = student(mine, GRID.sigmas[k].expand(40), torch.zeros(40).long())
            mine = mine - (GRID.sigmas[k] - GRID.sigmas[k + 1]) * v
        want = z - 0.5 * law(z, torch.full((40,), 0.5).double(), MEAN, STD)
    torch.testing.assert_close(mine, want, rtol=0, atol=1e-3)
    assert float(want.std()) < 0.9 * STD


def test_bad_settings_are_refused() -> None:
    for change, match in (
        ({"weight": -1.0}, r"weight: -1\.0 must be finite and ≥ 0"),
        ({"weight": 0.0}, "weight: 0 beside no reward's term teaches nothing; nearest valid: 1"),
        ({"square": -1.0}, r"square: -1\.0 must be finite"),
        ({"temperature": 0.0}, r"temperature: 0\.0 must be finite and above 0"),
        ({"parts": 0}, "parts: 0 must be at least 1"),
        ({"shift": -1.0}, r"shift: -1\.0 must be"),
    ):
        with pytest.raises(ValueError, match=match):
            GatedShaping(**change)
    with pytest.raises(ValueError, match="judge: None, and the loss has samples scored"):
        GatedShaping(parts=1)(models(), noises())
    with pytest.raises(ValueError, match="models: 'teacher' is missing"):
        GatedShaping(parts=1)({"policy": Affine(0.0, 1.0)}, noises())
