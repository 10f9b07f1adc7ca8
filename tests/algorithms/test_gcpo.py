"""GCPO in the real loop: chunks as units, what they reduce to, and draws that leave chunks out."""

from __future__ import annotations

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
    phased,
    second,
)

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.gcpo import gcpo
from tempflow.core.credit import RelativeChange
from tempflow.core.dynamics import FlowSDE
from tempflow.core.objective.clip import Clip
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.objective.ratio import ChunkRatio, clipped
from tempflow.core.plan import Cost
from tempflow.core.rollout import skeleton
from tempflow.core.schedule import linear, shifted
from tempflow.core.units import AdaptiveChunks, ChunkSampler, FixedChunks, leaf_of, whole_path
from tempflow.core.weight import uniform
from tempflow.train.experience import credit


def small(**fields) -> Algorithm:
    return gcpo(**{"steps": 5, "group": 4, "sizes": (1, 3), "share": 1.0, "clip": 0.02, **fields})


ADAPTIVE = {"sizes": None, "largest": 2}


def test_defaults_and_cost() -> None:
    a = gcpo()
    assert a.cost(0, 1) == Cost(204, 12, 192) and a.objective.unit == "chunk" and a.observe == ()
    assert a.first.units == FixedChunks((2, 3, 4, 7), ChunkSampler(0.5, False)) and a.objective.tightest_clip == 5e-5
    assert set(a.plan(0, 0).start) == {0} and len(set(gcpo(shared_noise=False).plan(0, 0).start)) == 12
    assert (a.credit.scale, a.credit.unbiased, a.credit.eps) == ("group", True, 1e-8)
    paper = gcpo(sizes=None, share=1.0)
    assert paper.first.units == AdaptiveChunks(4, ChunkSampler(1.0, False)) and paper.observe == (RelativeChange(),)
    assert gcpo(weighted=True).observe == (RelativeChange(),)


@pytest.mark.parametrize("fields", [{}, ADAPTIVE, {"kl": 0.1}], ids=["fixed", "adaptive", "kl"])
def test_in_the_loop(fields: dict) -> None:
    check_counts(small(**fields))
    check_first_ratio(small(**fields))
    check_no_spread(small(**fields))


def test_it_learns() -> None:
    check_learns(small(group=8))


@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_that_are_not_drawn_are_neither_computed_nor_counted(weighted: bool) -> None:
    """Two of four even chunks: half the edges, and a mean over those alone."""
    algorithm = small(sizes=(1, 1, 1, 1), share=0.5, weighted=weighted)
    check_counts(algorithm, share=0.5)
    bench = Bench(algorithm=algorithm)
    experience = bench.collect()
    taught = bench.items(experience, credit(bench.context, experience))
    assert taught.valid == taught.units == len(taught.row) == 6 * 4 * 2
    per_path = torch.bincount(leaf_of(experience.whole)[taught.row])
    assert bool((per_path == 2).all())
    again = bench.items(experience, credit(bench.context, experience), 1)
    assert set(again.row.tolist()) != set(taught.row.tolist())


def test_a_chunk_is_never_split_by_micro_batches() -> None:
    bench = Bench(algorithm=small(sizes=(4,)), train_rows=6)
    experience = bench.collect()
    taught = bench.items(experience, credit(bench.context, experience))
    leaf = leaf_of(experience.whole)
    for batch in taught.minibatches(6):
        assert len(batch.row) == 4 and len(leaf[batch.row].unique()) == 1
    wide = gradient(small(sizes=(1, 3)), train_rows=1000)
    narrow = gradient(small(sizes=(1, 3)), train_rows=1)
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-6 * float(wide.abs().max()))


def flow(algorithm: Algorithm, **changes) -> Algorithm:
    """Flow-GRPO with GCPO's plan and credit: what differs is the chunk alone."""
    base = flow_grpo(steps=5, group=4, clip=0.02, kl=0.0)
    return phased(replace(base, plan=algorithm.plan, credit=algorithm.credit), **changes)


def test_chunks_of_one_step_are_flow_grpo() -> None:
    ours = small(sizes=(1, 1, 1, 1), clip=1e-4)
    theirs = flow(ours, objective=clipped(1e-4, 1e-4))
    assert torch.equal(second(ours), second(theirs))
    assert float((second(small(sizes=(4,), clip=1e-4)) - second(theirs)).abs().max()) > 1e-4


def test_one_chunk_is_the_whole_paths_ratio() -> None:
    ours = small(sizes=(4,))
    theirs = flow(ours, objective=clipped(0.02, 0.02, ratio=ChunkRatio()), units=whole_path)
    assert torch.equal(second(ours), second(theirs))


def test_the_first_gradient_counts_a_chunk_once_whatever_its_length() -> None:
    """At r = 1 a chunk's gradient is the mean of its steps': Flow-GRPO's with weight T'/(K·size) on each step."""
    ours = small(sizes=(1, 3))

    def by_size(forest, schedule, dynamics):
        step = forest.edges.step
        return torch.where(step == 0, 4 / 2, 4 / 2 / 3).float()

    a, b = gradient(ours), gradient(flow(ours, weight=by_size))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))
    assert float((a - gradient(flow(ours))).abs().max()) > 1e-3 * float(a.abs().max())


