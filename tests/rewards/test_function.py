"""Any Python function as a reward: what counts as a score, what as failed, what as a mistake."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempflow.core.scores import Scores
from tempflow.rewards import Reward, RewardError, from_function
from tempflow.rewards.function import FunctionReward

MEDIA = torch.arange(3 * 4 * 5 * 3, dtype=torch.uint8).reshape(3, 4, 5, 3)
PROMPTS = ["a", "b", "a"]
META: list[dict[str, object]] = [{}, {}, {}]


def score(reward: FunctionReward, media: torch.Tensor = MEDIA) -> Scores:
    return reward.score(media, PROMPTS[: len(media)], META[: len(media)])


def returning(result: object) -> FunctionReward:
    return from_function(lambda images, prompts: result, name="mine")  # type: ignore[arg-type, return-value]


def test_the_function_sees_the_pictures_and_their_prompts() -> None:
    seen: list[object] = []

    def look(images: list[Image.Image], prompts: list[str]) -> list[float]:
        seen.extend((images, prompts))
        return [0.0] * len(images)

    score(from_function(look))
    images, prompts = seen
    assert prompts == PROMPTS and isinstance(prompts, list)
    assert all(i.mode == "RGB" and i.size == (5, 4) for i in images)  # type: ignore[attr-defined]
    assert np.array_equal(np.stack([np.asarray(i) for i in images]), MEDIA.numpy())  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, -3.0],
        (1, 2.5, -3.0),
        np.array([1, 2.5, -3.0]),
        np.array([1, 2.5, -3.0], np.float16),
        torch.tensor([1, 2.5, -3.0], dtype=torch.bfloat16),
        torch.tensor([1, 2.5, -3.0], requires_grad=True),
        [np.float64(1), torch.tensor(2.5), np.array(-3.0)],
    ],
)
def test_numbers_of_any_make_are_scores(result: object) -> None:
    scores = score(returning(result))
    assert scores.names == ("mine",) and scores.ok.all()
    assert scores.value.tolist() == [[1.0], [2.5], [-3.0]] and not scores.value.requires_grad


def test_integers_are_numbers_too() -> None:
    assert score(returning(np.array([1, 2, 3]))).value.flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_finite_number_is_failed_and_never_zero(bad: float | None) -> None:
    scores = score(returning([1.0, bad, 0.0]))
    assert scores.ok.flatten().tolist() == [True, False, True]
    assert math.isnan(scores.value[1, 0]) and scores.value[2, 0] == 0.0


def test_nan_in_an_array_is_failed() -> None:
    assert score(returning(np.array([np.nan, 1.0, np.inf]))).ok.flatten().tolist() == [False, True, False]


def test_an_exception_fails_all_rows_and_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def broken(images: list[Image.Image], prompts: list[str]) -> list[float]:
        raise KeyError("no such style")

    with caplog.at_level(logging.WARNING):
        scores = score(from_function(broken))
    assert not scores.ok.any() and torch.isnan(scores.value).all() and len(scores) == 3
    assert "reward 'broken' raised KeyError: 'no such style'; its 3 scores are failed" in caplog.text


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], r"reward 'mine' returned 2 scores; expected 3 numbers, one per image"),
        ([1.0] * 4, r"returned 4 scores; expected 3"),
        (0.5, r"returned 0\.5, a float; expected 3 numbers"),
        (None, r"returned None, a NoneType; expected 3"),
        ("abc", r"returned 'abc', a str; expected 3"),
        ({"a": 1, "b": 2, "c": 3}, r"a dict; expected 3"),
        (np.ones((3, 1)), r"returned an array of shape \[3, 1\]; expected 3"),
        (torch.ones(1, 3), r"returned an array of shape \[1, 3\]; expected 3"),
        (torch.ones(3, dtype=torch.complex64), r"a tensor of torch\.complex64; expected 3"),
        ([1.0, "0.5", 2.0], r"returned '0\.5', a str, for image 1; expected a number, or None for failed"),
        ([1.0, 0.5, True], r"returned True, a bool, for image 2; .*write float\(True\)"),
        (np.array([True, False, True]), r"a bool, for image 0"),
        (torch.tensor([True, False, True]), r"a bool, for image 0"),
        ([1.0, [2.0], 3.0], r"returned \[2\.0\], a list, for image 1"),
    ],
)
def test_a_result_of_another_make_is_a_mistake_with_a_name(result: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(returning(result))


def test_names() -> None:
    def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
        return [float(np.mean(np.asarray(i))) for i in images]

    class Judge:
        def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
            return [1.0] * len(images)

    assert from_function(brightness).name == "brightness"
    assert from_function(brightness, name="light").name == "light"
    assert from_function(Judge()).name == "Judge"
    assert from_function(functools.partial(brightness)).name == "partial"
    assert from_function(lambda images, prompts: [0.0]).name == "reward"
    assert isinstance(from_function(brightness), Reward)
    assert score(from_function(brightness)).value.flatten().tolist() == pytest.approx(
        MEDIA.float().mean((1, 2, 3)).tolist()
    )


def test_what_cannot_be_called_or_named_is_refused() -> None:
    with pytest.raises(ValueError, match=r"function = 'shapes' cannot be called; nearest valid: def score"):
        from_function("shapes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name = '': a reward needs one"):
        from_function(lambda images, prompts: [0.0], name="")


def test_media_are_checked_before_the_function_is_called() -> None:
    reward = from_function(lambda images, prompts: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"media is torch.float32 \[3, 4, 5, 3\] on cpu; nearest valid: torch.uint8"):
        score(reward, MEDIA.float())
    with pytest.raises(ValueError, match=r"prompts has 2 entries for 3 media; nearest valid: 3"):
        reward.score(MEDIA, ["a", "b"], META)
    with pytest.raises(ValueError, match=r"metadata has 0 entries for 3 media"):
        reward.score(MEDIA, PROMPTS, [])


def test_no_media_no_rows() -> None:
    assert len(score(from_function(lambda images, prompts: []), MEDIA[:0])) == 0


# ------------------------------------------------------------------------------------------------------------ metadata
def by_name(images, prompts, metadata):  # type: ignore[no-untyped-def]
    return [float(m["n"]) for m in metadata]


def flow_grpo_style(images, prompts, metadatas, scale=1.0):  # type: ignore[no-untyped-def]
    return [m["n"] * scale for m in metadatas]


class Judge2:
    def __call__(self, images, prompts, metadata=None):  # type: ignore[no-untyped-def]
        return [m.pop("n") for m in metadata]


@pytest.mark.parametrize(
    "function", [by_name, flow_grpo_style, Judge2(), functools.partial(flow_grpo_style, scale=1.0)]
)
def test_a_function_that_asks_for_metadata_gets_it(function: Any) -> None:
    given = [{"n": n, "tag": "x"} for n in range(3)]
    for _ in range(2):  # what it does to them stays its own
        scores = from_function(function).score(MEDIA, ["a", "b", "c"], given)
        assert scores.value[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_others_do_not() -> None:
    def scaled(images: Any, prompts: Any, scale: float = 2.0, **options: Any) -> list[float]:
        return [scale + len(options)] * len(images)

    assert from_function(scaled).score(MEDIA, ["a"] * 3, [{"n": 1}] * 3).value[:, 0].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "function",
    [lambda images: [], lambda images, prompts, model: [], lambda images, prompts, *, metadata: []],
)
def test_a_function_that_cannot_be_called_so_is_refused_at_once(function: Any) -> None:
    with pytest.raises(
        ValueError, match=r"reward: def reward\(.*cannot be called with images and prompts .*metadata\)"
    ):
        from_function(function)
