"""Losses on states with held elements or several streams.

Held: a loss and its gradient are those of the same objective on the free elements alone. Streams: with an advantage for
each they are the weighted mean of the objective on each stream alone, and no gradient crosses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempflow.core.dynamics import DDIM, DanceSDE, Dynamics, FlowSDE
from tempflow.core.likelihood_proxy import Adaptive, GeneralHuber, Huber, LikelihoodProxy, Matching, PathKL
from tempflow.core.objective.clip import Clip, ClipRule, DivergenceMask, Score, SoftGate, Truncate
from tempflow.core.objective.edges import EdgeBatch, Loss, Predict
from tempflow.core.objective.leaves import LeafBatch, LeafObjective
from tempflow.core.objective.likelihood import ClippedLikelihood, Estimate, PolicyGradient
from tempflow.core.objective.matching import NegativeAware, SignedLeastSquares
from tempflow.core.objective.norms import with_velocity_norm
from tempflow.core.objective.old import old_of
from tempflow.core.objective.preference import CentredReward, GroupPreference, OnlinePairs, PreferencePairs, Supervised
from tempflow.core.objective.ratio import ChunkRatio, NormRatio, PolicyRatio, PositionRatio, RegionRatio, StepRatio
from tempflow.core.objective.regularizer import Divergence, Imitation, LikelihoodKL, PredictionDistance, ToRollout
from tempflow.core.schedule import linear
from tempflow.core.state import WHOLE, StateLayout, StateStream, streams_along

SHAPE = (4, 3)
WIDE: Dynamics = DanceSDE(0.8)
Objective = Callable[[Mapping[str, Predict], Any], Loss]


class Field(nn.Module):
    """v = a·x + b·σ + c·row with a parameter of its own for each element, of which it uses `part`; NaN in `bad`."""

    def __init__(self, a: float, b: float, c: float, part: slice = slice(None), bad: slice = slice(0)) -> None:
        super().__init__()
        start = torch.tensor([a, b, c], dtype=torch.float64).view(3, 1, 1)
        self.theta = nn.Parameter(start * (1 + torch.arange(12).view(SHAPE) / 40))
        self.part, self.bad = part, bad

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        theta, s, c = self.theta[:, self.part], sigma.view(-1, 1, 1).to(x), (rows + 1).view(-1, 1, 1).to(x)
        v = theta[0] * x + theta[1] * s + theta[2] * c
        gap = torch.zeros_like(v, dtype=torch.bool)
        gap[:, self.bad] = True
        return v + torch.where(gap, math.nan, 0.0)  # so that a gradient from there would reach the parameters


def models(part: slice = slice(None), bad: slice = slice(0)) -> dict[str, Field]:
    given = {"policy": (0.4, -0.2, 0.05), "old": (0.43, -0.15, 0.04), "reference": (0.3, -0.3, 0.07)}
    return {name: Field(*numbers, part, bad) for name, numbers in given.items()}


def found(objective: Objective, sets: dict[str, Field], batch: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the policy's parameters, [3, 4, 3]; all metrics are finite and [B]."""
    loss = objective(sets, batch)
    for name, column in loss.metrics.items():
        assert column.dim() == 1 and bool(column.isfinite().all()), name
    loss.value.backward()
    gradient = sets["policy"].theta.grad
    assert gradient is not None and bool(gradient.isfinite().all())
    return loss.value.detach(), gradient


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------- edges
def edges(
    part: slice = slice(None),
    layout: StateLayout = WHOLE,
    advantage: Tensor | None = None,
    dynamics: Dynamics = WIDE,
    x: Tensor | None = None,
    by: Predict | None = None,
) -> EdgeBatch:
    """Six edges in three chunks; old log-probs and means are those of the weight set "old"."""
    x = randn(6, *SHAPE, seed=1) if x is None else x
    y = x + 0.2 * randn(6, *SHAPE, seed=2)
    value = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
    batch = EdgeBatch(
        x=x[:, part],
        y=y[:, part],
        step=torch.tensor([0, 1, 2, 3, 1, 2]),
        scale=torch.ones(6),
        rows=torch.tensor([0, 0, 1, 1, 2, 2]),
        log_prob=torch.zeros(6, dtype=torch.float64),
        advantage=value if advantage is None else advantage,
        weight=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0], dtype=torch.float64),
        schedule=linear(5, 3.0).double(),
        dynamics=dynamics,
        unit=torch.tensor([0, 0, 1, 1, 2, 2]),
        layout=layout,
    )
    predict = models(part)["old"] if by is None else by
    old = old_of(batch, predict(batch.x, batch.schedule.at(batch.step), batch.rows), 1e-7, True)
    assert bool(old.gap.isfinite().all())
    return replace(batch, log_prob=old.log_prob, mean=old.mean)


