"""Motion smoothness: how well each frame of a clip is told by its two neighbours.

VBench (arXiv 2311.17982) drops every second frame, has a model of frame interpolation draw it anew, and reports the
mean difference as a share of the range of pixels. Here the mean of the two neighbours stands in for that model, at
every frame but the first and the last: the measure is ours, needs no weights, and is not comparable with VBench's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media
from tempflow.rewards.protocol import check_media

LICENCE, NEEDS, RANGE = "Apache-2.0", "", "0 to 1; 1 for a clip that stands still"

FEWEST = 3
"""Frames that a clip must have: one, and its neighbours."""


def motion_smoothness() -> MotionSmoothness:
    """How even the change from frame to frame is, 0 to 1; standing still counts as even."""
    return MotionSmoothness()


@dataclass(frozen=True)
class MotionSmoothness:
    """1 − mean |f_t − (f_{t−1} + f_{t+1}) ÷ 2| ÷ 255, over pixels, channels and inner frames: 1 − the mean second
    difference, halved. It does not look at the prompt.

    A clip that stands still, or fades evenly, has 1: as the only reward it teaches a model to stand still.
    """

    name: str = "motion_smoothness"
    groupwise: bool = False
    takes: Kind = "video"

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; never fails. Raises ValueError for clips of fewer than 3 frames."""
        frames = check_media(media, prompts, metadata).frames
        if frames.shape[1] < FEWEST:
            raise ValueError(f"media has {frames.shape[1]} frames, too few to judge motion; nearest valid: {FEWEST}")
        value = torch.tensor([smoothness(clip) for clip in frames], dtype=torch.float32)[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


def smoothness(clip: Tensor) -> float:
    """Of one clip, uint8 [F, H, W, C] with F of at least 3. A frame at a time: a long clip needs no more memory."""
    total = 0
    for before, frame, after in zip(clip[:-2], clip[1:-1], clip[2:], strict=True):
        total += int((2 * frame.int() - before.int() - after.int()).abs().sum())
    return 1 - total / (2 * 255 * clip[1:-1].numel())
