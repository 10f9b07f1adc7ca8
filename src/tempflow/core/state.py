"""What a state is made of, and the one place where states are reduced to a number per row.

A model may hold some of a state's elements at given values (the first frame of image-to-video), and it may pack several
outputs into one state (video and sound). `StateLayout` says so. Whatever becomes a number per row (log-probs, KLs,
likelihood proxies, errors of a velocity, norms) is a mean by it: held elements do not count, and each stream has a mean
of its own, so that none drowns another by its number of elements.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""A mean over elements: [B, *S] -> [B], or one for each stream, [B, K]; in at least float32."""


def upcast(t: Tensor) -> Tensor:
    """``t`` in at least float32: lower precisions and integers are widened, float64 stays."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def has_double(device: torch.device) -> bool:
    """Whether the device computes in float64. Apple's MPS does not."""
    return device.type != "mps"


def double(t: Tensor) -> Tensor:
    """``t`` in float64 on its device, or on the CPU where the device has none."""
    return t.double() if has_double(t.device) else t.cpu().double()


def placed(noise: Tensor, device: torch.device) -> Tensor:
    """Noise on that device, with its bits; float64 as float32 where the device has none."""
    return noise.to(device) if has_double(device) or noise.dtype != torch.float64 else noise.float().to(device)


def to_rows(scalars: Tensor, like: Tensor) -> Tensor:
    """[B] scalars as [B, 1, …, 1], with the dtype and on the device of ``like`` [B, *S].

    Raises ValueError unless ``scalars`` has one value for each row of ``like``.
    """
    if scalars.dim() != 1 or scalars.shape[0] != like.shape[0]:
        raise ValueError(f"per-row values: shape {tuple(scalars.shape)} does not fit rows of {tuple(like.shape)}")
    # host to device need not wait for the device; the other way it must
    moved = scalars.to(like.device, like.dtype, non_blocking=like.device.type == "cuda")
    return moved.view(-1, *([1] * (like.dim() - 1)))


def mean_dims(t: Tensor) -> Tensor:
    """Mean over all but the first dimension: [B, *S] -> [B], in at least float32.

    The mean (not the sum) is what the official codes of the GRPO family use and what their clip ranges presume. It is
    the mean of a state that is all free and of one stream; of any state it is `StateLayout.mean`.
    """
    t = upcast(t)
    return t if t.dim() == 1 else t.mean(dim=tuple(range(1, t.dim())))


def times_per_token(sigma: Tensor, free: Tensor) -> Tensor:
    """σ of every token, [B, *N]: that of its row, and 0 (clean) where the token is held.

    Args:
        sigma: [B].
        free: bool [B, *N] or [1, *N], tokens in any arrangement.

    Raises ValueError for a mask of other rows or another dtype.
    """
    if free.dtype != torch.bool or free.dim() < 2 or free.shape[0] not in (1, len(sigma)):
        raise ValueError(f"free: {free.dtype} {list(free.shape)} must be bool [{len(sigma)}, N] or [1, N]")
    rows = sigma.view(-1, *[1] * (free.dim() - 1))
    return torch.where(free.to(sigma.device), rows, torch.zeros_like(rows))


@dataclass(frozen=True, eq=False)
class StateStream:
    """One of a model's outputs: the elements of the state that are its own, bool [*S], and its weight in means over
    streams (finite, > 0)."""

    name: str
    elements: Tensor
    weight: float = 1.0


