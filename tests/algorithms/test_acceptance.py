"""What every algorithm of the trajectory family must show: ratio 1, no gradient without spread, counted cost, size."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake import PROMPTS, Fake, TokenFake, same, weights
from family import FAMILY
from loop_checks import bench_of, check_counts, check_no_spread, constant, judging, partly_flat
from torch import Tensor

from tempflow import algorithms
from tempflow.algorithms import (
    ALGORITHMS,
    dance_grpo,
    dapo,
    ddpo,
    flash_grpo,
    flow_cps,
    flow_dppo,
    flow_grpo,
    flow_grpo_fast,
    gcpo,
    grpo_guard,
    mix_grpo,
    mix_grpo_flash,
    otca,
    pref_grpo,
    vipo,
)
from tempflow.algorithms.base import Algorithm
from tempflow.core.forest import Forest
from tempflow.train.experience import credit

FOLDER = Path(algorithms.__file__).parent
EDGES = {name for name, make in ALGORITHMS.items() if "edges" in make().first.keeps and not make().roles}
"""What learns from edges alone. One with a second role has phases of other kinds too, and tests of its own."""
PICTURES_ALONE = {
    "vipo": "a ratio at every position needs the latent's rows and columns",
    "vipo, region": "its map has the latent's rows and columns",
}
"""Algorithms that no latent of tokens can have, and why."""

on_both_shapes = pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param(name, Fake, id=name) for name in FAMILY),
        *(pytest.param(name, TokenFake, id=f"{name}, tokens") for name in FAMILY if name not in PICTURES_ALONE),
    ],
)


def test_the_family_is_whole() -> None:
    """What trains edges is of this family."""
    assert {name.partition(",")[0] for name in FAMILY} == EDGES


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_file_reads_at_a_sitting(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", sorted(EDGES))
def test_an_error_names_the_argument_it_is_about(name: str) -> None:
    """Not the field of the part that the argument ends up in."""
    known = inspect.signature(ALGORITHMS[name]).parameters
    bad = {"advantage_clip": 0.0, "std": "all", "eps": -1.0, "clip": 0.0, "kl": -1.0, "noise_level": -0.1}
    for field, value in bad.items():
        if field in known:
            with pytest.raises(ValueError, match=f"^{field}: "):
                ALGORITHMS[name](**{field: value})


@pytest.mark.parametrize("name", PICTURES_ALONE)
def test_what_needs_pictures_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"latents \[4, 2\] have no rows and columns"):
        bench_of(FAMILY[name](4), model=TokenFake()).collect()


@on_both_shapes
def test_forwards_are_the_costs(name: str, kind: type[Fake]) -> None:
    check_counts(FAMILY[name](4), model=kind())


@on_both_shapes
def test_the_first_ratio_is_exactly_one(name: str, kind: type[Fake]) -> None:
    """To the last bit, whatever the batches are, as the training forward is its own measure."""
    bench = bench_of(FAMILY[name](4), rollout_rows=11, train_rows=5, guidance=2.0, model=kind())
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["log_ratio_max"] == 0
    assert seen["clip_fraction"] == seen["outside_clip"] == 0
    assert seen["updates"] == 1 and seen["grad_norm"] > 0 and not same(weights(bench.model), before)


def blind(algorithm: Algorithm) -> Algorithm:
    """Perceptual entropy rewards different pictures: for it, they all look alike."""

    class Blind:
        name, of = "embedding", "leaf"

        def __call__(self, forest: Forest, media: Tensor) -> Tensor:
            return torch.full((len(media), 3), 0.1)

    seen = tuple(Blind() if o.name == "embedding" else o for o in algorithm.observe)
    return replace(algorithm, observe=seen)  # type: ignore[arg-type]


@on_both_shapes
def test_groups_without_spread_bear_no_gradient(name: str, kind: type[Fake]) -> None:
    if name == "perceptual_entropy, pcvae":
        pytest.skip("its bonus is the path's log p, which is never flat")
    judge = {"latent_reward": judging(lambda x, sigma, rows: sigma + rows)} if name.startswith("drm_grpo") else {}
    check_no_spread(blind(FAMILY[name](4)), model=kind(), **judge)


@on_both_shapes
def test_flat_groups_among_others_bear_none_either(name: str, kind: type[Fake]) -> None:
    """Prompts 0, 2, 4 are flat: the gradient is that of the others' edges alone, and only those are computed."""
    if name.startswith(("reinforce_pp", "perceptual_entropy, pcvae", "drm_grpo")):
        pytest.skip("compared across prompts, by log p, or by a judge: a prompt of equal rewards is not flat")
    algorithm = blind(FAMILY[name](4))
    bench = bench_of(algorithm, reward=partly_flat, max_grad_norm=1e9, model=kind())
    experience = bench.collect()
    given = credit(bench.context, experience).advantage
    flat = experience.whole.edges.prompt % 2 == 0
    assert not bool(given.live[flat].any()) and bool((given.value[flat] == 0).all())
    assert bool(given.value[~flat].any())
    # were their edges computed, this would show: their states are spoilt
    states = experience.forest.edges.child[flat]
    experience.forest.nodes[states] = math.nan
    seen = bench.update(experience)
    trained = experience.whole.edges.trained
    assert seen["trained_edges"] == bench.counter.train == int((trained & ~flat).sum()) and seen["updates"] == 1
    assert seen["zero_variance"] == pytest.approx(0.5)
    grads = torch.cat([p.grad.flatten() for p in bench.model.network.parameters() if p.grad is not None])
    assert bool(grads.isfinite().all()) and float(grads.abs().max()) > 0


