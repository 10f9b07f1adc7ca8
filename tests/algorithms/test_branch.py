"""BranchGRPO: its tree, back-ups, pruning and noise law, what it reduces to, and one iteration of the real loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake import PROMPTS, Bench
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    gradient,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.branch_grpo import branch_grpo
from tempflow.algorithms.dance_grpo import dance_grpo
from tempflow.core.dynamics import DanceSDE
from tempflow.core.plan import Cost, Plan
from tempflow.core.rollout import Noise, rollout, skeleton
from tempflow.core.schedule import linear
from tempflow.train.experience import credit


def branch(**options: object) -> Algorithm:
    return branch_grpo(**{"steps": 6, "splits": (0, 1, 3), "clip": 0.05, **options})  # pyright: ignore


def steps(plan: Plan, which: str) -> list[int]:
    flags: tuple[bool, ...] = getattr(plan, which)
    return sorted({i for i, flag in zip(plan.step, flags, strict=True) if flag})


def test_edges_forwards_and_leaves_by_the_formula() -> None:
    assert branch_grpo().cost(0, 1) == Cost(203, 16, 202)
    for splits, branches, trees in (((0, 3, 6, 9), 2, 1), ((1, 2), 3, 2), ((0,), 5, 1)):
        nodes = [trees * branches ** sum(s < i for s in splits) for i in range(21)]
        plan = branch_grpo(splits=splits, branches=branches, trees=trees).plan(0, 0)
        assert plan.cost() == Cost(sum(nodes[:20]), nodes[20], sum(nodes[1:20]))
        assert len(plan.parent) == sum(nodes[1:])


def test_split_edges_are_drawn_with_the_scaled_law_and_scored_by_that_law() -> None:
    algorithm = branch_grpo(steps=6, splits=(0, 2), split_scale=3.0)
    assert isinstance(algorithm.dynamics, DanceSDE)
    grid = linear(6, 3.0).double()
    predict = lambda x, sigma, rows: 0.4 * x - 0.1  # noqa: E731
    forest = rollout(
        [algorithm.plan(0, 0)] * 50,
        algorithm.dynamics,
        grid,
        predict,
        Noise(3),
        shape=(40,),
        store_dtype=torch.float64,
        keep_mean=True,
    )
    edges = forest.edges
    assert edges.mean is not None
    for step in range(5):
        scale, delta, sigma = (
            (3.0 if step in (0, 2) else 1.0),
            float(grid.delta(torch.tensor(step))),
            float(grid.sigmas[step]),
        )
        rate = 0.3 * scale
        here = edges.step == step
        x, y = forest.nodes[edges.parent[here]], forest.nodes[edges.child[here]]
        v = predict(x, None, None)
        mean = x - delta * (v + rate**2 / (2 * sigma) * (x + (1 - sigma) * v))
        torch.testing.assert_close(edges.mean[here], mean, rtol=1e-9, atol=1e-9)
        std = rate * math.sqrt(delta)
        assert float((y - mean).std()) == pytest.approx(std, rel=0.05)
        density = torch.distributions.Normal(mean, std).log_prob(y).mean(1)
        torch.testing.assert_close(edges.log_prob[here], density, rtol=1e-6, atol=1e-9)


def test_root_value_is_the_mean_leaf_reward_and_depths_are_standardised_per_tree() -> None:
    # where one edge leaves each root it is worth what the root is; a failed leaf counts for nothing
    late = skeleton([branch(trees=2, splits=(1, 3)).plan(0, 0)], range(1))
    score = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
    ok = torch.tensor([True] * 5 + [False, True, True])
    value, valid = late.backup(torch.where(ok, score, math.nan), ok)
    first = late.edges.step == 0
    assert value[first].tolist() == pytest.approx([9 / 4, 13 / 3]) and bool(valid[first].all())
    bench = Bench(algorithm=branch(trees=2))
    experience = bench.collect()
    whole, scores = experience.whole, experience.scores.value[:, 0].double()
    got = credit(bench.context, experience).advantage
    edge, leaf = whole.descent
    for tree in range(2):
        for step in range(5):
            here = ((whole.edges.prompt == 1) & (whole.edges.root == tree) & (whole.edges.step == step)).nonzero()[:, 0]
            value = torch.stack([scores[leaf[edge == e]].mean() for e in here])
            want = (value - value.mean()) / (value.std() + 1e-8)
            torch.testing.assert_close(got.value[here].double(), want, rtol=1e-4, atol=1e-4)


def test_the_deepest_edges_have_plain_grpos_advantages() -> None:
    bench = Bench(algorithm=branch())
    experience = bench.collect()
    got = credit(bench.context, experience).advantage.value[experience.whole.edges.step == 4]
    score = experience.scores.value[:, 0].view(len(PROMPTS), 8)
    want = (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True)
    torch.testing.assert_close(got, want.flatten(), rtol=1e-4, atol=1e-4)


def test_without_splits_it_is_dance_grpo() -> None:
    ours = branch(splits=(), trees=6, value="leaves", clip=0.02)
    other = dance_grpo(steps=6, group=6, fraction=1.0, shared_noise=False, clip=0.02)
    assert ours.plan(0, 0) == other.plan(0, 0)
    torch.testing.assert_close(gradient(ours), gradient(other), rtol=1e-5, atol=1e-7)


def test_before_the_first_split_there_is_nothing_to_compare() -> None:
    seen = Bench(algorithm=branch(splits=(2, 3))).iterate()
    assert seen["trained_edges"] == len(PROMPTS) * (2 + 4 + 4)
    assert seen["zero_variance"] == pytest.approx(2 / 12)


def test_depth_pruning_trains_fewer_steps_of_the_same_rollout() -> None:
    full, pruned = branch_grpo().plan(0, 0), branch_grpo(prune_steps=(15, 16, 17)).plan(0, 0)
    assert steps(pruned, "trained") == [i for i in range(19) if i not in (15, 16, 17)]
    assert replace(pruned, trained=full.trained) == full


def test_the_pruned_steps_slide_towards_the_noise_and_stop() -> None:
    algorithm = branch_grpo(prune_steps=(17, 15, 16), prune_every=30)

    def pruned(iteration: int) -> set[int]:
        return set(range(19)) - set(steps(algorithm.plan(iteration, 0), "trained"))

    assert pruned(0) == pruned(29) == {15, 16, 17}
    assert pruned(30) == {14, 15, 16} and pruned(60) == {13, 14, 15}
    assert pruned(179) == {10, 11, 12} and pruned(180) == pruned(209) == {9, 10, 11}
    assert pruned(210) == pruned(10_000) == {8, 9, 10}  # the last split is at 9
    assert algorithm.plan(30, 0) is algorithm.plan(59, 4)
    early = branch_grpo(prune_steps=(15,), prune_every=1, prune_stop=3).plan(10_000, 0)
    assert 3 not in steps(early, "trained") and len(steps(early, "trained")) == 18
    before = branch_grpo(prune_steps=(2,), prune_every=1).plan(50, 0)  # already nearer the noise than its stop
    assert 2 not in steps(before, "trained")


def test_width_pruning_keeps_paths_of_the_chosen_leaves_and_all_of_the_shared_ones() -> None:
    bench = Bench(algorithm=branch())
    experience = bench.collect()
    edges = experience.whole.edges
    for width, kept in (("branch", 4), ("extremes", 4)):
        got = credit(replace(bench.context, algorithm=branch(width=width)), experience).advantage
        full = credit(bench.context, experience).advantage
        deepest = got.ok & (edges.step == 4)
        for slot in range(len(PROMPTS)):
            here = deepest & (edges.prompt == slot)
            assert int(here.sum()) == kept
            order = experience.scores.value[:, 0][experience.whole.leaves.prompt == slot]
            chosen = got.ok[(edges.step == 4) & (edges.prompt == slot)]
            if width == "branch":
                assert torch.equal(chosen.view(4, 2).int().argmax(1), order.view(4, 2).argmax(1))
            else:
                rank = order.argsort(descending=True)
                assert set(chosen.nonzero()[:, 0].tolist()) == set(rank[:2].tolist()) | set(rank[-2:].tolist())
        assert torch.equal(got.value[got.live], full.value[got.live])
    branchwise = credit(replace(bench.context, algorithm=branch(width="branch")), experience).advantage
    assert bool(branchwise.ok[edges.step < 3].all())
    check_counts(branch(width="branch"), share=(2 + 4 + 4 + 4 + 4) / (2 + 4 + 4 + 8 + 8))


def test_extremes_are_the_prompts_among_several_trees_too() -> None:
    bench = Bench(algorithm=branch(trees=2, width="extremes", width_keep=0.25))
    experience = bench.collect()
    got, edges = credit(bench.context, experience).advantage, experience.whole.edges
    for slot in range(len(PROMPTS)):
        order = experience.scores.value[:, 0][experience.whole.leaves.prompt == slot].argsort(descending=True)
        chosen = got.ok[(edges.step == 4) & (edges.prompt == slot)]
        assert set(chosen.nonzero()[:, 0].tolist()) == {*order[:2].tolist(), *order[-2:].tolist()}


def test_mixed_mode_is_noisy_in_the_window_and_at_splits() -> None:
    plan = branch_grpo(noisy_window=4).plan(0, 0)
    assert steps(plan, "stochastic") == steps(plan, "trained") == [0, 1, 2, 3, 6, 9]
    assert plan.cost().forwards == branch_grpo().cost(0, 1).forwards and plan.cost().trained_edges == 2 * 3 + 4 + 8 + 16
    assert steps(branch_grpo(noisy_window=0).plan(0, 0), "stochastic") == [0, 3, 6, 9]
    assert branch_grpo(noisy_window=20).plan(0, 0) == branch_grpo().plan(0, 0)


def test_softmax_differs_from_the_mean_and_is_it_where_steps_are_sure() -> None:
    assert not torch.allclose(gradient(branch(value="softmax")), gradient(branch()), rtol=1e-3)
    bench = Bench(algorithm=branch(value="softmax"))
    experience = bench.collect()
    traits = experience.whole.edges.traits
    torch.testing.assert_close(traits["log_prob"], experience.forest.edges.log_prob)
    flat = replace(experience.whole.edges, traits={"log_prob": torch.zeros_like(traits["log_prob"])})
    even = replace(experience, whole=replace(experience.whole, edges=flat))
    got = credit(bench.context, even).advantage.value
    want = credit(replace(bench.context, algorithm=branch()), experience).advantage.value
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_one_iteration_of_the_loop() -> None:
    check_counts(branch(branches=3))  # with three, pictures of few grey levels have no group of equal means
    check_counts(branch(branches=3, noisy_window=2, kl=0.1))
    check_counts(branch(trees=2, value="leaves", prune_steps=(4,)))
    for algorithm in (branch(), branch(value="softmax", width="extremes"), branch(value="leaves")):
        check_first_ratio(algorithm)
        check_no_spread(algorithm)
    check_learns(branch(noise_level=0.5))


def test_bad_arguments() -> None:
    cases = [
        ({"steps": 1}, "steps: 1 must be at least 2"),
        ({"trees": 0}, "trees: 0 must be at least 1"),
        ({"branches": 1}, "branches: 1 must be at least 2, or a split is none; nearest valid: 2"),
        ({"splits": (0, 19)}, "splits: 19 must be in 0 … 18; nearest valid: 18"),
        ({"splits": ()}, "splits: () leaves nothing to compare with; nearest valid: (0,)"),
        ({"splits": (), "trees": 4}, "splits: () leaves nothing to compare with"),
        ({"prune_steps": (-1,)}, "prune_steps: -1 must be in 0 … 18; nearest valid: 0"),
        ({"prune_every": 0}, "prune_every: 0 must be at least 1"),
        (
            {"prune_steps": (15,), "prune_every": 1, "prune_stop": -3},
            "prune_stop: -3 is no end of (15,) by 1; nearest valid: None",
        ),
        (
            {"prune_steps": (15,), "prune_every": 1, "prune_stop": 16},
            "prune_stop: 16 is no end of (15,) by 1",
        ),
        ({"prune_steps": (15,), "prune_stop": 3}, "prune_stop: 3 is no end of (15,) by None"),
        ({"noisy_window": -1}, "noisy_window: -1 must be at least 0"),
        ({"value": "max"}, "value: 'max' is not one of 'mean', 'softmax', 'leaves'"),
        ({"width": "half"}, "width: 'half' is not one of 'all', 'branch', 'extremes'"),
        ({"width_keep": 0.0}, "width_keep: 0.0 must be in (0, 1]; 0.5 is usual"),
        ({"split_scale": 0.0}, "split_scale: 0.0 must be finite and above 0; 4.0 is usual"),
        ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0"),
        ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.001 is usual"),
        ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0"),
        ({"prune_steps": tuple(range(19))}, "plan: trains none of its edges"),
    ]
    check_errors(branch_grpo, cases)
