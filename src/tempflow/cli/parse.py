"""The configuration that a command line means: a recipe or a file, with options laid over it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic.fields import FieldInfo

from tempflow.cli.options import assign, flag, help_text, read, wants_help
from tempflow.names import PATH, SCREEN, cut, nearest
from tempflow.strict import ConfigError, Strict, leaves, shown, validated

if TYPE_CHECKING:
    from tempflow.config import Config, Stages

DEFAULT_RECIPE, SUFFIXES = "demo", (".yaml", ".yml")

RENAMED = {"shapes_demo": "shapes_tempflow"}
"""Recipes that are called otherwise now."""

Own = TypeVar("Own", bound=Strict)


class NoOptions(Strict):
    """Every field of a configuration is an option."""


def configured(verb: str, args: Sequence[str]) -> Config | Stages:
    """The configuration that `[RECIPE | config.yaml] [--field value …]` means, for a verb without further options."""
    return configured_with(NoOptions, verb, args)[0]


def configured_with(own: type[Own], verb: str, args: Sequence[str], source: str = "") -> tuple[Config | Stages, Own]:
    """The configuration that `[RECIPE | config.yaml] [--field value …]` means, and the verb's own options.

    Where it has stages, `--field` is what they share and `--stages.N.field` what stage N, from 0, has to itself.

    own     model of the options that the verb has beside a configuration's fields
    source  the recipe or file that is meant where none is named

    Options and file are one configuration, checked once, as a whole; `--algorithm.name` takes another algorithm, with
    its own defaults. Prints help and raises SystemExit where that is asked for. Raises ConfigError; where there are two
    sources, each line names the one that is at fault.
    """
    from tempflow.config import parse_recipe
    from tempflow.config.stages import stage_fields

    place = _source_place(args, own)
    named = place is not None
    source = args[place] if place is not None else source or DEFAULT_RECIPE
    rest = [word for n, word in enumerate(args) if n != place]
    tree, file = _tree(source)
    _take_algorithm(tree, rest, file)
    fields = leaves(own) | stage_fields(tree)
    if wants_help(rest):
        print(_help(verb, source, tree, fields, own))
        raise SystemExit(0)
    values = read(f"{verb} {source}" if named else verb, rest, fields, _whole_values(tree))
    mine = validated(own, {path: value for path, value in values.items() if path in own.model_fields})
    given = {path: value for path, value in values.items() if path not in own.model_fields}
    if tree.get("output") == f"runs/{tree.get('name')}":  # not chosen but derived: derive it anew, from the name
        tree["output"] = ""
    try:
        for path, value in given.items():
            _check_reaches(tree, path)
            _take_list(tree, path)
            assign(tree, path, value)
        return parse_recipe(tree), mine
    except ConfigError as error:
        raise _located(error, file, given) from error


def runs_of(config: Config | Stages) -> list[tuple[str, Config]]:
    """A configuration's runs, each with what stands in front of its fields in messages: "", or "stages.N."."""
    from tempflow.config import Stages

    if isinstance(config, Stages):
        return [(f"stages.{number}.", run) for number, run in enumerate(config.runs)]
    return [("", config)]


def _source_place(args: Sequence[str], own: type[Strict]) -> int | None:
    """Where in the words the recipe or file is named: in front, or after options and their values."""
    from tempflow.recipes import RECIPES

    alone = {flag(name) for name, field in own.model_fields.items() if field.annotation is bool}
    place = 0
    while place < len(args):
        word = args[place]
        if not word.startswith("-"):
            return place if place == 0 or word in RECIPES or word.endswith(SUFFIXES) else None
        place += 1 if "=" in word or word in alone else 2
    return None


def _located(error: ConfigError, file: str | None, given: Collection[str]) -> ConfigError:
    """The faults with the source of each in front, where there are two: the file, or options laid over it."""
    if file is None:
        return error

    def source(line: str) -> str:
        path = line.partition(":")[0] + "."
        shared = re.sub(r"^stages\.\d+\.", "", path)  # a fault of one stage may come of what all share
        said = any(p.startswith(f"{option}.") or f"{option}.".startswith(p) for p in (path, shared) for option in given)
        return "command line" if said else file

    return ConfigError("\n".join(f"{source(line)}: {line}" for line in str(error).splitlines()))


def _take_algorithm(tree: dict[str, Any], args: Sequence[str], file: str | None) -> None:
    """Another algorithm by `--algorithm.name`, or for a stage by `--stages.N.algorithm.name`, takes the place of the
    tree's, without what was set for that.

    Raises ConfigError where the algorithm is not known, on which all its fields depend.
    """
    from tempflow.config import algorithm_config
    from tempflow.config.stages import parts_of, stage_tree

    shared, stages = parts_of(tree)
    wholes = [("", tree, shared)]
    wholes += [(f"stages.{n}.", tree["stages"][n], stage_tree(shared, stage)) for n, stage in enumerate(stages)]
    for above, part, whole in wholes:
        old = whole.get("algorithm")
        before = old.get("name") if isinstance(old, Mapping) else None
        other = value_of(args, f"--{above}algorithm.name")
        if other is not None and other != before and isinstance(part, dict):
            part["algorithm"] = {"name": other}
        name = before if other is None else other
        if isinstance(name, str):
            try:
                algorithm_config(name)
            except ValueError as error:
                fault = ConfigError(f"{above}algorithm.{error}")
                raise _located(fault, file, [f"{above}algorithm"] if other is not None else []) from None


