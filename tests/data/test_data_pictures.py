"""Pictures beside a prompts' file: what is read, what is refused, and that nothing outside the folder is opened."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempflow.data import pictures as module
from tempflow.data.pictures import Pictures
from tempflow.media import Media, Size
from tempflow.request import Prompt

SIZE = Size(4, 6)  # height, width
KEYS = ("chosen", "rejected")


def noise(seed: int, size: tuple[int, int] = (4, 6), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def saved(path: Path, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, **options)).save(path)
    return path


def pair(**metadata: object) -> Prompt:
    return Prompt("a cat", {"chosen": "a.png", "rejected": "b.png", **metadata})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        saved(tmp_path / "data" / name, number)
    return tmp_path / "data"


def test_pictures_are_read_bit_for_bit_in_the_keys_order(folder: Path) -> None:
    found = Pictures(folder, KEYS, SIZE)
    prompts = [pair(), pair(chosen="deep/c.png", rejected="./a.png")]
    found.check(prompts)
    media = found(prompts).pictures()
    assert media.dtype == torch.uint8 and media.shape == (4, 4, 6, 3)
    for got, seed in zip(media, (0, 1, 2, 0), strict=True):
        assert np.array_equal(got.numpy(), noise(seed))


def test_the_root_is_the_prompts_files_folder() -> None:
    assert Pictures.beside("some/where/pairs.jsonl", KEYS, SIZE) == Pictures(Path("some/where"), KEYS, SIZE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_rgb(folder: Path, mode: str) -> None:
    picture = Image.fromarray(noise(5)).convert(mode)
    name = "x.png" if mode != "CMYK" else "x.jpg"
    picture.save(folder / name)
    with Image.open(folder / name) as again:
        assert again.mode == mode
        want = np.array(again.convert("RGB"))
    found = Pictures(folder, ("image",), SIZE)
    found.check([Prompt("x", {"image": name})])
    assert np.array_equal(found([Prompt("x", {"image": name})]).pictures()[0].numpy(), want)


# ------------------------------------------------------------------------------------------------------------ outside
def test_what_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = saved(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(folder.parent)
    (folder / "fine.png").symlink_to(folder / "a.png")
    (folder / "trainer.png").symlink_to(folder / "trainer.png")
    found = Pictures(folder, ("image",), SIZE)
    for name in (str(outside), str(folder / "a.png"), "../secret.png", "deep/../a.png", "link.png", "up/secret.png"):
        for use in (found.check, found):
            with pytest.raises(ValueError, match=r"image '.*': leads out of .*; nearest valid: a relative path"):
                use([Prompt("x", {"image": name})])
    for name in ("trainer.png", "nul\0l.png"):
        with pytest.raises(ValueError, match=r"prompt 1 \('x'\), image "):
            found.check([Prompt("x", {"image": name})])
    found.check([Prompt("x", {"image": "fine.png"})])  # a link that stays inside


def test_a_root_behind_a_link_is_as_good(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    Pictures(folder.parent / "alias", KEYS, SIZE).check([pair()])


def test_a_pipe_is_no_file_and_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is no file"):
        Pictures(folder, ("image",), SIZE).check([Prompt("x", {"image": "pipe.png"})])


# ------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"choosen": "a.png", "rejected": "b.png"}, r"prompt 2 \('y'\): no \"chosen\"; did you mean 'choosen'\?"),
        ({}, r"prompt 2 \('y'\): no \"chosen\"; a line looks like \{\"prompt\": …, \"chosen\": \"a.png\"\}"),
        ({"chosen": "a.png"}, r"no \"rejected\""),
        ({"chosen": 3, "rejected": "b.png"}, r"\"chosen\" is 3; it must be a picture's path"),
        ({"chosen": "", "rejected": "b.png"}, r"\"chosen\" is ''; it must be"),
        ({"chosen": ["a.png"], "rejected": "b.png"}, r"\"chosen\" is \['a\.png'\]"),
        ({"chosen": "aa.png", "rejected": "b.png"}, r"chosen 'aa\.png': .*aa\.png is no file; nearest valid: 'a\.png'"),
        ({"chosen": "deep", "rejected": "b.png"}, r"deep is no file"),
        ({"chosen": "no/a.png", "rejected": "b.png"}, r"no/a\.png is no file$"),
    ],
)
def test_metadata_that_names_no_picture(folder: Path, metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pictures(folder, KEYS, SIZE).check([pair(), Prompt("y", metadata)])


def test_another_size_is_said_with_both(folder: Path) -> None:
    saved(folder / "big.png", size=(6, 4))
    with pytest.raises(
        ValueError, match=r"prompt 1 \('a cat'\), rejected 'big\.png': is 6×4 .*the run draws 4×6.*height 6"
    ):
        Pictures(folder, KEYS, SIZE).check([pair(rejected="big.png")])


def test_files_that_are_no_pictures(folder: Path) -> None:
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").touch()
    Image.fromarray(noise(0)).save(folder / "x.bmp")
    (folder / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n")
    for name in ("text.png", "empty.png", "x.bmp", "x.eps"):
        with pytest.raises(
            ValueError, match=rf"chosen '{name}': no picture that can be read .*valid: a PNG, JPEG, WEBP"
        ):
            Pictures(folder, KEYS, SIZE).check([pair(chosen=name)])


def test_deep_colour_and_turned_pictures_are_not_guessed_at(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[module.ORIENTATION] = 6
    Image.fromarray(noise(0)).save(folder / "turned.jpg", exif=exif)
    found = Pictures(folder, KEYS, SIZE)
    with pytest.raises(ValueError, match=r"has mode I;16, whose range is not 8 bits; nearest valid: RGB"):
        found.check([pair(chosen="deep.png")])
    with pytest.raises(ValueError, match=r"is stored turned \(EXIF orientation 6\)"):
        found.check([pair(chosen="turned.jpg")])


def test_large_files_and_bombs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    found = Pictures(folder, KEYS, SIZE)
    for side in (10_000, 60_000):  # PIL warns of the one and raises for the other
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(ValueError, match=r"chosen 'bomb\.png': no picture that can be read .*decompression bomb"):
            found.check([pair(chosen="bomb.png")])
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"chosen 'a\.png': \d+ bytes; the largest valid size is 10"):
        found.check([pair()])


def test_a_file_that_is_cut_short_is_named_when_it_is_read(folder: Path) -> None:
    """Its header is whole, which is all that the check before a run looks at."""
    whole = saved(folder / "long.png", size=(64, 64)).read_bytes()
    (folder / "long.png").write_bytes(whole[: len(whole) // 2])
    found = Pictures(folder, ("image",), Size(64, 64))
    found.check([Prompt("x", {"image": "long.png"})])
    with pytest.raises(ValueError, match=r"prompt \('x'\), image 'long\.png': no picture that can be read"):
        found([Prompt("x", {"image": "long.png"})])


# --------------------------------------------------------------------------------------------------------------- clips
def clip(*levels: int) -> torch.Tensor:
    """A clip whose frame k is filled with levels[k]."""
    return torch.tensor(levels, dtype=torch.uint8)[None, :, None, None, None].repeat(1, 1, 4, 6, 3)


def of(folder: Path, fps: float | None, frames: int = 4) -> Pictures:
    return Pictures(folder, ("clip",), Size(4, 6, frames, fps))


CLIP = [Prompt("x", {"clip": "c.png"})]


@pytest.mark.parametrize("fps", [None, 8.0, 24.0, 23.976, 60.0])
@pytest.mark.parametrize("levels", [(1, 2, 3, 4), (1, 1, 2, 3), (1, 2, 2, 2), (1, 2, 2, 1), (5, 5, 5, 5)])
def test_a_clip_that_was_written_is_read_back_with_its_equal_frames(
    tmp_path: Path, fps: float | None, levels: tuple[int, ...]
) -> None:
    Media(clip(*levels), fps).write(0, tmp_path / "c.png")
    found = of(tmp_path, fps)
    found.check(CLIP)
    again = found(CLIP)
    assert torch.equal(again.frames, clip(*levels)) and again.fps == fps


@pytest.mark.parametrize(
    ("stored", "fps", "levels", "message"),
    [
        (24.0, 8.0, (1, 2, 3, 4), "has 4 frames at 24 a second, and the run draws 4 at 8; nearest .*model.fps 24$"),
        (24.0, None, (1, 2, 3, 4), "has 4 frames at 24 a second, and the run draws 4 at 10; nearest .*model.fps 24$"),
        (24.0, 8.0, (1, 1, 1, 2), "has 4 frames at 24 a second"),
        (4.0, 8.0, (1, 2, 3, 4), "has 4 frames at 4 a second, and the run draws 4 at 8; nearest .* 4, model.fps 4$"),
        (4.0, 8.0, (1, 2), "has 2 frames at 4 a second, and the run draws 4 at 8; nearest .* 2, model.fps 4$"),
        (4.0, 12.0, (1, 2), "has 2 frames at 4 a second, and the run draws 4 at 12"),
        (2.0, 8.0, (1,), "has 1 frames at 8 a second"),
        (8.0, 8.0, (1, 1, 2), "has 3 frames at 8 a second, and the run draws 4 at 8; nearest valid: model.frames 3"),
        (8.0, 8.0, (1, 2, 3, 4, 5, 6), "has 6 frames at 8 a second, and the run draws 4 at 8"),
        (8.0, 8.0, (1,), "has 1 frames at 8 a second, and the run draws 4 at 8"),
        (0.02, 8.0, (1, 1, 1, 2), "has 4 frames at 0.02 a second"),
    ],
)
def test_a_clip_of_another_length_or_rate_is_refused_with_both(
    tmp_path: Path, stored: float, fps: float | None, levels: tuple[int, ...], message: str
) -> None:
    Media(clip(*levels), stored).write(0, tmp_path / "c.png")
    for use in (of(tmp_path, fps).check, of(tmp_path, fps)):
        with pytest.raises(ValueError, match=r"clip 'c\.png': " + message):
            use(CLIP)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_clip_where_a_picture_is_asked_for_is_refused(tmp_path: Path, form: str) -> None:
    first, *others = (Image.fromarray(frame.numpy()) for frame in clip(10, 90, 200)[0])
    told: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 100}
    first.save(tmp_path / "c.png", format=form, **told)
    for use in (of(tmp_path, None, 1).check, of(tmp_path, None, 1)):
        with pytest.raises(ValueError, match=r"'c\.png': has 3 frames, and the run draws pictures; .*model.frames 3$"):
            use(CLIP)


def test_a_photograph_with_a_preview_is_a_picture(tmp_path: Path) -> None:
    first, other = (Image.fromarray(frame.numpy()) for frame in clip(10, 200)[0])
    first.save(tmp_path / "c.png", format="MPO", save_all=True, append_images=[other])
    found = of(tmp_path, None, 1)
    found.check(CLIP)
    assert len(found(CLIP).frames[0]) == 1


def test_clips_of_other_programs(tmp_path: Path) -> None:
    """WebP's times are whole milliseconds; an animated PNG may say none."""
    frames = [Image.fromarray(frame.numpy()) for frame in clip(10, 90, 90, 200)[0]]
    told: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    frames[0].save(tmp_path / "c.png", format="WEBP", lossless=True, duration=[42, 41, 42, 42], **told)
    assert torch.equal(of(tmp_path, 24.0)(CLIP).frames, clip(10, 90, 90, 200))
    frames[0].save(tmp_path / "c.png", **told)
    assert torch.equal(of(tmp_path, 24.0)(CLIP).frames, clip(10, 90, 90, 200))


def test_a_clip_that_is_cut_short_is_found_before_a_run(tmp_path: Path) -> None:
    noisy = np.stack([noise(seed, (64, 64)) for seed in range(4)])
    Media(torch.from_numpy(noisy)[None], 8.0).write(0, tmp_path / "c.png")
    whole = (tmp_path / "c.png").read_bytes()
    found = Pictures(tmp_path, ("clip",), Size(64, 64, 4, 8.0))
    assert np.array_equal(found(CLIP).frames[0].numpy(), noisy)
    for part in range(1, 8):
        (tmp_path / "c.png").write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(ValueError, match=r"prompt 1 \('x'\), clip 'c\.png': no picture that can be read"):
            found.check(CLIP)
