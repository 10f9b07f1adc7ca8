"""What several rewards become: products, gates, and prompts left out for their failures."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempflow.core.scores import Scores
from tempflow.rewards import RewardError
from tempflow.rewards.compose import Composition

NAN = math.nan


def scores(*rows: tuple[float, float]) -> Scores:
    value = torch.tensor(rows, dtype=torch.float32)
    return Scores(value, value.isfinite(), ("a", "b"))


def column(made: Scores) -> list[float | None]:
    assert made.names == ("a", "b", "reward")
    pairs = zip(made.value[:, 2].tolist(), made.ok[:, 2].tolist(), strict=True)
    return [value if ok else None for value, ok in pairs]


def test_a_product_is_of_powers_and_a_failure_fails_it() -> None:
    made = Composition({"a": 2.0, "b": 0.5}, "product")(scores((3, 4), (0, 9), (NAN, 1), (2, NAN)), [0, 0, 1, 1])
    assert column(made) == [18.0, 0.0, None, None]
    assert made.value[:2, :2].tolist() == [[3, 4], [0, 9]], "the rewards themselves stay"


def test_a_reward_of_weight_0_takes_no_part() -> None:
    made = Composition({"a": 1.0, "b": 0.0}, "product")(scores((3, -4), (2, NAN)), [0, 0])
    assert column(made) == [3.0, 2.0]


def test_a_negative_factor_stops_and_names_the_reward() -> None:
    with pytest.raises(
        RewardError, match=r"composition.how: 'product', but reward 'b' gave -4, .* nearest valid: 'sum'"
    ):
        Composition({"a": 1.0, "b": 1.0}, "product")(scores((3, -4)), [0])
    bad = Composition({"a": 1.0, "b": 1.0}, "product")(scores((NAN, -4)), [0])
    assert column(bad) == [None], "that row is failed anyway"


def test_a_power_without_a_value_is_failed() -> None:
    assert column(Composition({"a": -1.0, "b": 1.0}, "product")(scores((0, 1), (2, 1)), [0, 0])) == [None, 0.5]


def test_a_gate_lets_through_what_reaches_it() -> None:
    gate = Composition({"a": 1.0, "b": 0.0}, gates={"b": 0.5}, gated=-7.0)
    assert column(gate(scores((3, 0.5), (3, 0.49), (3, 2), (NAN, 0), (3, NAN)), [0] * 5)) == [3, -7, 3, None, None]


def test_two_gates_both_count() -> None:
    gate = Composition({"a": 1.0, "b": 1.0}, gates={"a": 1.0, "b": 1.0})
    assert column(gate(scores((1, 1), (0, 5), (5, 0)), [0] * 3)) == [2.0, 0.0, 0.0]


def test_a_sum_without_gates_adds_nothing() -> None:
    plain = Composition({"a": 1.0, "b": 1.0})
    given = scores((1, 2))
    assert plain(given, [0]) is given and not plain.adds and plain.judging(None) is None


@pytest.mark.parametrize(("share", "kept"), [(0.5, [True] * 4), (0.49, [False] * 2 + [True] * 2), (1.0, [True] * 4)])
def test_a_prompt_with_too_many_failures_is_left_out_whole(share: float, kept: list[bool]) -> None:
    """Half of slot 7's rows failed, none of slot 2's; a share that is reached, not passed, keeps it."""
    given = scores((1, 1), (NAN, 1), (1, 1), (1, 1))
    made = Composition({"a": 1.0, "b": 1.0}, drop_above=share)(given, [7, 7, 2, 2])
    assert made.ok.tolist() == [[k and bool(ok) for ok in row] for k, row in zip(kept, given.ok.tolist(), strict=True)]


def test_failures_of_a_reward_that_takes_no_part_leave_nothing_out() -> None:
    made = Composition({"a": 1.0, "b": 0.0}, drop_above=0.1)(scores((1, NAN), (2, NAN)), [0, 0])
    assert made.ok[:, 0].tolist() == [True, True]


def test_evaluations_leave_no_prompt_out_and_weigh_by_the_last_weights() -> None:
    judging = Composition({"a": 1.0, "b": 1.0}, "product", drop_above=0.1).judging({"a": 2.0, "b": 1.0})
    assert judging is not None and column(judging(scores((3, 1), (NAN, 1)), [0, 0])) == [9.0, None]


@given(st.lists(st.tuples(st.floats(0, 10, width=32), st.floats(0, 10, width=32)), min_size=1, max_size=6))
def test_a_row_does_not_depend_on_the_others(rows: list[tuple[float, float]]) -> None:
    """So chunks of whole prompts give what all together give."""
    composition = Composition({"a": 1.5, "b": 1.0}, "product", gates={"b": 3.0})
    whole = composition(scores(*rows), range(len(rows)))
    parts = Scores.cat([composition(scores(row), [0]) for row in rows])
    assert torch.equal(whole.ok, parts.ok) and torch.equal(whole.value.nan_to_num(), parts.value.nan_to_num())
