"""Advantages for each of a model's streams: whose rewards teach which output (video, sound)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tempflow.core.credit.rule import Advantage, Around
from tempflow.core.forest import Forest
from tempflow.core.scores import Scores


@dataclass(frozen=True)
class PerStream(Around):
    """A_k = the inner credit's advantage on the rewards of stream k and on those of no stream, [E, K].

    A reward of one stream then teaches that one alone; a reward of none (how picture and sound fit) teaches all. A
    stream without any reward has advantage 0. A leaf on which one of the rewards failed counts for none, and an edge is
    live where it is for any stream.

    streams  the model's, in its layout's order (`StateLayout.names`)
    rewards  reward -> the stream that it belongs to

    Raises ValueError for no stream or one named twice, or a reward of an unknown stream; when called, for an unknown
    reward, or an inner credit that points to peers.
    """

    streams: tuple[str, ...]
    rewards: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.streams or len(set(self.streams)) < len(self.streams):
            raise ValueError(f"streams: {self.streams} must be distinct, one at least; nearest valid: the model's")
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
        parts = [self._stream(stream, given, common, forest) for stream in self.streams]
        if any(part.peer is not None for part in parts):
            raise ValueError(
                "inner: points to the best path, which differs by stream; nearest valid: one without peers"
            )
        columns = {
            name: torch.stack([part.columns[name] for part in parts], 1) if column.dim() == 1 else column
            for name, column in parts[0].columns.items()
        }
        value = torch.stack([part.value for part in parts], 1)
        ok, live = (torch.stack(flags).any(0) for flags in ([p.ok for p in parts], [p.live for p in parts]))
        return replace(parts[0], value=value, ok=ok, live=live, columns=columns, streams=self.streams)

    def _stream(self, stream: str, given: Mapping[str, float], scores: Scores, forest: Forest) -> Advantage:
        own = {name: w for name, w in given.items() if w != 0 and self.rewards.get(name, stream) == stream}
        if own:
            return self.inner.weighted(own)(scores, forest)
        whole = self.inner.weighted(given)(scores, forest)
        return replace(whole, value=torch.zeros_like(whole.value), live=torch.zeros_like(whole.live))
