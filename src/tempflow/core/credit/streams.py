"""Advantages for each of a model's streams: whose rewards teach which output (video, sound)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tempflow.core.credit.rule import Advantage, Around
from tempflow.core.forest import Forest
from tempflow.core.scores import Scores


@dataclass(frozen=True)
class PerStream(Around):
    """A_k = the inner credit's advantage on the rewards of stream k and on those of no stream, [E, K].

    A reward of one stream then teaches that one alone; a reward of none (how picture and sound fit) teaches all. A
    stream without any reward has advantage 0. A leaf on which one of the rewards failed counts for none, and an edge is
    live where it is for any stream; so too in the `pool` that prompts were left out of.

    streams  the model's, in its layout's order (`StateLayout.names`)
    rewards  reward -> the stream that it belongs to

    Raises ValueError for no stream or one named twice, a reward of an unknown stream, or an inner credit that points to
    peers; when called, for an unknown reward, or columns [E, …] of several numbers an edge that differ by stream.
    """

    streams: tuple[str, ...]
    rewards: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.streams or len(set(self.streams)) < len(self.streams):
            raise ValueError(f"streams: {self.streams} must be distinct, one at least; nearest valid: the model's")
        if self.inner.peers:
            raise ValueError(
                "inner: points to the best path, which differs by stream; nearest valid: one without peers"
            )
        for reward, stream in self.rewards.items():
            if stream not in self.streams:
                near = ", ".join(self.streams)
                raise ValueError(f"rewards[{reward!r}]: {stream!r} is no stream; nearest valid: one of {near}")

    def __call__(self, scores: Scores, forest: Forest) -> Advantage:
        """`scores` of the forest's leaves, [N, R]; the advantages of its recorded edges, by stream."""
        strange = [name for name in self.rewards if name not in scores.names]
        if strange:
            raise ValueError(f"rewards: {strange[0]!r} is no reward; nearest valid: one of {', '.join(scores.names)}")
        given = self.reward_weights or dict.fromkeys(scores.names, 1.0)
        sound = scores.total(given)[1]
        common = Scores(scores.value, scores.ok & sound[:, None], scores.names)
        return _merged([self._stream(stream, given, common, forest) for stream in self.streams], self.streams)

    def _stream(self, stream: str, given: Mapping[str, float], scores: Scores, forest: Forest) -> Advantage:
        own = {name: w for name, w in given.items() if w != 0 and self.rewards.get(name, stream) == stream}
        if own:
            return self.inner.weighted(own)(scores, forest)
        whole = self.inner.weighted(given)(scores, forest)
        return _silent(whole)


def _silent(given: Advantage) -> Advantage:
    """The same edges, none of which teaches."""
    pool = None if given.pool is None else _silent(given.pool)
    return replace(given, value=torch.zeros_like(given.value), live=torch.zeros_like(given.live), pool=pool)


def _merged(parts: Sequence[Advantage], streams: tuple[str, ...]) -> Advantage:
    """One advantage of those of each stream; a part without a pool is its own."""
    columns = {name: _column(name, [part.columns[name] for part in parts]) for name in parts[0].columns}
    pooled = any(part.pool is not None for part in parts)
    return Advantage(
        value=torch.stack([part.value for part in parts], 1),
        ok=torch.stack([part.ok for part in parts]).any(0),
        live=torch.stack([part.live for part in parts]).any(0),
        columns=columns,
        pool=_merged([part.pool or part for part in parts], streams) if pooled else None,
        streams=streams,
    )


def _column(name: str, parts: Sequence[Tensor]) -> Tensor:
    """[E] of each stream as [E, K]; [E, …], which has no place for streams, where it is the same for all."""
    first = parts[0]
    if first.dim() == 1:
        return torch.stack(list(parts), 1)
    if not all(torch.equal(part, first) for part in parts[1:]):
        raise ValueError(
            f"columns: {name[:40]!r} has shape {list(first.shape)} and differs by stream; nearest valid: one number an "
            "edge, or the same for all streams"
        )
    return first
