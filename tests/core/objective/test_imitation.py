"""Segment matching and on-policy matching: official numbers, who bears gradients, and where each comes to rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian_toy import GRID, Affine, Steps, bearing, forget, law, noises, rows_asked, walked
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.objective.imitation import OnPolicyMatching, SegmentMatching
from tempflow.core.schedule import explicit, refined
from tempflow.core.state import StateLayout

MEAN, STD = 0.7, 0.5
BOTH = [SegmentMatching(3, 3.0), OnPolicyMatching(1.5)]


def models() -> dict[str, Affine]:
    return {"policy": Affine(-0.4, 1.2), "reference": Affine(MEAN, STD)}


def fixed(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return law(x, sigma, MEAN, STD)


# ---------------------------------------------------------------------------------------------------- segment matching
def test_segments_are_the_hand_written_loop() -> None:
    """Twelve teacher steps; the student's four on the teacher's states, each against the mean of three."""
    roles, given = models(), noises()
    loss = SegmentMatching(3, 3.0)(roles, given)
    fine = refined(GRID, 3, 3.0).sigmas
    x, errors = given.x, list[Tensor]()
    for k in range(4):
        start = x
        for i in range(3 * k, 3 * k + 3):
            x = x - (fine[i] - fine[i + 1]) * fixed(x, fine[i].expand(6), given.rows)
        target = (start - x) / (GRID.sigmas[k] - GRID.sigmas[k + 1])
        said = roles["policy"](start, GRID.sigmas[k].expand(6), given.rows)
        errors.append((said - target).square().mean((1, 2)))
    want = torch.stack(errors)
    torch.testing.assert_close(loss.value, want.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.metrics["error"], want.mean(0).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.metrics["error_first"], want[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.metrics["error_last"], want[3].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_student_of_segments_lands_where_the_teacher_does(parts: int) -> None:
    """A velocity that is linear at each node has room for the exact segments: the loss goes to 0, and then four steps
    are the teacher's 4·parts."""
    student, objective = Steps(), SegmentMatching(parts)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=80, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective({"policy": student, "reference": fixed}, noises(64, shape=(1,))).value
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    x = noises(20, 7, (1,)).x
    torch.testing.assert_close(walked(student, x), walked(fixed, x, refined(GRID, parts)), rtol=0, atol=1e-6)


def test_the_teacher_itself_has_no_loss_where_its_steps_are_the_students() -> None:
    roles = {"policy": Affine(MEAN, STD), "reference": fixed}
    assert SegmentMatching(1)(roles, noises()).value.item() < 1e-25
    assert SegmentMatching(2)(roles, noises()).value.item() > 1e-4


# -------------------------------------------------------------------------------------------------- on-policy matching
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_on_policy_matching_is_the_hand_written_loop(power: float) -> None:
    roles, given = models(), noises()
    loss = OnPolicyMatching(power)(roles, given)
    got = torch.autograd.grad(loss.value, list(roles["policy"].parameters()))
    sigmas, x, errors = GRID.sigmas, given.x, list[Tensor]()
    for k in range(4):
        sigma = sigmas[k].expand(6)
        said = roles["policy"](x, sigma, given.rows)
        errors.append((said - fixed(x, sigma, given.rows)).square().mean())
        x = (x - (sigmas[k] - sigmas[k + 1]) * said).detach()
    weight = sigmas[:4] ** power
    want = (weight / weight.sum() * torch.stack(errors)).sum()
    torch.testing.assert_close(loss.value, want, rtol=1e-12, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, list(roles["policy"].parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_optimum_is_the_teachers_velocity(steps: int) -> None:
    """Of few steps and of as many as the teacher's own: the student's path is then the teacher's on that grid."""
    grid = refined(explicit((1,), 3.0), steps, 3.0).double()
    student = Affine(-0.4, 1.2)
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=60, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = OnPolicyMatching()({"policy": student, "reference": fixed}, noises(16, grid=grid)).value
        loss.backward()
        return loss

    for _ in range(3):  # the states move with the student
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert float(student.mean.detach()) == pytest.approx(MEAN, abs=1e-4)
    if steps > 1:  # at pure noise the velocity does not depend on the deviation
        assert float(student.std.detach()) == pytest.approx(STD, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- common
@pytest.mark.parametrize("objective", BOTH)
def test_the_student_alone_bears_gradients_and_rows_are_counted(objective: SegmentMatching | OnPolicyMatching) -> None:
    roles, given = models(), noises()
    assert bearing(roles, objective(roles, given).value) == {"policy"}
    cost = objective.cost(4)
    asked, each = rows_asked(roles), cost.forwards + cost.alone
    assert (asked["reference"], asked["policy"]) == ((6 * each, 0), (0, 6 * cost.trained_edges))
    guided = replace(objective, strength=3.5)
    assert dict(guided.guidance) == {"reference": 3.5} and guided.cost(4) == Cost(0, 0, 4, alone=2 * each)
    assert replace(objective, strength=1.0).cost(4) == Cost(0, 0, 4, alone=each)
    assert SegmentMatching(3).cost(4) == Cost(12, 0, 4) and not SegmentMatching().guidance
    forget(roles)
    teacher = replace(objective, teacher="slow")
    assert teacher.weight_sets == ("policy", "slow")
    with pytest.raises(ValueError, match="models: 'slow' is missing"):
        teacher(roles, given)


@pytest.mark.parametrize("objective", BOTH)
def test_rows_depend_on_nothing_but_themselves(objective: SegmentMatching | OnPolicyMatching) -> None:
    roles, given, part = models(), noises(), slice(2, 5)
    some = replace(given, x=given.x[part], rows=given.rows[part], ids=given.ids[part])
    whole, few = objective(roles, given), objective(roles, some)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(values[part], few.metrics[name])
        assert values.shape == (6,) and not values.requires_grad


@pytest.mark.parametrize("objective", BOTH)
def test_held_elements_teach_nothing(objective: SegmentMatching | OnPolicyMatching) -> None:
    free = torch.ones(6, 2, 3, dtype=torch.bool)
    free[:3, 0] = False
    layout = StateLayout(free, torch.full((6, 2, 3), 0.25))
    roles, given = models(), noises(layout=layout)
    loss = objective(roles, given)
    for model in roles.values():
        for at, _, _ in model.seen:
            rows = torch.arange(len(at)) % 6 < 3
            assert bool((at[rows, 0] == 0.25).all())

    def broken(name: str) -> object:
        def say(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
            v = roles[name](x, s, r)
            held = torch.arange(len(x)) % 6 < 3
            return torch.where(held[:, None, None] & (torch.arange(2)[:, None] == 0), torch.nan, v)

        return say

    torch.testing.assert_close(objective({name: broken(name) for name in roles}, given).value, loss.value)  # type: ignore[dict-item]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="parts: 0 must be at least 1; nearest valid: 1"):
        SegmentMatching(0)
    with pytest.raises(ValueError, match=r"power: -1\.0 must be finite and ≥ 0"):
        OnPolicyMatching(-1.0)
