"""Motion smoothness, and JPEG incompressibility: the rewards that need no weights."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tempflow.media import Media
from tempflow.rewards import Reward, over_frames, score_all
from tempflow.rewards.jpeg_compressibility import jpeg_compressibility
from tempflow.rewards.jpeg_incompressibility import jpeg_incompressibility
from tempflow.rewards.motion_smoothness import motion_smoothness
from tempflow.rewards.protocol import takes_of

NOISE = torch.randint(0, 256, (3, 5, 6, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def smooth(*levels: int) -> float:
    """Of a clip whose frames are even greys."""
    clip = torch.tensor(levels, dtype=torch.uint8)[None, :, None, None, None].expand(1, -1, 2, 3, 3)
    scores = motion_smoothness().score(Media(clip), [""], [{}])
    assert scores.ok.all() and scores.names == ("motion_smoothness",)
    return scores.value.item()


def test_motion_golden_values() -> None:
    assert smooth(7, 7, 7, 7) == 1  # stands still
    assert smooth(0, 60, 120, 180) == 1  # fades evenly
    assert smooth(0, 255, 0, 255) == 0  # flickers
    assert smooth(0, 0, 255, 255) == pytest.approx(0.5)  # jumps once: the two frames at the jump are half of it off
    assert smooth(10, 20, 10) == pytest.approx(1 - 10 / 255)


def test_motion_is_the_second_difference_of_frames() -> None:
    frames = NOISE.double()
    off = (frames[:, 1:-1] - (frames[:, :-2] + frames[:, 2:]) / 2).abs().mean((1, 2, 3, 4)) / 255
    scores = motion_smoothness().score(Media(NOISE, 8.0), ["", "", ""], [{}] * 3)
    assert torch.allclose(scores.value[:, 0].double(), 1 - off, atol=1e-7)
    backwards = motion_smoothness().score(Media(NOISE.flip(0, 1)), ["", "", ""], [{}] * 3)
    assert torch.equal(backwards.value.flip(0), scores.value)  # row by row; a clip played backwards is as smooth


def test_motion_takes_clips_of_three_frames_and_more() -> None:
    reward = motion_smoothness()
    assert isinstance(reward, Reward) and takes_of(reward) == "video"
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"media has {count} frames, too few to judge motion; nearest valid: 3"):
            reward.score(Media(NOISE[:, :count]), ["", "", ""], [{}] * 3)
    assert not score_all([reward], Media(NOISE[:, :2]), ["", "", ""], [{}] * 3, [0, 1, 2]).ok.any()


def test_incompressibility_is_minus_compressibility() -> None:
    pictures = NOISE[:, 0].repeat(1, 8, 8, 1)
    for quality in (30, 95):
        good, bad = (
            make(quality=quality).score(pictures, ["", "", ""], [{}] * 3)
            for make in (jpeg_incompressibility, jpeg_compressibility)
        )
        file = io.BytesIO()
        Image.fromarray(pictures[0].numpy()).save(file, "JPEG", quality=quality)
        assert good.value[0].item() == pytest.approx(len(file.getvalue()) / 1000)
        assert torch.equal(good.value, -bad.value) and good.names == ("jpeg_incompressibility",)
    clips = over_frames(jpeg_incompressibility(), 2).score(Media(NOISE), ["", "", ""], [{}] * 3)
    assert clips.ok.all() and len(clips) == 3
    with pytest.raises(ValueError, match="quality = 96; nearest valid: 95"):
        jpeg_incompressibility(quality=96)
