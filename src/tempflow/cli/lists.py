"""`tempflow algorithms`, `models`, `rewards` and `recipes`: what there is."""

from __future__ import annotations

from collections.abc import Sequence

from tempflow.cli import fail
from tempflow.names import cut


def algorithms_verb(args: Sequence[str]) -> int:
    from tempflow.algorithms import ALGORITHMS, ENTRY_POINTS
    from tempflow.registry import entry_points

    rows = [(name, _first_line(function)) for name, function in ALGORITHMS.items()]
    rows += [(entry.name, f"from {entry.value}") for entry in entry_points(group=ENTRY_POINTS)]
    return _list("algorithms", args, ("name", "what"), rows)


def models_verb(args: Sequence[str]) -> int:
    from tempflow.models import ADAPTERS, adapter_for

    rows = [("shapes", "embedded, 32×32, shapes by prompt", "Apache-2.0", "tempflow[diffusers]")]
    rows += [("shapes_tokens", "embedded, the same pictures as 8×8 tokens", "Apache-2.0", "tempflow[diffusers]")]
    rows += [(n, adapter_for(n).family.title, "of the weights' folder", "tempflow[diffusers]") for n in ADAPTERS]
    return _list("models", args, ("path or pipeline class", "what", "licence", "needs"), rows)


def rewards_verb(args: Sequence[str]) -> int:
    from tempflow.rewards import Note, names, notes

    other = Note("from an installed package", "its own", "that package's", "")
    known = notes()
    told = {name: known.get(name, other) for name in names()}
    values = {name: n.values + (", has gradients" if n.differentiable else "") for name, n in told.items()}
    rows = [(name, f"{n.what.rstrip('.')} ({values[name]})", n.licence, n.needs) for name, n in told.items()]
    return _list("rewards", args, ("name", "what, values", "licence", "needs"), rows)


def recipes_verb(args: Sequence[str]) -> int:
    from tempflow.recipes import RECIPES

    return _list("recipes", args, ("name", "what"), [(name, _first_line(recipe)) for name, recipe in RECIPES.items()])


def _first_line(described: object) -> str:
    return (described.__doc__ or "").strip().partition("\n")[0]


def _list(verb: str, args: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Prints a table; such a verb takes no arguments but --help."""
    if args and args[0] not in ("-h", "--help"):
        return fail(f"{verb}: {cut(args[0])!r} is one argument too many; nearest valid: tempflow {verb}")
    if args:
        print(f"usage: tempflow {verb}\n\nLists the {verb} by {', '.join(columns)}.")
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
    return 0
