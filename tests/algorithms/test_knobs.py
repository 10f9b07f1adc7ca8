"""RLOO, Dr. GRPO, REINFORCE++, DAPO, GSPO, CISPO and SAPO: what each changes of Flow-GRPO, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake import PROMPTS, Bench, brightness
from loop_checks import (
    check_learns,
    check_no_spread,
    check_same_gradient,
    check_same_runs,
    check_sound,
    partly_flat,
    refuses,
    second,
)

from tempflow.algorithms import flow_grpo
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.cispo import cispo
from tempflow.algorithms.dapo import dapo
from tempflow.algorithms.dr_grpo import dr_grpo
from tempflow.algorithms.gspo import gspo
from tempflow.algorithms.reinforce_pp import reinforce_pp
from tempflow.algorithms.rloo import rloo
from tempflow.algorithms.sapo import sapo
from tempflow.core.credit import DynamicSampling, GroupZScore
from tempflow.core.objective.clip import Clip, Score, SoftGate, Truncate
from tempflow.core.objective.ratio import ChunkRatio, PolicyRatio, clipped
from tempflow.core.objective.regularizer import KLForm
from tempflow.core.plan import Cost
from tempflow.train.experience import credit

Make = Callable[..., Algorithm]
KNOBS: tuple[Make, ...] = (rloo, dr_grpo, reinforce_pp, dapo, gspo, cispo, sapo)
TOY: dict[str, Any] = {"steps": 4, "group": 6, "kl": 0.0}
"""Of tests/train's toy: eight latent elements, so ratios stray far and clips are wide."""

WIDE: dict[Make, dict[str, Any]] = {
    rloo: {"clip": 0.02},
    dr_grpo: {"clip": 0.02},
    reinforce_pp: {"clip": 0.02},
    dapo: {"clip": 0.02, "clip_high": 0.03},
    gspo: {"clip": 0.02},
    cispo: {"clip": 0.02},
    sapo: {"temperature": 50.0, "temperature_negative": 52.5},
}
by_name = pytest.mark.parametrize("make", KNOBS, ids=lambda f: f.__name__)


def toy(make: Make, **changes: Any) -> Algorithm:
    return make(**{**TOY, **WIDE.get(make, {"clip": 0.02}), **changes})


def plain(**changes: Any) -> Algorithm:
    return toy(flow_grpo, **{"std": "group", **changes})


# ------------------------------------------------------------------------------------------------------- all seven
@by_name
def test_first_pass_counts_and_batch_sizes(make: Make) -> None:
    check_sound(toy(make))
    check_sound(toy(make, kl=0.1, train_steps=2))


@by_name
def test_equal_rewards_teach_nothing(make: Make) -> None:
    check_no_spread(toy(make))


@by_name
def test_rewards_rise(make: Make) -> None:
    check_learns(toy(make), rise=0.05)


@by_name
def test_plans_and_dynamics_are_flow_grpos(make: Make) -> None:
    base = flow_grpo()
    assert (make().name, make().dynamics, make().first.weight) == (make.__name__, base.dynamics, base.first.weight)
    assert make().plan(3, 1) is base.plan(3, 1) and make().plan(0, 0).cost() == Cost(240, 24, 216)
    for iteration in range(4):
        assert make(train_steps=2).plan(iteration, 0) is flow_grpo(train_steps=2).plan(iteration, 5)


@by_name
@pytest.mark.parametrize("form", ["exact", "drift", "velocity", "k1", "k2", "k3"])
def test_every_kl_form_is_at_hand(make: Make, form: KLForm) -> None:
    algorithm = toy(make, kl=0.3, kl_form=form)
    assert isinstance(algorithm.objective, PolicyRatio)
    (term,) = algorithm.objective.regularizers
    assert (term.coefficient, getattr(term, "form", "")) == (0.3, form)
    assert algorithm.sets == ("reference",) and toy(make, kl=0.0, kl_form=form).sets == ()


@by_name
def test_every_argument_is_explained(make: Make) -> None:
    text = inspect.cleandoc(make.__doc__ or "").partition("Args:\n")[2]
    for name in inspect.signature(make).parameters:
        assert f"\n    {name}: " in f"\n{text}"


