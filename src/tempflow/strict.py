"""Strict models, and what is wrong with what they were given: a line a fault, with field, value, nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text (in YAML, quote it)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping of fields",
    "finite_number": "a finite number",
}
BOUNDS = {"greater_than_equal": ("ge", "≥"), "less_than_equal": ("le", "≤")}
OPEN_BOUNDS = {"greater_than": ("gt", "above"), "less_than": ("lt", "below")}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message has a line for each fault."""


class Strict(BaseModel):
    """Frozen; unknown fields, and values of another type, are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        problem = unknown_keys(cls, given) if isinstance(given, Mapping) else None
        if problem:
            raise ValueError(problem)
        return given


Model = TypeVar("Model", bound=Strict)


def validated(
    model: type[Model], given: Mapping[str, Any], narrowed: Mapping[str, type[BaseModel]] | None = None
) -> Model:
    """`given` as a `model`; raises ConfigError with what `explain` says."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, model, narrowed or {})) from error


def nearest(value: object, valid: Iterable[object]) -> str:
    """The valid value that reads most like `value`, as Python writes it."""
    options = {str(v): v for v in valid}
    close = get_close_matches(str(value), list(options), n=1, cutoff=0.0)
    return repr(options[close[0]]) if close else "none"


def unknown_keys(model: type[BaseModel], given: Mapping[Any, Any]) -> str | None:
    """A line for each key that is no field of `model`, with the likeliest field; None where all are fields."""
    fields = list(model.model_fields)
    lines: list[str] = []
    for key in given:
        if key not in fields:
            close = get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
            lines.append(f"{key}: unknown field; {hint}")
    return "\n".join(lines) or None


def explain(error: ValidationError, root: type[BaseModel], narrowed: Mapping[str, type[BaseModel]]) -> str:
    """The faults that pydantic found in a `root`, a line each, without its jargon.

    Our own checks raise ValueError("field: …") with the field as seen from their model; its path goes in front.
    `narrowed`: fields of `root` whose value is of a narrower model than declared.
    """
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "value_error":
            text = str(fault.get("ctx", {}).get("error", fault["msg"]))
            # A model's own message starts with one of its fields, a field's message does not name the field again.
            glue = "." if isinstance(fault["input"], Mapping | BaseModel) else ": "
            lines += [f"{path}{glue}{line}" if path else line for line in text.splitlines()]
        else:
            lines.append(f"{path}: {_sentence(fault, _field(root, fault['loc'], narrowed))}")
    return "\n".join(dict.fromkeys(lines))


def _sentence(fault: ErrorDetails, field: FieldInfo | None) -> str:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    usual = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    hint = "" if usual is None or isinstance(usual, BaseModel | tuple) else f"; the default is {usual!r}"
    if kind == "missing":
        return f"missing; it has no default{': ' + field.description if field and field.description else ''}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(context.get("expected")))
        return f"{value!r} is not one of {', '.join(options)}; nearest valid: {nearest(value, options)}"
    if kind in BOUNDS:
        key, sign = BOUNDS[kind]
        return f"{value!r} must be {sign} {context[key]}; nearest valid: {context[key]}"
    if kind in OPEN_BOUNDS:
        key, word = OPEN_BOUNDS[kind]
        return f"{value!r} must be {word} {context[key]}{hint}"
    if kind in KINDS:
        return f"{value!r} is not {KINDS[kind]}{hint}"
    return f"{value!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}{hint}"


def _field(
    root: type[BaseModel], path: tuple[int | str, ...], narrowed: Mapping[str, type[BaseModel]]
) -> FieldInfo | None:
    """The field that a path of keys and list positions leads to; None where it leaves the declared tree."""
    found: FieldInfo | None = None
    inside: Any = root
    for depth, part in enumerate(path):
        if isinstance(part, int):
            inside = next((a for a in get_args(inside) if isinstance(a, type)), None)
            continue
        if not (isinstance(inside, type) and issubclass(inside, BaseModel)) or part not in inside.model_fields:
            return None
        found = inside.model_fields[part]
        inside = narrowed.get(part, found.annotation) if depth == 0 else found.annotation
    return found
