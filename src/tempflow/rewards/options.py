"""A reward's options: the keyword parameters of the function that makes it, checked before anything is loaded."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, Field, PydanticUserError, create_model

from tempflow.rewards.protocol import Reward, RewardError
from tempflow.rewards.weights import commit_of
from tempflow.strict import Strict, validated

Make = Callable[..., Reward]
"""A function that makes a reward of its options, all keyword parameters, each with a type."""


def checked(make: Make, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as `make` takes them. Raises ConfigError, a line for each fault that begins with "options.NAME"."""
    try:
        found = validated(options_of(make), options)
    except ValueError as error:
        raise ValueError("\n".join(f"options.{line}" for line in str(error).splitlines())) from None
    return {name: getattr(found, name) for name in options}


def places(make: Make, options: Mapping[str, Any]) -> dict[str, str]:
    """Those options, given or by default, that name a file, a folder or a hub id (`strict.Place`), by name."""
    found = options_of(make).model_validate(dict(options))
    named = {name for name, field in type(found).model_fields.items() if _EXPANDED in field.metadata}
    return {name: getattr(found, name) for name in sorted(named) if getattr(found, name)}


def commits(make: Make, options: Mapping[str, Any]) -> dict[str, str]:
    """Those of `places` that are hub ids and can be had, by name: the commit that each means now (`commit_of`)."""
    found, named = options_of(make).model_validate(dict(options)), places(make, options)
    told = {name: commit_of(where, getattr(found, revision_of(name), None)) for name, where in named.items()}
    return {name: commit for name, commit in told.items() if commit is not None}


def revision_of(name: str) -> str:
    """The option that says at which revision the hub id is that the option `name` holds."""
    return "revision" if name in ("path", "clip") else f"{name.removesuffix('_path')}_revision"


_EXPANDED = AfterValidator(os.path.expanduser)
"""What tells a `strict.Place` from another text."""


NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@lru_cache
def options_of(make: Make) -> type[Strict]:
    """The model of a reward's options: its parameters that have a type. Raises RewardError where one without a type, or
    one that has no name in a call, must be given, and for a type that no configuration can give."""
    function = make.__init__ if inspect.isclass(make) else make
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(make).parameters.items():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        if parameter.kind in NAMED and name in hints:
            fields[name] = (_listable(hints[name]), Field(default=default))
        elif default is ... and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            raise RewardError(f"{make.__qualname__}: parameter {name!r} has no type; nearest valid: {name}: str")
    try:
        return create_model("Options", __base__=Strict, **fields)
    except PydanticUserError as error:  # a type of which it knows nothing
        raise RewardError(f"{make.__qualname__}: {str(error).splitlines()[0]}; nearest valid: a plain type") from error


def _listable(hint: Any) -> Any:
    """The type, in which a tuple may be given as a list, as YAML does."""
    if get_origin(hint) is tuple:
        return Annotated[hint, Field(strict=False)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_listable(option) for option in get_args(hint))]  # noqa: UP007 (made of a list)
    return hint
