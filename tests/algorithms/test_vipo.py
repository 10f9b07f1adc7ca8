"""ViPO in the real loop: maps of the pictures reach the loss place by place; even maps give the scalar method back."""

from __future__ import annotations

import sys
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
    second,
)
from torch import Tensor

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.vipo import ImportanceMap, Maps, vipo
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.objective.ratio import PositionRatio, RegionRatio
from tempflow.core.plan import Cost, chain
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import linear
from tempflow.perception import FeatureMaps, HandFeatures
from tempflow.train.experience import credit


def small(**fields) -> Algorithm:
    common = {"steps": 4, "group": 5, "kind": "flow", "noise_level": 0.7, "clip": 0.3, "eps": 1e-4}
    return vipo(**{**common, "train_fraction": 0.75, **fields})


def with_maps(algorithm: Algorithm, provider) -> Algorithm:
    return replace(algorithm, observe=(ImportanceMap(provider),))


def even(media: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.ones(len(media), *size)


def left(media: Tensor, size: tuple[int, int]) -> Tensor:
    maps = torch.zeros(len(media), *size)
    maps[:, :, 0] = 1
    return maps


def test_defaults_and_cost() -> None:
    a = vipo()
    assert a.cost(0, 1) == Cost(192, 12, 108) and a.dynamics == DanceSDE(0.25)
    assert a.objective.ratio == PositionRatio() and a.objective.keeps_mean
    assert a.observe == (ImportanceMap(Maps(None, "border", "minmax")),) and a.observe[0].of == "leaf"
    assert vipo(ratio="region").objective.ratio == RegionRatio() and vipo(kind="flow").dynamics == FlowSDE(0.7)
    plan = a.plan(0, 0)
    assert set(plan.start) == {0} and not plan.stochastic[-1] and a.plan(0, 5) is plan
    drawn = {tuple(s for s, t in zip(a.plan(i, 0).step, a.plan(i, 0).trained, strict=True) if t) for i in range(5)}
    assert len(drawn) > 1
    assert vipo(train_fraction=1.0).cost(0, 1) == Cost(192, 12, 180)
    assert vipo(steps=6, train_fraction=0.01).cost(0, 1) == Cost(72, 12, 12)


@pytest.mark.parametrize("ratio", ["position", "region"])
@pytest.mark.parametrize("fields", [{}, {"kind": "dance", "noise_level": 0.3}, {"kl": 0.1}], ids=repr)
def test_in_the_loop(ratio: str, fields: dict) -> None:
    algorithm = small(ratio=ratio, **fields)
    check_counts(algorithm)
    check_first_ratio(algorithm)
    check_no_spread(algorithm)


@pytest.mark.parametrize("ratio", ["position", "region"])
def test_it_learns(ratio: str) -> None:
    check_learns(small(ratio=ratio, group=8, orient="none", normalise="mean_one"))


def test_region_with_an_even_map_is_the_scalar_method() -> None:
    ours = with_maps(small(ratio="region"), even)
    theirs = flow_grpo(steps=4, group=5, clip=0.3, kl=0.0)
    theirs = replace(theirs, plan=ours.plan, credit=ours.credit.inner)
    torch.testing.assert_close(second(ours), second(theirs), rtol=0, atol=5e-6)
    assert float((second(with_maps(small(ratio="region"), left)) - second(theirs)).abs().max()) > 1e-4


def test_position_with_an_even_map_is_not() -> None:
    """The clip decides place by place: after an update its steps differ from the scalar ratio's."""
    region, position = (with_maps(small(ratio=r, clip=1e-3), even) for r in ("region", "position"))
    assert float((second(region) - second(position)).abs().max()) > 1e-4


@pytest.mark.parametrize("ratio", ["position", "region"])
def test_places_without_a_map_get_no_gradient(ratio: str) -> None:
    """The toy's bias is one number per latent element, so its gradient shows where the loss looked."""
    bench = Bench(algorithm=with_maps(small(ratio=ratio), left))
    bench.iterate()
    bias = bench.model.network.mean.bias.grad.view(2, 2, 2)
    assert float(bias[:, :, 1].abs().max()) == 0 and float(bias[:, :, 0].abs().min()) > 0


def test_maps_reach_the_edges_of_their_own_picture() -> None:
    bench = Bench(algorithm=small(normalise="mean_one", orient="none"))
    experience = bench.collect()
    maps = experience.whole.leaves.traits["map"]
    given = credit(bench.context, experience).advantage
    edges = experience.whole.edges
    assert maps.shape == (30, 2, 2) and bool((maps >= 0).all())
    assert torch.equal(given.columns["map"], maps[edges.prompt * 5 + edges.root])
    assert float((maps - maps.mean((1, 2), keepdim=True)).abs().max()) > 0.1


def test_the_default_maps_are_the_rooms_own_on_the_latents_grid() -> None:
    media = torch.randint(0, 255, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for orient in ("border", "reverse", "none"):
        for normalise in ("minmax", "mean_one"):
            want = FeatureMaps(HandFeatures(), orient=orient, normalise=normalise)(media, (4, 6))
            assert torch.equal(vipo(orient=orient, normalise=normalise).observe[0].provider(media, (4, 6)), want)


def test_dino_is_loaded_when_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sys.modules[vipo.__module__], "_dino", lambda path: asked.append(path) or HandFeatures(4))
    algorithm = vipo(dino="some/folder")
    assert asked == []
    media = torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8)
    assert algorithm.observe[0].provider(media, (4, 4)).shape == (2, 4, 4) and asked == ["some/folder"]


def test_maps_have_the_latents_rows_and_columns() -> None:
    forest = rollout([chain(4, 2)], FlowSDE(), linear(4), lambda x, s, r: x, Noise(0), shape=(5, 2, 3))
    assert ImportanceMap(even)(forest, torch.zeros(2, 4, 6, 3, dtype=torch.uint8)).shape == (2, 2, 3)


def test_packed_latents_are_refused() -> None:
    forest = rollout([chain(4, 2)], FlowSDE(), linear(4), lambda x, s, r: x, Noise(0), shape=(9, 4))
    with pytest.raises(
        ValueError, match=r"nodes: latents \[9, 4\] have no rows and columns; nearest valid: \[C, h, w\]"
    ):
        ImportanceMap(even)(forest, torch.zeros(2, 4, 4, 3, dtype=torch.uint8))


def test_bad_arguments() -> None:
    check_errors(
        vipo,
        [
            ({"steps": 1}, "steps: 1 must be at least 2, as the last one is not trained"),
            ({"group": 1}, "group: 1 must be at least 2"),
            ({"kind": "ode"}, "kind: 'ode' is not one of 'dance', 'flow'"),
            ({"noise_level": 0.0}, "noise_level: 0.0 must be finite and above 0; 0.25 is usual"),
            ({"train_fraction": 0.0}, "train_fraction: 0.0 must be finite and above 0; 0.6 is usual"),
            ({"ratio": "patch"}, "ratio: 'patch' is not one of 'position', 'region'"),
            ({"orient": "edge"}, "orient: 'edge' is not one of 'border', 'reverse', 'none'"),
            ({"normalise": "sum"}, "normalise: 'sum' is not one of 'minmax', 'mean_one'"),
            ({"clip": 0.0}, "clip: 0.0 must be finite and above 0; 0.0001 is usual"),
            ({"kl": -1.0}, "kl: -1.0 must be"),
            ({"advantage_clip": 0.0}, "advantage_clip: 0.0 must be finite and above 0"),
        ],
    )
