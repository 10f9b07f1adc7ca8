"""Rewards by name, and the one call that scores media by several of them.

A new file here is a new reward: a function by the file's name makes it, the first line of whose docstring says what it
measures. Its options are keyword parameters, each with a type (`rewards.options`). LICENCE says under which licence it
is, NEEDS by which extra of the package it works ("" for none), RANGE which values it gives, and DIFFERENTIABLE = True,
where that is so, that it has scores with gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.registry import Registry, entry_points
from tempflow.rewards.around import Renamed, over_frames
from tempflow.rewards.function import from_function
from tempflow.rewards.options import Make, checked, commits, places
from tempflow.rewards.protocol import Reward, RewardError, check_media, check_takes
from tempflow.rewards.safe import Fault, Pause, SafeReward, faults, go_on, safe

__all__ = [
    "REWARDS",
    "Media",
    "Note",
    "Reward",
    "RewardError",
    "SafeReward",
    "build",
    "check_takes",
    "checked",
    "commits",
    "faults",
    "from_function",
    "maker",
    "names",
    "notes",
    "over_frames",
    "places",
    "plugin",
    "safe",
    "score_all",
]

REWARDS: Mapping[str, Make] = Registry(
    __name__,
    besides=(
        *("around", "clip", "compose", "function", "geneval2_rules", "geneval_rules", "options", "protocol", "safe"),
        *("scorer", "scoring", "vlm", "weights", "wire"),
        *("answers", "endpoint", "sources", "template"),
    ),
)
"""What ships with the package: name → a function that makes it of its options."""

GROUP = "tempflow.rewards"
"""The entry point group by which other packages add rewards: each names such a function, or a class."""


def names() -> tuple[str, ...]:
    """All rewards that `build` knows: ours, then those of installed packages."""
    return (*REWARDS, *sorted(set(entry_points(group=GROUP).names) - set(REWARDS)))


@dataclass(frozen=True)
class Note:
    """What a reward measures, which values it gives, its licence, the extra that it needs ("" for none), and whether it
    has scores with gradients (`protocol.Differentiable`)."""

    what: str
    values: str
    licence: str
    needs: str
    differentiable: bool = False


def notes() -> dict[str, Note]:
    """Of each of our rewards."""
    told: dict[str, Note] = {}
    for name in REWARDS:
        make = REWARDS[name]
        file = vars(sys.modules[f"{__name__}.{name}"])
        about = (make.__doc__ or "").partition("\n")[0]
        gradients = bool(file.get("DIFFERENTIABLE", False))
        told[name] = Note(about, file["RANGE"], file["LICENCE"], file["NEEDS"], gradients)
    return told


def plugin(name: str) -> EntryPoint | None:
    """The installed package's entry point that makes the reward of that name; None where ours does, or nothing."""
    found = {} if name in REWARDS else {entry.name: entry for entry in entry_points(group=GROUP)}
    return found.get(name)


def maker(kind: str) -> Make:
    """The function that makes a reward of that kind: one of `REWARDS`, or an installed package's entry point in the
    group "tempflow.rewards". Raises ValueError for an unknown one."""
    if kind in REWARDS:
        return REWARDS[kind]
    entry = plugin(kind)
    if entry is None:
        started = [known for known in names() if kind and known.startswith(kind)]
        near = (started or get_close_matches(kind, names(), n=1, cutoff=0.0))[0]
        raise ValueError(f"reward: {kind!r} is unknown; did you mean {near!r}? Known: {', '.join(names())}")
    return entry.load()