def test_kl_forms_pull_alike_in_the_real_loop() -> None:
    """Pulled alone, from the second update on: sampled forms are near the exact KL."""
    zero = {"reward": lambda images, prompts: [r * 1e-6 for r in brightness(images, prompts)]}
    values: dict[str, float] = {}
    for form in ("exact", "k2", "k3"):
        bench = Bench(algorithm=plain(kl=1.0, kl_form=form, group=24), updates=2, rate=0.2, **zero)
        bench.iterate(0)
        values[form] = bench.iterate(1)["kl"]
    assert values["exact"] > 1e-3
    assert values["k2"] == pytest.approx(values["exact"], rel=0.3)
    assert values["k3"] == pytest.approx(values["exact"], rel=0.3)


# ------------------------------------------------------------------------------------------------- RLOO, Dr. GRPO
def test_rloo_is_n_over_n_minus_one_times_dr_grpo() -> None:
    bench = Bench(algorithm=toy(dr_grpo))
    experience = bench.collect()
    dr = credit(bench.context, experience).advantage
    lo = toy(rloo).credit(experience.scores, experience.whole)
    torch.testing.assert_close(lo.value, dr.value * 6 / 5, rtol=1e-6, atol=1e-9)
    edge, leaf = experience.whole.descent
    r = experience.scores.value[:, 0].double().numpy().reshape(6, 6)
    others = (r.sum(1, keepdims=True) - r) / 5
    np.testing.assert_allclose(lo.value[edge], (r - others).reshape(-1)[leaf], atol=1e-6)
    check_same_gradient(toy(rloo), toy(dr_grpo), factor=6 / 5)


def test_rloo_without_a_clip_is_the_score_function_and_first_steps_agree() -> None:
    free = toy(rloo, clip=None, kl=0.2)
    assert isinstance(free.objective, PolicyRatio)
    assert (
        isinstance(free.objective.clip, Score)
        and free.objective.regularizers == toy(rloo, kl=0.2).objective.regularizers
    )  # type: ignore[union-attr]
    check_same_gradient(toy(rloo, clip=None), toy(rloo))
    a, b = second(toy(rloo, clip=None)), second(toy(rloo))
    assert not torch.equal(a, b)  # then they part


def test_dr_grpo_is_flow_grpo_with_its_division_undone() -> None:
    """One prompt: a group's standard deviation is then one factor."""
    bench = Bench(algorithm=plain(eps=0.0, advantage_clip=None))
    experience = bench.collect(prompts=PROMPTS[:1])
    z = credit(bench.context, experience).advantage.value
    raw = toy(dr_grpo).credit(experience.scores, experience.whole).value
    spread = experience.scores.value.double().std(unbiased=False)
    torch.testing.assert_close(raw, (z.double() * spread).float(), rtol=1e-5, atol=1e-7)
    assert toy(dr_grpo).objective == plain(kl_form="exact").objective


def test_bounds_of_raw_advantages_are_in_units_of_the_reward() -> None:
    bench = Bench(algorithm=toy(dr_grpo, advantage_clip=0.01))
    value = credit(bench.context, bench.collect()).advantage.value
    assert float(value.abs().max()) == pytest.approx(0.01)


# ------------------------------------------------------------------------------------------------------ REINFORCE++
def test_reinforce_pp_against_numpy() -> None:
    bench = Bench(algorithm=toy(reinforce_pp))
    experience = bench.collect()
    edge, leaf = experience.whole.descent
    r = experience.scores.value[:, 0].double().numpy()
    d = r.reshape(6, 6) - r.reshape(6, 6).mean(1, keepdims=True)
    want = {"batch": (r - r.mean()) / r.std(), "group": (d / np.sqrt((d**2).mean())).reshape(-1)}
    for baseline, advantage in want.items():
        got = toy(reinforce_pp, baseline=baseline).credit(experience.scores, experience.whole).value
        np.testing.assert_allclose(got[edge], advantage[leaf], atol=1e-4)
    assert np.abs(want["batch"] - want["group"]).max() > 0.1


