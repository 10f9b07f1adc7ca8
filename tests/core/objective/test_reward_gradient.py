"""The reward's own gradient: along each path it is the derivative of what is taken with gradients, and of no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tempflow.core.cost import Cost
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.objective.reward_gradient import KnownNoise, LastSteps, LateStep, Path, RewardGradient
from tempflow.core.schedule import explicit
from tempflow.core.state import StateLayout
from tempflow.core.unroll import stop_nodes

GRID = explicit((1.0, 0.75, 0.5, 0.25), 3.0)
STEPS, ROWS, SEED = 4, 3, 2
PATHS: dict[str, Path] = {
    "late": LateStep(2),
    "last": LastSteps(1),
    "last two": LastSteps(2),
    "all": LastSteps(STEPS),
    "known": KnownNoise(2),
}


@dataclass
class Toy:
    """v = w_k·x + sin(w_k)·x³/9 + row/4, with a weight for each node k, so that each step has a gradient of its own;
    and a judge, r = −mean (tanh x0 − row/3)²."""

    weight: Tensor
    failing: tuple[int, ...] = ()

    def __call__(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        node = (GRID.sigmas.to(sigma) - sigma[:, None]).abs().argmin(1)
        w = self.weight[node].view(-1, 1, 1)
        return w * x + w.sin() * x**3 / 9 + rows.view(-1, 1, 1) / 4

    def reward(self, x: Tensor, rows: Tensor) -> Tensor:
        return -(x.tanh() - rows.view(-1, 1, 1) / 3).square().mean((1, 2))

    def through(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ok = torch.tensor([row not in self.failing for row in rows.tolist()])
        return torch.where(ok, self.reward(x, rows), 0.0), ok


@dataclass
class Judge:
    toy: Toy

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a plain score was asked for")

    def through(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.toy.through(x, rows)


def toy(grad: bool = True, failing: tuple[int, ...] = ()) -> Toy:
    weight = torch.tensor([0.4, -0.3, 0.6, 0.9], dtype=torch.float64, requires_grad=grad)
    return Toy(weight, failing)


def batch(judge: Toy) -> NoiseBatch:
    x = torch.randn(ROWS, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = tuple((0, 0, row, 0) for row in range(ROWS))
    return NoiseBatch(x, torch.arange(ROWS), ids, SEED, GRID, judge=Judge(judge))


def loss(path: Path, at: Toy, **options: float) -> Tensor:
    return RewardGradient(path, **options)({"policy": at}, batch(at)).value


def slope(of: Callable[[Tensor], float], weight: Tensor, node: int, step: float = 1e-6) -> float:
    """The central difference along one weight."""
    moved = [weight.clone(), weight.clone()]
    moved[0][node] += step
    moved[1][node] -= step
    return (of(moved[0]) - of(moved[1])) / (2 * step)


@pytest.mark.parametrize("name", ["last", "last two", "all"])
def test_the_last_steps_gradients_are_finite_differences_and_earlier_ones_exactly_none(name: str) -> None:
    path, policy = PATHS[name], toy()
    loss(path, policy).backward()
    assert policy.weight.grad is not None
    taught = {"last": 1, "last two": 2}.get(name, STEPS)
    for node in range(STEPS):
        with torch.no_grad():
            true = slope(lambda weight: loss(path, Toy(weight)).item(), policy.weight.detach(), node)
        assert abs(true) > 1e-3  # there is something to cut off
        if node < STEPS - taught:
            assert policy.weight.grad[node] == 0.0
        else:
            assert float(policy.weight.grad[node]) == pytest.approx(true, rel=1e-7)


def test_a_late_step_s_gradient_is_that_of_its_own_prediction() -> None:
    """Rows walk one by one by Euler; only the prediction at the stop is of the weights that move."""
    policy, path, base = toy(), LateStep(2), toy(grad=False)
    loss(path, policy).backward()
    assert policy.weight.grad is not None
    given = batch(base)
    stops = stop_nodes(given.seed, given.ids, STEPS, STEPS - 2).tolist()
    assert sorted(set(stops)) == [2, 3]

    def foreseen(weight: Tensor) -> float:
        found = list[Tensor]()
        for row, stop in enumerate(stops):
            x, at = given.x[row : row + 1], given.rows[row : row + 1]
            sigmas = GRID.sigmas.double()
            for node in range(stop):
                x = x - (sigmas[node] - sigmas[node + 1]) * base(x, sigmas[node][None], at)
            found.append(base.reward(x - sigmas[stop] * Toy(weight)(x, sigmas[stop][None], at), at))
        return -float(torch.cat(found).mean())

    for node in range(STEPS):
        true = slope(foreseen, base.weight, node)
        assert float(policy.weight.grad[node]) == pytest.approx(true, rel=1e-6, abs=1e-9)
        assert (policy.weight.grad[node] == 0) == (node < 2)


def test_a_known_noise_s_gradient_is_that_of_its_own_prediction() -> None:
    """The walk to the sample is of what the weights were."""
    policy, path, base = toy(), KnownNoise(2), toy(grad=False)
    loss(path, policy).backward()
    assert policy.weight.grad is not None

    def aligned(weight: Tensor) -> float:
        def ask(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return (Toy(weight) if torch.is_grad_enabled() else base)(x, sigma, rows)

        return RewardGradient(path)({"policy": ask}, batch(base)).value.item()

    for node in range(STEPS):
        true = slope(aligned, base.weight, node)
        assert float(policy.weight.grad[node]) == pytest.approx(true, rel=1e-6) and true != 0


def test_no_gradient_reaches_the_starting_noise_but_through_all_steps() -> None:
    for name, path in PATHS.items():
        policy = toy()
        given = batch(policy)
        start = given.x.clone().requires_grad_(True)
        RewardGradient(path)({"policy": policy}, replace(given, x=start)).value.backward()
        assert (start.grad is None or not start.grad.any()) == (not name.startswith("all")), name


def test_a_known_noise_gives_the_sample_back_where_the_velocity_is_the_path_s() -> None:
    given, drawn = batch(toy()), list[Tensor]()

    def straight(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Of every path to x0 = 2: v = (x − 2)/σ, which is ε − x0 on it."""
        drawn.append(sigma)
        return (x - 2.0) / sigma.view(-1, 1, 1)

    x = KnownNoise(3)(straight, given)
    assert x.shape == (3 * ROWS, 2, 2) and torch.allclose(x, torch.full_like(x, 2.0), atol=1e-12)
    # the walk's own predictions, then one of all pairs, at nodes and with noises that are not all the same
    assert len(drawn) == STEPS + 1 and len(drawn[-1].unique()) > 1 and len(drawn[-1]) == 3 * ROWS


