"""Sampler steps with gradients: the rollout's own states, finite differences, exact zeros."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tempflow.core import plan
from tempflow.core.dynamics import CPS, DDIM, ODE, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear
from tempflow.core.state import WHOLE, StateLayout
from tempflow.core.unroll import Unrolled, stop_nodes, unroll

SHAPE, ROWS, STEPS = (2, 3), 5, 4
GRID = linear(STEPS, 3.0)
NOISE = Noise(seed=11, iteration=5)
IDS = [(0, r) for r in range(ROWS)]
KINDS = (ODE(), FlowSDE(0.7), DanceSDE(0.3), LinearSDE(), CPS(0.8), DDIM(1.0))


class Net(nn.Module):
    """Small, smooth, nonlinear; other at every σ and row."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.inner = nn.Parameter((torch.randn(6, 6, generator=g, dtype=torch.float64) / 3).to(dtype))
        self.outer = nn.Parameter((torch.randn(6, 6, generator=g, dtype=torch.float64) / 3).to(dtype))
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        assert sigma.shape == rows.shape == x.shape[:1]
        self.calls.append((len(x), torch.is_grad_enabled()))
        s, c = (t.to(x).view(-1, 1) for t in (sigma, rows))
        return (x.flatten(1) @ self.inner + s - 0.1 * c).tanh().matmul(self.outer).view_as(x)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return NOISE.initial(IDS, SHAPE).to(dtype)


def rows() -> Tensor:
    return torch.arange(ROWS) % 2


def reward(x: Tensor) -> Tensor:
    """Terminal and differentiable."""
    return (x.flatten(1)[:, 0].sin() - 0.3 * x.flatten(1)[:, 1:].square().sum(1)).mean()


def gradients(net: Net, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters())))


def held() -> StateLayout:
    """All rows alike, as the roots of one prompt are."""
    free = torch.ones(1, *SHAPE, dtype=torch.bool)
    free[:, 0] = False
    return StateLayout(free, torch.linspace(-1, 1, free.numel()).view(free.shape))


def test_held_elements_are_those_of_each_row_on_the_whole_way() -> None:
    free = torch.ones(ROWS, *SHAPE, dtype=torch.bool)
    free[:3, 0] = False
    layout = StateLayout(free, torch.linspace(-1, 1, free.numel()).view(free.shape))

    def broken(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """What no network should say at the first line of a state."""
        return torch.cat([torch.full_like(x[:, :1], torch.nan), 0.3 * x[:, 1:] - w], 1)

    w = torch.zeros((), requires_grad=True)
    walked = unroll(
        start(), GRID, broken, rows()[:3].repeat(2)[:ROWS], stop=torch.tensor([2, 3, 4, 0, 0]), layout=layout
    )
    for states in (walked.x, walked.x0(), walked.visits[-1].x):
        assert torch.equal(states[:3, 0].float(), layout.clean[:3, 0])  # type: ignore[index]
    (slope,) = torch.autograd.grad(walked.x0()[:3].sum(), w)
    assert bool(slope.isfinite()) and float(slope.abs()) > 0.1


@pytest.mark.parametrize("layout", [WHOLE, held()], ids=["whole", "held"])
@pytest.mark.parametrize("dynamics", KINDS, ids=repr)
def test_states_are_those_of_a_rollout_to_the_last_bit(dynamics: Dynamics, layout: StateLayout) -> None:
    net = Net(torch.float32)

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return net(x, sigma, torch.arange(ROWS))

    one = plan.chain(STEPS, ROWS) if dynamics.stochastic else plan.ode(STEPS, ROWS)
    forest = rollout([one], dynamics, GRID, predict, NOISE, shape=SHAPE, keep="all", layout=layout)
    walked = unroll(
        start(torch.float32), GRID, predict, rows(), dynamics=dynamics, noise=NOISE, ids=IDS, layout=layout, last=2
    )
    assert walked.x.requires_grad and torch.equal(walked.x, forest.nodes[forest.leaves.node])
    by_step = forest.nodes[forest.edges.parent].view(STEPS, ROWS, *SHAPE)
    for visit, states in zip(walked.visits, by_step, strict=True):
        assert torch.equal(visit.x, states)


def test_each_row_stops_at_its_own_node_as_a_walk_there_would() -> None:
    net, stops = Net(), torch.tensor([4, 0, 2, 3, 1])
    kind = CPS(0.6)

    def walk(stop: int | Tensor, **options: object) -> Unrolled:
        return unroll(start(), GRID, net, rows(), dynamics=kind, noise=NOISE, ids=IDS, stop=stop, **options)  # type: ignore[arg-type]

    mixed = walk(stops)
    assert torch.equal(mixed.stop, stops) and torch.equal(mixed.sigma, GRID.sigmas[stops])
    for row, stop in enumerate(stops.tolist()):
        alone = walk(stop)
        torch.testing.assert_close(mixed.x[row], alone.x[row], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(mixed.x0()[row], alone.x0()[row], rtol=1e-13, atol=1e-13)
        want = alone.x[row] - GRID.sigmas[stop] * net(alone.x, alone.sigma, rows())[row]
        torch.testing.assert_close(alone.x0()[row], want if stop < STEPS else alone.x[row], rtol=1e-13, atol=1e-13)
    # one prediction for each step taken, and one for each look at a stop before the end
    assert sum(len(visit.index) for visit in mixed.visits) == sum(min(s + 1, STEPS) for s in stops.tolist())
    assert all(len(visit.index) == ROWS for visit in mixed.visits[-1:])
    blind = walk(2, look=False)
    assert blind.clean is None and len(blind.visits) == 2 and torch.equal(blind.x, walk(2).x)
    with pytest.raises(ValueError, match="look = True"):
        blind.x0()


def test_visits_give_clean_samples_of_every_step() -> None:
    net = Net()
    walked = unroll(start(), GRID, net, rows())
    for i, visit in enumerate(walked.visits):
        sigma = GRID.sigmas[i].double()
        torch.testing.assert_close(visit.clean(GRID), visit.x - sigma * visit.velocity)
    # an Euler step into 0 goes to the clean sample
    torch.testing.assert_close(walked.visits[-1].clean(GRID), walked.x)


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(0.7), CPS(0.9)], ids=repr)
@pytest.mark.parametrize("last", [None, 1, 2, 3])
def test_reward_gradients_equal_finite_differences(last: int | None, dynamics: Dynamics) -> None:
    """Through the last K steps: those of the function whose earlier steps are walked by weights that stand still."""
    net, frozen = Net(), Net()

    def value(through: bool) -> Tensor:
        options = {"dynamics": dynamics, "noise": NOISE, "ids": IDS}
        if last is None or not through:
            return reward(unroll(start(), GRID, net, rows(), last=last, **options).x)  # type: ignore[arg-type]
        node = STEPS - last
        here = unroll(start(), GRID, frozen, rows(), stop=node, look=False, **options).x.detach()  # type: ignore[arg-type]
        return reward(unroll(here, GRID, net, rows(), first=node, **options).x)  # type: ignore[arg-type]

    got = gradients(net, value(through=False))
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), got, strict=True):
            assert float(gradient.abs().max()) > 1e-3
            for place in [(0, 0), (2, 5), (5, 1)]:
                ends = list[float]()
                for move in (1e-5, -2e-5):
                    parameter[place] += move
                    ends.append(float(value(through=True)))
                parameter[place] += 1e-5
                slope = (ends[0] - ends[1]) / 2e-5
                assert slope == pytest.approx(float(gradient[place]), rel=1e-6, abs=1e-9)


