"""Pictures on a disk that is not there: what offline algorithms are given on the toys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from tempflow.media import Media
from tempflow.request import Prompt
from tempflow.rewards.protocol import Reward


def seeded() -> Generator:
    return torch.Generator().manual_seed(11)


@dataclass
class Album:
    """For every prompt asked for, `group` pictures that the untrained model would draw, newly drawn; of these the best
    by the reward, and where two are wanted the worst."""

    drawn: Callable[[int, Generator], Tensor]  # count -> pictures
    reward: Reward
    wanted: int
    group: int = 12
    generator: Generator = field(default_factory=seeded)

    def __call__(self, prompts: Sequence[Prompt]) -> Media:
        found: list[Tensor] = []
        for prompt in prompts:
            media = self.drawn(self.group, self.generator)
            value = self.reward.score(media, [prompt.text] * self.group, [{}] * self.group).value[:, 0]
            found += [media[value.argmax()], media[value.argmin()]][: self.wanted]
        return Media.of(torch.stack(found))