def test_reinforce_pp_takes_k2_and_the_batch_by_default() -> None:
    algorithm = reinforce_pp()
    assert algorithm.credit == GroupZScore(center="batch", scale="pooled", eps=1e-8, clip=5.0)
    assert algorithm.objective == clipped(1e-4, 1e-4, 0.004, "k2")


def test_a_flat_prompt_moves_with_the_batch_as_baseline_only() -> None:
    trained = {}
    for baseline in ("batch", "group"):
        bench = Bench(algorithm=toy(reinforce_pp, baseline=baseline), reward=partly_flat)
        trained[baseline] = bench.iterate()["trained_edges"]
    assert trained == {"batch": 108, "group": 54}


# ------------------------------------------------------------------------------------------------------------- DAPO
def test_dapo_with_equal_clips_is_flow_grpo_bitwise_where_all_groups_have_spread() -> None:
    check_same_runs(toy(dapo, clip=0.02, clip_high=0.02), plain())
    assert dapo().objective == clipped(1e-4, 1.4e-4)


def test_dapo_trains_and_averages_over_the_first_prompts_with_spread() -> None:
    """Prompts 1, 3, 5 have spread. Two are kept: the gradient is that of these two alone."""
    bench = Bench(algorithm=toy(dapo, keep=2), reward=partly_flat, max_grad_norm=1e9)
    metrics = bench.iterate()
    assert metrics["trained_edges"] == bench.counter.train == 2 * 18
    assert bench.counter.rollout == toy(dapo).cost(0, 6).forwards  # the pool is paid for
    got = {n: p.grad.clone() for n, p in bench.model.network.named_parameters() if p.grad is not None}
    other = Bench(algorithm=plain(), reward=partly_flat, max_grad_norm=1e9)
    experience = other.collect()
    given = credit(other.context, experience)
    keep = torch.isin(experience.whole.edges.prompt, torch.tensor([1, 3]))
    assert not bool(given.advantage.live[experience.whole.edges.prompt % 2 == 0].any())
    only = replace(
        given.advantage,
        ok=given.advantage.ok & keep,
        live=given.advantage.live & keep,
    )
    explicit = replace(other.context.algorithm, credit=Given(only))
    other.context = replace(other.context, algorithm=explicit)
    other.update(experience)
    for name, parameter in other.model.network.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


class Given(GroupZScore):
    """An advantage that is known already."""

    def __init__(self, advantage: Any) -> None:
        super().__init__()
        object.__setattr__(self, "advantage", advantage)

    def __call__(self, scores: Any, forest: Any) -> Any:
        return self.advantage  # type: ignore[attr-defined]


def test_dapo_doubles_the_mean_where_half_of_the_groups_are_flat() -> None:
    """The plain loss counts flat groups in its mean; here they are not there."""
    check_same_gradient(toy(dapo), plain(), factor=2.0, reward=partly_flat)
    assert toy(dapo, keep=3).credit == DynamicSampling(plain().credit, 3)


def test_clip_higher_leaves_more_room_above() -> None:
    gate = toy(dapo).objective.clip  # type: ignore[union-attr]
    assert gate == Clip(0.02, 0.03)
    a, b = (second(toy(dapo, clip=0.002, clip_high=high)) for high in (0.002, 0.004))
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- GSPO
def test_gspo_of_one_trained_step_is_flow_grpo() -> None:
    mine, other = (second(a) for a in (toy(gspo, train_steps=1), plain(train_steps=1)))
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_gspo_first_update_is_flow_grpos() -> None:
    check_same_gradient(toy(gspo), plain())