def kl(form: Any) -> tuple[Divergence]:
    return (Divergence(0.3, form),)


EDGE_LOSSES: dict[str, PolicyRatio] = {
    "clip": PolicyRatio(Clip(0.05, 0.05)),
    "truncate": PolicyRatio(Truncate(1.0, 0.05)),
    "gate": PolicyRatio(SoftGate(20.0, 21.0)),
    "score": PolicyRatio(Score()),
    "mask": PolicyRatio(DivergenceMask(1e-3)),
    "unscaled mask": PolicyRatio(DivergenceMask(1e-3, scaled=False)),
    "norm ratio": PolicyRatio(Clip(0.05, 0.05), NormRatio()),
    "chunks": PolicyRatio(Clip(0.05, 0.05), ChunkRatio()),
    "chunks of norms": PolicyRatio(Score(), ChunkRatio(NormRatio())),
    "rollout kl": PolicyRatio(Score(), StepRatio(), (ToRollout(0.5, StepRatio()),)),
    **{f"kl {form}": PolicyRatio(Score(), StepRatio(), kl(form)) for form in ("exact", "drift", "velocity")},
    **{f"kl {form}": PolicyRatio(Score(), StepRatio(), kl(form)) for form in ("k1", "k2", "k3")},
}
HELD_ROWS, FREE_ROWS = slice(0, 1), slice(1, 4)