def test_the_last_k_predictions_count_the_one_at_the_stop() -> None:
    net = Net()
    x0 = unroll(start(), GRID, net, rows(), stop=torch.tensor([0, 1, 2, 3, 3]), last=1).x0()
    at = unroll(start(), GRID, net, rows(), stop=torch.tensor([0, 1, 2, 3, 3]), last=0)
    assert not at.x.requires_grad and not at.x0().requires_grad
    want = at.x - at.sigma.double().view(-1, 1, 1) * net(at.x, at.sigma, rows())
    for a, b in zip(gradients(net, reward(x0)), gradients(net, reward(want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_cut_gives_an_exactly_zero_gradient_across_it(cut: int) -> None:
    nets = [Net() for _ in range(STEPS)]

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Each step by weights of its own, which says whose gradient is whose."""
        return nets[int((GRID.sigmas == sigma[0]).nonzero())](x, sigma, rows)

    x = start().requires_grad_()
    walked = unroll(x, GRID, predict, rows(), cuts=[cut])
    leaves = [x, *(p for net in nets for p in net.parameters())]
    got = torch.autograd.grad(reward(walked.x), leaves, allow_unused=True, materialize_grads=True)
    sizes = [float(g.abs().sum()) for g in got]
    behind = 1 + 2 * cut
    assert sizes[:behind] == [0.0] * behind and min(sizes[behind:]) > 1e-4
    # the value is that of the walk without a cut, and the first part has a graph of its own
    assert torch.equal(walked.x, unroll(x, GRID, predict, rows()).x)
    first = torch.autograd.grad(walked.visits[0].velocity.square().sum(), list(nets[0].parameters()))
    assert min(float(g.abs().sum()) for g in first) > 1e-3


def test_a_cut_holds_for_the_rows_that_pass_it() -> None:
    net, stops = Net(), torch.tensor([1, 2, 3, 4, 2])
    x = start().requires_grad_()
    walked = unroll(x, GRID, net, rows(), stop=stops, cuts=[2])
    (got,) = torch.autograd.grad(walked.x0().sin().sum(), x)
    size = got.flatten(1).abs().sum(1)
    assert float(size[0]) > 1e-3 and bool((size[1:] == 0).all())


def test_a_checkpointed_walk_has_the_same_gradients_and_keeps_less() -> None:
    net, kept = Net(), list[int]()

    def walk(checkpointed: bool) -> tuple[Tensor, list[Tensor]]:
        kept.append(0)

        def pack(t: Tensor) -> Tensor:
            kept[-1] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x = unroll(start(), GRID, net, rows(), last=3, checkpointed=checkpointed).x
        return x, gradients(net, reward(x))

    (x, plain), (same, again) = walk(False), walk(True)
    assert torch.equal(x, same) and kept[1] < kept[0]
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_earlier_steps_are_asked_as_training_asks_and_keep_no_graph() -> None:
    net = Net()
    walked = unroll(start(), GRID, net, rows(), last=1)
    assert [on for _, on in net.calls] == [True] * STEPS
    assert [v.velocity.requires_grad for v in walked.visits] == [False, False, False, True]
    net.calls.clear()
    unroll(start(), GRID, net, rows(), last=0)
    with torch.no_grad():
        assert not unroll(start(), GRID, net, rows(), checkpointed=True).x.requires_grad
    assert [on for _, on in net.calls] == [False] * 2 * STEPS


def test_gradients_reach_the_start_only_through_a_whole_walk() -> None:
    net, x = Net(), start().requires_grad_()
    (whole,) = torch.autograd.grad(reward(unroll(x, GRID, net, rows()).x), x)
    assert float(whole.abs().min()) > 0
    part = unroll(x, GRID, net, rows(), stop=torch.tensor([3, 0, 0, 1, 3]), last=1)
    (got,) = torch.autograd.grad(part.x0().sin().sum(), x)
    assert (got.flatten(1).abs().sum(1) > 0).tolist() == [False, True, True, False, False]


def test_parts_of_a_grid_join_and_states_keep_their_type() -> None:
    net = Net()
    options = {"dynamics": FlowSDE(0.7), "noise": NOISE, "ids": IDS}
    whole = unroll(start(), GRID, net, rows(), **options)  # type: ignore[arg-type]
    x = start()
    for low, high in pairwise((0, 1, 3, STEPS)):
        x = unroll(x, GRID, net, rows(), first=low, stop=high, look=False, **options).x  # type: ignore[arg-type]
    assert torch.equal(x, whole.x)
    half = unroll(start(torch.bfloat16), GRID, Net(torch.bfloat16), rows(), stop=2)
    assert half.x.dtype == torch.bfloat16 and half.x0().dtype == torch.float32
    ended = Schedule(torch.tensor([0.9, 0.4, 0.1]), gain=1.25)
    leaf = unroll(start(), ended, net, rows())
    assert torch.equal(leaf.x0(), leaf.x * 1.25)


def test_stop_nodes_are_functions_of_their_ids() -> None:
    ids = [(3, slot) for slot in range(4000)]
    nodes = stop_nodes(7, ids, STEPS)
    assert torch.equal(nodes[100:200], stop_nodes(7, ids[100:200], STEPS))
    assert not torch.equal(nodes, stop_nodes(8, ids, STEPS))
    counts = nodes.bincount(minlength=STEPS)
    assert len(counts) == STEPS and float((counts - 1000).abs().max()) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert int(stop_nodes(7, ids, STEPS, first=2).min()) == 2
    assert len(stop_nodes(7, [(3,)] * 5, STEPS).unique()) == 1
    with pytest.raises(ValueError, match=r"first: 4 of 4 steps leaves no node; nearest valid: 3"):
        stop_nodes(7, ids, STEPS, first=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop": 5}, r"stop: 5 is outside \[0, 4\]; nearest valid: 4"),
        ({"stop": torch.tensor([0, 1, 2, 3, -1])}, r"stop: -1 is outside \[0, 4\]; nearest valid: 0"),
        ({"stop": torch.tensor([1, 2])}, r"stop: torch.int64 \[2\] must be torch.int64 \[5\]"),
        ({"first": 3, "stop": 2}, r"stop: 2 is outside \[3, 4\]; nearest valid: 3"),
        ({"first": -1}, r"first: -1 is outside"),
        ({"cuts": [0]}, r"cuts: 0 is not between steps; nearest valid: 1"),
        ({"cuts": [4]}, r"cuts: 4 is not between steps; nearest valid: 3"),
        ({"last": -1}, r"last: -1 is negative; nearest valid: 0"),
        ({"dynamics": CPS(0.9)}, r"draws noise, which needs a Noise and 5 ids, not 0; nearest valid: ODE\(\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=match):
        unroll(start(), GRID, net, rows(), **options)  # type: ignore[arg-type]
    assert not net.calls


def test_shapes_are_checked() -> None:
    def wide(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return x[:, :1]

    with pytest.raises(ValueError, match=r"predict returned shape \[5, 1, 3\]; nearest valid: \[5, 2, 3\]"):
        unroll(start(), GRID, wide, rows())
    with pytest.raises(ValueError, match=r"rows: shape \[2\] must be \[5\]"):
        unroll(start(), GRID, wide, rows()[:2])
