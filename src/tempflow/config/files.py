"""Configurations as YAML files and plain mappings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tempflow.config.tree import Config
from tempflow.data.prompts import nearest_file
from tempflow.names import PATH
from tempflow.strict import MAX_DEPTH, MAX_VALUES, ConfigError, cut, shown, validated

MAX_YAML_BYTES = 2**20

Made = TypeVar("Made")
TOO_MANY = f"holds more than {MAX_VALUES:,} values; a configuration has about a hundred"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number, as people mean it, and refuses a key given twice.

    It stops reading where there is more than a configuration can hold, so that no file takes long.
    """

    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > MAX_VALUES:
            raise ConfigError(TOO_MANY)
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"is nested deeper than {MAX_DEPTH}; a configuration has four levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key.value)} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """What YAML says: mappings, lists, texts, numbers, dates. Raises ConfigError, on one line, where it says nothing.

    Text whose aliases unfold to more than `MAX_VALUES` values is refused before it is unfolded.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node) > MAX_VALUES:
            raise ConfigError(TOO_MANY)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: 2026-13-45, a number of 5 000 digits
        raise ConfigError(f"is not YAML: {cut(str(error), 160)}") from error


def _unfolded(node: yaml.Node, sizes: dict[int, int] | None = None) -> int:
    """How many values a document has once every alias is written out; a part that holds itself has no end."""
    sizes = {} if sizes is None else sizes
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES + 1  # while it is being counted: who meets it now is inside it
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes) for part in parts)
    return sizes[id(node)]


def parse_config(given: Any) -> Config:
    """A mapping, as YAML has it, to a `Config`. Raises ConfigError, a line for each fault."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"a configuration is a mapping of fields, not {type(given).__name__}; start with 'name: …'")
    if "stages" in given:
        raise ConfigError("stages: several runs, and one is meant; nearest valid: one of them (load_stages reads all)")
    return validated(Config, given)


def read_config(path: str | Path) -> dict[str, Any]:
    """What a YAML file of at most 1 MiB says, not yet a `Config`.

    Raises ConfigError for a file that is missing (naming the nearest existing one), cannot be read, or is no mapping.
    """
    file = Path(path).expanduser()
    name = cut(str(file), PATH)
    try:
        if not file.is_file():
            raise ConfigError(f"{name} is no file; {nearest_file(file, ('.yaml', '.yml'))}")
        size = file.stat().st_size
        if size > MAX_YAML_BYTES:
            raise ConfigError(f"{name} has {size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror})") from error
    try:
        given = read_yaml(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not YAML: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror})") from error
    if not isinstance(given, dict):
        what = f"a configuration is a mapping of fields, not {type(given).__name__}; start with 'name: …'"
        raise ConfigError(f"{name}: {what}")
    return given


def load_config(path: str | Path) -> Config:
    """The configuration in a YAML file of at most 1 MiB, read as data only; `load_stages` reads one of stages.

    Raises ConfigError for what `read_config` refuses, and for fields that are not valid.
    """
    return from_file(path, lambda given: parse_config(_one_run(given, Path(path).parent)))


def _one_run(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`given`. Raises ConfigError, with the last stage's folder, for stages whose runs lie in `folder`."""
    begun = [file.parent for file in folder.glob("[1-9]*-*/config.yaml")] if "stages" in given else []
    if begun:
        last = max(begun, key=lambda stage: (len(stage.name.partition("-")[0]), stage.name))
        raise ConfigError(f"stages: several runs, and one is meant; nearest valid: {cut(str(last), PATH)}")
    return given


def from_file(path: str | Path, parse: Callable[[dict[str, Any]], Made]) -> Made:
    """What `parse` makes of a file. Raises ConfigError, each line with the file in front."""
    given = read_config(path)
    try:
        return parse(given)
    except ConfigError as error:
        name = cut(str(Path(path).expanduser()), PATH)
        raise ConfigError("\n".join(f"{name}: {line}" for line in str(error).splitlines())) from error
