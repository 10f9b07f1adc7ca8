"""Flow-GRPO-Fast and Flash-GRPO: costs, where their noise is, what they reduce to, and a ratio of 1 before updates."""

from dataclasses import replace

import pytest
import torch
from loop_checks import check_same_runs, phased, second

from tempflow.algorithms import Algorithm, flash_grpo, flow_grpo, flow_grpo_fast
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.plan import Cost, Plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import shifted
from tempflow.core.weight import uniform


def noisy(plan: Plan) -> set[int]:
    return {i for i, stochastic in zip(plan.step, plan.stochastic, strict=True) if stochastic}


def test_costs() -> None:
    assert flow_grpo_fast().plan(0, 0).cost() == Cost(240, 24, 72)
    assert flash_grpo().plan(0, 0).cost() == Cost(160, 8, 8)
    shared = flow_grpo_fast(shared_prefix=True)
    for slot in range(5):
        plan = shared.plan(0, slot)
        start = min(noisy(plan))
        assert plan.cost() == Cost(start + 1 + 24 * (9 - start), 24, 72)


def test_fast_with_a_full_window_is_flow_grpo() -> None:
    full = flow_grpo_fast(window=10, kind="sde", noise_level=0.7, clip=1e-4, kl=0.04)
    other = flow_grpo(kl_form="exact")
    assert full.plan(3, 2) == other.plan(3, 2)
    assert (full.dynamics, full.credit, full.first.weight, full.objective) == (
        other.dynamics,
        other.credit,
        other.first.weight,
        other.objective,
    )


def test_flash_at_a_single_step_is_a_window_of_one() -> None:
    """All prompts at one step, so that rectified weights are 1: Flow-GRPO-Fast with Flash's dynamics, bit for bit."""
    flash = flash_grpo(steps=4, group=6, first_steps=1, clip=0.02)
    fast = flow_grpo_fast(steps=4, group=6, window=1, window_end=1, log_prob="density", clip=0.02)
    assert flash.plan(0, 0) == fast.plan(0, 0)
    check_same_runs(flash, replace(fast, dynamics=flash.dynamics))
    drawn = flash_grpo(steps=4, group=6, first_steps=3, clip=0.02)
    even = phased(drawn, weight=uniform)
    assert not torch.equal(second(drawn), second(even))  # prompts at different steps: weights are not 1


def test_all_of_a_group_are_noisy_at_one_step_which_is_their_prompts() -> None:
    plans = [flash_grpo().plan(3, slot) for slot in range(12)]
    for plan in plans:
        chains = [plan.node_root[plan.roots + e] for e, on in enumerate(plan.stochastic) if on]
        assert len(noisy(plan)) == 1 and sorted(chains) == list(range(8)) and len(set(plan.start)) == 8
    assert len({min(noisy(plan)) for plan in plans}) > 3


@pytest.mark.parametrize(("algorithm", "starts"), [(flow_grpo_fast(), range(3)), (flash_grpo(), range(10))])
def test_windows_vary_with_prompt_and_iteration_and_cover_their_range(algorithm: Algorithm, starts: range) -> None:
    seen = [[min(noisy(algorithm.plan(i, s))) for s in range(8)] for i in range(20)]
    assert {start for row in seen for start in row} == set(starts)
    assert all(len(set(row)) > 1 for row in seen[:3]) and seen[0] != seen[1]
    assert algorithm.plan(4, 1) is algorithm.plan(4, 1)


@pytest.mark.parametrize("make", [flow_grpo_fast, flash_grpo])
def test_the_ratio_is_exactly_one_before_any_update(make: type) -> None:
    algorithm: Algorithm = make(steps=6, group=4)
    predict = lambda x, sigma, rows: 0.8 * x - 0.3  # noqa: E731
    plans = [algorithm.plan(0, slot) for slot in range(4)]
    forest = rollout(plans, algorithm.dynamics, shifted(6), predict, Noise(7), shape=(4,))
    edges = forest.edges
    rows = edges.trained.nonzero()[:, 0]
    weight = algorithm.first.weight(forest, shifted(6), algorithm.dynamics)[rows]
    batch = EdgeBatch(
        forest.nodes[edges.parent[rows]],
        forest.nodes[edges.child[rows]],
        edges.step[rows],
        edges.scale[rows],
        edges.prompt[rows],
        edges.log_prob[rows],
        torch.ones(len(rows)),
        weight,
        shifted(6),
        algorithm.dynamics,
    )
    loss = algorithm.objective({"policy": predict}, batch)
    assert float(loss.metrics["log_ratio_abs"].max()) == 0.0 and len(rows) > 0


def test_flash_weights_are_one_where_all_prompts_share_a_step() -> None:
    algorithm = flash_grpo(steps=6, first_steps=1)
    plans = [algorithm.plan(0, slot) for slot in range(3)]
    forest = rollout(plans, algorithm.dynamics, shifted(6), lambda x, s, r: 0.5 * x, Noise(1), shape=(2,))
    assert torch.allclose(algorithm.first.weight(forest, shifted(6), algorithm.dynamics), torch.ones(len(forest.edges)))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (flow_grpo_fast, {"window": 11}, "window: 11 is longer than the rollout; nearest valid: 10"),
        (flow_grpo_fast, {"window_end": 2}, "window_end: 2 must be in 3 … 10; nearest valid: 3"),
        (flow_grpo_fast, {"window": 1, "window_end": 10}, "window_end: 10 lets a window of 1 fall"),
        (flow_grpo_fast, {"kind": "ode"}, "kind: 'ode' is not one of 'cps', 'sde'"),
        (flash_grpo, {"first_steps": 20}, "first_steps: 20 must be in 1 … 19; nearest valid: 19"),
        (flash_grpo, {"group": 1}, "group: 1 must be at least 2"),
    ],
)
def test_bad_arguments(make: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**arguments)
    assert message in str(caught.value)
