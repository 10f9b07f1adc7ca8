"""An algorithm's configuration: its fields are the parameters of its function, written once, there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Field, create_model, model_validator

from tempflow.algorithms import ALGORITHMS, Algorithm, find
from tempflow.algorithms.base import argument_texts
from tempflow.strict import Place, Strict, shown

MOST, MOST_STEPS = 10_000, 1_000
"""Largest whole numbers that an algorithm may be given: all are counts of pictures, steps or iterations."""


class AlgorithmConfig(Strict):
    """An algorithm by name, with the parameters of its function as further fields."""

    name: str = Field(description="which algorithm")

    def build(self) -> Algorithm:
        """The algorithm itself. Raises its function's ValueErrors."""
        parameters = {key: value for key, value in self if key != "name"}
        return find(self.name)(**parameters)

    @classmethod
    def narrowed(cls, given: object) -> type[AlgorithmConfig] | None:  # type: ignore[override]
        """The fields of the algorithm that `given` names; None where it names none."""
        name = given.name if isinstance(given, AlgorithmConfig) else None
        name = given.get("name") if isinstance(given, Mapping) else name
        if cls is not AlgorithmConfig:
            return cls
        try:
            return algorithm_config(name) if isinstance(name, str) else None
        except ValueError:
            return None

    @model_validator(mode="after")
    def _buildable(self) -> AlgorithmConfig:
        self.build()
        return self


@lru_cache
def algorithm_config(name: str) -> type[AlgorithmConfig]:
    """The configuration class of an algorithm: a field for each parameter of its function, with its default.

    Descriptions come from the "Args:" part of the function's docstring. Raises ValueError for an unknown name.
    """
    function = find(name)
    hints, texts = get_type_hints(function), argument_texts(function.__doc__ or "")
    fields: dict[str, Any] = {"name": (Literal[name], Field(default=name, description="which algorithm"))}
    for parameter in inspect.signature(function).parameters.values():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        most = MOST_STEPS if parameter.name in ("steps", "draft_steps") else MOST
        hint = _listable(hints[parameter.name], most)
        fields[parameter.name] = (hint, Field(default=default, description=texts.get(parameter.name)))
    label = "".join(word.capitalize() for word in name.split("_")) + "Config"
    summary = inspect.cleandoc(function.__doc__ or name).partition("\n")[0]
    return create_model(label, __base__=AlgorithmConfig, __doc__=summary, **fields)


def _listable(hint: Any, most: int = MOST) -> Any:
    """The type, in which a tuple may be given as a list (YAML knows no other) and whole numbers have a bound.

    A text that is not one of a few is a path, or a name that no path can be taken for.
    """
    if hint is int:
        return Annotated[int, Field(le=most)]
    if hint is str:
        return Place
    if get_origin(hint) is tuple:
        inner = tuple(part if part is ... else _listable(part, most) for part in get_args(hint))
        return Annotated[tuple[inner], Field(strict=False)]  # type: ignore[valid-type]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_listable(option, most) for option in get_args(hint))]  # noqa: UP007 (made of a list)
    return hint


def to_algorithm(given: Any) -> Any:
    """A mapping becomes the configuration of the algorithm that it names."""
    if not isinstance(given, Mapping):
        return given
    if "name" not in given:
        raise ValueError(f"name: missing; nearest valid: one of {', '.join(ALGORITHMS)}")
    if not isinstance(given["name"], str):
        raise ValueError(f"name: {shown(given['name'])} is not a text; nearest valid: one of {', '.join(ALGORITHMS)}")
    return algorithm_config(given["name"]).model_validate(given)
