"""From words of the command line to validated options; faults are explained in our own words."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import BaseModel
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from tempflow.strict import ConfigError, Strict

if TYPE_CHECKING:
    from tempflow.config import Config

DEFAULT_RECIPE = "demo"


def fail(message: str, status: int = 2) -> int:
    for line in message.splitlines():
        print(f"tempflow: {line}", file=sys.stderr)
    return status


def _as_mapping(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Lets tyro read the flags of a model's fields but not build it: its faults are then explained in our own words."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    defaults = dict(info.default)
    fields = [
        StructFieldSpec(
            name=name,
            type=Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation,  # type: ignore
            default=defaults[name],
            helptext=field.description,
        )
        for name, field in info.type.model_fields.items()
    ]
    return StructConstructorSpec(instantiate=dict, fields=tuple(fields))


def parse(base: Strict, verb: str, args: Sequence[str]) -> Mapping[str, Any]:
    """The fields of `base` with the flags in `args` laid over them, not yet validated."""
    args = _lists_joined(base, args)
    registry = ConstructorRegistry()
    registry.struct_rule(_as_mapping)
    parsed: Any = tyro.cli(
        type(base), prog=f"tempflow {verb}", default=base, args=args, use_underscores=True, registry=registry
    )
    return parsed


def _lists_joined(base: Strict, args: Sequence[str]) -> list[str]:
    """`--prompt a --prompt b` as `--prompt a b`: of a list that is given in parts tyro would keep the last alone."""
    lists, words, own = set(_list_fields(base)), list[str](), dict[str, list[str]]()
    current: list[str] | None = None
    for word in args:
        name, equals, value = word.partition("=")
        field = name.removeprefix("--").replace("-", "_") if word.startswith("--") else None
        if field is None:
            (words if current is None else current).append(word)
        elif field in lists:
            current = own.setdefault(field, [])
            current += [value] if equals else []
        else:
            current = None
            words.append(word)
    return words + [word for field, values in own.items() for word in (f"--{field}", *values)]


def _list_fields(base: BaseModel) -> Iterator[str]:
    """Dotted names of the fields that hold a list of plain values."""
    for name, value in base:
        if isinstance(value, BaseModel):
            yield from (f"{name}.{inner}" for inner in _list_fields(value))
        elif isinstance(value, tuple) and not any(isinstance(item, BaseModel) for item in value):
            yield name


def configured(verb: str, args: Sequence[str]) -> Config:
    """The configuration that `[RECIPE | config.yaml] [--field value …]` means.

    `--algorithm.name` takes another algorithm, with its own defaults. Raises ConfigError.
    """
    from tempflow.config import parse_config

    named = bool(args) and not args[0].startswith("-")
    base = base_config(args[0] if named else DEFAULT_RECIPE)
    rest = list(args[1:] if named else args)
    other = _value(rest, "--algorithm.name")
    if other is not None and other != base.algorithm.name:
        base = parse_config({**base.model_dump(), "algorithm": {"name": other}})
    given = dict(parse(base, verb, rest))
    if given["output"] == f"runs/{base.name}":  # not chosen but derived: derive it anew, the name may be another
        given["output"] = ""
    return parse_config(given)


def _value(args: Sequence[str], flag: str) -> str | None:
    """What follows `flag`, as its own word or behind an equals sign."""
    for place, word in enumerate(args):
        if word == flag and place + 1 < len(args):
            return args[place + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def base_config(source: str) -> Config:
    """A recipe by name, or the configuration in a YAML file. Raises ConfigError naming the nearest."""
    from tempflow.config import load_config
    from tempflow.recipes import RECIPES

    if source in RECIPES:
        return RECIPES[source]()
    if source.endswith((".yaml", ".yml")) or os.sep in source or Path(source).is_file():
        return load_config(source)
    close = get_close_matches(source, list(RECIPES), n=1, cutoff=0.0)[0]
    raise ConfigError(f"{source!r} is neither a recipe nor a .yaml file; nearest valid: {close!r}")


def device_of(name: str) -> str:
    """`name`, with "auto" resolved. Raises ValueError for a device that is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r}, but torch sees no CUDA device; nearest valid: 'cpu'")
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device; nearest valid: 'cpu'") from error
