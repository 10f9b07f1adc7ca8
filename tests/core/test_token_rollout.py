"""Tokens through rollout and forest: stored as they are, drawn by identity alone, scored by the whole jump's law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tempflow.core import plan, weight
from tempflow.core.credit.observed import PathLogProb, Progress, RelativeChange
from tempflow.core.distribution import Categorical
from tempflow.core.dynamics import MixtureJump
from tempflow.core.forest import Forest
from tempflow.core.plan import Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule, linear
from tempflow.core.solver import DPMSolver2
from tempflow.core.state import StateLayout

SHAPE, V = (2, 3), 5
JUMP, GRID, NOISE = MixtureJump(V), linear(4, 3.0), Noise(seed=3)
CHAIN, TREE = plan.chain(4, 3), plan.tree(4, roots=1, splits={0: 2, 2: 3}, train=range(3))
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))


def logits(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return TABLE[x] * (2 - sigma.view(-1, 1, 1, 1)) + rows.view(-1, 1, 1, 1) * torch.arange(V) / 10


def grow(plans: Sequence[Plan], **options: object) -> Forest:
    arguments = {"dynamics": JUMP, "schedule": GRID, "predict": logits, "noise": NOISE, "shape": SHAPE, **options}
    return rollout(plans, **arguments)  # type: ignore[arg-type]


def same(a: Forest, b: Forest) -> None:
    assert torch.equal(a.nodes, b.nodes) and a.nodes.dtype == b.nodes.dtype == torch.int64
    assert torch.equal(a.edges.log_prob, b.edges.log_prob) and torch.equal(a.leaves.node, b.leaves.node)


@pytest.mark.parametrize("one", [CHAIN, TREE, plan.chain(4, 3, train=())])
def test_tokens_are_stored_as_they_are_and_have_the_whole_jumps_log_prob(one: Plan) -> None:
    forest = grow([one] * 2)
    edges, nodes = forest.edges, forest.nodes
    assert nodes.dtype == torch.int64 and edges.log_prob.dtype == torch.float32
    assert int(nodes.min()) >= 0 and int(nodes.max()) < V and len(nodes.unique()) == V
    x, y, grid = nodes[edges.parent], nodes[edges.child], GRID.double()
    p = logits(x, GRID.at(edges.step), edges.prompt).double().softmax(-1)
    share = (grid.delta(edges.step) / grid.at(edges.step)).view(-1, 1, 1)
    stays = (1 - share) * (x == y) + share * p.gather(-1, y[..., None])[..., 0]
    torch.testing.assert_close(edges.log_prob.double(), stays.log().mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert bool((x == y).any()) and bool((x != y).any())


def test_a_draw_is_a_function_of_its_identity_alone() -> None:
    whole = grow([CHAIN, TREE])
    for rows in (1, 2, 5):
        same(grow([CHAIN, TREE], max_rows=rows), whole)
    same(Forest.cat([grow([CHAIN], slots=[0]), grow([TREE], slots=[1])]), whole)
    same(whole.to("cpu"), whole)
    other = grow([CHAIN, TREE], noise=Noise(seed=4))
    assert not torch.equal(other.nodes, whole.nodes)
    first = whole.select(whole.edges.step == 0)
    dropped = first.drop_leaf_states()
    assert len(dropped.nodes) < len(first.nodes) < len(whole.nodes) and dropped.nodes.dtype == torch.int64
    early = whole.edges.child[whole.edges.step == 0]
    assert torch.equal(dropped.nodes[dropped.edges.child], whole.nodes[early])


def test_held_tokens_stay_and_what_is_said_of_them_is_not_read() -> None:
    free = torch.ones(1, *SHAPE, dtype=torch.bool)
    free[:, 0, 0] = False
    held = StateLayout(free, torch.full((1, *SHAPE), 4.0))

    def broken(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        said = logits(x, sigma, rows)
        said[:, 0, 0] = torch.nan
        return said

    plain, forest = grow([CHAIN] * 2), grow([CHAIN] * 2, predict=broken, layout=held)
    assert bool((forest.nodes[:, 0, 0] == 4).all())
    others = free.expand(len(plain.nodes), -1, -1)
    assert torch.equal(forest.nodes[others], plain.nodes[others]) and bool(forest.edges.log_prob.isfinite().all())
    for bad, words in ((1.5, "clean: 1.5 is no token of 0 … 4; nearest valid: 2"), (9.0, "clean: 9 .* valid: 4")):
        with pytest.raises(ValueError, match=words):
            grow([CHAIN] * 2, layout=replace(held, clean=torch.full((1, *SHAPE), bad)))


def test_a_solver_of_tokens_walks_to_the_mode() -> None:
    class Greedy:
        memory = 0

        def transition(
            self, x: Tensor, velocity: Tensor, schedule: Schedule, step: Tensor, previous: Sequence[Tensor]
        ) -> Categorical:
            return Categorical(velocity)

    forest = grow([plan.ode(1, 3)], solver=Greedy(), schedule=linear(1), keep="all")
    x, y = forest.nodes[forest.edges.parent], forest.nodes[forest.edges.child]
    assert torch.equal(y, logits(x, torch.ones(3), torch.zeros(3)).argmax(-1)) and y.dtype == torch.int64


def test_what_is_observed_of_tokens() -> None:
    forest, media = grow([CHAIN] * 2), torch.zeros(6)
    assert bool((PathLogProb()(forest, media) < 0).all())
    for observation in (Progress(), RelativeChange()):
        with pytest.raises(ValueError, match="compares states as numbers, and these are tokens"):
            observation(forest, media)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: grow([CHAIN, plan.ode(4, 2)]), r"plans\[1\]: walks deterministic edges, and tokens of MixtureJump"),
        (lambda: grow([plan.window(4, 2, 1, 2)]), r"plans\[0\]: walks deterministic edges"),
        (lambda: grow([CHAIN], keep_mean=True), "keep_mean: needs a velocity, and of MixturePath.*predicts logits"),
        (lambda: grow([CHAIN], solver=DPMSolver2()), "solver DPMSolver2.*needs a velocity"),
        (lambda: grow([CHAIN], predict=lambda x, s, r: logits(x, s, r)[..., 1:]), r"\[3, 2, 3, 5\], logits of tokens"),
        (lambda: grow([CHAIN], predict=lambda x, s, r: x.float()), r"predict returned shape \[3, 2, 3\]"),
        (lambda: grow([CHAIN], predict=lambda x, s, r: logits(x, s, r) * torch.nan), "logits: row 0 has a token"),
        (lambda: grow([CHAIN], store_dtype=torch.int64), "store_dtype = torch.int64"),
        (lambda: weight.noise_aware(grow([CHAIN]), GRID, JUMP), "moves tokens, which have no mean and no std"),
    ],
)
def test_what_tokens_cannot_have(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask()
