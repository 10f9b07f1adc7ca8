"""What a sample is: sizes, media of pictures, clips and sound, and what is written of them."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempflow import media
from tempflow.media import DURATION, Media, Size, serves


def clips(count: int = 2, frames: int = 5) -> torch.Tensor:
    """Frame f of clip n is filled with 10·n + f."""
    values = 10 * torch.arange(count)[:, None] + torch.arange(frames)
    return values.to(torch.uint8)[:, :, None, None, None].repeat(1, 1, 2, 3, 3)


def test_sizes() -> None:
    assert Size(2, 3) == Size(2, 3, 1, None, None) != Size(2, 3, 4)
    assert (Size(2, 3, 4).pixels, str(Size(2, 3)), str(Size(2, 3, 4))) == (24, "2×3", "2×3, 4 frames")
    for given, message in (
        ({"height": 0}, "height: 0 is too small; nearest valid: 1"),
        ({"width": -2}, "width: -2"),
        ({"frames": 0}, "frames: 0"),
        ({"fps": 0.0}, "fps: 0.0 must be above 0; nearest valid: null"),
        ({"seconds": float("inf")}, "seconds: inf"),
    ):
        with pytest.raises(ValueError, match=message):
            Size(**({"height": 2, "width": 2} | given))


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (lambda: Media(torch.zeros(1, 1, 2, 2, 3)), r"torch.float32 .*; nearest valid: torch.uint8 \[N, F, H, W, 3\]"),
        (lambda: Media(torch.zeros(1, 2, 2, 3, dtype=torch.uint8)), r"\[1, 2, 2, 3\] on cpu"),
        (lambda: Media(clips(), sound=torch.zeros(1, 1, 4), sound_rate=8), r"nearest valid: float32 \[2, C, S\]"),
        (lambda: Media(clips(), sound=torch.zeros(2, 1, 4)), "sound_rate: None of a sound"),
        (lambda: Media(clips(), sound_rate=8), "sound_rate: 8 without a sound"),
        (lambda: Media.of(torch.zeros(2, 2, 2, 4, dtype=torch.uint8)), r"nearest valid: torch.uint8 \[N, H, W, 3\]"),
        (lambda: Media.of("a.png"), "media is a str"),  # type: ignore[arg-type]
        (lambda: Media.cat([Media(clips()), Media(clips(frames=1))]), "2 kinds of media"),
        (lambda: Media.cat([]), "parts: 0 kinds of media; nearest valid: 1"),
        (
            lambda: Media.cat([Media(clips(), 8.0, torch.zeros(2, 1, n), 8) for n in (4, 6)]),
            r"2 kinds .*sound \[1, 4\] at 8, and .*sound \[1, 6\] at 8\); nearest valid: 1$",
        ),
        *((lambda fps=fps: Media(clips(), fps), f"fps: {fps} must be") for fps in (0.0, -8.0, math.inf, math.nan)),
        (lambda: Media(clips(frames=0)), r"media is \[2, 0, 2, 3, 3\]; nearest valid: F, H and W of at least 1"),
        (lambda: Media(clips(), 8.0, torch.zeros(2, 1, 0), 8), r"sound is \[2, 1, 0\]; nearest valid: C and S"),
        (lambda: Media(clips(), 8.0, torch.zeros(2, 1, 4), 0), "sound_rate: 0 is too small; nearest valid: 1"),
    ],
)
def test_what_is_no_medium(media: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        media()
    assert "\n" not in str(caught.value)


def test_no_media_are_media() -> None:
    none = Media(clips(), 8.0)[[]]
    assert len(none) == 0 and len(Media.cat([none, Media(clips(), 8.0)])) == 2


def test_pictures_of_pictures_and_of_clips() -> None:
    pictures = clips(frames=1)[:, 0]
    assert torch.equal(Media.of(pictures).pictures(), pictures) and Media.of(pictures).kind == "picture"
    clip = Media(clips(), fps=8.0)
    assert clip.kind == "video" and clip.size == Size(2, 3, 5, 8.0) and Media.of(clip) is clip
    assert clip.pictures()[:, 0, 0, 0].tolist() == [2, 12]  # the middle one
    assert clip.pictures(3)[:, 0, 0, 0].tolist() == [0, 2, 4, 10, 12, 14]
    assert clip.pictures(5)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert clip.pictures(9).shape == (18, 2, 3, 3)
    strips = clip.strips(3)
    assert strips.shape == (2, 2, 9, 3) and strips[1, 0, ::3, 0].tolist() == [10, 12, 14]
    assert torch.equal(Media.of(pictures).strips(), pictures)
    with pytest.raises(ValueError, match="count: 0 is too small"):
        clip.pictures(0)


def test_rows_copies_and_parts() -> None:
    sound = torch.arange(8.0).view(2, 1, 4) / 8
    media = Media(clips(), 4.0, sound, 8)
    assert media.kind == "video and sound" and len(media) == 2
    back = media[[1, 0]]
    assert torch.equal(back.frames, media.frames.flip(0)) and back.sound is not None
    assert torch.equal(back.sound, sound.flip(0)) and (back.fps, back.sound_rate) == (4.0, 8)
    whole = Media.cat([media[[0]], media[slice(1, 2)]])
    assert torch.equal(whole.frames, media.frames) and whole.sound is not None and torch.equal(whole.sound, sound)
    copy = media.clone()
    copy.frames.zero_()
    assert media.frames.any() and copy.sound is not None and copy.sound is not sound


def test_what_is_written_loses_nothing(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), np.uint8))
    sound = torch.tensor([[[0.0, 0.5, -1.0, 2.0]], [[0.0] * 4]])
    media = Media(noise, 10.0, sound, 8)
    assert media.write(0, tmp_path / "a.png") == [tmp_path / "a.png", tmp_path / "a.wav"]
    with Image.open(tmp_path / "a.png") as clip:
        assert clip.n_frames == 3 and clip.info["duration"] == 100  # type: ignore[attr-defined]
        for number in range(3):
            clip.seek(number)
            assert np.array_equal(np.asarray(clip.convert("RGB")), noise[0, number].numpy())
    with wave.open(str(tmp_path / "a.wav"), "rb") as heard:
        assert (heard.getframerate(), heard.getnchannels(), heard.getnframes()) == (8, 1, 4)
        assert np.frombuffer(heard.readframes(4), "<i2").tolist() == [0, 16384, -32767, 32767]
    assert Media(noise[:, :1]).write(1, tmp_path / "b.png") == [tmp_path / "b.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), noise[1, 0].numpy())
    with pytest.raises(FileExistsError):
        media.write(1, tmp_path / "a.png")


@pytest.mark.parametrize("fps", [None, 24.0, 10.0])
@pytest.mark.parametrize(("frames", "durations"), [((0, 0, 1), (2, 1)), ((7,) * 4, (3, 1)), ((1, 0, 0, 0), (1, 2, 1))])
def test_equal_frames_are_joined_with_their_times(
    tmp_path: Path, fps: float | None, frames: tuple[int, ...], durations: tuple[int, ...]
) -> None:
    clip = torch.tensor(frames, dtype=torch.uint8)[None, :, None, None, None].repeat(1, 1, 4, 5, 3)
    (file,) = Media(clip, fps).write(0, tmp_path / "a.png")
    step, told, colours = DURATION if fps is None else 1000 / fps, [], []
    with Image.open(file) as stored:
        for number in range(stored.n_frames):  # type: ignore[attr-defined]
            stored.seek(number)
            colours.append(stored.convert("RGB").getpixel((0, 0)))
            told.append(stored.info["duration"] / step)
    assert told == pytest.approx(durations)
    assert [c[0] for c, n in zip(colours, durations, strict=True) for _ in range(n)] == list(frames)


def test_who_can_be_given_what() -> None:
    assert serves("picture", "picture") and serves("video", "video") and serves("video and sound", "video and sound")
    assert serves("video and sound", "sound") and serves("video and sound", "video")
    assert not serves("video", "picture") and not serves("picture", "video") and not serves("video", "sound")


def test_media_of_another_size_say_both() -> None:
    def made(frames: int = 4, fps: float | None = 8.0, seconds: float | None = None) -> Media:
        sound = None if seconds is None else torch.zeros(1, 1, round(seconds * 100))
        pixels = torch.zeros(1, frames, 2, 3, 3, dtype=torch.uint8)
        return Media(pixels, fps, sound, None if seconds is None else 100)

    for given, size in (
        (made(), Size(2, 3, 4, 8.0)),
        (made(), Size(2, 3, 4)),
        (made(seconds=9.0), Size(2, 3, 4, 8.0)),
        (made(seconds=0.55), Size(2, 3, 4, 8.0, 0.5)),
        (made(fps=24000 / 1001), Size(2, 3, 4, 23.976024)),
        (made(frames=1, fps=None), Size(2, 3, 1, 8.0)),
    ):
        assert given.misfit(size) == ""
    for given, size, told in (
        (
            made(frames=2, fps=4.0),
            Size(2, 3, 4, 8.0),
            "2×3, 2 frames at 4 a second, and 2×3, 4 frames at 8 a second is",
        ),
        (
            made(fps=4.0),
            Size(2, 3, 4, 8.0),
            "2×3, 4 frames at 4 a second, and 2×3, 4 frames at 8 a second is asked for",
        ),
        (made(fps=None), Size(2, 3, 4, 8.0), "2×3, 4 frames, and 2×3, 4 frames at 8 a second is asked for"),
        (made(), Size(3, 3, 4), "2×3, 4 frames at 8 a second, and 3×3, 4 frames is asked for"),
        (made(seconds=0.5), Size(2, 3, 4, 8.0, 1.0), "2×3, 4 frames at 8 a second, 0.5 s of sound, and 2×3, 4 frames"),
        (
            made(),
            Size(2, 3, 4, 8.0, 1.0),
            "2×3, 4 frames at 8 a second, and 2×3, 4 frames at 8 a second, 1 s of sound is",
        ),
    ):
        assert given.misfit(size).startswith(told)


def test_what_is_held_at_a_time_is_bounded_by_frames_and_by_bytes() -> None:
    """1 GiB is 341 pictures at 1024², and 11 clips of 81 frames at 480×832."""
    for size, most, held in (
        (Size(32, 32), 1024, 1024),
        (Size(32, 32, 81), 1024, 12),
        (Size(512, 512), 1024, 1024),
        (Size(1024, 1024), 1024, 341),
        (Size(480, 832, 81, 16.0), 1024, 11),
        (Size(720, 1280, 121), 1024, 3),
        (Size(2160, 3840, 2000), 1, 1),
    ):
        assert size.at_once(most) == held
        assert held == 1 or held * 3 * size.pixels <= media.BYTES_AT_ONCE
