"""DP-DMD's loss: official numbers, the cut's exact zero, the teacher's mean velocity, where each half comes to rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian_toy import GRID, Affine, bearing, law, noises, rows_asked
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.objective.distill import DistributionMatching
from tempflow.core.objective.diversity import TaughtFirstStep
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule, explicit, linear
from tempflow.core.state import StateLayout
from tempflow.core.times import UniformTimes

MEAN, STD, SHIFTED = 0.7, 0.5, UniformTimes(shift=3.0)


def models() -> dict[str, Affine]:
    return {"policy": Affine(-0.4, 1.2), "fake": Affine(0.1, 0.9), "reference": Affine(MEAN, STD)}


class ByStep(torch.nn.Module):
    """A network for each step, whose gradients tell which step they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(Affine(-0.4 + 0.1 * n, 1.2) for n in range(4))

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return self.steps[int((GRID.sigmas == sigma[0]).nonzero())](x, sigma, rows)

    def sizes(self) -> list[float]:
        return [sum(0.0 if p.grad is None else float(p.grad.abs()) for p in step.parameters()) for step in self.steps]


def official(roles: dict[str, Affine], given: NoiseBatch, taught: int, teacher_steps: int, weight: float) -> Tensor:
    """DP-DMD's update written anew, in the steps of its published training script: x_θ behind a detached first step,
    p_real and p_fake by the noisy x_t, NaN replaced, MSE to a detached target, and the anchor's velocity."""
    grid, rows, size = GRID.sigmas, given.rows, len(given.x)
    x, first = given.x, torch.empty(0)
    for i in range(4):
        velocity = roles["policy"](x, grid[i].expand(size), rows)
        first = velocity if i == 0 else first
        x = x + (grid[i + 1] - grid[i]) * velocity
        x = x.detach() if i == 0 else x
    u = Stream(given.seed, "matching.times").uniform(given.ids, (1,))[:, 0]
    t = 3 * u / (1 + 2 * u)
    noise, s = Stream(given.seed, "matching.noise").normal(given.ids, x.shape[1:]).double(), t.view(-1, 1, 1)
    with torch.no_grad():
        at = (1 - s) * x + s * noise
        p_real = at - (at - s * roles["reference"](at, t, rows))
        p_fake = at - (at - s * roles["fake"](at, t, rows))
        gradient = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=[1, 2], keepdim=True))
        z, steps = given.x, linear(teacher_steps, 3.0).sigmas.double()
        for i in range(taught):
            z = z + (steps[i + 1] - steps[i]) * roles["reference"](z, steps[i].expand(size), rows)
        target = (given.x - z) / (1 - steps[taught])
    matched = 0.5 * torch.nn.functional.mse_loss(x, (x - gradient).detach())
    return matched + weight * torch.nn.functional.mse_loss(first, target)


