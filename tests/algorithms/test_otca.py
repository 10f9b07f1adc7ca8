"""OTCA in the real loop: what each of its two corrections does, and what is left without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake import PROMPTS, Bench
from loop_checks import (
    check_counts,
    check_errors,
    check_first_ratio,
    check_learns,
    check_no_spread,
    second,
    two_rewards,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.otca import otca
from tempflow.core.credit import GroupZScore, MinNorm, Progress, StepCredit
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.plan import Cost
from tempflow.core.units import leaf_of
from tempflow.train.experience import credit


def small(**fields) -> Algorithm:
    return otca(**{"steps": 5, "group": 4, "kind": "flow", "noise_level": 0.7, "clip": 0.02, "eps": 1e-4, **fields})


def test_defaults_and_cost() -> None:
    a = otca()
    assert a.cost(0, 1) == Cost(240, 12, 228) and a.dynamics == DanceSDE(0.3) and a.observe == (Progress(),)
    inner = GroupZScore(by=("prompt", "step"), unbiased=True, eps=1e-8)
    assert a.credit == StepCredit(MinNorm(inner, 0.2), "progress", 0.01)
    assert otca(tcd=False).credit == MinNorm(inner, 0.2) and otca(tcd=False).observe == ()
    assert otca(moca=False).credit == StepCredit(inner, "progress", 0.01)
    assert otca(kind="flow", noise_level=0.7).dynamics == FlowSDE(0.7)
    plan = a.plan(0, 0)
    assert set(plan.start) == {0} and not plan.stochastic[-1]
    flow = otca(kind="flow").plan(0, 0)
    assert len(set(flow.start)) == 12 and all(flow.stochastic)


@pytest.mark.parametrize("fields", [{}, {"kind": "dance", "noise_level": 0.3}, {"kl": 0.1}], ids=repr)
def test_in_the_loop(fields: dict) -> None:
    check_counts(small(**fields))
    check_first_ratio(small(**fields))
    check_no_spread(small(**fields))


def test_it_learns() -> None:
    check_learns(small(group=8))


def test_with_both_off_it_is_flow_grpo() -> None:
    ours = small(tcd=False, moca=False)
    theirs = replace(flow_grpo(steps=5, group=4, clip=0.02, kl=0.0), credit=ours.credit)
    assert torch.equal(second(ours), second(theirs))


def test_one_reward_and_a_large_floor_are_flow_grpo_too() -> None:
    plain = second(small(tcd=False, moca=False))
    torch.testing.assert_close(second(small(tcd=False)), plain, rtol=0, atol=2e-6)
    torch.testing.assert_close(second(small(moca=False, floor=1e6)), plain, rtol=0, atol=2e-6)
    assert float((second(small(moca=False)) - plain).abs().max()) > 1e-4


def test_step_weights_come_from_the_rollouts_own_latents() -> None:
    """Mean 1 on every path, and what the states say, which credit no longer has."""
    bench = Bench(algorithm=small(moca=False))
    experience = bench.collect()
    assert len(experience.whole.nodes) == 0 or experience.whole.nodes.numel() == 0
    given = credit(bench.context, experience).advantage
    plain = bench.context.algorithm.credit.inner(experience.scores, experience.whole)
    leaf, trained = leaf_of(experience.whole), experience.whole.edges.trained
    strong = plain.value.abs() > 0.1
    w = given.value / plain.value
    for n in range(len(experience.whole.leaves)):
        mine = (leaf == n) & trained
        if bool(strong[mine].all()):
            assert float(w[mine].mean()) == pytest.approx(1, abs=1e-5) and float(w[mine].std()) > 1e-2
    assert float(w[trained & strong].min()) > 0
    # each edge's own states, found by who it is and not by its place
    forest, floor = experience.forest, bench.context.algorithm.credit.floor  # type: ignore[attr-defined]
    ends = {tuple(k): n for k, n in zip(_who(forest.leaves), forest.leaves.node.tolist(), strict=True)}
    d = {}
    for who, step, a, b in zip(
        _who(forest.edges), forest.edges.step.tolist(), forest.edges.parent, forest.edges.child, strict=True
    ):
        x, y, end = (forest.nodes[n].double().flatten() for n in (a, b, ends[tuple(who)]))
        cos = torch.nn.functional.cosine_similarity
        d[*who, step] = max(float(cos(y, end, 0) - cos(x, end, 0)), 0.0) + floor
    edges = experience.whole.edges
    for who, step, share, seen, counts in zip(
        _who(edges), edges.step.tolist(), w.tolist(), strong.tolist(), trained.tolist(), strict=True
    ):
        path = [d[*who, i] for i in range(4)]  # the last step is not trained
        if seen and counts:
            assert share == pytest.approx(d[*who, step] / (sum(path) / 4), rel=1e-4)


def _who(rows: Any) -> list[list[int]]:
    return torch.stack([rows.prompt, rows.root], 1).tolist()


def test_edges_where_two_rewards_disagree_teach_only_by_exploration() -> None:
    silent = Bench(algorithm=small(explore=0.0, tcd=False), rewards=two_rewards())
    experience = silent.collect()
    given = credit(silent.context, experience).advantage
    each = [
        GroupZScore(unbiased=True, reward_weights={n: 1.0})(experience.scores, experience.whole).value
        for n in experience.scores.names
    ]
    disagree = each[0] * each[1] < 0
    assert 0 < int(disagree.sum()) < len(disagree)
    assert torch.equal(given.live, ~disagree) and bool(given.ok.all())
    metrics = silent.update(experience)
    trained = experience.whole.edges.trained
    assert metrics["trained_edges"] == int((trained & ~disagree).sum()) < int(trained.sum())
    exploring = Bench(algorithm=small(explore=0.5, tcd=False), rewards=two_rewards())
    assert exploring.iterate()["trained_edges"] == int(trained.sum())


def test_without_moca_rewards_are_summed_by_their_weights() -> None:
    """The z-score of 2a − b, which is not 2·z(a) − z(b)."""
    bench = Bench(algorithm=small(moca=False, tcd=False, eps=1e-8), rewards=two_rewards())
    experience = bench.collect()
    scores, whole = experience.scores, experience.whole
    a, b = scores.value.double().numpy().reshape(len(PROMPTS), -1, 2).transpose(2, 0, 1)

    def z(r: np.ndarray) -> np.ndarray:
        return ((r - r.mean(1, keepdims=True)) / r.std(1, ddof=1, keepdims=True)).reshape(-1)

    weighted = bench.context.algorithm.credit.weighted(dict(zip(scores.names, (2.0, -1.0), strict=True)))
    got, leaf = weighted(scores, whole).value.numpy(), leaf_of(whole).numpy()
    np.testing.assert_allclose(got, z(2 * a - b)[leaf], rtol=1e-4, atol=1e-4)
    assert np.abs(got - (2 * z(a) - z(b))[leaf]).max() > 0.1


def test_bad_arguments() -> None:
    check_errors(
        otca,
        [
            ({"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained"),
            ({"group": 1}, "group: 1 must be at least 2"),
            ({"kind": "cps"}, "kind: 'cps' is not one of 'dance', 'flow'; nearest valid: 'dance'"),
            ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.3 is usual"),
            ({"floor": 0.0}, "floor: 0.0 must be finite and above 0; 0.01"),
            ({"explore": 1.5}, "explore: 1.5 must be in [0, 1]; nearest valid: 1.0"),
            ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
            ({"kl": -1.0}, "kl: -1.0 must be"),
            ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0"),
        ],
    )
