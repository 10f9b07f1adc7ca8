"""Losses from starting noises: who bears gradients, against hand-written loops, and a student that learns by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tempflow.core.cost import Cost
from tempflow.core.dynamics import CPS
from tempflow.core.objective.distill import DistributionMatching, FlowMatching, OwnSamples
from tempflow.core.objective.edges import Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.schedule import explicit
from tempflow.core.state import StateLayout
from tempflow.core.times import UniformTimes
from tempflow.core.unroll import stop_nodes

GRID = explicit((1, 0.75, 0.5, 0.25), 3.0)
MEAN, STD = 0.7, 0.5


def batch(size: int = 6, update: int = 0, shape: tuple[int, ...] = (2, 3)) -> NoiseBatch:
    ids = tuple((0, update, n % 2, n) for n in range(size))
    x = Stream(5, "start").normal(ids, shape).double()
    return NoiseBatch(x, torch.arange(size) % 2, ids, 5, GRID)


class Affine(nn.Module):
    """The velocity of N(mean, std²), element by element."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        self.seen.append((x.detach(), sigma))
        t = sigma.to(x).view(-1, *[1] * (x.dim() - 1))
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        return (x - self.mean - gain * (x - (1 - t) * self.mean)) / t


def roles() -> dict[str, Affine]:
    return {"policy": Affine(-0.4, 1.2), "fake": Affine(0.0, 1.0), "reference": Affine(MEAN, STD)}


def bearing(models: Mapping[str, Affine], value: Tensor) -> set[str]:
    value.backward()
    return {name for name, model in models.items() if model.mean.grad is not None and bool(model.mean.grad)}


def sample(predict: Predict, given: NoiseBatch) -> Tensor:
    """By hand, row by row: Euler steps to the drawn node, and x̂0 there."""
    found = list[Tensor]()
    for n, stop in enumerate(stop_nodes(given.seed, given.ids, 4).tolist()):
        x, row = given.x[n : n + 1], given.rows[n : n + 1]
        for i in range(stop):
            with torch.no_grad():
                x = x - (GRID.sigmas[i] - GRID.sigmas[i + 1]) * predict(x, GRID.sigmas[i : i + 1], row)
        found.append(x - GRID.sigmas[stop] * predict(x, GRID.sigmas[stop : stop + 1], row))
    return torch.cat(found)