def held(batch: int = 1) -> StateLayout:
    free = torch.ones(batch, *SHAPE, dtype=torch.bool)
    free[:, HELD_ROWS] = False
    return StateLayout(free, torch.full((batch, *SHAPE), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", EDGE_LOSSES)
def test_an_edge_loss_is_that_of_the_free_elements(name: str, rows: int) -> None:
    """Whatever the network says of held elements, and whatever stands there."""
    x = randn(6, *SHAPE, seed=1)
    x[:, HELD_ROWS] = 1e3
    broken = models(bad=HELD_ROWS)
    value, gradient = found(EDGE_LOSSES[name], broken, edges(layout=held(rows), x=x, by=broken["old"]))
    alone, expected = found(EDGE_LOSSES[name], models(FREE_ROWS), edges(FREE_ROWS))
    close(value, alone)
    close(gradient, expected)
    assert bool((gradient[:, HELD_ROWS] == 0).all()) and bool((gradient[:, FREE_ROWS] != 0).any())


STREAMS = streams_along(SHAPE, 0, {"video": 3, "sound": 1}, {"sound": 0.5})
PARTS, SHARES = (slice(0, 3), slice(3, 4)), (2 / 3, 1 / 3)
ADVANTAGES = torch.tensor(
    [[1.0, 0.3], [-1.0, 0.2], [0.5, -0.5], [-0.5, 0.0], [2.0, 0.4], [-2.0, -0.4]], dtype=torch.float64
)


def bent(name: str) -> bool:
    return name.startswith("kl")


@pytest.mark.parametrize("name", EDGE_LOSSES)
def test_edges_with_an_advantage_for_each_stream_are_each_streams_own(name: str) -> None:
    layout = StateLayout(streams=STREAMS)
    value, gradient = found(EDGE_LOSSES[name], models(), edges(layout=layout, advantage=ADVANTAGES))
    parts = [
        found(EDGE_LOSSES[name], models(part), edges(part, advantage=ADVANTAGES[:, k])) for k, part in enumerate(PARTS)
    ]
    close(value, sum((s * v for s, (v, _) in zip(SHARES, parts, strict=True)), torch.zeros(()).double()))
    close(gradient, sum((s * g for s, (_, g) in zip(SHARES, parts, strict=True)), torch.zeros(3, *SHAPE).double()))


@pytest.mark.parametrize("name", EDGE_LOSSES)
def test_a_streams_advantage_leaves_the_others_gradient_unchanged(name: str) -> None:
    layout = StateLayout(streams=STREAMS)
    other = ADVANTAGES * torch.tensor([-3.0, 1.0])
    (_, first), (_, second) = (
        found(EDGE_LOSSES[name], models(), edges(layout=layout, advantage=a)) for a in (ADVANTAGES, other)
    )
    assert torch.equal(first[:, PARTS[1]], second[:, PARTS[1]])
    assert not torch.allclose(first[:, PARTS[0]], second[:, PARTS[0]])
    if not (bent(name) or name == "rollout kl"):
        silent = ADVANTAGES * torch.tensor([1.0, 0.0])
        _, gradient = found(EDGE_LOSSES[name], models(), edges(layout=layout, advantage=silent))
        assert bool((gradient[:, PARTS[1]] == 0).all())


@pytest.mark.parametrize("name", EDGE_LOSSES)
def test_a_joint_advantage_weighs_streams_and_not_elements(name: str) -> None:
    """A stream whose elements all come twice keeps its part in the loss and, element by element, half its gradient."""
    twice = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    single = StateLayout(streams=STREAMS)
    double = StateLayout(streams=streams_along((7, 3), 0, {"video": 6, "sound": 1}, {"sound": 0.5}))
    old = {**models()}

    def doubled(net: Field) -> Predict:
        return lambda x, sigma, rows: net(x[:, [0, 1, 2, 6]], sigma, rows)[:, twice]

    batch = edges(layout=single)
    wide = replace(batch, x=batch.x[:, twice], y=batch.y[:, twice], layout=double)
    heard = old["old"](batch.x, batch.schedule.at(batch.step), batch.rows)[:, twice]
    kept = old_of(wide, heard, 1e-7, True)
    close(kept.log_prob, batch.log_prob)
    wide = replace(wide, log_prob=kept.log_prob, mean=kept.mean)
    value, gradient = found(EDGE_LOSSES[name], models(), batch)
    net = models()
    loss = EDGE_LOSSES[name]({n: doubled(m) for n, m in net.items()}, wide).value
    loss.backward()
    close(loss.detach(), value)
    assert net["policy"].theta.grad is not None
    close(net["policy"].theta.grad, gradient)


def test_a_weight_may_be_by_stream() -> None:
    layout = StateLayout(streams=STREAMS)
    batch = edges(layout=layout, advantage=ADVANTAGES)
    weight = batch.weight[:, None] * torch.tensor([1.0, 3.0])
    _, plain = found(EDGE_LOSSES["clip"], models(), batch)
    _, weighed = found(EDGE_LOSSES["clip"], models(), replace(batch, weight=weight))
    close(weighed, plain * torch.tensor([1.0, 1, 1, 3]).view(4, 1))


def test_one_stream_by_name_has_the_bits_of_none() -> None:
    named = StateLayout(streams=(StateStream("picture", torch.ones(SHAPE, dtype=torch.bool)),))
    for name, objective in EDGE_LOSSES.items():
        plain = found(objective, models(), edges())
        joint = found(objective, models(), edges(layout=named))
        split = found(objective, models(), edges(layout=named, advantage=edges().advantage[:, None]))
        for a, b, c in zip(plain, joint, split, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), name


def test_imitation_counts_free_elements() -> None:
    from tempflow.core.objective.edges import Peers

    objective = PolicyRatio(Score(), StepRatio(), (Imitation(0.7),))

    def with_peers(batch: EdgeBatch) -> EdgeBatch:
        assert batch.mean is not None
        return replace(batch, peers=Peers(batch.x.flip(0), batch.mean.flip(0), batch.scale))

    value, gradient = found(objective, models(bad=HELD_ROWS), with_peers(edges(layout=held(), by=models()["old"])))
    alone, expected = found(objective, models(FREE_ROWS), with_peers(edges(FREE_ROWS)))
    close(value, alone)
    close(gradient, expected)


@pytest.mark.parametrize("ratio", [PositionRatio(), RegionRatio()])
@pytest.mark.parametrize("layout", [held(), StateLayout(streams=STREAMS)])
def test_maps_of_positions_are_refused(ratio: Any, layout: StateLayout) -> None:
    batch = replace(edges(layout=layout), columns={"map": torch.ones(6, 3)})
    with pytest.raises(ValueError, match=f"ratio: {type(ratio).__name__} weighs positions"):
        PolicyRatio(Clip(), ratio)(models(), batch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"advantage": torch.zeros(6, 3)}, r"log_prob: shape \[6\] must be \[6, 2\]"),
        ({"advantage": ADVANTAGES, "log_prob": torch.zeros(6)}, "one number per edge and stream"),
        ({"weight": torch.zeros(6, 2)}, r"weight: shape \[6, 2\] must be \[6\]"),
    ],
)
def test_bad_shapes_by_stream(change: dict[str, Tensor], words: str) -> None:
    batch = replace(edges(layout=StateLayout(streams=STREAMS)), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        EDGE_LOSSES["clip"](models(), batch)


def test_a_column_of_edges_bends_the_clip_of_every_stream() -> None:
    layout = StateLayout(streams=STREAMS)
    standing = torch.tensor([0.9, -0.9, 0.5, -0.5, 1.0, -1.0], dtype=torch.float64)
    rule: ClipRule = Clip(0.02, 0.02, sensitivity=0.8)
    batch = replace(edges(layout=layout, advantage=ADVANTAGES), columns={"standing": standing})
    value, _ = found(PolicyRatio(rule), models(), batch)
    parts = [
        found(PolicyRatio(rule), models(p), replace(edges(p, advantage=ADVANTAGES[:, k]), columns=batch.columns))[0]
        for k, p in enumerate(PARTS)
    ]
    close(value, SHARES[0] * parts[0] + SHARES[1] * parts[1])


def test_rounding_is_judged_by_the_free_elements() -> None:
    broken = models(bad=HELD_ROWS)
    for dynamics in (FlowSDE(0.7), DDIM(1.0)):
        whole = edges(layout=held(), dynamics=dynamics, by=broken["old"])
        alone = edges(FREE_ROWS, dynamics=dynamics)
        gaps = []
        for batch, predict in ((whole, broken["policy"]), (alone, models(FREE_ROWS)["policy"])):
            velocity = predict(batch.x, batch.schedule.at(batch.step), batch.rows)
            gaps.append(old_of(batch, velocity, 1e-7, False).gap)
        close(gaps[0], gaps[1])


# -------------------------------------------------------------------------------------------------------------- leaves
def leaves(part: slice = slice(None), layout: StateLayout = WHOLE, advantage: Tensor | None = None) -> LeafBatch:
    value = torch.tensor([0.9, -0.5, -0.4, 0.3, -0.2, -0.1], dtype=torch.float64)
    return LeafBatch(
        randn(6, *SHAPE, seed=3)[:, part],
        value if advantage is None else advantage,
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([[0.3, 0.8]], dtype=torch.float64).expand(6, 2),
        randn(1, 2, *SHAPE, seed=4).expand(6, 2, *SHAPE)[:, :, part],
        layout,
    )


FAR = PredictionDistance("reference", 0.2)
PROXIES: dict[str, LikelihoodProxy] = {
    "adaptive": Adaptive(),
    "adaptive velocity": Adaptive("velocity"),
    "matching": Matching(1),
    "huber": Huber(),
    "ghuber": GeneralHuber(),
    "path": PathKL(),
}
SPLIT: dict[str, LeafObjective] = {
    "nft": NegativeAware(regularizers=(FAR,)),
    "nft plain": NegativeAware(0.5, adaptive=False, regularizers=(PredictionDistance("old", 0.1, "x0"),)),
    "signed": SignedLeastSquares(),
    "signed balanced": SignedLeastSquares(anchor="balanced", reference=0.1, adaptive=True),
    "signed sum": SignedLeastSquares(form="sum", adaptive=True),
    "clipped pooled": ClippedLikelihood(0.01, 0.01, Estimate(pooled=True), soft_clip=3.0),
    "on policy": ClippedLikelihood(estimate=Estimate(on_policy=True), regularizers=(PredictionDistance("old", 0.3),)),
    "likelihood kl": PolicyGradient(regularizers=(LikelihoodKL("reference", 0.2, "k3"),)),
    "pepg": PolicyGradient("pepg"),
    "par": PolicyGradient("par", Estimate(pooled=True)),
    **{f"epg {name}": PolicyGradient(estimate=Estimate(proxy)) for name, proxy in PROXIES.items()},
    **{f"clipped {name}": ClippedLikelihood(0.01, 0.01, Estimate(proxy)) for name, proxy in PROXIES.items()},
}
"""Objectives that take an advantage for each stream."""

COMPARING: dict[str, LeafObjective] = {
    "pairs": OnlinePairs(PreferencePairs(20.0, regularizers=(FAR,))),
    "groups": GroupPreference(20.0, 1e-2, regularizers=(FAR,)),
    "centred": CentredReward(),
    "centred, soft": CentredReward(temperature=1.0, form="bce"),
    **{f"supervised {name}": Supervised(proxy) for name, proxy in PROXIES.items()},
}
"""Objectives on whole samples."""


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", [*SPLIT, *COMPARING])
def test_a_leaf_loss_is_that_of_the_free_elements(name: str, rows: int) -> None:
    objective = {**SPLIT, **COMPARING}[name]
    value, gradient = found(objective, models(bad=HELD_ROWS), leaves(layout=held(rows)))
    alone, expected = found(objective, models(FREE_ROWS), leaves(FREE_ROWS))
    close(value, alone)
    close(gradient, expected)
    assert bool((gradient[:, HELD_ROWS] == 0).all()) and bool((gradient[:, FREE_ROWS] != 0).any())


@pytest.mark.parametrize("name", SPLIT)
def test_leaves_with_an_advantage_for_each_stream_are_each_streams_own(name: str) -> None:
    advantage = ADVANTAGES / 3
    value, gradient = found(SPLIT[name], models(), leaves(layout=StateLayout(streams=STREAMS), advantage=advantage))
    parts = [found(SPLIT[name], models(part), leaves(part, advantage=advantage[:, k])) for k, part in enumerate(PARTS)]
    close(value, SHARES[0] * parts[0][0] + SHARES[1] * parts[1][0])
    close(gradient, SHARES[0] * parts[0][1] + SHARES[1] * parts[1][1])


@pytest.mark.parametrize("name", SPLIT)
def test_another_streams_advantage_leaves_a_leafs_gradient_unchanged(name: str) -> None:
    layout = StateLayout(streams=STREAMS)
    given = [ADVANTAGES / 3, ADVANTAGES / 3 * torch.tensor([-1.0, 1.0])]
    first, second = (found(SPLIT[name], models(), leaves(layout=layout, advantage=a))[1] for a in given)
    assert torch.equal(first[:, PARTS[1]], second[:, PARTS[1]])
    assert not torch.allclose(first[:, PARTS[0]], second[:, PARTS[0]])


@pytest.mark.parametrize("name", [*SPLIT, *COMPARING])
def test_a_joint_advantage_of_leaves_weighs_streams_and_not_elements(name: str) -> None:
    objective = {**SPLIT, **COMPARING}[name]
    twice = [0, 1, 2, 0, 1, 2, 3]
    batch = leaves(layout=StateLayout(streams=STREAMS))
    double = StateLayout(streams=streams_along((7, 3), 0, {"video": 6, "sound": 1}, {"sound": 0.5}))
    wide = replace(batch, x0=batch.x0[:, twice], noise=batch.noise[:, :, twice], layout=double)

    def doubled(net: Field) -> Predict:
        return lambda x, sigma, rows: net(x[:, [0, 1, 2, 6]], sigma, rows)[:, twice]

    value, gradient = found(objective, models(), batch)
    net = models()
    loss = objective({n: doubled(m) for n, m in net.items()}, wide).value
    loss.backward()
    close(loss.detach(), value)
    assert net["policy"].theta.grad is not None
    close(net["policy"].theta.grad, gradient)


@pytest.mark.parametrize("name", [*SPLIT, *COMPARING])
def test_one_stream_of_leaves_has_the_bits_of_none(name: str) -> None:
    objective = {**SPLIT, **COMPARING}[name]
    named = StateLayout(streams=(StateStream("picture", torch.ones(SHAPE, dtype=torch.bool)),))
    plain, joint = (found(objective, models(), leaves(layout=layout)) for layout in (WHOLE, named))
    assert all(torch.equal(a, b) for a, b in zip(plain, joint, strict=True))
    if name in SPLIT:
        split = found(objective, models(), leaves(layout=named, advantage=leaves().advantage[:, None]))
        assert all(torch.equal(a, b) for a, b in zip(plain, split, strict=True))


@pytest.mark.parametrize("name", COMPARING)
def test_objectives_on_whole_samples_refuse_advantages_by_stream(name: str) -> None:
    batch = leaves(layout=StateLayout(streams=STREAMS), advantage=ADVANTAGES)
    with pytest.raises(ValueError, match=f"advantage: one for each stream, and {type(COMPARING[name]).__name__}"):
        COMPARING[name](models(), batch)


def test_objectives_say_whether_they_take_advantages_by_stream() -> None:
    assert all(objective.by_stream for objective in SPLIT.values())
    assert not any(objective.by_stream for objective in COMPARING.values())
    for ratio in (StepRatio(), NormRatio(), PositionRatio(), RegionRatio()):
        takes = not isinstance(ratio, PositionRatio | RegionRatio)
        assert PolicyRatio(ratio=ratio).by_stream == PolicyRatio(ratio=ChunkRatio(ratio)).by_stream == takes


def test_leaves_refuse_advantages_of_other_streams() -> None:
    with pytest.raises(ValueError, match=r"advantage: shape \[6, 2\] must be \[6\]"):
        leaves(advantage=ADVANTAGES)
    with pytest.raises(ValueError, match=r"advantage: shape \[6, 3\] must be \[6, 2\]"):
        leaves(layout=StateLayout(streams=STREAMS), advantage=torch.zeros(6, 3))


def test_the_size_of_velocities_is_a_mean_over_streams() -> None:
    batch = leaves(layout=StateLayout(streams=STREAMS))
    objective = NegativeAware(regularizers=(FAR,))
    seen = with_velocity_norm(objective, models(), batch, 6).metrics["velocity_norm"]
    x = ((1 - batch.t.view(6, 2, 1, 1)) * batch.x0[:, None] + batch.t.view(6, 2, 1, 1) * batch.noise).flatten(0, 1)
    rms = []
    for name in ("policy", "reference"):
        v = models()[name](x, batch.t.flatten(), batch.rows.repeat_interleave(2)).detach().square()
        rms.append((2 / 3 * v[:, :3].mean((1, 2)) + 1 / 3 * v[:, 3].mean(1)).sqrt())
    close(seen, (rms[0] / rms[1]).mean().expand(6))
