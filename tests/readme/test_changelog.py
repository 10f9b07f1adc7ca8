"""CHANGELOG.md's tables of what moved: every new name is there, no old path is left beside it."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    body = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", TEXT, re.M | re.S)
    assert body, heading
    lines = [line for line in body[1].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def found(path: str) -> object:
    """The object at a dotted path inside the package."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(["tempflow", *parts[:cut]])
        try:
            item: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # a dependency is missing, not ours
            continue
        for name in parts[cut:]:
            item = getattr(item, name)
        return item
    raise AssertionError(path)


def there(path: str) -> bool:
    try:
        found(path)
    except (AttributeError, AssertionError):
        return False
    return True


def has(path: str) -> bool:
    """Whether there is such a name, or such a field of a dataclass."""
    owner, _, name = path.rpartition(".")
    kind = found(owner)
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set[str]()
    return name in fields or hasattr(kind, name)


def test_every_name_is_at_its_new_path_and_no_old_path_is_left() -> None:
    table = rows("Modules, classes and functions")
    assert len(table) > 40
    for old, new, kept, renamed in table:
        (was,), (now,) = names(old), names(new)
        pairs = [*zip(names(kept), names(kept), strict=True), *zip(*[iter(names(renamed))] * 2, strict=True)]
        assert pairs
        assert [name for _, name in pairs if not there(f"{now}.{name}")] == [], f"{old} → {new}"
        # `core.credit` is a package now, and still exports the rules that it had
        assert was == "core.credit" or [name for name, _ in pairs if there(f"{was}.{name}")] == [], old


def test_every_attribute_has_its_new_name_alone() -> None:
    table = rows("Fields, attributes and arguments")
    assert len(table) > 15
    for owner, attributes, *_ in table:
        (path,) = names(owner)
        for old, new in zip(*[iter(names(attributes))] * 2, strict=True):
            assert has(f"{path}.{new}") and not has(f"{path}.{old}"), f"{path}: {old} → {new}"
