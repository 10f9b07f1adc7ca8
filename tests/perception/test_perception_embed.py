"""Embeddings under perceptual entropy's bonus: the squared distance from the group's centroid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise, rendered
from torch import Tensor

from tempflow.perception import Embedding, HandEmbedding
from tempflow.perception.diversity import features


def bonus(media: Tensor) -> Tensor:
    """‖φ_k − φ̄‖² of one group, float64 [G]."""
    rows = HandEmbedding()(media).double()
    return ((rows - rows.mean(0)) ** 2).sum(1)


def test_equal_pictures_give_equal_rows() -> None:
    media = noise(4, 32, 32)
    rows = HandEmbedding()(media[[0, 1, 0, 2, 3, 0]])
    assert isinstance(HandEmbedding(), Embedding)
    assert rows.shape == (6, 128) and rows.dtype == torch.float32
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[0], rows[5])
    assert len({row.numpy().tobytes() for row in rows}) == 4
    assert torch.equal(rows, features(media[[0, 1, 0, 2, 3, 0]]))
    assert HandEmbedding()(media[:0]).shape == (0, 128)


def test_identical_pictures_earn_nothing() -> None:
    media, _ = rendered(1, seed=0)
    assert float(bonus(media.expand(8, -1, -1, -1)).max()) < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_the_bonus_follows_its_picture_and_sums_to_the_spread(count: int, seed: int) -> None:
    media, _ = rendered(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(bonus(media[order]), bonus(media)[order], rtol=1e-9, atol=1e-12)
    covariance = torch.cov(HandEmbedding()(media).double().T, correction=0)
    assert float(bonus(media).sum()) == pytest.approx(count * float(covariance.trace()), rel=1e-9)


def test_the_odd_one_out_earns_most() -> None:
    media, _ = rendered(2, seed=3)
    group = media[[0, 0, 0, 1, 0]].clone()
    group[0, 5, 5] = 255 - group[0, 5, 5]  # nearly the same
    assert int(bonus(group).argmax()) == 3


def test_media_are_pictures_on_the_cpu() -> None:
    for media in (torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), noise(1, 4, 4).to("meta")):
        with pytest.raises(ValueError, match=r"nearest valid: torch\.uint8 \[N, H, W, 3\] on cpu"):
            HandEmbedding()(media)
