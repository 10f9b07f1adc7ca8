"""Options of the command line from the fields of a model: words to values, and the help that lists them.

`--a.b-c VALUE` sets the field a.b_c. What a value is, its field says; what it may be, validation says, which a
configuration from a file goes through as well.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tempflow.config.files import read_yaml
from tempflow.names import cut, likeliest
from tempflow.strict import ConfigError, Strict, leaves, shown, validated

POSITIONAL = "positional"
"""Annotates a field that is given without its name."""

NOTHING = ("none", "null")
"""How a value that may be missing is said to be."""

TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

LONGEST_NUMBER = 40
"""Digits that are read as a number."""

Model = TypeVar("Model", bound=Strict)
Fields = Mapping[str, FieldInfo]


def parse(model: type[Model], verb: str, args: Sequence[str]) -> Model:
    """What `args` say as a `model`. Prints help and raises SystemExit where that is asked for.

    Raises ConfigError, a line for each fault.
    """
    fields = leaves(model)
    if wants_help(args):
        print(help_text(f"tempflow {verb}", model.__doc__ or "", fields))
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    for path, value in read(verb, args, fields).items():
        assign(tree, path, value)
    return validated(model, tree)


def wants_help(args: Sequence[str]) -> bool:
    """Whether help is asked for, anywhere."""
    return "-h" in args or "--help" in args


def flag(path: str) -> str:
    """How the field is given: "--a.b-c"."""
    return "--" + path.replace("_", "-")


def read(verb: str, args: Sequence[str], fields: Fields, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted path -> value, for what `args` give; validation has still to be done.

    usual  dotted path -> a value to show where one is missing

    Raises ConfigError for an option that is none, has no value, or is given twice (a list may be, in parts), and for an
    argument too many.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    alone: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if not _is_option(word):
            alone.append(word)
            continue
        name, has_value, text = word.partition("=")
        path = _field_of(verb, name, fields)
        field, texts = fields.get(path, _ANY), [text] if has_value else []
        if not has_value:
            texts = _values(words, field)
        if not texts or "" in texts:
            what = "is empty" if texts else "no value is given"
            raise ConfigError(f"{name}: {what}; nearest valid: {name} {_example(field, (usual or {}).get(path))}")
        value, before, now = _value(texts, field), values.get(path), cut(" ".join(texts))
        if isinstance(before, list) and isinstance(value, list) and before and value:
            value = [*before, *value]
        elif path in values:
            raise ConfigError(f"{name}: is given twice, {said[path]} and {now}; nearest valid: {name} {now} alone")
        inside = next((flag(given) for given in values if given.startswith(f"{path}.")), None)
        if inside is not None:
            raise ConfigError(f"{name}: would take back {inside} in front of it; nearest valid: {name} first")
        values[path], said[path] = value, now
    return values | _alone(verb, alone, fields)


def _is_option(word: str) -> bool:
    """Negative numbers are values."""
    return word.startswith("-") and len(word) > 1 and not (word[1] in ".0123456789" or word in ("-inf", "-nan"))


def _field_of(verb: str, name: str, fields: Fields) -> str:
    """The field that an option sets."""
    by_flag = {flag(path): path for path, field in fields.items() if POSITIONAL not in field.metadata}
    if name in by_flag:
        return by_flag[name]
    around, dot, inside = name.rpartition(".")  # a setting of a field that takes any by name
    if dot and inside and around in by_flag and _is_mapping(fields[by_flag[around]]):
        return f"{by_flag[around]}.{inside.replace('-', '_')}"
    meant = _meant(name, fields)
    if meant is None:
        raise ConfigError(f"{cut(name)}: no such option; nearest valid: those that `tempflow {verb} --help` lists")
    alone = POSITIONAL in fields[meant].metadata
    hint = f"without a name: tempflow {verb} {meant.upper()}" if alone else flag(meant)
    why = "options are spelled with hyphens" if "_" in name and hint == name.replace("_", "-") else "no such option"
    raise ConfigError(f"{cut(name)}: {why}; nearest valid: {hint}")


def _meant(name: str, fields: Fields) -> str | None:
    """The field that an option most likely means: of the item of a list that it names, if it names one."""
    item = re.match(r"--(\w+\.\d+\.)(.+)", name)
    inside = [path.removeprefix(item[1]) for path in fields if path.startswith(item[1])] if item else []
    found = likeliest(item[2], inside) if item and inside else None
    return likeliest(name, list(fields)) if item is None or found is None else item[1] + found


def _values(words: list[str], field: FieldInfo) -> list[str]:
    """The words that are an option's values, taken from the front of `words`."""
    if _is_list(field):
        count = next((n for n, word in enumerate(words) if _is_option(word)), len(words))
    elif field.annotation is bool:
        if not (words and words[0].lower() in TRUTH):
            return ["true"]
        count = 1
    else:
        count = int(bool(words) and not _is_option(words[0]))
    taken, words[:] = words[:count], words[count:]
    return taken


def _alone(verb: str, words: Sequence[str], fields: Fields) -> dict[str, Any]:
    """The fields that are given without a name."""
    places = [path for path, field in fields.items() if POSITIONAL in field.metadata]
    rest, values = list(words), dict[str, Any]()
    for path in places:
        if rest and _is_list(fields[path]):
            values[path], rest = rest, []
        elif rest:
            values[path] = rest.pop(0)
    for path, value in values.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise ConfigError(f"{path}: is empty; nearest valid: tempflow {verb} {path.upper()}")
    if rest:
        kept = " ".join(words[: len(words) - len(rest)])
        hint = cut(f"tempflow {verb} {kept}".strip())
        raise ConfigError(f"{verb}: {shown(rest[0])} is one argument too many; nearest valid: {hint}")
    return values


