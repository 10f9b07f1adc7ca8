"""Strict models, and what is wrong with what they were given: a line a fault, with field, value, nearest valid one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from reprlib import Repr
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tempflow.names import SCREEN, cut, likeliest, nearest

__all__ = [
    "MAX_DEPTH",
    "MAX_FAULTS",
    "MAX_VALUES",
    "ConfigError",
    "Place",
    "Strict",
    "check_bounds",
    "cut",
    "leaves",
    "nearest",
    "shown",
    "validated",
]

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

MAX_FAULTS = 20
"""Faults that are told at once."""

MAX_DEPTH, MAX_VALUES, MAX_TEXT, MAX_INT = 20, 10_000, 4096, 2**63 - 1
"""What a configuration may hold: more than any needs, and so little that neither checks nor messages grow with it."""

_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict, _BRIEF.maxset = 3, 4, 4, 4, 4
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = SCREEN


Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A text that may name a place on the disk; "~" in it is the user's home, in a file as on the command line."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message has a line for each fault."""


class Strict(BaseModel):
    """Frozen; unknown fields, and values of another type, are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def narrowed(cls, given: object) -> type[Self] | None:
        """The model that `given` is meant for: this one, or one derived from it; None where that cannot be told."""
        return cls

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            lines = [_unknown_line((), key, cls, leaves(cls, given)) for key in given if key not in cls.model_fields]
            if lines:
                raise ValueError("\n".join(lines))
        return given


Model = TypeVar("Model", bound=Strict)


# ------------------------------------------------------------------------------------------------ values in messages
def shown(value: object) -> str:
    """`value` as Python writes it, cut to a screen line; quick to make however large it is."""
    try:
        return cut(_BRIEF.repr(value))
    except (ValueError, RecursionError):  # an int beyond Python's limit of digits
        return f"a {type(value).__name__} that is too large to write down"


# -------------------------------------------------------------------------------------------------------- validation
def validated(model: type[Model], given: Mapping[str, Any]) -> Model:
    """`given` as a `model`. Raises ConfigError with a line for each fault, at most `MAX_FAULTS`.

    `given` may be anything that YAML or JSON can say: what is too large or too deep is refused before it is read.
    """
    check_bounds(given)
    fields = leaves(model, given)
    unknown = list(_unknown(model, given))
    lines = [_unknown_line(path[:-1], path[-1], inner, fields) for path, inner in unknown[:MAX_FAULTS]]
    try:
        made = model.model_validate(_without(given, [path for path, _ in unknown]))
    except ValidationError as error:
        lines += _explain(error, dict(model.model_fields) | fields)
    else:
        if not lines:
            return made
    over = len(lines) + max(0, len(unknown) - MAX_FAULTS) - MAX_FAULTS
    raise ConfigError("\n".join(lines[:MAX_FAULTS] + [f"… and {over} more"] * (over > 0)))


def check_bounds(given: object) -> None:
    """Raises ConfigError for a tree that is larger or deeper than any configuration."""
    large = _too_large(given)
    if large:
        raise ConfigError(large)


def leaves(model: type[BaseModel], given: object = None) -> dict[str, FieldInfo]:
    """Dotted path -> field, for all fields of a tree that are not sections themselves.

    given   a mapping, which says what narrower models stand where (which algorithm) and how many items lists have;
            the items of a list of models are numbered, and one more may be added
    """
    values, found = given if isinstance(given, Mapping) else {}, dict[str, FieldInfo]()
    for name, field in model.model_fields.items():
        value, section, item = values.get(name), _section(field), _item(field)
        if section is not None:
            inner = leaves(_narrowed(section, value) or section, value)
            found |= {f"{name}.{path}": part for path, part in inner.items()}
            continue
        found[name] = field
        if item is not None:
            count = len(value) if isinstance(value, list | tuple) else 0
            for n in range(count + 1):
                found |= {f"{name}.{n}.{path}": part for path, part in leaves(item).items()}
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _item(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a list's items; None for other fields."""
    return next((a for a in get_args(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _narrowed(section: type[BaseModel], given: object) -> type[BaseModel] | None:
    return section.narrowed(given) if issubclass(section, Strict) else section


def _too_large(given: object) -> str | None:
    """What is too large or too deep in a tree of mappings and lists; what stands twice counts twice."""
    left, todo = MAX_VALUES, [("", 0, given)]
    while todo:
        path, depth, value = todo.pop()
        name, left = path or "configuration", left - 1
        if left < 0 or depth > MAX_DEPTH:
            what = f"holds more than {MAX_VALUES:,} values" if left < 0 else f"is nested deeper than {MAX_DEPTH}"
            return f"{cut(name)}: {what}; nearest valid: the fields that `tempflow train --help` lists"
        if isinstance(value, int) and abs(value) > MAX_INT:
            return f"{cut(name)}: {shown(value)} is too large; nearest valid: {MAX_INT if value > 0 else -MAX_INT}"
        if isinstance(value, str) and len(value) > MAX_TEXT:
            return f"{cut(name)}: {shown(value)} has {len(value):,} characters; nearest valid: at most {MAX_TEXT:,}"
        inside: Iterable[tuple[object, object]] = ()
        if isinstance(value, Mapping):
            inside = value.items()
        elif isinstance(value, list | tuple):
            inside = enumerate(value)
        todo += [(f"{path}.{_key(key)}" if path else _key(key), depth + 1, part) for key, part in inside]
    return None


def _key(key: object) -> str:
    return cut(key) if isinstance(key, str) else shown(key)


# ---------------------------------------------------------------------------------------------------- unknown fields
def _unknown(model: type[BaseModel], given: object) -> Iterator[tuple[tuple[Any, ...], type[BaseModel]]]:
    """Path of each key in a tree that is no field there, and the model that it stands in."""
    if not isinstance(given, Mapping):
        return
    for key in given:
        if key not in model.model_fields:
            yield (key,), model
    for name, field in model.model_fields.items():
        value, section, item = given.get(name), _section(field), _item(field)
        parts: list[tuple[tuple[Any, ...], object, type[BaseModel] | None]] = []
        if section is not None:
            parts = [((name,), value, _narrowed(section, value))]
        elif item is not None and isinstance(value, list | tuple):
            parts = [((name, n), part, item) for n, part in enumerate(value)]
        for way, part, inner in parts:
            if inner is not None:
                yield from (((*way, *path), owner) for path, owner in _unknown(inner, part))


def _unknown_line(way: Sequence[Any], key: Any, owner: type[BaseModel], fields: Mapping[str, FieldInfo]) -> str:
    """What is wrong with `key`, which stands at `way`, where an `owner` is meant to be."""
    section = "".join(f"{_key(part)}." for part in way)
    sections = dict.fromkeys(path.rpartition(".")[0] for path in fields)
    meant = likeliest(section + str(key), [*filter(None, sections), *fields])
    if meant is None:
        hint = cut(f"there are {', '.join(owner.model_fields) or 'none'}", 2 * SCREEN)
    else:
        hint = f"did you mean {meant.removeprefix(section)!r}?"
    return f"{section}{_key(key)}: unknown field; {hint}"


def _without(given: Mapping[Any, Any], paths: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    """A copy of a tree without what stands at those paths."""
    copy = dict(given)
    for key, *rest in paths:
        if not rest:
            del copy[key]
        elif isinstance(copy[key], Mapping):
            copy[key] = _without(copy[key], [tuple(rest)])
        else:
            items = list(copy[key])
            items[rest[0]] = _without(items[rest[0]], [tuple(rest[1:])])
            copy[key] = items
    return copy


# ------------------------------------------------------------------------------------------------------ other faults
def _explain(error: ValidationError, fields: Mapping[str, FieldInfo]) -> list[str]:
    """The faults that pydantic found, a line each, without its jargon.

    Our own checks raise ValueError("field: …") with the field as seen from their model; its path goes in front.
    """
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "value_error":
            text = str(fault.get("ctx", {}).get("error", fault["msg"]))
            # A model's own message starts with one of its fields, a field's message does not name the field again.
            leaf = path in fields and _section(fields[path]) is None
            glue = "." if isinstance(fault["input"], Mapping | BaseModel) and not leaf else ": "
            lines += [f"{path}{glue}{line}" if path else line for line in text.splitlines()]
        else:
            lines.append(f"{path}: {_sentence(fault, fields.get(path))}")
    return list(dict.fromkeys(lines))


def _sentence(fault: ErrorDetails, field: FieldInfo | None) -> str:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    usual = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    hint = "" if usual is None or isinstance(usual, BaseModel | tuple) else f"; the default is {usual!r}"
    if kind == "missing":
        return f"missing; it has no default{': ' + field.description if field and field.description else ''}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(context.get("expected")))
        return f"{shown(value)} is not one of {', '.join(options)}; nearest valid: {nearest(value, options)}"
    if kind in BOUNDS:
        key, sign = BOUNDS[kind]
        return f"{shown(value)} must be {sign} {context[key]}; nearest valid: {context[key]}"
    if kind in OPEN_BOUNDS:
        key, word = OPEN_BOUNDS[kind]
        return f"{shown(value)} must be {word} {context[key]}{hint}"
    if kind in KINDS:
        return f"{shown(value)} is not {KINDS[kind]}{hint}"
    return f"{shown(value)}: {fault['msg'][0].lower()}{fault['msg'][1:]}{hint}"