def test_gspo_has_one_ratio_a_path() -> None:
    """A path's three trained edges are one unit; that a unit's log ratio is their mean: core/objective/test_forms."""
    algorithm = toy(gspo)
    assert algorithm.objective == clipped(0.02, 0.02, ratio=ChunkRatio())
    assert gspo().objective == clipped(5e-5, 5e-5, ratio=ChunkRatio())
    experience = Bench(algorithm=algorithm).collect()
    units = algorithm.first.units(experience.whole, 0)  # type: ignore[attr-defined]
    edges = experience.whole.edges
    trained = units[edges.trained]
    assert len(torch.unique(trained)) == 36 and bool((torch.bincount(trained) == 3).all())
    path = edges.prompt[edges.trained] * 6 + edges.root[edges.trained]
    assert len(torch.unique(torch.stack([path, trained], 1), dim=0)) == 36
    a, b = second(toy(gspo, clip=0.01)), second(plain(clip=0.01))
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ CISPO, SAPO
@pytest.mark.parametrize("make", [cispo, sapo], ids=lambda f: f.__name__)
def test_soft_gates_first_update_is_flow_grpos(make: Make) -> None:
    check_same_gradient(toy(make), plain())


def test_without_bounds_both_are_the_plain_ratio() -> None:
    """Updates that stray: r·A·∇log p for all, once nothing is clipped."""
    free = {
        "cispo": second(toy(cispo, clip=1e6), rate=0.05),
        "sapo": second(toy(sapo, temperature=1e-2, temperature_negative=1e-2), rate=0.05),
        "clip": second(plain(clip=0.999999, clip_high=1e6), rate=0.05),
    }
    for name in ("cispo", "sapo"):
        torch.testing.assert_close(free[name], free["clip"], rtol=1e-3, atol=1e-4)
    tight = second(toy(sapo, temperature=200.0), rate=0.05)
    assert float((tight - free["clip"]).abs().max()) > 1e-3


def test_what_cispo_and_sapo_compose() -> None:
    assert cispo().objective.clip == Truncate(1.0, 1e-4)  # type: ignore[union-attr]
    assert sapo().objective.clip == SoftGate(1e4, 1.05e4)  # type: ignore[union-attr]
    for algorithm in (cispo(), sapo(), gspo()):
        assert algorithm.credit == flow_grpo(std="group").credit and not algorithm.sets


def test_cispo_never_blocks_an_edge() -> None:
    for make, blocked in ((cispo, False), (flow_grpo, True)):
        bench = Bench(algorithm=toy(make, clip=1e-3), updates=3)
        bench.iterate(0)
        assert (bench.iterate(1)["clip_fraction"] > 0) is blocked


# ----------------------------------------------------------------------------------------------------------- errors
@by_name
def test_shared_arguments_are_checked(make: Make) -> None:
    refuses(make, {"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained; nearest valid: 2")
    refuses(make, {"group": 1}, "group: 1 must be at least 2, or there is nothing to compare with; nearest valid: 2")
    refuses(make, {"train_steps": 12}, "train_steps: 12 must be in 1 … 9; nearest valid: 9")
    refuses(make, {"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.7 is usual")
    refuses(make, {"kl": -1.0}, "kl: -1.0 must be finite and ≥ 0")
    refuses(make, {"kl": 0.1, "kl_form": "k4"}, "kl_form: 'k4' is not one of exact, drift, velocity, k1, k2, k3")
    refuses(make, {"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (rloo, {"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
        (dr_grpo, {"clip": -1.0}, "clip: -1.0 must be finite and above 0"),
        (
            reinforce_pp,
            {"baseline": "others"},
            "baseline: 'others' is not one of 'batch', 'group'; nearest valid: 'batch'",
        ),
        (reinforce_pp, {"eps": -1.0}, "eps: -1.0 must be"),
        (dapo, {"keep": 0}, "keep: 0 must be at least 1, or None for all with spread; nearest valid: 1"),
        (dapo, {"clip_high": 0.0}, "clip_high: 0.0 must be"),
        (gspo, {"clip": 0.0}, "clip: 0.0 must be finite and above 0"),
        (cispo, {"clip_low": 1.5}, "clip_low: 1.5 must be at most 1"),
        (cispo, {"clip_low": 0.0}, "clip_low: 0.0 must be finite and above 0; 1.0 is usual"),
        (sapo, {"temperature": 0.0}, "temperature: 0.0 must be finite and above 0; 10000.0 is usual"),
        (sapo, {"temperature_negative": float("inf")}, "temperature_negative: inf must be finite and above 0"),
    ],
)
def test_bad_arguments(make: Make, arguments: dict[str, object], message: str) -> None:
    refuses(make, arguments, message)
