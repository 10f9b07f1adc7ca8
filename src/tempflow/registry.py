"""What a package offers, found by its files: a new file there is all it takes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

FAULTS = (SyntaxError, AttributeError, NameError, TypeError, LookupError, ValueError)
"""What a file with a mistake raises when it is imported. An ImportError of a file here is let through: it says what to
install."""

CHANGING = ("update", "setdefault", "pop", "popitem", "clear")
"""Methods that change a dictionary."""


def entry_points(*, group: str) -> EntryPoints:
    """Those of installed packages, looked up once: it takes milliseconds, and what is installed stays."""
    return _installed(group, tuple(sys.path))


@lru_cache
def _installed(group: str, path: tuple[str, ...]) -> EntryPoints:
    return metadata.entry_points(group=group)


def files_of(package: str) -> list[tuple[str, Path]]:
    """(name, folder) of the files of a package that is imported by then, in alphabetical order."""
    found = [(file.name, Path(getattr(file.module_finder, "path", ""))) for file in _modules(package)]
    return sorted(found)


def _modules(package: str) -> tuple[pkgutil.ModuleInfo, ...]:
    return _modules_in(tuple(sys.modules[package].__path__))


@lru_cache
def _modules_in(folders: tuple[str, ...]) -> tuple[pkgutil.ModuleInfo, ...]:
    return tuple(pkgutil.iter_modules(folders))


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

    Raises ValueError, when it is read, for a file with the constant that is no Python, a dictionary that is no literal
    or is changed or made elsewhere than at the top level, a key that is declared twice, and two entry points of one
    name; when a key is looked up, for a file that does not run or has no object of that name.
    """

    def __init__(self, package: str, constant: str, group: str | None = None) -> None:
        self._package, self._constant, self._group = package, constant, group

    def __getitem__(self, key: str) -> T:
        own = self._own
        if key in own:
            return self._of_file(key, *own[key])
        for entry in self._entries:
            if entry.name == key:
                try:
                    return entry.load()
                except (*FAULTS, ImportError) as error:
                    raise ValueError(f"{self._group}: {key!r} is {entry.value!r}, {_why(error)}") from error
        raise KeyError(key)

    def _of_file(self, key: str, file: str, name: str) -> T:
        where = f"{file}.py: {self._constant}[{key!r}]"
        try:
            there = vars(importlib.import_module(f"{self._package}.{file}"))
        except FAULTS as error:
            raise ValueError(f"{where}: {_why(error)}") from error
        if name not in there:
            near = get_close_matches(name, [n for n, value in there.items() if isinstance(value, type)], 1, 0.0)
            hint = f"; nearest valid: {near[0]!r}" if near else ""
            raise ValueError(f"{where} is {name[:60]!r}, which the file does not have{hint}")
        return there[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *sorted({entry.name for entry in self._entries} - self._own.keys())])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self._own or any(entry.name == key for entry in self._entries)

    @property
    def _entries(self) -> tuple[EntryPoint, ...]:
        found = () if self._group is None else tuple(entry_points(group=self._group))
        for name, times in Counter(entry.name for entry in found).items():
            if times > 1:
                values = " and ".join(repr(entry.value) for entry in found if entry.name == name)
                raise ValueError(f"{self._group}: {name!r} is {values}; nearest valid: one of these packages alone")
        return found

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


def _why(error: Exception) -> str:
    return f"which fails: {' '.join(str(error).split())[:200]} ({type(error).__name__})"


def _declared(path: Path, constant: str) -> Mapping[str, str]:
    """The dictionary of that name at a file's top level, read without running the file; {} where there is none."""
    raw = path.read_bytes() if path.is_file() else b""
    return _declared_in(raw, path.name, constant) if constant.encode() in raw else {}


@lru_cache(maxsize=256)
def _declared_in(raw: bytes, file: str, constant: str) -> Mapping[str, str]:
    """The same of a file's text; kept by the text itself, as models are loaded many times in a process."""
    try:
        tree = ast.parse(raw)
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        raise ValueError(f"{file}: {constant} cannot be read: {' '.join(str(error).split())[:200]}") from error
    found: dict[str, str] = {}
    plain: ast.expr | None = None
    for node in tree.body:
        if plain is not None or not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        target, *others = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
        if isinstance(target, ast.Name) and target.id == constant and not others:
            found, plain = _texts(node.value, f"{file}: {constant}"), target
    for node in _at_import(tree):
        if node is not plain and _changes(node, constant):
            where = f"{file}:{getattr(node, 'lineno', 1)}: {constant}"
            raise ValueError(f"{where} is set or changed here; nearest valid: one dictionary at the file's top level")
    return found


def _texts(node: ast.expr, where: str) -> dict[str, str]:
    """A dictionary of texts, as literals."""
    sides = [*node.keys, *node.values] if isinstance(node, ast.Dict) else [None]
    texts = [side.value for side in sides if isinstance(side, ast.Constant) and isinstance(side.value, str)]
    if len(texts) < len(sides):
        raise ValueError(f"{where} must be a dictionary of texts, as literals")
    keys, names = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    for key, times in Counter(keys).items():
        if times > 1:
            raise ValueError(f"{where} has {key[:60]!r} {times} times; nearest valid: once")
    return dict(zip(keys, names, strict=True))


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All that runs when a file is imported, but for its functions and classes, and annotations without a value."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
        if not inside and not (isinstance(child, ast.AnnAssign) and child.value is None):
            yield child
            yield from _at_import(child)


def _changes(node: ast.AST, constant: str) -> bool:
    """Whether it sets, changes or deletes what has that name."""
    if isinstance(node, ast.Name):
        return node.id == constant and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.value, ast.Name):
        method = isinstance(node, ast.Attribute) and node.attr in CHANGING
        return node.value.id == constant and (method or not isinstance(node.ctx, ast.Load))
    return False


class Namesakes(ModuleType):
    """A package in which a file's name means the object of that name in it.

    The import system makes an imported file an attribute of its package; its namesake takes that place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, vars(value).get(name, value) if isinstance(value, ModuleType) else value)
