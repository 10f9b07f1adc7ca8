"""What a package offers, found by its files: a new file there is all it takes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def files_of(package: str) -> list[tuple[str, Path]]:
    """(name, folder) of the files of a package that is imported by then, in alphabetical order."""
    found = [(file.name, Path(getattr(file.module_finder, "path", ""))) for file in _modules(package)]
    return sorted(found)


def _modules(package: str) -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(sys.modules[package].__path__)


class Registry(Mapping[str, T]):
    """File name → the object of that name in the file. Read-only, in alphabetical order.

    Looking up a name imports its file and no other; listing names imports none.

    package  dotted name of a package, which is imported by then
    besides  its files that offer nothing
    """

    def __init__(self, package: str, besides: Collection[str]) -> None:
        self._package, self._besides = package, frozenset(besides)

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return vars(importlib.import_module(f"{self._package}.{name}"))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(file.name for file in _modules(self._package) if file.name not in self._besides))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


class Declared(Mapping[str, T]):
    """Key → the object that a file of the package, or an installed package's entry point, declares for it.

    A file declares by a dictionary of literals at its top level, `CONSTANT = {"key": "name of an object of the file"}`,
    which is read without running the file. Looking up a key imports its file and no other; listing keys imports none.

    package   dotted name of a package, which is imported by then
    constant  what the dictionary is called
    group     the entry point group by which other packages add keys; a file's comes first. None: they cannot

    Raises ValueError, when it is read, for a dictionary that is no literal, or a key that two files declare.
    """

    def __init__(self, package: str, constant: str, group: str | None = None) -> None:
        self._package, self._constant, self._group = package, constant, group

    def __getitem__(self, key: str) -> T:
        own = self._own
        if key in own:
            file, name = own[key]
            return vars(importlib.import_module(f"{self._package}.{file}"))[name]
        for entry in self._entries:
            if entry.name == key:
                return entry.load()
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *sorted({entry.name for entry in self._entries} - self._own.keys())])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in set(self)

    @property
    def _entries(self) -> tuple[EntryPoint, ...]:
        return () if self._group is None else tuple(entry_points(group=self._group))

    @property
    def _own(self) -> dict[str, tuple[str, str]]:
        """Key → (file, name of the object)."""
        found: dict[str, tuple[str, str]] = {}
        for file, folder in files_of(self._package):
            for key, name in _declared(folder / f"{file}.py", self._constant).items():
                if key in found:
                    raise ValueError(f"{self._constant}: {found[key][0]}.py and {file}.py both declare {key!r}")
                found[key] = (file, name)
        return found


def _declared(path: Path, constant: str) -> dict[str, str]:
    """The dictionary of that name at a file's top level, read without running the file; {} where there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if constant not in text:
        return {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and target.id == constant:
            try:
                return {str(key): str(name) for key, name in dict(ast.literal_eval(node.value)).items()}
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path.name}: {constant} must be a dictionary of texts, as literals") from error
    return {}


class Namesakes(ModuleType):
    """A package in which a file's name means the object of that name in it.

    The import system makes an imported file an attribute of its package; its namesake takes that place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, vars(value).get(name, value) if isinstance(value, ModuleType) else value)
