"""Which (t, ε) are drawn, and who shares them."""

from __future__ import annotations

import pytest
import torch

from tempflow.core.likelihood_proxy import Matching, corrupt
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import shifted
from tempflow.core.times import GridTimes, StratifiedGridTimes, UniformTimes

SCHEDULE, SHAPE = shifted(10), (2, 3)
IDS = [(4, slot, root) for slot in range(3) for root in range(4)]
SAME = torch.tensor([i[1] for i in IDS])[:, None] == torch.tensor([i[1] for i in IDS])[None]


def equal(t: torch.Tensor) -> torch.Tensor:
    """Which samples drew the same, [N, N]."""
    flat = t.flatten(1)
    return (flat[:, None] == flat[None]).all(-1)


@pytest.mark.parametrize(
    "draws", [Renoise(GridTimes()), Renoise(UniformTimes(3), 1), Renoise(StratifiedGridTimes(4), 2, 2)]
)
def test_replay_does_not_depend_on_order_chunks_or_which_pairs_are_wanted(draws: Renoise) -> None:
    t, noise = draws(7, IDS, SCHEDULE, SHAPE)
    again = draws(7, IDS[::-1], SCHEDULE, SHAPE)
    assert torch.equal(again[0].flip(0), t) and torch.equal(again[1].flip(0), noise)
    parts = [draws(7, [i], SCHEDULE, SHAPE) for i in IDS]
    assert torch.equal(torch.cat([p[0] for p in parts]), t) and torch.equal(torch.cat([p[1] for p in parts]), noise)
    some = draws(7, IDS, SCHEDULE, SHAPE, range(1, 3))
    assert torch.equal(some[0], t[:, 1:3]) and torch.equal(some[1], noise[:, 1:3])
    other = draws(8, IDS, SCHEDULE, SHAPE)
    assert not torch.equal(other[0], t) and not torch.equal(other[1], noise)


def test_sharing() -> None:
    one = torch.eye(len(IDS), dtype=torch.bool)
    t, noise = Renoise(UniformTimes(3))(1, IDS, SCHEDULE, SHAPE)
    assert torch.equal(equal(t), one) and torch.equal(equal(noise), one)
    t, noise = Renoise(UniformTimes(3), 1)(1, IDS, SCHEDULE, SHAPE)
    assert bool(equal(t).all()) and torch.equal(equal(noise), one)
    t, noise = Renoise(UniformTimes(3), 2, 2)(1, IDS, SCHEDULE, SHAPE)
    assert torch.equal(equal(t), SAME) and torch.equal(equal(noise), SAME)
    assert not torch.equal(noise[:, 0], noise[:, 1]), "the pairs of a sample have noises of their own"


def test_sharing_lowers_the_variance_within_a_group() -> None:
    """Samples alike in difficulty: with common pairs their surrogates differ by the sample alone."""
    x0 = 0.1 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    ids = [(0, 0, root) for root in range(64)]

    def spread(share: int | None) -> float:
        t, noise = (a.double() for a in Renoise(UniformTimes(), share, share)(3, ids, SCHEDULE, SHAPE))
        velocity = 0.5 * corrupt(x0, noise[:, 0], t[:, 0])
        return float(Matching(1)(velocity, x0, noise[:, 0], t[:, 0]).var())

    assert spread(2) < 0.1 * spread(None)


def test_bad_sharing_is_refused() -> None:
    with pytest.raises(ValueError, match="share_noise: 0"):
        Renoise(GridTimes(), share_noise=0)
    with pytest.raises(ValueError, match="nearest valid: 3"):
        Renoise(GridTimes(), share_times=4)(0, IDS, SCHEDULE, SHAPE)