# ------------------------------------------------------------------------------------------------------------ values
def _options(annotation: Any) -> tuple[Any, ...]:
    """What a type allows, without annotations: the members of a union, else itself."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(option for part in get_args(annotation) for option in _options(part))
    return (annotation,)


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(option) is tuple for option in _options(field.annotation))


def _is_mapping(field: FieldInfo) -> bool:
    return any(get_origin(option) is dict for option in _options(field.annotation))


_ANY = FieldInfo(annotation=Any)  # type: ignore[arg-type]
"""What a setting without a type of its own is read as: as YAML."""


def _value(texts: Sequence[str], field: FieldInfo) -> Any:
    """What the texts say, of the field's type if they can be read so; else as they are, for validation to explain."""
    options = _options(field.annotation)
    first = texts[0]
    if len(texts) == 1 and first.lower() in NOTHING:
        if NoneType in options:
            return None
        if field.default == "" or _is_list(field):
            return field.default if field.default == "" else []
    if Any in options or (_is_mapping(field) and first.startswith("{")):
        return read_yaml(first)
    if _is_list(field):
        if len(texts) == 1 and first.startswith(("[", "{")):
            return read_yaml(first)
        inner = get_args(next(o for o in options if get_origin(o) is tuple))[0]
        return [_scalar(text, _options(inner)) for text in texts]
    return _scalar(first, options)


def _scalar(text: str, options: Sequence[Any]) -> Any:
    if bool in options and text.lower() in TRUTH:
        return TRUTH[text.lower()]
    for kind in (int, float):
        if kind in options and len(text) <= LONGEST_NUMBER:
            try:
                return kind(text)
            except ValueError:
                pass
    for choice in (c for option in options if get_origin(option) is Literal for c in get_args(option)):
        if str(choice) == text:
            return choice
    if int in options and float not in options and len(text) <= LONGEST_NUMBER:
        try:  # "2.5" is a number, if none of the right kind
            return float(text)
        except ValueError:
            return text
    return text


def _example(field: FieldInfo, usual: Any) -> str:
    """A value to show: the usual one or the default, else what kind it is."""
    for value in (usual, None if field.is_required() else field.default):
        if isinstance(value, str | int | float) and value != "":
            return cut(str(value))
    return _kind(field)


def assign(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value at a dotted path of a tree of mappings and lists; sections that are missing are made.

    Raises ConfigError where the path leads through something else.
    """
    parts = path.split(".")
    inside: Any = tree
    for depth, (part, following) in enumerate(pairwise(parts)):
        fresh: Any = [] if following.isdigit() else {}
        if isinstance(inside, list):
            place = int(part)
            inside += [fresh] * (place == len(inside))
            inside = inside[place]
        else:
            inside = inside.setdefault(part, fresh)
        if not isinstance(inside, list if following.isdigit() else dict):
            raise ConfigError(f"{'.'.join(parts[: depth + 1])}: {shown(inside)} is not a mapping of fields")
    section: Any = inside
    section[parts[-1]] = value


# -------------------------------------------------------------------------------------------------------------- help
def help_text(usage: str, about: str, fields: Fields, values: Mapping[str, Any] | None = None) -> str:
    """A line or more for each field: its option, kind, description and value.

    values  dotted path -> what the configuration at hand says; defaults where it says nothing
    """
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    alone = [path for path, field in fields.items() if POSITIONAL in field.metadata]
    shape = " ".join([usage, *(f"[{path.upper()}]" for path in alone), "[--option value …]"])
    lines = [f"usage: {shape}", "", *textwrap.wrap(" ".join(about.split()), width)]
    section = None
    for path, field in fields.items():
        if _holds_models(field):
            continue
        here = path.rpartition(".")[0].partition(".")[0]
        if here != section:
            lines += ["", f"{here}:"] if here else [""]
            section = here
        name = path.upper() if path in alone else f"{flag(path)} {_kind(field)}"
        value = (values or {}).get(path, None if field.is_required() else field.default)
        told = "" if value is None or value == "" or value == () or value == [] else f" ({_plain(value)})"
        lines += _entry(name, f"{field.description or ''}{told}", width)
    lines += ["", "A value that may be missing is given as `none`; several values stand side by side."]
    return "\n".join(lines)


def _holds_models(field: FieldInfo) -> bool:
    """Whether it is a list of sections, whose fields are listed themselves."""
    return any(isinstance(a, type) and issubclass(a, BaseModel) for a in get_args(field.annotation))


def _entry(name: str, text: str, width: int, column: int = 36) -> list[str]:
    wrapped = textwrap.wrap(text, max(20, width - column)) or [""]
    if len(name) + 3 > column:
        return [f"  {name}", *(" " * column + line for line in wrapped)]
    return [f"  {name}".ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def _plain(value: Any) -> str:
    return cut(" ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _kind(field: FieldInfo) -> str:
    """What sort of value a field takes."""
    return "|".join(dict.fromkeys(_word(option) for option in _options(field.annotation)))


def _word(option: Any) -> str:
    words = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", NoneType: "none"}
    if get_origin(option) is Literal:
        return "|".join(map(str, get_args(option)))
    if get_origin(option) is tuple:
        inner = dict.fromkeys(_word(part) for part in _options(get_args(option)[0]))
        return f"{'|'.join(inner)} …"
    return words.get(option, "VALUE")
