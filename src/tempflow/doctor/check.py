"""One finding, and many as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["ok", "warning", "fails"]
COLOURS: dict[State, str] = {"ok": "green", "warning": "yellow", "fails": "red"}


@dataclass(frozen=True)
class Check:
    """What was looked at, how it stands, what was found, and what to do about it ("" where nothing is to be done).

    "fails": a run cannot start or cannot end. "warning": it can, but slower, or with something that you should know.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def failed(checks: Sequence[Check]) -> bool:
    """Whether any check fails."""
    return any(check.state == "fails" for check in checks)


def by_stage(found: Sequence[Sequence[Check]]) -> list[Check]:
    """The checks of several stages as one list: those that are alike in all once, the others with the stage in
    front."""
    if len(found) == 1:
        return list(found[0])
    alike = [check for check in found[0] if all(check in other for other in found)]
    own = [(n, check) for n, checks in enumerate(found) for check in checks if check not in alike]
    return [*alike, *(replace(check, name=f"stages.{n}: {check.name}") for n, check in own)]


def to_json(checks: Sequence[Check]) -> dict[str, Any]:
    """{"fails": whether any does, "checks": the fields of each}."""
    return {"fails": failed(checks), "checks": [asdict(check) for check in checks]}


def table(checks: Sequence[Check]) -> Table:
    """A row per check, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table()
    for column in ("check", "state", "found", "what to do"):
        rows.add_column(column, no_wrap=column == "state", overflow="fold")
    for c in checks:
        rows.add_row(escape(c.name), f"[{COLOURS[c.state]}]{c.state}[/]", escape(c.found), escape(c.advice))
    return rows
