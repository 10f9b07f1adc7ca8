"""Several networks as one module: what trains, samples and saves sees a single network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Networks of one architecture, each for a range of noise levels, as Wan 2.2's two are.

    networks    by name, from the noisiest to the cleanest; names of parameters are "NAME.…"
    boundaries  σ, falling, one between each two of them: a row with σ ≥ boundaries[i] goes to one of the first i + 1

    Rows of a batch may fall on several of them: each gets its own rows. One that gets none has no gradient (None).

    Raises ValueError for less than two networks, another number of boundaries, or ones that do not fall inside (0, 1).
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundaries: Sequence[float]) -> None:
        super().__init__()
        if len(networks) < 2 or len(boundaries) != len(networks) - 1:
            raise ValueError(
                f"boundaries: {list(boundaries)} for {len(networks)} networks; nearest valid: one between each two of "
                "at least two"
            )
        if any(not low < high for high, low in pairwise([1.0, *boundaries, 0.0])):
            raise ValueError(f"boundaries: {list(boundaries)} must fall from below 1 to above 0; nearest valid: 0.875")
        self.boundaries = tuple(boundaries)
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, level: Tensor, **rows: Tensor) -> Tensor:
        """What each row's network gives for it, [B, …]. level: σ, [B]; rows: a network's arguments, [B, …] each."""
        expert = torch.stack([level < boundary for boundary in self.boundaries]).sum(0)
        parts: list[tuple[Tensor, Tensor]] = []
        for number, network in enumerate(self.children()):
            mine = (expert == number).nonzero()[:, 0]
            if len(mine) == len(level):
                return network(**rows)
            if len(mine):
                parts.append((mine, network(**{name: value[mine] for name, value in rows.items()})))
        order = torch.cat([mine for mine, _ in parts]).argsort()
        return torch.cat([out for _, out in parts])[order]