def test_adaptive_chunks_come_from_the_rollouts_own_l1rel() -> None:
    bench = Bench(algorithm=small(**ADAPTIVE))
    experience = bench.collect()
    edges = experience.whole.edges
    assert edges.traits["l1rel"].shape == (len(edges),) and float(edges.traits["l1rel"].min()) > 0
    unit = bench.context.algorithm.first.units(experience.whole, 0)
    assert torch.equal(unit >= 0, edges.trained) and len(unit[unit >= 0].unique()) >= 2 * 4 * len(PROMPTS)


# ------------------------------------------------------------------------------------- what the code offers beside
def test_reweighting_is_the_codes_by_the_chunks_middle_step() -> None:
    """√((T − m)/m), m = start + size // 2: of T 17 and (2, 3, 4, 7) the steps 1, 3, 7 and 12."""
    algorithm = gcpo(reweight=True)
    forest = skeleton([algorithm.plan(0, 0)], range(1))
    found = algorithm.first.weight(forest, shifted(17), algorithm.dynamics).double()
    want = [4.0] * 2 + [2.1602468994692867] * 3 + [1.1952286093343936] * 4 + [0.6454972243679028] * 7
    by_step = [found[forest.edges.step == i] for i in range(16)]
    torch.testing.assert_close(torch.stack([v[0] for v in by_step]), torch.tensor(want, dtype=torch.float64))
    assert all(bool((v == v[0]).all()) for v in by_step)
    assert gcpo().first.weight is uniform
    plain, heavy = gradient(small(sizes=(2, 2))), gradient(small(sizes=(2, 2), reweight=True))
    assert float((heavy - plain).abs().max()) > 1e-3 * float(plain.abs().max())


def test_the_right_clip_is_its_own() -> None:
    gate = gcpo(clip_high=8e-5).objective.clip
    assert (gate.low, gate.high) == (5e-5, 8e-5) and gcpo().objective.clip == Clip(5e-5, 5e-5)


def test_the_kl_to_the_rollouts_policy_is_k3_of_a_chunks_ratio() -> None:
    """e^(old − new) − 1 − (old − new) of the chunk's mean log-probs, once a chunk, outside the clip."""
    g = torch.Generator().manual_seed(0)
    x, y, v, old = (torch.randn(4, 2, 3, generator=g, dtype=torch.float64) for _ in range(4))
    y, step, unit = x + 0.3 * y, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    grid, dynamics, one = linear(4), FlowSDE(0.7), torch.ones(4, dtype=torch.float64)
    was = dynamics.transition(x, old, grid, step, one).log_prob(y)
    batch = EdgeBatch(x, y, step, one, step, was, one * 0, one, grid, dynamics, unit=unit)
    loss = gcpo(rollout_kl=0.7).objective({"policy": lambda *_: v}, batch)
    d = (was - dynamics.transition(x, v, grid, step, one).log_prob(y)).view(2, 2).mean(1)
    want = 0.7 * (d.exp() - 1 - d).mean()
    assert float(want) > 1e-4
    torch.testing.assert_close(loss.value, want)
    torch.testing.assert_close(loss.metrics["rollout_kl"], (d.exp() - 1 - d).repeat_interleave(2))
    check_first_ratio(small(rollout_kl=1.0))
    assert torch.equal(gradient(small(rollout_kl=5.0)), gradient(small()))  # 0 where the policy has not moved
    assert not torch.equal(second(small(rollout_kl=5.0)), second(small()))


def test_weighted_draws_go_by_the_paths_own_change() -> None:
    """torch.multinomial over each picture's own chunk weights: where its latent changes most, it draws most."""
    forest = skeleton([gcpo(steps=5, group=400, sizes=(2, 2)).plan(0, 0)], range(1))
    leaf, step = leaf_of(forest), forest.edges.step
    early = leaf % 2 == 0
    change = torch.where((step < 2) == early, 9.0, 1.0)
    forest = replace(forest, edges=replace(forest.edges, traits={"l1rel": change}))
    unit = FixedChunks((2, 2), ChunkSampler(0.5, weighted=True))(forest, 0)
    first = (unit >= 0) & (step == 0)
    assert float(first[early & (step == 0)].double().mean()) == pytest.approx(0.9, abs=0.06)
    assert float(first[~early & (step == 0)].double().mean()) == pytest.approx(0.1, abs=0.06)


def test_bad_arguments() -> None:
    check_errors(
        gcpo,
        [
            ({"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained"),
            ({"group": 1}, "group: 1 must be at least 2"),
            ({"steps": 10}, "sizes: (2, 3, 4, 7) add up to 16; nearest valid: a sum of 9, steps − 1"),
            ({"sizes": (16, 0)}, "sizes: (16, 0) must be chunks of at least one step"),
            ({"sizes": ()}, "sizes: () must be chunks of at least one step"),
            ({"largest": 0}, "largest: 0 must be at least 1; nearest valid: 1"),
            ({"share": 0.0}, "share: 0.0 must be in (0, 1]"),
            ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.7 is usual"),
            ({"reweight": True, "sizes": None}, "reweight: needs sizes whose first is 2 at least, not None"),
            ({"reweight": True, "sizes": (1, 15)}, "reweight: needs sizes whose first is 2 at least, not (1, 15)"),
            ({"rollout_kl": -1.0}, "rollout_kl: -1.0 must be finite and ≥ 0"),
            ({"clip": -1.0}, "clip: -1.0 must be finite and above 0; 5e-05 is usual"),
            ({"kl": -1.0}, "kl: -1.0 must be"),
            ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0"),
        ],
    )
