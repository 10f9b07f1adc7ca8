"""Times: what each sampler promises, and that nothing but (stream, id) decides a draw."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempflow.core.rng import Stream
from tempflow.core.schedule import shifted
from tempflow.core.times import GridTimes, LogitNormalTimes, StratifiedGridTimes, Times, UniformTimes, WindowTimes

SCHEDULE = shifted(14)
STREAM = Stream(5, "test")
IDS = [(0, slot, root) for slot in range(20) for root in range(5)]
KINDS: tuple[Times, ...] = (
    GridTimes(), StratifiedGridTimes(6, 1, 0.9), StratifiedGridTimes(4), WindowTimes(3, 3),
    UniformTimes(6, 0.2, 1.0, 3.0), UniformTimes(), LogitNormalTimes(6, shift=3.0),
    StratifiedGridTimes(5, 1, 0.9, initial=True),
)  # fmt: skip


def index(t: torch.Tensor) -> torch.Tensor:
    """Where on the grid the times are; fails for a time that is not on it."""
    hit = t[..., None] == SCHEDULE.sigmas[:-1].double()
    assert bool((hit.sum(-1) == 1).all())
    return hit.long().argmax(-1)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_draw_depends_on_its_id_alone(kind: Times) -> None:
    t = kind(STREAM, IDS, SCHEDULE)
    assert t.shape == (len(IDS), kind.count(14)) and t.dtype == torch.float64
    assert bool(((t > 0) & (t <= 1)).all())
    order = [(7 * j) % len(IDS) for j in range(len(IDS))]
    assert torch.equal(kind(STREAM, [IDS[j] for j in order], SCHEDULE), t[order])
    assert torch.equal(torch.cat([kind(STREAM, [i], SCHEDULE) for i in IDS[:9]]), t[:9])
    assert not torch.equal(kind(Stream(6, "test"), IDS, SCHEDULE), t)
    assert len(torch.unique(t, dim=0)) > 2
    assert kind(STREAM, [], SCHEDULE).shape == (0, kind.count(14))


def test_grid_times_are_all_but_one_in_random_order() -> None:
    found = index(GridTimes()(STREAM, IDS, SCHEDULE))
    assert found.shape[1] == 13
    assert all(len(set(row)) == 13 for row in found.tolist())
    assert {i for row in found.tolist() for i in row} == set(range(14)), "pure noise and the smallest σ take part"
    assert len({row[0] for row in found.tolist()}) > 8, "the first is not always the same"
    assert GridTimes(1.0).count(10) == 10 and GridTimes().count(10) == 9 and GridTimes(0.6).count(10) == 6
    every = GridTimes(1.0)(STREAM, IDS, SCHEDULE).sort(descending=True)[0]
    assert torch.equal(every, SCHEDULE.sigmas[:-1].double().expand(len(IDS), -1))


def test_strata_of_awm() -> None:
    """Integer edges [1, 2, 4, 6, 8, 10] → [2, 4, 6, 8, 10, 12] of 14 steps: neither pure noise nor the two lowest σ."""
    kind = StratifiedGridTimes(6, first=1, fraction=0.9)
    assert kind.edges(14) == [1, 2, 4, 6, 8, 10, 12]
    found = index(kind(STREAM, IDS, SCHEDULE))
    for j, (low, high) in enumerate([(1, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]):
        assert set(found[:, j].tolist()) == set(range(low, high))


def test_awm_with_pure_noise_always() -> None:
    """ "discrete_with_init": index 0, then the strata, which never hold it."""
    kind = StratifiedGridTimes(5, first=1, fraction=0.9, initial=True)
    assert kind.count(14) == 6 and kind.edges(14) == [1, 3, 5, 7, 9, 12]
    found = index(kind(STREAM, IDS, SCHEDULE))
    assert bool((found[:, 0] == 0).all())
    for j, (low, high) in enumerate([(1, 3), (3, 5), (5, 7), (7, 9), (9, 12)]):
        assert set(found[:, j + 1].tolist()) == set(range(low, high))
    plain = StratifiedGridTimes(5, first=1, fraction=0.9)(STREAM, IDS, SCHEDULE)
    assert torch.equal(kind(STREAM, IDS, SCHEDULE)[:, 1:], plain)


@given(steps=st.integers(1, 60), strata=st.integers(1, 60), first=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_strata_partition_the_grid(steps: int, strata: int, first: int) -> None:
    kind = StratifiedGridTimes(strata, first)
    if strata > steps - first:
        with pytest.raises(ValueError, match="strata"):
            kind.edges(steps)
        return
    edges = kind.edges(steps)
    sizes = [b - a for a, b in pairwise(edges)]
    assert edges[0] == first and edges[-1] == steps and len(sizes) == strata
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_window_is_consecutive_from_every_start() -> None:
    found = index(WindowTimes(3, 3)(STREAM, IDS, SCHEDULE))
    assert {tuple(row) for row in found.tolist()} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert torch.equal(WindowTimes(5)(STREAM, IDS[:1], SCHEDULE)[0], SCHEDULE.sigmas[:5].double())


def test_uniform_strata_and_shift() -> None:
    t = UniformTimes(6, 0.2, 1.0, 3.0)(STREAM, IDS, SCHEDULE)
    u = t / (3 - 2 * t)  # undoes the shift
    part = ((u - 0.2) / 0.8 * 6).floor()
    assert torch.equal(part, torch.arange(6.0, dtype=torch.float64).expand(len(IDS), -1))
    many = UniformTimes()(STREAM, [(j,) for j in range(4000)], SCHEDULE)[:, 0]
    assert float(many.mean()) == pytest.approx(0.5, abs=0.02)


def test_logit_normal_density() -> None:
    ids = [(j,) for j in range(6000)]
    t = LogitNormalTimes(1, mean=0.5, std=0.8)(STREAM, ids, SCHEDULE)[:, 0]
    z = torch.logit(t)
    assert float(z.mean()) == pytest.approx(0.5, abs=0.04) and float(z.std()) == pytest.approx(0.8, abs=0.03)
    strata = LogitNormalTimes(6, shift=3.0)(STREAM, IDS, SCHEDULE)
    u = torch.special.ndtr(torch.logit(strata / (3 - 2 * strata)))
    assert torch.equal((u * 6).floor()[:, 1:], torch.arange(1.0, 6, dtype=torch.float64).expand(len(IDS), -1))
    assert float(LogitNormalTimes(1, mean=-9)(STREAM, IDS, SCHEDULE).max()) == 0.01


def test_bad_fields_are_refused() -> None:
    for call in (
        lambda: GridTimes(0), lambda: GridTimes(0.01).count(10), lambda: StratifiedGridTimes(0),
        lambda: StratifiedGridTimes(2, -1), lambda: StratifiedGridTimes(2, 0, 1.0, True),
        lambda: WindowTimes(0), lambda: WindowTimes(3, 3).count(4),
        lambda: UniformTimes(1, 0.5, 0.5), lambda: UniformTimes(shift=0), lambda: LogitNormalTimes(std=0),
        lambda: LogitNormalTimes(low=0), lambda: LogitNormalTimes(mean=float("nan")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"fraction|strata|first|size|low|shift|std|mean"):
            call()
