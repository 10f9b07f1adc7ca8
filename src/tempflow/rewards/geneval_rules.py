"""GenEval's rules (arXiv 2310.11513; code djghosh13/geneval): what a prompt asks for, and whether detections show it.

Pure functions of detections; `rewards.geneval` finds these in pictures. These rules judge a picture:

    official    right or wrong, as the benchmark counts
    graded      ours, 0 to 1: the mean of how far each demand is met; 1 exactly where `official` is right
    flow_grpo   the graded reward that Flow-GRPO trains with (arXiv 2505.05470), as its code computes it; its strict
                measure is `flow_grpo_strict`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from tempflow.strict import nearest, shown

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""Kinds of task. The benchmark's score is the mean over them."""

COUNTING = "counting"
"""The tag under which detections must be surer."""

COCO = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
"""The 80 classes as COCO calls them."""

RENAMED: Mapping[str, str] = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""What GenEval calls otherwise than COCO."""

OTHER_NAMES: Mapping[str, str] = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""What some lists of labels call COCO's classes."""

CLASSES = tuple(RENAMED.get(name, name) for name in COCO)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; x to the right, y down, in any unit."""


# ------------------------------------------------------------------------------------------------ what is asked for
@dataclass(frozen=True)
class Include:
    """Objects that must be there; `position`: (relation, index of the earlier include that it refers to)."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Exclude:
    """So many objects of a class, or more, must not be there."""

    name: str
    count: int


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    tag: str
    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()


def task_of(metadata: Mapping[str, object]) -> Task:
    """A prompt's metadata, in the form of GenEval's published file: {"tag": "position", "include": [{"class": "bench",
    "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}], "exclude": []}.

    "exclude", "color" and "position" may be absent or null, other keys of the prompt are not looked at. Raises
    ValueError, naming the field and the nearest valid value, for anything else.
    """
    tag = metadata.get("tag")
    if tag not in TAGS:
        raise ValueError(f"tag: {_told(metadata, 'tag')}; nearest valid: {nearest(tag or TAGS[0], TAGS)}")
    included = _items(metadata, "include", ("class", "count", "color", "position"))
    if not included:
        raise ValueError(f"include: {_told(metadata, 'include')}; nearest valid: {EXAMPLE}")
    include = tuple(_include(item, f"include[{place}]", place) for place, item in enumerate(included))
    excluded = enumerate(_items(metadata, "exclude", ("class", "count")))
    exclude = tuple(Exclude(_class(item, f"exclude[{n}]"), _count(item, f"exclude[{n}]")) for n, item in excluded)
    return Task(str(tag), include, exclude)


def check_possible(task: Task, most: int) -> None:
    """Raises ValueError, naming the field, for a task that no picture can fulfil. most: `Limits.most`."""
    for place, item in enumerate(task.include):
        where = f"include[{place}]"
        if item.count > most:
            raise ValueError(f"{where}.count: {item.count}, and at most {most} are counted; nearest valid: {most}")
        if item.position is not None and task.include[item.position[1]].name == item.name:
            target = f"include[{item.position[1]}], which is of the same class: an object would stand beside itself"
            raise ValueError(f"{where}.position: refers to {target}; nearest valid: an include of another class")
        for earlier, other in enumerate(task.include[:place]):
            twice = other.name == item.name and other.colour is not None and item.colour is not None
            if twice and other.colour != item.colour:
                both = f"{item.colour!r}, and include[{earlier}].color {other.colour!r}, of the same objects"
                raise ValueError(f"{where}.color: {both} ({item.name!r}); nearest valid: {other.colour!r}")
    for place, banned in enumerate(task.exclude):
        asked = max((item.count for item in task.include if item.name == banned.name), default=0)
        if asked >= banned.count:
            told = f"{banned.count} of {banned.name!r}, of which include asks for {asked}"
            raise ValueError(f"exclude[{place}].count: {told}; nearest valid: {asked + 1}")


EXAMPLE = '[{"class": "bench", "count": 1}]'


def _items(metadata: Mapping[str, object], key: str, known: Sequence[str]) -> Sequence[Mapping[str, object]]:
    """A list of mappings with these keys; empty where it is null or absent."""
    given = metadata.get(key)
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise ValueError(f"{key}: {shown(given)} is no list; nearest valid: {EXAMPLE}")
    for place, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise ValueError(f"{key}[{place}]: {shown(item)} is no object; nearest valid: {EXAMPLE[1:-1]}")
        for name in item:
            if name not in known:
                raise ValueError(f"{key}[{place}]: {shown(name)} is unknown; nearest valid: {nearest(name, known)}")
    return given


def _include(item: Mapping[str, object], where: str, place: int) -> Include:
    colour, position = item.get("color"), item.get("position")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{where}.color: {shown(colour)} is no colour; nearest valid: {nearest(colour, COLOURS)}")
    name, count = _class(item, where), _count(item, where)
    return Include(name, count, None if colour is None else str(colour), _position(position, where, place))


