"""A reward's options: checked by the types of the function that makes it, named as a configuration does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from PIL import Image
from pydantic import Field

from tempflow.rewards import REWARDS, RewardError, build
from tempflow.rewards.jpeg_compressibility import JPEGCompressibility
from tempflow.rewards.options import checked, options_of, places
from tempflow.rewards.protocol import Reward
from tempflow.strict import Place


def made(
    *,
    path: Place,
    other: Place = "",
    batch: Annotated[int, Field(ge=1)] = 8,
    form: Literal["cosine", "scaled"] = "cosine",
    sides: tuple[int, ...] = (1, 2),
    most: float | None = None,
) -> Reward:
    """A made-up reward."""
    del path, other, batch, form, sides, most
    return JPEGCompressibility()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "options.path: missing; it has no default"),
        ({"path": "x", "batch": 0}, "options.batch: 0 must be ≥ 1; nearest valid: 1"),
        ({"path": "x", "batch": "8"}, "options.batch: '8' is not a whole number; the default is 8"),
        ({"path": "x", "form": "cos"}, "options.form: 'cos' is not one of cosine, scaled; nearest valid: 'cosine'"),
        ({"path": "x", "bach": 3}, "options.bach: unknown field; did you mean 'batch'?"),
        ({"path": 3}, "options.path: 3 is not a text"),
    ],
)
def test_a_wrong_option_is_one_line_with_its_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        checked(made, options)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_options_are_given_as_yaml_gives_them() -> None:
    given = {"path": "~/x", "sides": [3, 4], "most": 2}
    assert checked(made, given) == {"path": str(Path.home() / "x"), "sides": (3, 4), "most": 2}


def test_places_are_told_from_other_texts() -> None:
    assert places(made, {"path": "~/x"}) == {"path": str(Path.home() / "x")}
    assert places(made, {"path": "x", "other": "y"}) == {"other": "y", "path": "x"}


@pytest.mark.parametrize("name", REWARDS)
def test_every_shipped_reward_says_the_types_of_its_options(name: str) -> None:
    fields = options_of(REWARDS[name]).model_fields
    assert all(field.annotation is not None for field in fields.values())


def test_a_parameter_without_a_type_is_named() -> None:
    def untyped(*, path):  # type: ignore[no-untyped-def]
        return JPEGCompressibility()

    with pytest.raises(RewardError, match="parameter 'path' has no type; nearest valid: path: str"):
        options_of(untyped)


def test_a_type_that_no_configuration_can_give_is_named() -> None:
    class Made:
        def __init__(self, picture: Image.Image) -> None: ...

    with pytest.raises(RewardError, match=r"Made: Unable to generate .* nearest valid: a plain type"):
        options_of(Made)  # type: ignore[arg-type]


def test_a_class_is_made_of_its_options_and_renamed() -> None:
    reward = build("small", "jpeg_compressibility")
    assert reward.name == "small" and reward.groupwise is False
    with pytest.raises(ValueError, match=r"options\.quality: 200|options\.qualty"):
        build("jpeg_compressibility", options={"qualty": 200})