def noised(x: Tensor, given: NoiseBatch, name: str, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    u = Stream(given.seed, f"{name}.times").uniform(given.ids, (1,))[:, 0]
    t, noise = low + (high - low) * u, Stream(given.seed, f"{name}.noise").normal(given.ids, x.shape[1:]).double()
    s = t.view(-1, 1, 1)
    return (1 - s) * x.detach() + s * noise, noise, t


@pytest.mark.parametrize("anchor", ["clean", "noisy", "none"])
def test_matching_is_the_hand_written_loop_and_moves_the_student_alone(anchor: str) -> None:
    models, given = roles(), batch()
    loss = DistributionMatching(anchor=anchor)(models, given)  # type: ignore[arg-type]
    got = torch.autograd.grad(loss.value, [models["policy"].mean, models["policy"].std], retain_graph=True)
    x = sample(models["policy"], given)
    at, _, t = noised(x, given, "matching", 0.02, 0.98)
    s = t.view(-1, 1, 1)
    real, fake = (at - s * models[name](at, t, given.rows) for name in ("reference", "fake"))
    base = {"clean": x, "noisy": at}.get(anchor)
    scale = 1.0 if base is None else (base - real).abs().mean((1, 2), keepdim=True)
    target = (x - (fake - real) / scale).detach()
    want = 0.5 * (x - target).square().mean()
    torch.testing.assert_close(loss.value, want)
    for a, b in zip(got, torch.autograd.grad(want, [models["policy"].mean, models["policy"].std]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert bearing(models, loss.value) == {"policy"}
    assert set(loss.metrics) == {"gradient", "gap"}
    assert all(v.shape == (6,) and not v.requires_grad for v in loss.metrics.values())


def test_the_fake_score_regresses_the_students_samples_and_moves_alone() -> None:
    models, given = roles(), batch()
    loss = FlowMatching(UniformTimes(low=0.1, high=0.9))(models, given)
    x = sample(models["policy"], given).detach()
    at, noise, t = noised(x, given, "fake", 0.1, 0.9)
    want = (models["fake"](at, t, given.rows) - (noise - x)).square().mean()
    torch.testing.assert_close(loss.value, want)
    assert bearing(models, loss.value) == {"fake"} and loss.metrics["error"].shape == (6,)


@pytest.mark.parametrize("objective", [FlowMatching(), DistributionMatching(), DistributionMatching(last=None)])
def test_rows_depend_on_their_ids_alone_and_forwards_are_counted(
    objective: FlowMatching | DistributionMatching,
) -> None:
    models, given = roles(), batch()
    whole = objective(models, given)
    part = slice(2, 5)
    some = objective(models, replace(given, x=given.x[part], rows=given.rows[part], ids=given.ids[part]))
    for name, values in whole.metrics.items():
        torch.testing.assert_close(values[part], some.metrics[name])
    for model in models.values():
        model.seen.clear()
    objective(models, given)
    rows = sum(len(x) for model in models.values() for x, _ in model.seen)
    stops = stop_nodes(given.seed, given.ids, 4)
    assert rows == int((stops + 1).sum()) + len(given.x) * (2 if len(objective.weight_sets) == 3 else 1)
    cost = objective.cost(4)
    assert rows <= len(given.x) * (cost.forwards + cost.trained_edges)
    known = {FlowMatching(): (4, 1), DistributionMatching(): (5, 1)}.get(objective, (2, 4))
    assert (cost.forwards, cost.trained_edges, cost.alone, cost.leaves) == (*known, 0, 0)


def test_a_teacher_with_a_guidance_of_its_own_stands_alone() -> None:
    assert DistributionMatching(strength=3.5).cost(4) == Cost(4, 0, 1, alone=2)
    assert DistributionMatching(strength=1.0).cost(4) == Cost(4, 0, 1, alone=1)
    assert dict(DistributionMatching(strength=3.5).guidance) == {"reference": 3.5}


def test_times_lie_in_their_range_and_states_are_asked_at_them() -> None:
    models, given = roles(), batch(200)
    DistributionMatching()(models, given)
    (at, t), (same, s) = models["reference"].seen[0], models["fake"].seen[0]
    assert torch.equal(at, same) and torch.equal(t, s) and len(t.unique()) == 200
    assert 0.02 <= float(t.min()) < 0.06 and 0.94 < float(t.max()) <= 0.98


def test_held_elements_are_clean_and_teach_nothing() -> None:
    free = torch.ones(1, 2, 3, dtype=torch.bool)
    free[:, 0] = False
    layout = StateLayout(free, torch.full((1, 2, 3), 0.25))
    models, given = roles(), replace(batch(), layout=layout)
    for objective in (FlowMatching(), DistributionMatching()):
        loss = objective(models, given)
        for at, _ in (seen for model in models.values() for seen in model.seen):
            assert bool((at[:, 0] == 0.25).all())
        broken = {
            name: (lambda x, s, r, m=model: torch.cat([torch.full_like(x[:, :1], torch.nan), m(x, s, r)[:, 1:]], 1))
            for name, model in models.items()
        }
        torch.testing.assert_close(objective(broken, given).value, loss.value)


def test_a_stochastic_student_that_walks_to_the_end() -> None:
    models, given = roles(), batch()
    end = OwnSamples("end", CPS(0.9), checkpointed=True)
    loss = DistributionMatching(samples=end, last=None)(models, given)
    again = DistributionMatching(samples=replace(end, checkpointed=False), last=None)(models, given)
    other = DistributionMatching(samples=OwnSamples("end"), last=None)(models, given)
    assert loss.value.item() == again.value.item() != other.value.item()
    assert bearing(models, loss.value) == {"policy"}


def test_the_two_in_turn_bring_the_student_to_the_teachers_law() -> None:
    """Two updates of a learned fake score for one of the student's; the end of the walk is the sample."""
    models, samples = roles(), OwnSamples("end")
    student = torch.optim.Adam(models["policy"].parameters(), 0.1)
    fake = torch.optim.Adam(models["fake"].parameters(), 0.1)
    matching, following = DistributionMatching(samples=samples, anchor="noisy"), FlowMatching(samples=samples)
    for update in range(180):
        learner, objective = (student, matching) if update % 3 == 2 else (fake, following)
        learner.zero_grad()
        learner.param_groups[0]["lr"] = 0.1 * 0.985**update
        objective(models, batch(8, update, (64,))).value.backward()
        learner.step()
    x = samples(models["policy"], batch(50, 999, (64,)), 0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05) and float(x.std()) == pytest.approx(STD, abs=0.05)


def test_bad_settings_are_refused() -> None:
    models = roles()
    with pytest.raises(ValueError, match="anchor: 'both' is not one of clean, noisy, none"):
        DistributionMatching(anchor="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last: 0 predictions teach nothing; nearest valid: 1"):
        DistributionMatching(last=0)
    with pytest.raises(ValueError, match="stop: 'middle' is not one of random, end"):
        OwnSamples("middle")  # type: ignore[arg-type]
    for objective in (FlowMatching(), DistributionMatching()):
        with pytest.raises(ValueError, match="models: 'fake' is missing; the objective asks for policy"):
            objective({name: model for name, model in models.items() if name != "fake"}, batch())
    with pytest.raises(ValueError, match=r"fake: predicts \[6, 1, 3\] where the states are \[6, 2, 3\]"):
        FlowMatching()({**models, "fake": lambda x, s, r: x[:, :1]}, batch())
