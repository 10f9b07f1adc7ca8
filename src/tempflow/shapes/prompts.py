"""The prompts of the `shapes` world: six GenEval task kinds over four shapes, six colours and four relations.

Splits are by *content*: the pair "a circle and a square" stands with "a square and a circle" in one split. The four
single-object prompts are too few to split and stand in every split. RL trains on `train`, tunes and keeps its best
checkpoint on `validation`; `test` is looked at only for reported figures. The base model's pretraining has seen
pictures of every prompt, as a base model trained on the web has; RL never sees a rendered picture.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Literal, get_args

Shape = Literal["circle", "square", "triangle", "cross"]
Color = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Relation = Literal["left of", "right of", "above", "below"]
Kind = Literal["single", "two", "count", "color", "position", "attribution"]
Split = Literal["train", "validation", "test"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)
NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Object:
    """One wanted object; `color` None means any colour."""

    shape: Shape
    color: Color | None = None


@dataclass(frozen=True)
class Spec:
    """What a picture must show: exactly these objects and no more. `relation` is between the first and the second."""

    kind: Kind
    objects: tuple[Object, ...]
    relation: Relation | None = None

    @property
    def prompt(self) -> str:
        """The caption, at most eight words."""
        if self.kind == "count":
            shape = self.objects[0].shape
            return f"{NUMBERS[len(self.objects)]} {shape}{'es' if shape == 'cross' else 's'}"
        named = [f"a {o.color} {o.shape}" if o.color else f"a {o.shape}" for o in self.objects]
        return f" {self.relation or 'and'} ".join(named)


def _contents() -> dict[Kind, list[list[Spec]]]:
    """All prompts by kind, in groups of the same content (a group is never torn between splits)."""
    pairs = list(permutations(SHAPES, 2))
    flipped: dict[Relation, Relation] = {"left of": "right of", "above": "below"}
    two = [[Spec("two", (Object(a), Object(b))), Spec("two", (Object(b), Object(a)))] for a, b in pairs if a < b]
    position = [
        [Spec("position", (Object(a), Object(b)), r), Spec("position", (Object(b), Object(a)), flipped[r])]
        for a, b in pairs
        for r in ("left of", "above")
    ]
    attribution = [
        [
            Spec("attribution", (Object(a, c), Object(b, d))),
            Spec("attribution", (Object(b, d), Object(a, c))),
        ]
        for a, b in pairs
        if a < b
        for c, d in permutations(COLORS, 2)
    ]
    return {
        "single": [[Spec("single", (Object(s),))] for s in SHAPES],
        "two": two,
        "count": [[Spec("count", (Object(s),) * n)] for s in SHAPES for n in NUMBERS],
        "color": [[Spec("color", (Object(s, c),))] for s in SHAPES for c in COLORS],
        "position": position,
        "attribution": attribution,
    }


def _order(group: list[Spec]) -> bytes:
    return hashlib.blake2b(group[0].prompt.encode(), digest_size=8).digest()


@cache
def specs(split: Split | None = None) -> tuple[Spec, ...]:
    """All prompts of a split (or of the whole world), in a fixed order.

    Of each kind but `single`, two thirds of the contents are `train`, one sixth `validation`, one sixth `test`,
    dealt by a hash of the content. Raises ValueError for an unknown split.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    chosen: list[Spec] = []
    for kind, groups in _contents().items():
        ordered = sorted(groups, key=_order)
        sixth = max(1, len(ordered) // 6)
        cut: dict[Split, slice] = {
            "test": slice(0, sixth),
            "validation": slice(sixth, 2 * sixth),
            "train": slice(2 * sixth, None),
        }
        picked = ordered if kind == "single" or split is None else ordered[cut[split]]
        chosen += [spec for group in picked for spec in group]
    return tuple(chosen)


@cache
def by_prompt() -> dict[str, Spec]:
    """Every caption of the world and what it means."""
    return {spec.prompt: spec for spec in specs()}


def balanced(split: Split, count: int) -> list[Spec]:
    """`count` prompts, the six kinds in equal parts, each kind's prompts taken in turn: the fixed evaluation list."""
    pools = [[s for s in specs(split) if s.kind == kind] for kind in KINDS]
    return [pools[i % 6][(i // 6) % len(pools[i % 6])] for i in range(count)]
