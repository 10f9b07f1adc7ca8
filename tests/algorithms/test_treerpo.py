"""Dynamic-TreeRPO: its tree, noise, clips and pull, what it reduces to, and one iteration of the real loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake import Bench
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
    phased,
    second,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.dynamic_treerpo import dynamic_treerpo
from tempflow.algorithms.lesson import Batch
from tempflow.algorithms.mix_grpo import mix_grpo
from tempflow.core import weight
from tempflow.core.credit import GroupZScore
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.objective.ratio import clipped
from tempflow.core.plan import Cost
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear
from tempflow.train.experience import Experience, credit
from tempflow.train.update import predictors


def tree(**options: object) -> Algorithm:
    return dynamic_treerpo(**{"steps": 6, "depth": 3, "every": 1, "clip": 0.02, **options})  # pyright: ignore


def batch_of(bench: Bench, experience: Experience, rows: torch.Tensor) -> EdgeBatch:
    items = Batch(rows, torch.zeros_like(rows), torch.arange(len(rows)), len(rows), len(rows), 1)
    return bench.batch(experience, credit(bench.context, experience), items)


def test_thirty_edges_and_sixteen_leaves_where_independent_paths_have_sixty_four() -> None:
    for iteration, start in ((0, 0), (25, 1), (24 * 20, 19)):
        cost = dynamic_treerpo().cost(iteration, 1)
        assert cost == Cost(start + 15 + 16 * (21 - start), 16, 30)
    assert mix_grpo(group=16).cost(0, 1).trained_edges == 64
    assert dynamic_treerpo(trees=2, branches=3, depth=2).cost(0, 1) == Cost(2 * (1 + 3 + 9 * 23), 18, 24)


def test_the_window_is_always_whole_and_rolls_back() -> None:
    algorithm = dynamic_treerpo(every=1)
    for m in range(50):
        plan = algorithm.plan(m, 0)
        noisy = {i for i, s in zip(plan.step, plan.stochastic, strict=True) if s}
        assert noisy == set(range(m % 21, m % 21 + 4)) and plan.cost().leaves == 16


def test_leaf_pairs_share_their_prefix_to_the_last_bit() -> None:
    algorithm = tree()
    assert algorithm.dynamics is not None
    forest = rollout(
        [algorithm.plan(1, 0)],
        algorithm.dynamics,
        linear(6, 3.0),
        lambda x, s, r: x.sin(),
        Noise(2),
        shape=(3,),
        keep="all",
    )
    path: list[dict[int, int]] = [{} for _ in range(8)]
    for e, leaf in zip(*(t.tolist() for t in forest.descent), strict=True):
        path[leaf][int(forest.edges.step[e])] = int(forest.edges.child[e])
    for a in range(8):
        for b in range(a):
            shared = 1 + 3 - (a ^ b).bit_length()  # the ODE step before the window, and the tree's common levels
            same = [path[a][i] == path[b][i] for i in range(6)]
            assert same == [i < shared for i in range(6)]
    assert len(torch.unique(forest.nodes[forest.leaves.node], dim=0)) == 8


def test_noise_grows_linearly_with_depth_and_is_in_the_log_prob() -> None:
    algorithm = dynamic_treerpo(steps=8, growth=0.8, every=1)
    assert algorithm.dynamics is not None
    grid = linear(8, 3.0).double()
    predict = lambda x, sigma, rows: 0.4 * x  # noqa: E731
    plans = [algorithm.plan(2, 0)] * 40
    forest = rollout(
        plans, algorithm.dynamics, grid, predict, Noise(3), shape=(50,), store_dtype=torch.float64, keep_mean=True
    )
    edges = forest.edges
    assert edges.mean is not None
    for k, step in enumerate(range(2, 6)):
        here = edges.step == step
        factor = 1 + 0.8 * k / 4
        torch.testing.assert_close(edges.scale[here], torch.full((int(here.sum()),), factor))
        sigma, delta = float(grid.sigmas[step]), float(grid.delta(torch.tensor(step)))
        std = 0.7 * factor * math.sqrt(sigma / (1 - sigma) * delta)
        y, mean = forest.nodes[edges.child[here]], edges.mean[here]
        assert float((y - mean).std()) == pytest.approx(std, rel=0.05)
        density = torch.distributions.Normal(mean, std).log_prob(y).mean(1)
        torch.testing.assert_close(edges.log_prob[here], density, rtol=1e-6, atol=1e-6)
    even = dynamic_treerpo(growth=0.0).plan(0, 0)
    assert set(even.scale) == {1.0}


def test_weights_count_paths_and_their_gradient_is_the_sum_over_paths() -> None:
    bench = Bench(algorithm=tree(imitation=0.0, sensitivity=0.0, trees=1))
    experience = bench.collect()
    given, edges = credit(bench.context, experience), experience.whole.edges
    torch.testing.assert_close(given.weight, 2.0 ** (2 - edges.step.float()) / (24 / 14))
    assert float(given.weight.mean()) == pytest.approx(1)
    # Eq. 9 before an update: the mean over leaves and steps of A_leaf·r, whose gradient is A_leaf·∇log p
    score = experience.scores.value[:, 0].view(-1, 8)
    z = ((score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True)).flatten()
    edge, leaf = experience.whole.descent
    per_path = torch.zeros(len(edges)).index_add(0, edge, z[leaf]) / len(edge)
    torch.testing.assert_close(given.advantage.value * given.weight / len(edges), per_path, rtol=1e-3, atol=1e-6)


def test_with_one_child_no_pull_and_a_fixed_clip_it_is_mix_grpo() -> None:
    plain = {"growth": 0.0, "sensitivity": 0.0, "imitation": 0.0}
    ours = tree(trees=6, branches=1, **plain)
    other = mix_grpo(steps=6, group=6, window=3, every=1, clip=0.02, shared_noise=False)
    assert all(ours.plan(m, 0) == other.plan(m, 0) for m in range(3))
    torch.testing.assert_close(gradient(ours), gradient(other), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second(ours), second(other), rtol=1e-5, atol=1e-6)


def test_without_sensitivity_and_pull_it_is_the_clipped_ratio_on_the_tree() -> None:
    plain = tree(sensitivity=0.0, imitation=0.0)
    bare = replace(
        plain.taught(clipped(0.02, 0.02)),
        credit=replace(plain.credit.inner.inner, inner=GroupZScore(by=("prompt", "step"), unbiased=True, eps=1e-8)),  # pyright: ignore
    )
    torch.testing.assert_close(second(plain), second(bare), rtol=0, atol=0)
    narrow = {"imitation": 0.0, "clip": 0.002}  # both leave 1, and clips differ
    assert not torch.equal(second(tree(**narrow)), second(tree(sensitivity=0.0, **narrow)))
    assert not torch.allclose(gradient(phased(plain, weight=weight.uniform)), gradient(plain), rtol=1e-3)


def test_the_clip_has_more_room_upward_for_good_edges_and_less_downward() -> None:
    bench = Bench(algorithm=tree(imitation=0.0))
    experience = bench.collect()
    rows = experience.whole.edges.trained.nonzero()[:, 0]
    batch = batch_of(bench, experience, rows)
    u = batch.columns["standing"]
    torch.testing.assert_close(u, batch.advantage.clamp(-1, 1))
    for shift in (0.015, 0.025, -0.015, -0.025):
        moved = replace(batch, log_prob=batch.log_prob - math.log1p(shift))
        loss = bench.context.algorithm.objective(predictors(bench.context, experience.prompts), moved)
        room = torch.where(torch.tensor(shift > 0), 0.02 * (1 + 0.5 * u), 0.02 * (1 - 0.5 * u))
        assert torch.equal(loss.metrics["outside_clip"] > 0, abs(shift) > room)


def test_the_best_path_is_the_one_of_the_highest_reward_where_advantages_are_bounded() -> None:
    bench = Bench(algorithm=tree(imitation=1.0, advantage_clip=0.3))
    experience = bench.collect()
    whole, score = experience.whole, experience.scores.value[:, 0]
    peer, (edge, leaf) = credit(bench.context, experience).advantage.peer, whole.descent
    assert peer is not None
    for prompt in whole.leaves.prompt.unique():
        mine = (whole.leaves.prompt == prompt).nonzero()[:, 0]
        best = set(edge[leaf == mine[score[mine].argmax()]].tolist())
        here = (whole.edges.prompt == prompt).nonzero()[:, 0]
        assert {int(e) for e in here if int(peer[e]) == int(e) and bool(whole.edges.trained[e])} <= best
        assert set(peer[here][whole.edges.trained[here]].tolist()) <= best


def test_the_pull_is_to_the_best_paths_velocity_and_0_on_that_path() -> None:
    bench = Bench(algorithm=tree(imitation=1.0))
    experience = bench.collect()
    edges, whole = experience.whole.edges, experience.whole
    rows = edges.trained.nonzero()[:, 0]
    batch = batch_of(bench, experience, rows)
    term = bench.context.algorithm.objective(predictors(bench.context, experience.prompts), batch).metrics["imitation"]
    sigma, policy = experience.schedule.at(batch.step), predictors(bench.context, experience.prompts)["policy"]
    edge, leaf = whole.descent
    score = experience.scores.value[:, 0]
    for slot in range(6):
        leaves = (whole.leaves.prompt == slot).nonzero()[:, 0]
        best = leaves[score[leaves].argmax()]
        path = {int(edges.step[e]): int(e) for e in edge[leaf == best]}
        for e in (edges.prompt == slot).nonzero()[:, 0].tolist():
            target = path[int(edges.step[e])]
            both = torch.tensor([e, target])
            v = policy(batch.x[both], sigma[both], batch.rows[both]).detach()
            assert float(term[e]) == pytest.approx(float((v[0] - v[1]).square().mean()), rel=1e-3, abs=1e-7)
            assert (float(term[e]) < 1e-7) == bool(edges.parent[e] == edges.parent[target])


def test_one_iteration_of_the_loop() -> None:
    check_counts(tree(stride=0))
    check_counts(tree(stride=0, kl=0.1, trees=2))
    check_first_ratio(tree())
    check_no_spread(tree())
    check_learns(tree(stride=0, sensitivity=0.0))
    check_learns(tree(stride=0, imitation=0.02))


def test_bad_arguments() -> None:
    cases = [
        ({"steps": 1}, "steps: 1 must be at least 2; nearest valid: 2"),
        ({"depth": 0}, "depth: 0 must be at least 1"),
        ({"depth": 25}, "depth: 25 leaves no step to finish by; nearest valid: 24"),
        ({"branches": 0}, "branches: 0 must be at least 1"),
        ({"branches": 1}, "branches: 1 with 1 tree leaves nothing to compare with; nearest valid: 2"),
        ({"window_end": 3}, "window_end: 3 must be in 4 … 24; nearest valid: 4"),
        ({"order": "up"}, "order: 'up' is not one of progressive, random, decay, exp_decay"),
        ({"growth": -0.1}, "growth: -0.1 must be finite and ≥ 0"),
        ({"growth": math.inf}, "growth: inf must be finite"),
        ({"sensitivity": 1.0}, "sensitivity: 1.0 must be in [0, 1)"),
        ({"imitation": -1.0}, "imitation: -1.0 must be finite and ≥ 0"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0"),
        ({"advantage_clip": -5.0}, "advantage_clip: -5.0 must be finite and above 0"),
    ]
    check_errors(dynamic_treerpo, cases)