def _class(item: Mapping[str, object], where: str) -> str:
    name = item.get("class")
    if isinstance(name, str) and name in CLASSES:
        return name
    said = str(name).strip().lower()
    said = OTHER_NAMES.get(said, said)
    near = repr(RENAMED[said]) if said in RENAMED else nearest(said, CLASSES)
    raise ValueError(f"{where}.class: {_told(item, 'class')}; nearest valid: {near}")


def _count(item: Mapping[str, object], where: str) -> int:
    count = item.get("count")
    if isinstance(count, int) and not isinstance(count, bool) and count >= 1:
        return count
    whole = isinstance(count, int | float) and not isinstance(count, bool) and math.isfinite(count)
    near = max(1, round(count)) if whole else 1  # pyright: ignore[reportArgumentType]
    raise ValueError(f"{where}.count: {_told(item, 'count')}; nearest valid: {near}")


def _position(given: object, where: str, place: int) -> tuple[str, int] | None:
    if given is None:
        return None
    example = f'["left of", {max(place - 1, 0)}]'
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(f"{where}.position: {shown(given)} is no [relation, index]; nearest valid: {example}")
    relation, target = given
    if relation not in RELATIONS:
        near = nearest(relation, RELATIONS)
        raise ValueError(f"{where}.position: {shown(relation)} is no relation; nearest valid: {near}")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < place:
        near = max(place - 1, 0) if place else "no position in the first include"
        raise ValueError(f"{where}.position: {shown(target)} is the index of no earlier include; nearest valid: {near}")
    return str(relation), target


def _told(item: Mapping[str, object], key: str) -> str:
    return f"{shown(item[key])} is not valid" if item.get(key) is not None else "is missing"


# ---------------------------------------------------------------------------------------------------- what is there
@dataclass(frozen=True)
class Detection:
    """An object in a picture.

    name        its class, as GenEval calls it
    confidence  0 to 1
    box         may have no area
    colour      what a classifier said of it; None where nobody asked

    Raises ValueError for a number that is not finite, and a box whose right (bottom) is left of (above) its left (top).
    """

    name: str
    confidence: float
    box: Box
    colour: str | None = None

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not all(map(math.isfinite, (self.confidence, *self.box))) or right < left or bottom < top:
            raise ValueError(f"detection of {self.name!r}: confidence {self.confidence}, box {self.box} is no box")


@dataclass(frozen=True)
class Limits:
    """Which detections count: those surer than `threshold` (for counting tasks `counting`), of each class the `most`
    surest. Raises ValueError for thresholds outside [0, 1) and `most` below 1."""

    threshold: float = 0.3
    counting: float = 0.9
    most: int = 16

    def __post_init__(self) -> None:
        for field in fields(self)[:2]:
            value = getattr(self, field.name)
            if not 0 <= value < 1:
                raise ValueError(f"{field.name}: {value} is not in [0, 1); nearest valid: {field.default}")
        if self.most < 1:
            raise ValueError(f"most: {self.most} is too small; nearest valid: 1")

    def least(self, task: Task) -> float:
        """What the confidence of a detection must be above."""
        return self.counting if task.tag == COUNTING else self.threshold


OFFICIAL = Limits()
"""What the benchmark uses."""

Found = Mapping[str, Sequence[Detection]]
"""Detections that count, by class, the surest first."""


def counted(task: Task, detections: Iterable[Detection], limits: Limits = OFFICIAL) -> Found:
    """Those that count. Equally sure ones are ordered by their boxes, so that the order given does not matter."""
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda d: (-d.confidence, d.box, d.colour or "")):
        same = found.setdefault(one.name, [])
        if one.confidence > limits.least(task) and len(same) < limits.most:
            same.append(one)
    return found


def coloured(task: Task, found: Found) -> list[Detection]:
    """Those whose colour a rule looks at, each once."""
    asked = [one for item in task.include if item.colour is not None for one in _first(item, found)]
    return list({id(one): one for one in asked}.values())


def relations(a: Box, b: Box) -> frozenset[str]:
    """Where `a` is as seen from `b`: none, one or two of `RELATIONS`; y grows downwards.

    With the offset d of the centres and the sizes s of both boxes together, per axis: |d| − 0.1·s, at least 0, must be
    more than half of ‖d‖. Twenty times that inequality is computed, which numbers that are whole leave exact.
    """
    dx, dy = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]  # twice the offset
    across, down = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
    least = 5 * math.hypot(dx, dy)
    held: set[str] = set()
    if 10 * abs(dx) - 2 * across > least:
        held.add("left of" if dx < 0 else "right of")
    if 10 * abs(dy) - 2 * down > least:
        held.add("above" if dy < 0 else "below")
    return frozenset(held)


