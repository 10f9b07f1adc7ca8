"""The (t, ε) pairs at which clean samples are re-noised: which are drawn, and who shares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.rng import NoiseKind, Stream
from tempflow.core.schedule import Schedule
from tempflow.core.times import Id, Times


@dataclass(frozen=True)
class Renoise:
    """Which (t, ε) a sample is re-noised with.

    `share_times`, `share_noise`: samples whose ids agree in that many leading parts share them; None: no sharing. With
    ids (iteration, slot, root, …), 1 shares over the iteration and 2 over the prompt. DiffusionNFT shares nothing; AWM
    shares times over the batch (1, None); V-GRPO both over the prompt (2, 2), so that within a group proxies differ
    by what they measure and not by what they drew. Raises ValueError for a share below 1.
    """

    times: Times
    share_times: int | None = None
    share_noise: int | None = None

    def __post_init__(self) -> None:
        for name, share in (("share_times", self.share_times), ("share_noise", self.share_noise)):
            if share is not None and share < 1:
                raise ValueError(f"{name}: {share} is too small; nearest valid: 1, or None for no sharing")

    def __call__(
        self,
        seed: int,
        ids: Sequence[Id],
        schedule: Schedule,
        shape: Sequence[int],
        pairs: range | None = None,
        noise: NoiseKind = "normal",
    ) -> tuple[Tensor, Tensor]:
        """Times [N, M], float64, within the schedule's range, and noises [N, M, *shape] (`core.rng`), on the CPU.

        pairs  which of the M pairs are wanted (the others are not computed); None: all
        noise  the kind that the corruption wants

        Policy, old and reference must be asked at the same pairs: draw once, or again with the same arguments.
        """
        wanted = range(self.times.count(schedule.steps)) if pairs is None else pairs
        owners, place = _distinct(ids, self.share_times)
        t = schedule.within(self.times(Stream(seed, "forward.times"), owners, schedule))[place][:, list(wanted)]
        owners, place = _distinct(ids, self.share_noise)
        z = Stream(seed, "forward.noise").noise(noise, [(j, *i) for i in owners for j in wanted], shape)
        return t, z.view(len(owners), len(wanted), *shape)[place]

    def single(
        self,
        seed: int,
        ids: Sequence[Id],
        which: Sequence[int],
        schedule: Schedule,
        shape: Sequence[int],
        noise: NoiseKind = "normal",
    ) -> tuple[Tensor, Tensor]:
        """One pair of each id, its `which`-th: times [N, 1] and noises [N, 1, *shape], equal to those of `__call__`."""
        owners, place = _distinct(ids, self.share_times)
        t = schedule.within(self.times(Stream(seed, "forward.times"), owners, schedule))[place]
        t = t.gather(1, torch.tensor(which, dtype=torch.long)[:, None])
        owned = [i if self.share_noise is None else i[: self.share_noise] for i in ids]
        z = Stream(seed, "forward.noise").noise(noise, [(j, *i) for j, i in zip(which, owned, strict=True)], shape)
        return t, z[:, None]


def _distinct(ids: Sequence[Id], share: int | None) -> tuple[list[Id], list[int]]:
    """The distinct owners of draws, and for each id the place of its owner."""
    if share is not None and any(len(i) < share for i in ids):
        short = next(i for i in ids if len(i) < share)
        raise ValueError(f"share: the id {short} has no {share} leading parts; nearest valid: {len(short)}")
    keys = [i if share is None else i[:share] for i in ids]
    owners = list(dict.fromkeys(keys))
    number = {owner: n for n, owner in enumerate(owners)}
    return owners, [number[key] for key in keys]