def _check_reaches(tree: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError for an option that would change nothing, as every stage has a value of its own."""
    from tempflow.config.stages import STAGES, reaches

    if not path.startswith(f"{STAGES}.") and not reaches(tree, path):
        own = f"{flag(f'{STAGES}.0.{path}')} and so on"
        raise ConfigError(f"{path}: no stage takes it from what they share; nearest valid: {own}")


def _take_list(tree: dict[str, Any], path: str) -> None:
    """Where an option sets a part of a list that a stage has from what all share, the stage gets a list of its own."""
    from tempflow.config.stages import STAGES, is_given, parts_of, stage_tree

    section, *parts = path.split(".")
    place = next((n for n, part in enumerate(parts) if n and part.isdigit()), None)
    if section != STAGES or place is None:
        return
    shared, stages = parts_of(tree)
    stage, way = stages[int(parts[0])], parts[1:place]
    if not is_given(stage, way):
        listed: Any = stage_tree(shared, stage)
        for part in way:
            listed = listed.get(part, []) if isinstance(listed, Mapping) else []
        assign(tree, ".".join([STAGES, parts[0], *way]), copy.deepcopy(listed))


def value_of(args: Sequence[str], option: str) -> str | None:
    """What follows `option`, as its own word or behind an equals sign."""
    for place, word in enumerate(args):
        if word == option and place + 1 < len(args):
            return args[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _tree(source: str) -> tuple[dict[str, Any], str | None]:
    """A recipe's fields, or what a YAML file says; and the file's name. Raises ConfigError naming the nearest."""
    from tempflow.config import Config, read_config
    from tempflow.recipes import RECIPES

    if source in RECIPES:
        made = RECIPES[source]()
        return made.model_dump(mode="json") if isinstance(made, Config) else copy.deepcopy(dict(made.tree)), None
    path = Path(source[: 16 * SCREEN]).expanduser()
    if source.endswith(SUFFIXES) or os.sep in source or _is_file(path):
        return read_config(source), cut(source, PATH)
    beside = next((str(path.with_suffix(s)) for s in SUFFIXES if _is_file(path.with_suffix(s))), None)
    plain = source.removeprefix("shapes_").replace("-", "_")
    moved = RENAMED.get(source) or next((n for n in RECIPES if n.startswith(f"leaderboard_{plain}")), None)
    hint = repr(beside or moved) if beside or moved else nearest(source, RECIPES)
    raise ConfigError(f"{shown(source)} is neither a recipe nor a .yaml file; nearest valid: {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than any file's name, or with a zero byte
        return False


def _help(verb: str, source: str, tree: Mapping[str, Any], fields: Mapping[str, FieldInfo], own: type[Strict]) -> str:
    """All options of a verb over that recipe or file; of stages those that they set themselves, and their
    algorithms'."""
    from tempflow.algorithms import find
    from tempflow.config.stages import STAGES

    algorithm, values = tree.get("algorithm"), _whole_values(tree)
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    what = (find(name).__doc__ or "").strip().partition("\n")[0] if name else "no algorithm yet"
    about = f"{own.__doc__} Values are those of {source}. "
    if STAGES in tree:
        about += "It has stages: an option is what they share, and --stages.N. in front of it makes it stage N's own. "
        said = _values(tree)
        fields = {
            path: field
            for path, field in fields.items()
            if not path.startswith(f"{STAGES}.") or path in said or path.split(".")[2] == "algorithm"
        }
    else:
        about += f"{name}: {what} "
    about += (
        f"--algorithm.name takes another, whose fields `tempflow {verb} {source} --algorithm.name NAME --help` lists."
    )
    return help_text(f"tempflow {verb} [RECIPE | config.yaml]", about, fields, values)


def _whole_values(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`_values`, where each stage has what it shares with the others too."""
    from tempflow.config.stages import STAGES, parts_of, stage_tree

    shared, stages = parts_of(tree)
    found = _values(tree)
    for number, stage in enumerate(stages):
        found |= _values(stage_tree(shared, stage), f"{STAGES}.{number}.")
    return found


def _values(tree: object, above: str = "") -> dict[str, Any]:
    """Dotted path -> value, for whatever is in a tree of mappings and lists."""
    parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    found: dict[str, Any] = {}
    for key, value in parts:
        found[f"{above}{key}"] = value
        found |= _values(value, f"{above}{key}.")
    return found


@contextmanager
def writing(field: str, path: str | Path) -> Iterator[None]:
    """Around the writing of what `field` names. Raises ValueError, naming both, where the disk does not take it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{field}: {cut(str(path), PATH)!r} cannot be written ({error.strerror or error})") from error
