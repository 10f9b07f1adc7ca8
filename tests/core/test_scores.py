"""Scores: a failed score is failed, and stays so through every operation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempflow.core.scores import Scores


def make(n: int = 4, names: tuple[str, ...] = ("pick", "ocr"), seed: int = 0, fail: float = 0.3) -> Scores:
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(n, len(names), generator=g)
    return Scores(value, torch.rand(n, len(names), generator=g) >= fail, names)


def test_failed_cells_become_nan_whatever_they_held() -> None:
    ok = torch.tensor([[True, False], [False, True]])
    scores = Scores(torch.tensor([[1.0, 0.0], [math.inf, 2.0]]), ok, ("a", "b"))
    assert torch.equal(torch.isnan(scores.value), ~ok)
    assert scores.value[0, 0] == 1.0 and scores.value[1, 1] == 2.0
    assert len(scores) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_ok_cells_are_refused(bad: float) -> None:
    value = torch.zeros(2, 2)
    value[1, 0] = bad
    with pytest.raises(ValueError, match=r"value\[1, 0\] \(a\)"):
        Scores(value, torch.ones(2, 2, dtype=torch.bool), ("a", "b"))


@pytest.mark.parametrize(
    ("value", "ok", "names", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool), ("a",), "float32"),
        (torch.zeros(2, 1), torch.ones(2, 1), ("a",), "torch.bool"),
        (torch.zeros(2), torch.ones(2, dtype=torch.bool), ("a",), r"\[N, 1\]"),
        (torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), ("a",), r"\[N, 1\]"),
        (torch.zeros(2, 1), torch.ones(3, 1, dtype=torch.bool), ("a",), r"\[2, 1\]"),
        (torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), ("a", "a"), r"\('a',\)"),
        (torch.zeros(2, 0), torch.ones(2, 0, dtype=torch.bool), (), "at least one"),
    ],
)
def test_bad_shapes_and_types(value: torch.Tensor, ok: torch.Tensor, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scores(value, ok, names)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_total_against_numpy(seed: int, n: int) -> None:
    scores = make(n, ("a", "b", "c"), seed)
    value, ok = scores.total({"a": 0.25, "c": -2.0})
    want = 0.25 * scores.value[:, 0].numpy().astype(np.float64) - 2.0 * scores.value[:, 2].numpy().astype(np.float64)
    assert torch.equal(ok, scores.ok[:, 0] & scores.ok[:, 2])  # b takes no part
    np.testing.assert_allclose(value.numpy(), want, rtol=1e-5, atol=1e-6)  # NaN where NaN
    assert torch.equal(torch.isnan(value), ~ok)


def test_total_defaults_and_zero_weights() -> None:
    scores = Scores(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]]), ("a", "b"))
    value, ok = scores.total()
    assert value[0] == 3.0 and ok.tolist() == [True, False] and bool(value[1].isnan())
    value, ok = scores.total({"a": 2.0, "b": 0.0})
    assert value.tolist() == [2.0, 6.0] and ok.tolist() == [True, True]


def test_total_rejects_bad_weights() -> None:
    scores = make()
    with pytest.raises(ValueError, match="nearest valid: 'pick'"):
        scores.total({"pic": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        scores.total({"pick": math.nan})
    with pytest.raises(ValueError, match="no reward takes part"):
        scores.total({"pick": 0.0})


def test_total_of_a_row_does_not_depend_on_the_others() -> None:
    scores = make(37, ("a", "b", "c"), fail=0.0)
    weights = {"a": 0.1, "b": 0.7, "c": 0.3}
    whole = scores.total(weights)[0]
    alone = torch.cat([scores.select(torch.tensor([n])).total(weights)[0] for n in range(37)])
    assert torch.equal(whole, alone)


def test_cat_stack_and_select() -> None:
    a, b = make(3, seed=1), make(2, seed=2)
    both = Scores.cat([a, b])
    torch.testing.assert_close(both.value, torch.cat([a.value, b.value]), rtol=0, atol=0, equal_nan=True)
    picked = both.select(torch.tensor([4, 0]))
    torch.testing.assert_close(picked.value, torch.stack([b.value[1], a.value[0]]), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(both.select(both.ok[:, 0]).ok[:, 0], torch.ones(int(both.ok[:, 0].sum()), dtype=torch.bool))

    wide = Scores.stack([a, make(3, ("clip",), seed=3)])
    assert wide.names == ("pick", "ocr", "clip")
    assert torch.equal(wide.ok[:, :2], a.ok)
    with pytest.raises(ValueError, match="differ"):
        Scores.cat([a, make(3, ("x", "y"))])
    with pytest.raises(ValueError, match="nearest valid: 3"):
        Scores.stack([a, make(4, ("clip",))])
    with pytest.raises(ValueError, match="distinct"):
        Scores.stack([a, a])
    with pytest.raises(ValueError, match="nothing to join"):
        Scores.cat([])
    with pytest.raises(ValueError, match="nothing to join"):
        Scores.stack([])
