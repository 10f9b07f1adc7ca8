"""What a package offers, found by file name: a new file there is all it takes."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


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
        files = pkgutil.iter_modules(sys.modules[self._package].__path__)
        return iter(sorted(file.name for file in files if file.name not in self._besides))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


class Namesakes(ModuleType):
    """A package in which a file's name means the object of that name in it.

    The import system makes an imported file an attribute of its package; its namesake takes that place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, vars(value).get(name, value) if isinstance(value, ModuleType) else value)