def build(name: str, kind: str = "", options: Mapping[str, Any] | None = None, frames: int | None = None) -> Reward:
    """A reward. Loads no weights (`protocol.prepare`).

    name     what it is called, in metrics and as a column
    kind     which reward it is (`maker`); "": the one of that name
    options  its own, by name
    frames   for clips: the mean over so many frames of each, by a reward of pictures

    Raises ValueError for an unknown kind and for options that it does not take, RewardError for an entry point that
    does not make a reward, ImportError, with the command, where a library is missing.
    """
    make = maker(kind or name)
    reward = make(**checked(make, options or {}))
    if not isinstance(reward, Reward):
        raise RewardError(
            f"reward {kind or name!r} is a {type(reward).__name__}; "
            "expected an object with name, groupwise and score(media, prompts, metadata)"
        )
    if frames is not None:
        reward = over_frames(reward, frames)
    return reward if not kind or reward.name == name else Renamed(reward, name)


def score_all(
    rewards: Sequence[Reward],
    media: Media | Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
    groups: Sequence[int],
    *,
    timeout: float | None = None,
    ok: Tensor | None = None,
    pause: Pause = go_on,
) -> Scores:
    """Scores all media by all rewards, a column (or more) each, rows in the media's order.

    media    or pictures, uint8 [N, H, W, 3] on the CPU
    groups   the prompt slot of each medium. A groupwise reward is called once per slot; equal prompts in different
             slots are different groups
    timeout  seconds that a call may take; None leaves each reward the one that it has (`safe`)
    ok       bool[N] on the CPU, which media are any at all: the others are not scored, and failed
    pause    called while a call with a timeout goes on; may raise to leave

    A reward that raises, or takes too long, has failed scores and a warning. Where that is due to some prompts only,
    the others are still scored: a call that raised is made anew for each slot. Rewards get copies of what is given.

    Raises ValueError for no rewards, or lengths that differ; RewardError for a reward that does not return a row per
    medium.
    """
    if not rewards:
        raise ValueError("rewards = []: nothing to score by; nearest valid: [build('shapes')]")
    media = check_media(media, prompts, metadata)
    for field, count in (("groups", len(groups)), ("ok", len(media) if ok is None else len(ok))):
        if count != len(media):
            raise ValueError(f"{field} has {count} entries for {len(media)} media; nearest valid: {len(media)}")
    whole = torch.arange(len(media)) if ok is None else ok.nonzero()[:, 0]
    rows = _Rows(media, prompts, metadata, pause)
    slots: dict[int, list[int]] = {}
    for row in whole.tolist():
        slots.setdefault(int(groups[row]), []).append(row)
    return Scores.stack([_column(safe(r, timeout), rows, whole.tolist(), slots.values()) for r in rewards])


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is scored, and a call of a reward with some of its rows."""

    media: Media
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, object]]
    pause: Pause

    def call(self, reward: SafeReward, rows: Sequence[int]) -> Scores | Fault:
        media = self.media if len(rows) == len(self.media) else self.media[rows]
        prompts, metadata = [self.prompts[i] for i in rows], [self.metadata[i] for i in rows]
        return reward.attempt(media, prompts, metadata, self.pause)


def _column(reward: SafeReward, rows: _Rows, whole: Sequence[int], slots: Collection[Sequence[int]]) -> Scores:
    """One reward's scores of all rows; those that are not in `whole` are failed."""
    answers = _answers(reward, rows, whole, slots) if whole or not len(rows.media) else []
    blank = reward.failed(len(rows.media))
    value, ok = blank.value.clone(), blank.ok.clone()
    for part, answer in answers:
        if isinstance(answer, Fault):
            continue
        if answer.names != blank.names:
            raise RewardError(f"reward {reward.name!r} returned columns {answer.names}, then {blank.names}")
        value[list(part)], ok[list(part)] = answer.value, answer.ok
    return Scores(value, ok, blank.names)


def _answers(
    reward: SafeReward, rows: _Rows, whole: Sequence[int], slots: Collection[Sequence[int]]
) -> list[tuple[Sequence[int], Scores | Fault]]:
    """Of one call, or of one for each slot: which rows, and what was said of them."""
    if not reward.groupwise or not slots:
        answer = rows.call(reward, whole)
        if len(slots) < 2 or isinstance(answer, Scores) or answer.late:
            return [(whole, answer)]
    return [(slot, rows.call(reward, slot)) for slot in slots]