# ------------------------------------------------------------------------------------------------------------- rules
def official(task: Task, found: Found) -> float:
    """1.0 where all that is asked for is there and nothing that is excluded, else 0.0.

    Each include takes the `count` surest objects of its class: they must be there, have the colour, and each stand in
    the relation to each object that the include referred to took, if that was met itself. More objects are no fault,
    but for an exclude.
    """
    taken: list[Sequence[Detection] | None] = []
    for item in task.include:
        objects = _first(item, found)
        met = len(objects) == item.count and _right(item, objects) == item.count
        if met and item.position is not None:
            targets = taken[item.position[1]]
            met = targets is not None and _all_stand(item.position[0], objects, targets)
        taken.append(objects if met else None)
    banned = any(len(found.get(item.name, ())) >= item.count for item in task.exclude)
    return float(all(objects is not None for objects in taken) and not banned)


def graded(task: Task, found: Found) -> float:
    """0 to 1, the mean of these parts, each 0 to 1; 1 exactly where `official` is right.

    - each include: the share of its `count` objects that are there. Where an exclude bounds the same class to n
      objects, what is above is lost as what is below: 1 − (found − n)/n, at least 0
    - each colour: the share of the `count` objects that are there and have it
    - each position: the share of the pairs (object, target), of all that are asked for, that are there and hold
    - each exclude of a class that no include names: 1, less 1/n for each object above the n that are allowed (all for
      the first where none is), at least 0

    Beside Flow-GRPO's: no part is negative, excludes count, more objects are no fault where the benchmark forgives
    them, a position that does not hold gets nothing, and colours and positions are graded before the count is exact.
    """
    names = {item.name for item in task.include}
    allowed: dict[str, int] = {}
    for item in task.exclude:
        allowed[item.name] = min(item.count - 1, allowed.get(item.name, item.count))
    parts: list[float] = []
    for item in task.include:
        objects = _first(item, found)
        over = _over(len(found.get(item.name, ())), allowed.get(item.name))
        parts.append(min(len(objects) / item.count, over))
        if item.colour is not None:
            parts.append(_right(item, objects) / item.count)
        if item.position is not None:
            relation, target = item.position[0], task.include[item.position[1]]
            pairs = [(a.box, b.box) for a in objects for b in _first(target, found)]
            parts.append(sum(relation in relations(*pair) for pair in pairs) / (item.count * target.count))
    parts += [_over(len(found.get(name, ())), most) for name, most in allowed.items() if name not in names]
    return sum(parts) / len(parts)


def flow_grpo(task: Task, found: Found) -> float:
    """The mean of these parts, as published, so at most 1 and perhaps below 0:

    - each include: 1 − |count − found| ÷ count over all objects of the class that count
    - where that is not exact and a colour or a position is asked for: a 0
    - where it is exact, a colour: 1 − |count − right| ÷ count
    - where it is exact and the colour is right, a position: 1; but 0 where the include referred to was not met; and a 0
      and a 1, so ½, where a pair does not hold

    Excludes play no part.
    """
    parts, _ = _flow_grpo(task, found)
    return sum(parts) / len(parts)


def flow_grpo_strict(task: Task, found: Found) -> float:
    """1.0 where each include has exactly `count` objects, all of the colour and where they should be, else 0.0; as
    published. Excludes play no part, and more objects are wrong for any tag."""
    return float(_flow_grpo(task, found)[1])


def _flow_grpo(task: Task, found: Found) -> tuple[list[float], bool]:
    """The parts, and whether all includes are met."""
    parts: list[float] = []
    taken: list[Sequence[Detection] | None] = []
    for item in task.include:
        objects = found.get(item.name, ())
        parts.append(1 - abs(item.count - len(objects)) / item.count)
        met = len(objects) == item.count
        if not met:
            parts += [0.0] * (item.colour is not None or item.position is not None)
        elif item.colour is not None:
            right = _right(item, objects)
            parts.append(1 - abs(item.count - right) / item.count)
            met = right == item.count
        if met and item.position is not None:
            targets = taken[item.position[1]]
            met = targets is not None and _all_stand(item.position[0], objects, targets)
            parts += [1.0] if met else [0.0] if targets is None else [0.0, 1.0]
        taken.append(objects if met else None)
    return parts, all(objects is not None for objects in taken)


def _first(item: Include, found: Found) -> Sequence[Detection]:
    return found.get(item.name, ())[: item.count]


def _right(item: Include, objects: Sequence[Detection]) -> int:
    """How many have the colour; all where none is asked for."""
    if item.colour is None:
        return len(objects)
    if any(one.colour is None for one in objects):
        raise ValueError(f"a detection of {item.name!r} has no colour, and {item.colour!r} is asked for")
    return sum(one.colour == item.colour for one in objects)


def _all_stand(relation: str, objects: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    return all(relation in relations(a.box, b.box) for a in objects for b in targets)


def _over(count: int, most: int | None) -> float:
    """1 up to `most` objects (None: any number), then less by a share of it for each more, at least 0."""
    return 1.0 if most is None else max(0.0, 1 - max(0, count - most) / max(most, 1))
