"""Rewards by name, and the one call that scores media by several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points

import torch

from tempflow.core.scores import Scores
from tempflow.rewards.function import from_function
from tempflow.rewards.jpeg import JPEGCompressibility
from tempflow.rewards.protocol import Media, Reward, RewardError, check, check_media
from tempflow.rewards.shapes import ShapesReward

__all__ = [
    "REWARDS",
    "JPEGCompressibility",
    "Media",
    "Reward",
    "RewardError",
    "ShapesReward",
    "build",
    "from_function",
    "names",
    "score_all",
]

REWARDS: dict[str, Callable[[], Reward]] = {
    "shapes": ShapesReward,
    "shapes_strict": lambda: ShapesReward(graded=False),
    "jpeg_compressibility": JPEGCompressibility,
}
"""What ships with the package: name -> constructor without arguments."""

GROUP = "tempflow.rewards"
"""The entry point group by which other packages add rewards: each names a constructor without arguments."""


def names() -> tuple[str, ...]:
    """All rewards that `build` knows: ours, then those of installed packages."""
    return (*REWARDS, *sorted(set(entry_points(group=GROUP).names) - set(REWARDS)))


def build(name: str) -> Reward:
    """The reward of that name: one of `REWARDS`, or an installed package's entry point in the group "tempflow.rewards".

    Raises ValueError for an unknown name, RewardError for an entry point that does not make a reward.
    """
    if name in REWARDS:
        return REWARDS[name]()
    plugins = {p.name: p for p in entry_points(group=GROUP)}
    if name not in plugins:
        started = [known for known in names() if name and known.startswith(name)]
        near = (started or get_close_matches(name, names(), n=1, cutoff=0.0))[0]
        raise ValueError(f"reward: {name!r} is unknown; did you mean {near!r}? Known: {', '.join(names())}")
    reward = plugins[name].load()()
    if not isinstance(reward, Reward):
        raise RewardError(
            f"entry point {plugins[name].value!r} of reward {name!r} made a {type(reward).__name__}; "
            "expected an object with name, groupwise and score(media, prompts, metadata)"
        )
    return reward


def score_all(
    rewards: Sequence[Reward],
    media: Media,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
    groups: Sequence[int],
) -> Scores:
    """Scores all media by all rewards, a column (or more) each, rows in the media's order.

    `groups`: the prompt slot of each medium. A groupwise reward is called once per slot; equal prompts in different
    slots are different groups. Raises ValueError for no rewards, or lengths that differ; RewardError for a reward that
    does not return a row per medium.
    """
    if not rewards:
        raise ValueError("rewards = []: nothing to score by; nearest valid: [build('shapes')]")
    check_media(media, prompts, metadata)
    if len(groups) != len(media):
        raise ValueError(f"groups has {len(groups)} entries for {len(media)} media; nearest valid: {len(media)}")
    parts = []
    for reward in rewards:
        if reward.groupwise:
            parts.append(_by_group(reward, media, prompts, metadata, groups))
        else:
            parts.append(check(reward.score(media, prompts, metadata), len(media), reward.name))
    return Scores.stack(parts)


def _by_group(
    reward: Reward,
    media: Media,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
    groups: Sequence[int],
) -> Scores:
    """One call per slot, rows put back in the media's order (a slot's media need not lie together)."""
    if not groups:
        return check(reward.score(media, prompts, metadata), 0, reward.name)
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(groups):
        rows.setdefault(int(slot), []).append(row)
    parts = [
        check(reward.score(media[r], [prompts[i] for i in r], [metadata[i] for i in r]), len(r), reward.name)
        for r in rows.values()
    ]
    order = torch.tensor([i for r in rows.values() for i in r])
    return Scores.cat(parts).select(torch.argsort(order))
