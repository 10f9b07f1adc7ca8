"""What a credit rule is: scores of a forest's leaves in, advantages of its recorded edges out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from tempflow.core.forest import Edges, Forest
from tempflow.core.groups import dense
from tempflow.core.scores import Scores

Key = Literal["prompt", "root", "step", "depth", "parent"]


@dataclass(frozen=True, eq=False)
class Advantage:
    """Per edge, [E] each.

    value    float32, 0 where not live; [E, K] where every stream has its own
    ok       bool, it counts in the loss's mean: a valid leaf descends from it, and no selection left it out
    live     bool, ok and its group has spread
    columns  what the objective is told of each edge beside that, [E, …] by name ("map", "standing")
    peer     LongTensor [E], another edge of the same prompt and step that the objective looks at; None: none
    pool     the advantages before whole prompts were left out, which metrics tell of; None: these
    streams  the names of the K streams; (): one advantage an edge, for all streams together
    """

    value: Tensor
    ok: Tensor
    live: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    peer: Tensor | None = None
    pool: Advantage | None = None
    streams: tuple[str, ...] = ()

    def flat(self, values: Tensor) -> Tensor:
        """The mean over streams of [E, K] values, [E]; others as they are: for metrics and records."""
        return values.mean(1) if values.dim() == 2 else values


class CreditRule(Protocol):
    """Scores of a forest's leaves -> advantages of its recorded edges."""

    @property
    def reward_weights(self) -> Mapping[str, float] | None:
        """Weights of the named rewards' sum; None: all 1."""
        ...

    def weighted(self, reward_weights: Mapping[str, float] | None) -> CreditRule:
        """The same credit with other reward weights."""
        ...

    @property
    def peers(self) -> bool:
        """Whether it points edges to others (`Advantage.peer`), by all rewards together."""
        ...

    def groups(self, edges: Edges) -> Tensor:
        """Dense group numbers [E]: which edges are compared with each other."""
        ...

    def __call__(self, scores: Scores, forest: Forest) -> Advantage: ...


@dataclass(frozen=True)
class Around:
    """What credits around another one share: its reward weights, groups and peers are theirs.

    decides      beside values it says which edges count, to which others they point, or columns of theirs
    values_only  it makes advantages anew of the inner credit's values, of each reward or leaf, and loses all else

    Raises ValueError around a credit by stream (`PerStream`), which is the outermost: one number an edge is worked on.
    Also where only values are read and the inner credit, or one inside that, decides.
    """

    inner: CreditRule
    decides: ClassVar[bool] = False
    values_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        own, inner = type(self).__name__, type(self.inner).__name__
        if getattr(self.inner, "streams", ()):
            raise ValueError(f"inner: {own} works on one advantage an edge; nearest valid: {inner} around {own}")
        if self.values_only and (name := _deciding(self.inner)):
            raise ValueError(_lost(own, name))

    @property
    def reward_weights(self) -> Mapping[str, float] | None:
        """Weights of the named rewards' sum; None: all 1."""
        return self.inner.reward_weights

    def weighted(self, reward_weights: Mapping[str, float] | None) -> Self:
        """The same credit with other reward weights."""
        return replace(self, inner=self.inner.weighted(reward_weights))

    @property
    def peers(self) -> bool:
        """Whether it points edges to others, as the inner credit does."""
        return self.inner.peers

    def groups(self, edges: Edges) -> Tensor:
        """Dense group numbers [E], the inner credit's."""
        return self.inner.groups(edges)


def _deciding(rule: CreditRule) -> str:
    """Which of a rule and those inside it decides; "" where none does."""
    if getattr(rule, "decides", False) or (rule.peers and not isinstance(rule, Around)):
        return type(rule).__name__
    return _deciding(rule.inner) if isinstance(rule, Around) else ""


def _lost(own: str, inner: str) -> str:
    return f"inner: {own} reads values alone, and {inner} selects or marks edges; nearest valid: {inner} around {own}"


def alike(rule: Around, parts: Sequence[Advantage]) -> Advantage:
    """The first of the parts that a rule reads values of, which differ in nothing but `value` and `live`.

    Raises ValueError where they do: the inner credit decides, and did not say so (`Around.decides`).
    """
    first = parts[0]
    for part in parts:
        more = bool(part.columns) or part.peer is not None or part.pool is not None
        if more or not torch.equal(part.ok, first.ok):
            raise ValueError(_lost(type(rule).__name__, type(rule.inner).__name__))
    return first


def group_index(edges: Edges, by: tuple[Key, ...]) -> Tensor:
    """Dense group numbers [E]: edges with equal keys share one. An empty `by` puts all into one group."""
    columns = {
        "prompt": edges.prompt,
        "root": edges.root,
        "step": edges.step,
        "depth": edges.depth,
        "parent": edges.parent,
    }
    number = torch.zeros_like(edges.step)
    for key in by:
        # dense again after every key, so that the product of two counts is all that must fit an int64
        number = dense(number * (columns[key].amax() + 1) + columns[key]) if len(number) else number
    return number