def test_held_elements_stay_as_they_are_given() -> None:
    free = torch.ones(ROWS, 2, 2, dtype=torch.bool)
    free[:, 0] = False
    clean = torch.full((ROWS, 2, 2), 0.25, dtype=torch.float64)
    for path in PATHS.values():
        policy = toy()
        given = replace(batch(policy), layout=StateLayout(free=free, clean=clean))
        x = path(policy, replace(given, x=given.layout.hold(given.x)))
        assert torch.equal(x[:, 0], torch.full_like(x[:, 0], 0.25)) and (x[:, 1] != 0.25).all()


@pytest.mark.parametrize("name", PATHS)
def test_a_failed_score_is_left_out_and_counted(name: str) -> None:
    path, whole, patchy = PATHS[name], toy(), toy(failing=(1,))
    told = RewardGradient(path)({"policy": patchy}, batch(patchy))
    told.value.backward()
    seen = path(whole, batch(whole))
    rows = torch.arange(ROWS).repeat_interleave(len(seen) // ROWS)
    value = whole.reward(seen, rows)
    (-value[rows != 1]).sum().div(len(rows)).backward()
    assert patchy.weight.grad is not None and whole.weight.grad is not None
    assert torch.allclose(patchy.weight.grad, whole.weight.grad, rtol=1e-12)
    assert told.metrics["failed_rewards"].tolist() == [0, 1, 0]
    assert told.sums()["reward"] == pytest.approx((value[rows != 1].sum().item(), int((rows != 1).sum())))
    nobody = RewardGradient(path)({"policy": whole}, batch(toy(failing=(0, 1, 2))))
    assert nobody.value == 0 and nobody.sums()["reward"] == (0.0, 0.0)


def test_a_margin_stops_what_has_reached_it() -> None:
    path, policy = LastSteps(1), toy()
    reached = policy.reward(path(policy, batch(policy)), torch.arange(ROWS)).detach()
    middle = float(reached.sort().values[1])
    told = RewardGradient(path, middle)({"policy": policy}, batch(policy))
    assert told.value.item() == pytest.approx(float((middle - reached).clamp(min=0).mean()))
    low = loss(path, policy, margin=float(reached.min()) - 1.0)
    low.backward()
    assert policy.weight.grad is not None and not policy.weight.grad.any() and low == 0


def test_costs_and_one_line_for_what_is_wrong() -> None:
    assert LateStep(2).cost(4) == Cost(3, 1, 1) and LastSteps(2).cost(4) == Cost(2, 1, 2)
    assert LastSteps(4).cost(4) == LastSteps(9).cost(4) == Cost(0, 1, 4) and KnownNoise(3).cost(4) == Cost(4, 3, 3)
    for name, make in (("late", LateStep), ("count", LastSteps), ("pairs", KnownNoise)):
        with pytest.raises(ValueError, match=f"^{name}: 0 must be at least 1; nearest valid: 1$"):
            make(0)
    given = batch(toy())
    for judge in (None, lambda x, rows: (x, rows)):
        with pytest.raises(ValueError, match=r"^judge: .* gives no gradients; nearest valid: a run with diff"):
            RewardGradient(LastSteps())({"policy": toy()}, replace(given, judge=judge))
    with pytest.raises(ValueError, match=r"^models: 'policy' is missing"):
        RewardGradient(LastSteps())({}, given)
