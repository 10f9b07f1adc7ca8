"""`composition.how: normalised` with every algorithm: it trains, and a reward's scale plays no part."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from benchmarks.golden import model
from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import drive
from tempflow.algorithms import ALGORITHMS, Algorithm, find
from tempflow.config import Config
from tempflow.core.credit import normalised
from tempflow.train.build import composed

RATE = 2.0**-6


def summed(algorithm: Algorithm) -> Algorithm:
    return replace(algorithm, credit=normalised(algorithm.credit))


WITH_CREDIT = {name for name, make in ALGORITHMS.items() if make().rolls_out}


@pytest.mark.parametrize("name", sorted(WITH_CREDIT - {"otca"}))
def test_every_algorithm_trains_by_normalised_rewards(name: str) -> None:
    weights = drive(replace(CASES[name], reward="both"), RATE, change=summed).weights["policy"]
    assert weights.isfinite().all() and not torch.equal(weights[0], weights[-1])


def test_the_min_norm_point_joins_rewards_already() -> None:
    with pytest.raises(ValueError, match="min-norm point joins the rewards already"):
        summed(find("otca")())


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - WITH_CREDIT))
def test_where_no_credit_is_taken_there_is_nothing_to_normalise(name: str) -> None:
    config = Config.model_validate(
        {
            "name": "x",
            "iterations": 1,
            "algorithm": {"name": name},
            "rewards": [{"name": "shapes"}, {"name": "shapes_strict"}],
            "composition": {"how": "normalised"},
            "evaluation": {"metric": "shapes"},
        }
    )
    with pytest.raises(ValueError, match=f"composition.how: 'normalised', but {name} takes no credit from a rollout's"):
        composed(config, config.algorithm.build(), True, ["shapes", "shapes_strict"])


@pytest.mark.parametrize("change", [summed, None])
def test_a_rewards_scale_plays_no_part(change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a plain sum it does: a thousandfold reward is then all that counts."""
    ends, evenness = [], model.evenness
    for scale in (1000.0, 1.0):

        @functools.wraps(evenness)
        def scaled(images: list, prompts: list, scale: float = scale) -> list[float]:
            return [scale * value for value in evenness(images, prompts)]

        monkeypatch.setattr(model, "evenness", scaled)
        weights = drive(replace(CASES["flow_grpo"], reward="both"), RATE, change=change).weights["policy"]  # type: ignore[arg-type]
        ends.append(weights[1] - weights[0])
    apart = float((ends[0] - ends[1]).norm() / ends[1].norm())
    assert apart < 0.02 if change else apart > 0.1