POPULATION, UNBIASED = 0, 1
GROUP_STD: dict[str, tuple[int, Algorithm]] = {
    "flow_grpo": (POPULATION, flow_grpo(4, 6, std="group", eps=0.0)),
    "flow_grpo_fast": (POPULATION, flow_grpo_fast(4, 6, 2, std="group", eps=0.0)),
    "flow_cps": (POPULATION, flow_cps(4, 6, std="group", eps=0.0)),
    "flow_dppo": (POPULATION, flow_dppo(4, 6, 2, std="group", eps=0.0)),
    "grpo_guard": (POPULATION, grpo_guard(4, 6, std="group", eps=0.0)),
    "flash_grpo": (POPULATION, flash_grpo(4, 6, std="group", eps=0.0)),
    "ddpo": (POPULATION, ddpo(4, 6, eps=0.0)),
    "dapo": (POPULATION, dapo(4, 6, eps=0.0)),
    "dance_grpo": (UNBIASED, dance_grpo(4, 6)),
    "mix_grpo": (UNBIASED, mix_grpo(4, 6, 2)),
    "mix_grpo_flash": (UNBIASED, mix_grpo_flash(4, 6, 2, rewards="scores")),
    "gcpo": (UNBIASED, gcpo(4, 6, (3,))),
    "otca": (UNBIASED, otca(4, 6, tcd=False)),
    "vipo": (UNBIASED, vipo(4, 6)),
    "pref_grpo": (UNBIASED, pref_grpo(4, 6, None, win_rate=False)),
}


@pytest.mark.parametrize("name", GROUP_STD)
def test_whose_standard_deviation_it_is(name: str) -> None:
    """The group's, of n or of n − 1: a factor of 0.91 at six pictures."""
    ddof, algorithm = GROUP_STD[name]
    experience = bench_of(algorithm).collect()
    reward = experience.scores.value[:, 0].double().view(6, 6)
    want = (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True, correction=ddof)
    edge, leaf = experience.whole.descent
    got = algorithm.credit(experience.scores, experience.whole).value[edge]
    torch.testing.assert_close(got.double(), want.flatten()[leaf], rtol=1e-4, atol=1e-5)


def test_zero_variance_tells_of_prompts_that_a_credit_leaves_out() -> None:
    """DAPO trains none of the flat prompts, nor more than `keep` others: the metric is the whole pool's."""
    for changes in ({}, {"prompts": 1}):
        algorithm = FAMILY["dapo"](4)
        algorithm = replace(algorithm, credit=replace(algorithm.credit, **changes))  # type: ignore[type-var]
        seen = bench_of(algorithm, reward=partly_flat).iterate()
        assert seen["zero_variance"] == pytest.approx(0.5)
        assert seen["trained_edges"] == len(changes or PROMPTS[::2]) * 18
    assert bench_of(FAMILY["dapo"](4)).iterate()["zero_variance"] == 0
    assert bench_of(FAMILY["dapo"](4), reward=constant).iterate()["zero_variance"] == 1
