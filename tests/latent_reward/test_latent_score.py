"""The judge, and guided sampling: one candidate is the plain sampler, several are never worse than their mean."""

from __future__ import annotations

import math

import latent_world as world
import pytest
import torch
from torch import Tensor

from tempflow.core import plan
from tempflow.core.dynamics import CPS, ODE, DanceSDE, Dynamics, FlowSDE, LinearSDE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear
from tempflow.core.scores import Scores
from tempflow.latent_reward import Guided, LatentReward, LatentScorer, guided_sample
from tempflow.media import Size
from tempflow.request import asked

SIZE = Size(32, 32)

SHAPE, NOISE, GRID = (2, 3), Noise(seed=5, iteration=2), linear(6, 3.0)
U = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]])


def velocity(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    s, c = sigma.view(-1, 1, 1), rows.view(-1, 1, 1).to(x.dtype)
    return (0.4 + 0.2 * s) * x + 0.05 * x * x - 0.1 * c


def along(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    return (x * U).sum((1, 2))


def never(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
    raise AssertionError("one candidate needs no judge")


def draw(candidates: int, judge: object, dynamics: Dynamics | None = None, roots: int = 3) -> Guided:
    return guided_sample(
        FlowSDE(0.7) if dynamics is None else dynamics,
        GRID,
        velocity,
        judge,  # type: ignore[arg-type]
        NOISE,
        shape=SHAPE,
        slots=[4, 1],
        roots=roots,
        candidates=candidates,
    )


# -------------------------------------------------------------------------------------------------------------- judge
def test_what_is_not_finite_has_failed() -> None:
    values = torch.tensor([1.5, math.nan, -math.inf, math.inf, 0.0])
    judge = LatentScorer(lambda x, s, r: values[r], name="mine")
    scores = judge(torch.zeros(5, 2), torch.ones(5), torch.arange(5))
    assert scores.names == ("mine",) and scores.value.shape == (5, 1)
    assert scores.ok[:, 0].tolist() == [True, False, False, False, True]
    assert scores.value[:, 0].isnan().tolist() == [False, True, True, True, False]


def test_parts_of_a_batch_come_out_in_order_and_without_gradients() -> None:
    sizes: list[int] = []

    def score(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        sizes.append(len(x))
        return x[:, 0] + 10 * sigma + 100 * rows

    x, sigma, rows = torch.arange(7.0)[:, None], torch.linspace(0, 0.6, 7), torch.arange(7)
    got = LatentScorer(score, rows=3)(x, sigma, rows)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(got.value[:, 0], x[:, 0] + 10 * sigma + 100 * rows)
    assert len(LatentScorer(score)(x[:0], sigma[:0], rows[:0])) == 0


def test_a_judge_made_of_a_reward_is_the_reward() -> None:
    model = world.adapter()
    reward = LatentReward.from_transformer(model.network, width=8)
    with torch.no_grad():
        reward.head.out.weight.fill_(1.0)
    judge = LatentScorer.of(model, reward, world.PROMPTS, SIZE)
    x, sigma, rows = world.normal("x", 3), torch.full((3,), 0.4), torch.tensor([1, 0, 1])
    condition = model.encode(asked(world.PROMPTS), SIZE).tensors
    want = reward(x, sigma * 1000, condition["embeds"][rows], condition["pooled"][rows])[0]
    assert torch.equal(judge(x, sigma, rows).value[:, 0], want) and len(set(want.tolist())) == 3


def test_a_judge_says_what_does_not_fit() -> None:
    judge = LatentScorer(lambda x, s, r: x)
    with pytest.raises(ValueError, match=r"must be \[3\], one for each latent"):
        judge(torch.zeros(3, 2), torch.ones(2), torch.arange(3))
    with pytest.raises(ValueError, match=r"score returned"):
        judge(torch.zeros(3, 2), torch.ones(3), torch.arange(3))
    with pytest.raises(ValueError, match="rows: 0 is too small; nearest valid: 1"):
        LatentScorer(along, rows=0)


# ----------------------------------------------------------------------------------------------------- guided sampling
@pytest.mark.parametrize(
    "dynamics", [FlowSDE(0.7), LinearSDE(), DanceSDE(0.3), CPS(0.8)], ids=lambda d: type(d).__name__
)
def test_one_candidate_is_plain_sampling_bit_for_bit(dynamics: Dynamics) -> None:
    forest = rollout([plan.chain(6, 3)] * 2, dynamics, GRID, velocity, NOISE, shape=SHAPE, slots=[4, 1])
    drawn = draw(1, never, dynamics)
    assert torch.equal(drawn.x, forest.nodes[forest.leaves.node])
    assert torch.equal(drawn.prompt, forest.leaves.prompt) and torch.equal(drawn.root, forest.leaves.root)
    assert bool(drawn.scores.isnan().all()) and not drawn.chosen.any()


def test_one_candidate_without_noise_is_the_ode() -> None:
    forest = rollout([plan.ode(6, 3)] * 2, ODE(), GRID, velocity, NOISE, shape=SHAPE, slots=[4, 1])
    assert torch.equal(draw(1, never, ODE()).x, forest.nodes[forest.leaves.node])


def test_candidates_are_the_children_of_a_tree() -> None:
    """The first step's candidates: those of a rollout that branches there."""
    seen: list[Tensor] = []

    def judge(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        seen.append(x.clone())
        return LatentScorer(along)(x, sigma, rows)

    draw(4, judge, roots=1)
    forest = rollout([plan.tree(6, 1, {0: 4})] * 2, FlowSDE(0.7), GRID, velocity, NOISE, shape=SHAPE, slots=[4, 1])
    first = forest.edges.child[forest.edges.step == 0]
    assert torch.equal(seen[0], forest.nodes[first])


def test_the_kept_candidate_is_the_best_and_never_below_the_mean() -> None:
    drawn = draw(5, LatentScorer(along))
    kept = drawn.scores.gather(2, drawn.chosen[:, :, None])[:, :, 0]
    assert torch.equal(kept, drawn.scores.max(2).values)
    assert bool((kept > drawn.scores.mean(2)).all()) and len(drawn.chosen.unique()) == 5
    torch.testing.assert_close(kept[-1], along(drawn.x, GRID.sigmas[-1:], drawn.prompt))
    worst = draw(5, LatentScorer(lambda x, s, r: -along(x, s, r)))
    plain = draw(1, never)
    means = [float(along(d.x, GRID.sigmas, d.prompt).mean()) for d in (worst, plain, drawn)]
    assert means[0] < means[1] - 0.5 < means[2] - 1.0


def test_candidates_share_one_forward_and_are_judged_at_the_next_noise_level() -> None:
    asked: list[tuple[int, float]] = []
    judged: list[tuple[int, float, list[int]]] = []

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append((len(x), float(sigma[0])))
        return velocity(x, sigma, rows)

    def judge(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        assert sigma.unique().numel() == 1
        judged.append((len(x), float(sigma[0]), rows.tolist()))
        return LatentScorer(along)(x, sigma, rows)

    guided_sample(CPS(0.8), GRID, predict, judge, NOISE, shape=SHAPE, slots=[4, 1], roots=2, candidates=3)
    grid = GRID.sigmas.tolist()
    assert asked == [(4, s) for s in grid[:-1]]
    # CPS draws no noise in its last step, so there is nothing to choose there
    assert judged == [(12, s, [4] * 6 + [1] * 6) for s in grid[1:-1]]


def test_failed_candidates_are_passed_over() -> None:
    def judge(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = -torch.arange(len(x)).float()[:, None]  # below 0: a failure that counted as 0 would win
        ok = (torch.arange(len(x)) % 4 >= 2)[:, None] & (rows != 1)[:, None]
        return Scores(value, ok, ("odd",))

    drawn = draw(4, judge)
    assert bool((drawn.chosen[:, drawn.prompt == 4] == 2).all())
    assert bool((drawn.chosen[:, drawn.prompt == 1] == 0).all())  # all failed: as without a judge
    assert torch.equal(drawn.x[drawn.prompt == 1], draw(1, never).x[3:])


def test_a_samples_path_does_not_depend_on_its_company() -> None:
    both = draw(4, LatentScorer(along))
    alone = guided_sample(
        FlowSDE(0.7), GRID, velocity, LatentScorer(along), NOISE, shape=SHAPE, slots=[1], roots=1, candidates=4
    )
    torch.testing.assert_close(alone.x[0], both.x[3])
    assert torch.equal(alone.chosen[:, 0], both.chosen[:, 3])


def test_a_tiny_pipeline_is_sampled_by_its_own_reward() -> None:
    model = world.adapter()
    reward = LatentReward.from_transformer(model.network, width=8)
    with torch.no_grad():
        reward.head.out.weight.copy_(torch.linspace(-1, 1, 8)[None])
    predict = model.predictor(model.encode(asked(world.PROMPTS), SIZE), 1.0)
    drawn = guided_sample(
        FlowSDE(0.7),
        model.schedule(3, Size(32, 32)),
        predict,
        LatentScorer.of(model, reward, world.PROMPTS, SIZE),
        NOISE,
        shape=model.noise_shape(Size(32, 32)),
        slots=[0, 1],
        candidates=3,
    )
    assert drawn.x.shape == (2, *world.SHAPE) and bool(drawn.x.isfinite().all())
    assert bool((drawn.scores.max(2).values > drawn.scores.mean(2)).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 0}, "candidates: 0 is too small; nearest valid: 1"),
        ({"roots": 0}, "roots: 0 is too small; nearest valid: 1"),
        ({"slots": [1, 1]}, r"slots: \[1, 1\] must be distinct and >= 0; nearest valid: \[1\]"),
        ({"slots": [-2]}, r"slots: \[-2\] must be distinct"),
        ({"dynamics": ODE()}, r"candidates: 4, but ODE\(\) draws no noise; nearest valid: 1"),
    ],
)
def test_what_cannot_be_sampled_says_so(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "dynamics": FlowSDE(0.7),
        "schedule": GRID,
        "predict": velocity,
        "score_latents": never,
        "noise": NOISE,
        "shape": SHAPE,
        "slots": [0],
    }
    with pytest.raises(ValueError, match=message):
        guided_sample(**{**arguments, **change})  # type: ignore[arg-type]
