"""The prompts of the `shapes` world: six GenEval task kinds over nine shapes, seven colours, two sizes and four places.

Splits are by *content*, which is what a prompt means however it is worded: "a circle and a ring" stands with "a ring
and a circle", "a circle above a ring" with "a ring below a circle". RL trains on `train`, tunes and keeps its best
checkpoint on `validation`; `test` is looked at only for reported figures. The base model's pretraining has seen
pictures of `train` and `validation`, never one of a content of `test`; RL never sees a rendered picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import combinations, permutations
from typing import Literal, get_args

import numpy as np

Shape = Literal["circle", "square", "triangle", "cross", "ring", "diamond", "moon", "dome", "bar"]
Color = Literal["red", "green", "blue", "yellow", "purple", "cyan", "white"]
Size = Literal["small", "big"]
Place = Literal["at the top", "at the bottom", "on the left", "on the right"]
Relation = Literal["left of", "right of", "above", "below"]
Kind = Literal["single", "two", "count", "color", "position", "attribution"]
Split = Literal["train", "validation", "test"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
PLACES: tuple[Place, ...] = get_args(Place)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
NUMBERS = {2: "two", 3: "three", 4: "four"}
HELD_OUT: dict[Kind, tuple[int, int]] = {
    "single": (24, 24),
    "two": (12, 6),
    "count": (36, 36),
    "color": (32, 32),
    "position": (24, 24),
    "attribution": (60, 60),
}
"""Contents of `test` and of `validation`; `train` has the rest. Two objects can be said in two orders: two prompts."""


@dataclass(frozen=True)
class Object:
    """One wanted object; what is None is left open."""

    shape: Shape
    color: Color | None = None
    size: Size | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Spec:
    """What a picture must show: exactly these objects and no more. `relation` is between the first and the second."""

    kind: Kind
    objects: tuple[Object, ...]
    relation: Relation | None = None

    @property
    def prompt(self) -> str:
        """The caption, at most seven words."""
        if self.kind == "count":
            first, number = self.objects[0], NUMBERS[len(self.objects)]
            return " ".join(w for w in (number, first.color, _plural(first.shape)) if w)
        named = [" ".join(w for w in ("a", o.size, o.color, o.shape, o.place) if w) for o in self.objects]
        return f" {self.relation or 'and'} ".join(named)


def _plural(shape: Shape) -> str:
    return f"{shape}{'es' if shape == 'cross' else 's'}"


def _contents() -> dict[Kind, list[list[Spec]]]:
    """All prompts by kind, in groups of the same content (a group is never torn between splits)."""
    pairs = list(combinations(SHAPES, 2))
    flipped: dict[Relation, Relation] = {"left of": "right of", "above": "below"}
    sizes, colors = (None, *SIZES), (None, *COLORS)
    single = [Object(s, size=z, place=p) for s in SHAPES for z in sizes for p in (None, *PLACES) if z or p]
    return {
        "single": [[Spec("single", (o,))] for o in single],
        "two": [[Spec("two", (Object(a), Object(b))), Spec("two", (Object(b), Object(a)))] for a, b in pairs],
        "count": [[Spec("count", (Object(s, c),) * n)] for s in SHAPES for n in NUMBERS for c in colors],
        "color": [[Spec("color", (Object(s, c, z),))] for s in SHAPES for c in COLORS for z in sizes],
        "position": [
            [Spec("position", (Object(a), Object(b)), r), Spec("position", (Object(b), Object(a)), flipped[r])]
            for a, b in permutations(SHAPES, 2)
            for r in flipped
        ],
        "attribution": [
            [Spec("attribution", (Object(a, c), Object(b, d))), Spec("attribution", (Object(b, d), Object(a, c)))]
            for a, b in pairs
            for c, d in permutations(COLORS, 2)
        ],
    }


def _hash(spec: Spec) -> bytes:
    return hashlib.blake2b(spec.prompt.encode(), digest_size=8).digest()


def _traits(spec: Spec) -> set[object]:
    """What a split should have equally often, as many traits for every content of a kind."""
    count = len(spec.objects)
    per_object = [{o.shape, (o.color, "color"), (o.shape, o.color), (o.size, o.place)} for o in spec.objects]
    return set[object]().union(*per_object) | {(spec.relation, count), (count, *(o.color for o in spec.objects[:1]))}


def _pick(groups: Sequence[list[Spec]], count: int) -> list[int]:
    """`count` groups in whose company every trait is as frequent as can be; ties by the groups' order."""
    traits = [_traits(g[0]) for g in groups]
    column = {t: i for i, t in enumerate(sorted(set[object]().union(*traits), key=repr))}
    has = np.zeros((len(groups), len(column)), np.int64)
    for row, each in zip(has, traits, strict=True):
        row[[column[t] for t in each]] = 1
    free, used, chosen = np.ones(len(groups), bool), np.zeros(len(column), np.int64), list[int]()
    for _ in range(count):
        best = int(np.where(free, has @ used, np.iinfo(np.int64).max).argmin())
        free[best], used = False, used + has[best]
        chosen.append(best)
    return chosen


@cache
def _dealt() -> dict[Split, dict[Kind, tuple[Spec, ...]]]:
    """Every kind's prompts by split; the first wordings of all contents come before the second ones."""
    dealt: dict[Split, dict[Kind, tuple[Spec, ...]]] = {split: {} for split in SPLITS}
    for kind, contents in _contents().items():
        rest = sorted((sorted(group, key=_hash) for group in contents), key=lambda group: _hash(group[0]))
        for split, count in zip(("test", "validation", "train"), (*HELD_OUT[kind], None), strict=True):
            chosen = range(len(rest)) if count is None else _pick(rest, count)
            picked = [rest[i] for i in chosen]
            dealt[split][kind] = tuple(group[n] for n in range(len(picked[0])) for group in picked)
            rest = [group for i, group in enumerate(rest) if i not in set(chosen)]
    return dealt


@cache
def specs(split: Split | None = None) -> tuple[Spec, ...]:
    """All prompts of a split (or of the whole world), kind by kind, in a fixed order.

    Raises ValueError for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    return tuple(s for part in (SPLITS if split is None else (split,)) for kind in KINDS for s in _dealt()[part][kind])


@cache
def by_prompt() -> dict[str, Spec]:
    """Every caption of the world and what it means."""
    return {spec.prompt: spec for spec in specs()}


def check_known(prompts: Sequence[str]) -> None:
    """Raises ValueError for a prompt that is not of this world."""
    known = by_prompt()
    for prompt in prompts:
        if prompt not in known:
            near = get_close_matches(prompt, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"prompts: {prompt!r} is not a prompt of the shapes world; nearest valid: {near!r}")


def balanced(split: Split, count: int) -> list[Spec]:
    """`count` prompts, the six kinds in equal parts, each kind's prompts taken in turn: the fixed evaluation list."""
    pools = [_dealt()[split][kind] for kind in KINDS]
    return [pools[i % 6][(i // 6) % len(pools[i % 6])] for i in range(count)]