@pytest.mark.parametrize(("taught", "weight"), [(5, 0.05), (10, 0.05), (30, 0.4), (1, 0.0)])
def test_loss_and_gradient_are_the_published_ones(taught: int, weight: float) -> None:
    roles, given = models(), noises()
    matching = DistributionMatching(SHIFTED, anchor="noisy")
    loss = TaughtFirstStep(matching, weight, taught)(roles, given)
    parameters = list(roles["policy"].parameters())
    got = torch.autograd.grad(loss.value, parameters)
    want = official(roles, given, taught, 30, weight)
    torch.testing.assert_close(loss.value, want, rtol=1e-6, atol=0)
    for a, b in zip(got, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    assert set(loss.metrics) == {"gradient", "gap", "first_error"}
    assert all(v.shape == (6,) and not v.requires_grad for v in loss.metrics.values())


def test_behind_the_cut_the_first_step_has_exactly_no_gradient() -> None:
    for weight in (0.0, 0.05):
        roles: dict[str, Any] = {**models(), "policy": ByStep()}
        TaughtFirstStep(weight=weight)(roles, noises()).value.backward()
        first, *rest = roles["policy"].sizes()
        assert (first == 0.0) == (weight == 0.0) and min(rest) > 1e-4
    # and what the rest gets does not know of the first step's loss
    kept = list[list[float]]()
    for weight in (0.0, 7.0):
        roles = {**models(), "policy": ByStep()}
        TaughtFirstStep(weight=weight)(roles, noises()).value.backward()
        kept.append(roles["policy"].sizes()[1:])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("taught", [1, 5, 30])
@pytest.mark.parametrize("grid", [GRID, Schedule(torch.tensor([0.9, 0.6, 0.1], dtype=torch.float64), gain=1.2)])
def test_one_step_by_the_target_lands_where_the_teacher_is(taught: int, grid: Schedule) -> None:
    given, objective = noises(grid=grid), TaughtFirstStep(taught=taught)
    teacher, states = Affine(MEAN, STD), list[Tensor]()
    with torch.no_grad():
        target = objective.target({"reference": teacher}, given)
        steps, z = objective.grid(grid).sigmas, given.x
        for i in range(taught):
            z = z - (steps[i] - steps[i + 1]) * teacher(z, steps[i].expand(6), given.rows)
            states.append(z)
    reached = steps[taught]
    torch.testing.assert_close(given.x - (steps[0] - reached) * target, states[-1], rtol=1e-12, atol=1e-12)
    assert (steps[0], steps[-1]) == (grid.sigmas[0], grid.sigmas[-1]) and (taught == 30) == (reached == steps[-1])


@pytest.mark.parametrize("taught", range(1, 7))
def test_of_a_teacher_whose_paths_are_straight_the_target_is_its_first_velocity(taught: int) -> None:
    """v(x_t, t) = w(x_1) along x_t = x_1 − (1 − t)·w(x_1), here with w(x) = x − (a·x + b) of one point of data for each
    noise: the flow is linear, whatever K."""

    def straight(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        t = sigma.to(x).view(-1, 1, 1)
        noise = (x - (1 - t) * 0.3) / (t + (1 - t) * 0.5)  # x = t·ε + (1 − t)·(ε/2 + .3)
        return noise - (0.5 * noise + 0.3)

    given = noises()
    target = TaughtFirstStep(taught=taught, teacher_steps=6).target({"reference": straight}, given)
    torch.testing.assert_close(target, straight(given.x, torch.ones(6).double(), given.rows), rtol=1e-12, atol=1e-12)


def test_each_half_comes_to_rest_where_it_should() -> None:
    """The first step on the mean of the teacher's path; the rest, by an exact fake score, on the teacher's law."""
    student = ByStep()
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    objective = TaughtFirstStep(DistributionMatching(SHIFTED, anchor="none"), weight=1.0)
    given = noises(64, shape=(4,))
    for update in range(150):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.98**update
        optimizer.zero_grad()
        given = noises(64, update, (4,))
        with torch.no_grad():
            x = given.x
            for i in range(4):
                x = x - (GRID.sigmas[i] - GRID.sigmas[i + 1]) * student(x, GRID.sigmas[i].expand(64), given.rows)
            mean, std = x.mean(), x.std()

        def fake(x: Tensor, s: Tensor, r: Tensor, mean: Tensor = mean, std: Tensor = std) -> Tensor:
            return law(x, s, mean, std)

        roles = {"policy": student, "fake": fake, "reference": Affine(MEAN, STD)}
        objective(roles, given).value.backward()  # type: ignore[arg-type]
        optimizer.step()
    with torch.no_grad():
        first = student(given.x, torch.ones(64).double(), given.rows)
        target = objective.target({"reference": Affine(MEAN, STD)}, given)
    # the target is ε·c − mean with c a little below 1, and an Affine at σ = 1 says ε − mean
    assert float((first - target).mean().abs()) < 0.02 and float((first - target).std()) < 0.1
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.06) and float(x.std()) == pytest.approx(STD, abs=0.06)


def test_the_student_alone_bears_gradients_and_rows_are_counted() -> None:
    roles, given = models(), noises()
    objective = TaughtFirstStep()
    assert bearing(roles, objective(roles, given).value) == {"policy"}
    assert rows_asked(roles) == {"policy": (0, 24), "fake": (6, 0), "reference": (6 * (5 + 1), 0)}
    assert objective.cost(4) == Cost(7, 0, 4) and not objective.guidance
    guided = replace(objective, matching=replace(objective.matching, strength=3.5))
    assert guided.cost(4) == Cost(1, 0, 4, alone=12) and dict(guided.guidance) == {"reference": 3.5}


def test_rows_depend_on_nothing_but_themselves_and_held_elements_teach_nothing() -> None:
    roles, given, part = models(), noises(), slice(2, 5)
    some = replace(given, x=given.x[part], rows=given.rows[part], ids=given.ids[part])
    whole, few = TaughtFirstStep()(roles, given), TaughtFirstStep()(roles, some)
    for name, values in whole.metrics.items():
        torch.testing.assert_close(values[part], few.metrics[name])
    free = torch.ones(1, 2, 3, dtype=torch.bool)
    free[:, 0] = False
    held = replace(given, layout=StateLayout(free, torch.full((1, 2, 3), 0.25)))
    want = TaughtFirstStep()(roles, held)
    broken = {
        name: (lambda x, s, r, m=model: torch.cat([torch.full_like(x[:, :1], torch.nan), m(x, s, r)[:, 1:]], 1))
        for name, model in roles.items()
    }
    torch.testing.assert_close(TaughtFirstStep()(broken, held).value, want.value)


def test_bad_settings_are_refused() -> None:
    for change, match in (
        ({"taught": 0}, "taught: 0 of 30 steps; nearest valid: 1"),
        ({"taught": 31}, "taught: 31 of 30 steps; nearest valid: 30"),
        ({"weight": -0.1}, "weight: -0.1 must be finite and ≥ 0; 0 leaves the first step untaught"),
        ({"shift": 0.0}, "shift: 0.0 must be finite and above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            TaughtFirstStep(**change)
    roles = models()
    with pytest.raises(ValueError, match="steps: 1, and what follows the first step is matched; nearest valid: 2"):
        TaughtFirstStep()(roles, noises(grid=explicit((1,)).double()))
    with pytest.raises(ValueError, match="models: 'fake' is missing"):
        TaughtFirstStep()({"policy": roles["policy"], "reference": roles["reference"]}, noises())
