"""docs/architecture.md: its tables name every file, its imports and walls are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "tempflow"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    found = re.search(rf"^###? {re.escape(heading)}\n(.*?)(?=^###? |\Z)", PAGE, re.M | re.S)
    assert found, heading
    return found[1]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def imports(path: Path, room: str) -> set[str]:
    """The files of the room that this one imports, wherever the import stands."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == f"tempflow.{room}":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"tempflow.{room}."):
            names.add(node.module.split(".")[2])
    return names


def test_the_table_of_the_training_room_is_the_code() -> None:
    rows = [cells(line) for line in section("train").splitlines() if re.match(r"\| `\w+\.py`", line)]
    told = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}
    files = {path.name: imports(path, "train") for path in (SRC / "train").glob("*.py") if path.name != "__init__.py"}
    assert told == files


def test_the_diagram_of_the_training_room_has_no_import_that_is_not_there() -> None:
    diagram = re.search(r"```mermaid\n(.*?)```", section("train"), re.S)
    assert diagram
    arrows = re.findall(r"^ +(\w+) --> (.+)$", diagram[1], re.M)
    assert len(arrows) > 8
    drawn = {source: set(target.split(" & ")) for source, target in arrows if source != "trainer"}
    for source, targets in drawn.items():
        assert targets <= imports(SRC / "train" / f"{source}.py", "train"), source


def test_every_file_is_on_the_page() -> None:
    core = section("core")
    for folder in ("core", "core/credit", "core/objective"):
        names = {path.name for path in (SRC / folder).glob("*.py")} - {"__init__.py"}
        assert [name for name in sorted(names) if f"`{name}`" not in core] == [], folder
    algorithms = section("algorithms")
    names = {path.stem for path in (SRC / "algorithms").glob("*.py")} - {"__init__", "base", "lesson", "phase"}
    assert set(re.findall(r"`(\w+)`", algorithms.split("|---|---|")[1])) == names
    rest = {p for p in SRC.rglob("*.py") if p.relative_to(SRC).parts[0] not in ("core", "algorithms", "train")}
    told = [str(p.relative_to(SRC)) for p in rest if p.name != "__init__.py"]
    assert [name for name in sorted(told) if f"`{name}`" not in PAGE and not cited(name)] == []


def cited(name: str) -> bool:
    """In a cell that names several single modules."""
    return "/" not in name and re.search(rf"`{re.escape(name)}[`,]", PAGE) is not None


def test_files_that_the_pages_name_are_there() -> None:
    for page in ("architecture.md", "stranger_test.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        named = re.findall(r"`((?:src/tempflow/)?[a-z_]+/[\w/]+\.py)`", text)
        assert named
        missing = [n for n in named if not (ROOT / n).exists() and not (SRC / n).exists() and "NAME" not in n]
        assert missing == [], page


def test_no_algorithm_of_the_strangers_test_needs_more_than_three_files() -> None:
    text = (ROOT / "docs" / "stranger_test.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) >= 5
    for name, files, count in rows:
        opened = re.findall(r"`([\w/]+\.py)`", files)
        assert opened[0] == f"algorithms/{name.strip('`')}.py" and len(opened) <= 3 and count.endswith(str(len(opened)))
