"""What every algorithm of the trajectory family must show: ratio 1, no gradient without spread, counted cost, size."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake import PROMPTS, same, weights
from family import FAMILY
from loop_checks import bench_of, check_counts, check_no_spread, constant, judging, partly_flat
from torch import Tensor

from tempflow import algorithms
from tempflow.algorithms import ALGORITHMS
from tempflow.algorithms.base import Algorithm
from tempflow.core.forest import Forest
from tempflow.train.step import credit

FOLDER = Path(algorithms.__file__).parent
EDGES = {name for name, make in ALGORITHMS.items() if make().draws is None}
by_name = pytest.mark.parametrize("name", FAMILY)


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


@by_name
def test_forwards_are_the_costs(name: str) -> None:
    check_counts(FAMILY[name](4))


@by_name
def test_the_first_ratio_is_exactly_one(name: str) -> None:
    """Row by row, so that rollout and training compute with the same shapes: to the last bit."""
    bench = bench_of(FAMILY[name](4), rollout_rows=1, train_rows=1)
    before = weights(bench.model)
    seen = bench.iterate()
    assert seen["log_ratio_max"] <= (0 if bench.setting.algorithm.objective.unit == "edge" else 1e-7)
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


@by_name
def test_groups_without_spread_bear_no_gradient(name: str) -> None:
    if name == "perceptual_entropy, pcvae":
        pytest.skip("its bonus is the path's log p, which is never flat")
    judge = {"judge": judging(lambda x, sigma, rows: sigma + rows)} if name == "drm_grpo" else {}
    check_no_spread(blind(FAMILY[name](4)), **judge)


@by_name
def test_flat_groups_among_others_bear_none_either(name: str) -> None:
    """Prompts 0, 2, 4 are flat: the gradient is that of the others' edges alone, and only those are computed."""
    if name.startswith(("reinforce_pp", "perceptual_entropy, pcvae", "drm_grpo")):
        pytest.skip("compared across prompts, by log p, or by a judge: a prompt of equal rewards is not flat")
    algorithm = blind(FAMILY[name](4))
    bench = bench_of(algorithm, reward=partly_flat, max_grad_norm=1e9)
    experience = bench.collect()
    given = credit(bench.setting, experience).advantage
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