def streams_along(
    shape: Sequence[int], dim: int, sizes: Mapping[str, int], weights: Mapping[str, float] | None = None
) -> tuple[StateStream, ...]:
    """Streams that follow one another along a dimension of the state, *S = `shape`: {"video": 6144, "sound": 126}.

    weights  of those that differ from 1

    Raises ValueError where the sizes do not add up to the dimension, or weights name no stream.
    """
    if sum(sizes.values()) != shape[dim]:
        raise ValueError(f"sizes: {dict(sizes)} must add up to {shape[dim]}, the state's dimension {dim}")
    strange = [name for name in weights or {} if name not in sizes]
    if strange:
        raise ValueError(f"weights: {strange[0]!r} is no stream; nearest valid: one of {', '.join(sizes)}")
    streams, start = list[StateStream](), 0
    for name, size in sizes.items():
        elements = torch.zeros(tuple(shape), dtype=torch.bool)
        elements.narrow(dim, start, size).fill_(True)
        streams.append(StateStream(name, elements, (weights or {}).get(name, 1.0)))
        start += size
    return tuple(streams)


@dataclass(frozen=True, eq=False)
class StateLayout:
    """Which elements of a state [*S] are sampled, what the others are held at, and which belong together.

    free     bool, [N, *S] by condition row or [1, *S] for all rows alike; None: all elements are free
    clean    the same, float: what the elements that are not free are held at, from root to leaf, finite (where states
             are tokens: whole numbers); None with `free` None. What it says of free elements is not read
    streams  parts of the state, each with a mean of its own; (): the state is one. Every free element is in exactly
             one, and every row has a free element in each; held ones may be in none
    first    the condition row that row 0 of `free` and `clean` is of

    Raises ValueError where these do not fit together, and for a row without a free element.
    """

    free: Tensor | None = None
    clean: Tensor | None = None
    streams: tuple[StateStream, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        free, clean = self.free, self.clean
        if (free is None) != (clean is None):
            given, missing = ("free", "clean") if clean is None else ("clean", "free")
            raise ValueError(
                f"{missing}: None beside {given}; held elements need both, nearest valid: a tensor [1, *S]"
            )
        if free is not None and clean is not None:
            _check_held(free, clean)
        _check_streams(self.streams, free)

    @property
    def whole(self) -> bool:
        """Whether the state is all free and of one stream: then all means are `mean_dims`."""
        return self.free is None and len(self.streams) < 2

    @property
    def count(self) -> int:
        """K, the number of streams, at least 1."""
        return max(1, len(self.streams))

    @property
    def names(self) -> tuple[str, ...]:
        """The streams' names; () where the state is one."""
        return tuple(stream.name for stream in self.streams)

    @property
    def unheld(self) -> StateLayout:
        """The same streams with every element free."""
        return self._of(None, None)

    def to(self, device: torch.device | str) -> StateLayout:
        """The layout on another device."""
        free, clean = (None if t is None else t.to(device) for t in (self.free, self.clean))
        moved = self._of(free, clean, self.first)
        streams = tuple(StateStream(s.name, s.elements.to(device), s.weight) for s in self.streams)
        object.__setattr__(moved, "streams", streams)
        return moved

    def take(self, rows: Tensor | slice) -> StateLayout:
        """The layout of a batch whose states have those condition rows, LongTensor [B].

        Raises ValueError for a slice of a layout with another `first` than 0 and, where looking is free (on the CPU),
        for a row that the layout does not have.
        """
        if self.free is None or self.clean is None:
            return self
        if isinstance(rows, Tensor):
            self._check_rows(rows, max(len(self.free), len(self.clean)))
            rows = rows - self.first
        elif self.first:
            raise ValueError(f"rows: a slice of a layout that starts at row {self.first}; nearest valid: a LongTensor")
        return self._of(_rows(self.free, rows), _rows(self.clean, rows))

    def hold(self, x: Tensor) -> Tensor:
        """States [B, *S] with the held elements at their given values, in the dtype of ``x``."""
        if self.free is None or self.clean is None:
            return x
        return torch.where(self.free.to(x.device), x, self.clean.to(x))

    def check_tokens(self, vocabulary: int) -> None:
        """Raises ValueError where an element is held at what is no token of 0 … vocabulary − 1."""
        if self.free is None or self.clean is None:
            return
        clean, token = self.clean, self.clean.round().clamp(0, vocabulary - 1)
        bad = ~self.free.to(clean.device) & (clean != token)
        if bool(bad.any()):
            held, near = (float(t.expand_as(bad)[bad][0]) for t in (clean, token))
            raise ValueError(f"clean: {held:g} is no token of 0 … {vocabulary - 1}; nearest valid: {near:.0f}")

    def silence(self, t: Tensor) -> Tensor:
        """Velocities [B, *S], or logits [B, *S, V], with 0 at held elements, whatever was there: no value and no
        gradient comes from them."""
        if self.free is None:
            return t
        free = self.free.to(t.device)
        return torch.where(free if t.dim() == free.dim() else free[..., None], t, torch.zeros_like(t))

    def mean(self, t: Tensor) -> Tensor:
        """[B, *S] -> [B]: the weighted mean over streams of each one's mean over its free elements."""
        return mean_dims(t) if self.whole else self.over_streams(self.by_stream(t))

    def by_stream(self, t: Tensor) -> Tensor:
        """[B, *S] -> [B, K], each stream's mean over its free elements."""
        if self.whole:
            return mean_dims(t)[:, None]
        t = upcast(t)
        return torch.stack([_mean(t, mask) for mask in self._masks(t)], 1)

    def over_streams(self, values: Tensor) -> Tensor:
        """[…, K] -> […], the mean over streams, by their weights."""
        if self.count == 1:
            return values[..., 0]
        weights = values.new_tensor(self.shares)
        return (values * weights).sum(-1)

    @property
    def shares(self) -> tuple[float, ...]:
        """The streams' weights, which sum to 1."""
        total = math.fsum(stream.weight for stream in self.streams)
        return tuple(stream.weight / total for stream in self.streams) or (1.0,)

    def measured(self, measure: Callable[[Reduce], Tensor], by_stream: bool = False) -> Tensor:
        """What `measure` makes of a reduction: stream by stream, [B, K] where `by_stream`, else their mean, [B]."""
        if by_stream:
            return measure(self.by_stream)
        return measure(self.mean) if self.count == 1 else self.over_streams(measure(self.by_stream))

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values by row [B], or by row and stream [B, K], for every element of ``like`` [B, *S]; 0 in no stream."""
        if values.dim() == 1 or self.count == 1:
            return to_rows(values.flatten(), like)
        columns = [to_rows(value, like) for value in values.unbind(1)]
        parts = [torch.where(s.elements.to(like.device), c, 0.0) for s, c in zip(self.streams, columns, strict=True)]
        return torch.stack(parts).sum(0)

    def effective(self, t: Tensor) -> float | Tensor:
        """How many equally weighted independent elements have a mean as sharp as `mean` of [B, *S], [B] or [1]."""
        if self.whole:
            return t[0].numel()
        sizes = [mask.flatten(1).sum(1).to(upcast(t).dtype) for mask in self._masks(t)]
        return 1 / torch.stack([share**2 / size for share, size in zip(self.shares, sizes, strict=True)]).sum(0)

    def check_advantages(self, streams: Sequence[str]) -> None:
        """Raises ValueError unless advantages by these streams (none: joint ones) fit the layout."""
        if streams and tuple(streams) != self.names:
            near = str(self.names) if self.streams else "a joint credit, as the model's states are one stream"
            raise ValueError(f"streams: {tuple(streams)} are not the model's; nearest valid: {near}")

    def _check_rows(self, rows: Tensor, count: int) -> None:
        """Rows of a layout that is not the same for all are `count` from `first` on."""
        if count == 1 or rows.device.type != "cpu" or not rows.numel():
            return
        low, high, last = int(rows.min()), int(rows.max()), self.first + count - 1
        if low < self.first or high > last:
            bad, near = (low, self.first) if low < self.first else (high, last)
            raise ValueError(f"rows: {bad} is outside [{self.first}, {last}], the layout's; nearest valid: {near}")

    def _masks(self, t: Tensor) -> list[Tensor]:
        """Of each stream, the elements that count, bool [B or 1, *S]."""
        free = None if self.free is None else self.free.to(t.device)
        if len(self.streams) < 2:
            return [torch.ones_like(t[:1], dtype=torch.bool) if free is None else free]
        own = [stream.elements.to(t.device)[None] for stream in self.streams]
        return own if free is None else [mask & free for mask in own]

    def _of(self, free: Tensor | None, clean: Tensor | None, first: int = 0) -> StateLayout:
        """These rows of the layout; they need no check again, which a device would have to be waited for."""
        other = copy.copy(self)
        for name, value in (("free", free), ("clean", clean), ("first", first)):
            object.__setattr__(other, name, value)
        return other


def _rows(t: Tensor, rows: Tensor | slice) -> Tensor:
    if t.shape[0] == 1:
        return t
    return t[rows.to(t.device)] if isinstance(rows, Tensor) else t[rows]


def _mean(t: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked elements, [B]; what is outside reaches neither it nor a gradient."""
    inside = torch.where(mask, t, torch.zeros_like(t))
    return inside.sum(dim=tuple(range(1, t.dim()))) / mask.flatten(1).sum(1)


def _check_held(free: Tensor, clean: Tensor) -> None:
    if free.dtype != torch.bool or free.dim() < 2:
        raise ValueError(f"free: {free.dtype} {list(free.shape)} must be bool [N, *S]; nearest valid: [1, *S]")
    if clean.shape[1:] != free.shape[1:] or (clean.shape[0] != free.shape[0] and 1 not in (len(clean), len(free))):
        raise ValueError(
            f"clean: shape {list(clean.shape)} must be {list(free.shape)}, as that of free; or 1 for N rows"
        )
    if not clean.is_floating_point():
        raise ValueError(f"clean: {clean.dtype} cannot hold a latent; nearest valid: torch.float32")
    none = ~free.flatten(1).any(1)
    if bool(none.any()):
        raise ValueError(f"free: row {int(none.int().argmax())} has no free element; nearest valid: at least one")
    broken = ~free.to(clean.device) & ~clean.isfinite()
    if bool(broken.any()):
        held = float(clean.expand_as(broken)[broken][0])
        raise ValueError(f"clean: {held} at an element that is not free; nearest valid: a finite number")


def _check_streams(streams: Sequence[StateStream], free: Tensor | None) -> None:
    if not streams:
        return
    names, like = [stream.name for stream in streams], streams[0].elements
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"streams: names {names} must be distinct and not empty")
    for stream in streams:
        if not (math.isfinite(stream.weight) and stream.weight > 0):
            raise ValueError(
                f"streams: {stream.name!r} has weight {stream.weight}; must be finite and above 0; 1 is usual"
            )
        if stream.elements.dtype != torch.bool or stream.elements.shape != like.shape:
            given = f"{stream.elements.dtype} {list(stream.elements.shape)}"
            raise ValueError(f"streams: {stream.name!r} has elements {given}; nearest valid: bool {list(like.shape)}")
    if free is not None and free.shape[1:] != like.shape:
        raise ValueError(
            f"free: shape {list(free.shape)} must be [N, {', '.join(map(str, like.shape))}], as the streams"
        )
    sampled = torch.ones_like(like)[None] if free is None else free.to(like.device)
    times = torch.stack([stream.elements for stream in streams]).sum(0)
    wrong = sampled & (times != 1)
    if bool(wrong.any()):
        raise ValueError(f"streams: {int(wrong.any(0).sum())} free elements are in none or in several; put each in one")
    for stream in streams:
        if not bool((stream.elements & sampled).flatten(1).any(1).all()):
            raise ValueError(f"streams: {stream.name!r} has a row without a free element; leave the stream out there")


WHOLE = StateLayout()
"""All elements free, one stream."""
