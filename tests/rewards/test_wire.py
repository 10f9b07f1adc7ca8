"""Requests and answers as bytes: every bit of media arrives; what is no request is refused before it is unpacked."""

from __future__ import annotations

import io
import json
import math
import zlib
from typing import Any

import pytest
import torch
from PIL import Image

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import wire
from tempflow.rewards.wire import LENGTH, Answer, Head, Limits, TooLarge, WireError

LIMITS = Limits(rows=8, bytes=1 << 20, pixels=1 << 16)


def media(rows: int = 2, frames: int = 1, height: int = 5, width: int = 7, sound: bool = False) -> Media:
    generator = torch.Generator().manual_seed(rows + 10 * frames)
    pixels = torch.randint(0, 256, (rows, frames, height, width, 3), dtype=torch.uint8, generator=generator)
    heard = torch.rand((rows, 2, 9), generator=generator) * 2 - 1 if sound else None
    return Media(pixels, 8.0 if frames > 1 else None, heard, 16_000 if sound else None)


def read(data: bytes, limits: Limits = LIMITS) -> tuple[Head, Media]:
    start = wire.head_size(data[: LENGTH.size], limits)
    head = wire.read_head(data[:start], limits)
    return head, wire.read_media(head, memoryview(data)[start:])


def packed(head: dict[str, Any] | bytes, *bodies: bytes) -> bytes:
    said = head if isinstance(head, bytes) else json.dumps(head).encode()
    return b"".join([LENGTH.pack(len(said)), said, *bodies])


def head(bodies: list[int], **changes: Any) -> dict[str, Any]:
    """Of a request with one 5×7 picture."""
    form = {"codec": "raw", "frames": 1, "height": 5, "width": 7} | changes.pop("media", {})
    said = {"version": 1, "prompts": ["a"], "metadata": [{}], "media": form, "bodies": bodies}
    return said | changes


def png(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **how)
    return file.getvalue()


@pytest.mark.parametrize("codec", ["png", "raw", "ffv1"])
@pytest.mark.parametrize(
    "given",
    [media(), media(1, 3), media(2, 4, 16, 24, sound=True), media(1, 1, 1, 1), media(1, 1, 4096, 16)],
    ids=["pictures", "clip", "sound", "one pixel", "long"],
)
def test_every_bit_arrives(codec: Any, given: Media) -> None:
    if codec == "ffv1":
        pytest.importorskip("av")
    prompts = ["", "€ 🦊 " * 2000][: len(given)]
    sent = wire.pack(given, prompts, [{"n": row, "deep": [{"a": None}]} for row in range(len(given))], codec)
    found, got = read(sent)
    assert found.prompts == tuple(prompts) and [m["n"] for m in found.metadata] == [*range(len(given))]
    assert torch.equal(got.frames, given.frames) and (got.fps, got.sound_rate) == (given.fps, given.sound_rate)
    assert (got.sound is None) == (given.sound is None)
    if got.sound is not None and given.sound is not None:
        assert torch.equal(got.sound, given.sound)


@pytest.mark.parametrize(
    "metadata",
    [{"x": math.nan}, {"x": {1, 2}}, {"x": b"1"}, {"x": torch.zeros(1)}],
    ids=["nan", "set", "bytes", "tensor"],
)
def test_metadata_that_json_cannot_say_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="cannot be sent as JSON"):
        wire.pack(media(1), ["a"], [metadata])


RAW = bytes(5 * 7 * 3)
PNG = png(Image.new("RGB", (7, 5), (1, 2, 3)))

WRONG: dict[str, tuple[bytes, str]] = {
    "no JSON": (packed(b"{"), "no JSON"),
    "not UTF-8": (packed(b'{"version": "\xff"}'), "no JSON"),
    "NaN": (packed(b'{"version": NaN}'), "NaN is no number"),
    "a key twice": (packed(b'{"version": 1, "version": 1}'), "a key stands twice"),
    "deep": (packed(b"[" * 100_000), "no JSON"),
    "digits": (packed(b'{"version": ' + b"9" * 5000 + b"}"), "no JSON"),
    "another version": (packed(head([105], version=2), RAW), "version"),
    "unknown field": (packed(head([105], path="/etc/passwd"), RAW), "path"),
    "no prompts": (packed(head([], prompts=[], metadata=[])), "prompts"),
    "prompt of another type": (packed(head([105], prompts=[3]), RAW), "prompts.0"),
    "half a surrogate": (packed(json.dumps(head([105])).replace('"a"', '"\\ud800"').encode(), RAW), "no JSON"),
    "metadata missing": (packed(head([105], metadata=[]), RAW), "metadata has 0 entries for 1"),
    "metadata deep": (
        packed(head([105], metadata=[{"a": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}]), RAW),
        "deeper than 16",
    ),
    "no side": (packed(head([0], media={"height": 0})), "height"),
    "negative": (packed(head([105], media={"width": -7}), RAW), "width"),
    "true for 1": (packed(head([105], media={"frames": True}), RAW), "frames"),
    "infinite rate": (packed(b'{"version": 1, "media": {"fps": Infinity}}'), "Infinity is no number"),
    "another codec": (packed(head([105], media={"codec": "jpeg"}), RAW), "codec"),
    "bodies missing": (packed(head([])), "0 bodies; expected 1"),
    "bodies too many": (packed(head([105, 1]), RAW, b"x"), "2 bodies; expected 1"),
    "body of another size": (packed(head([104]), RAW[1:]), "104 bytes; expected 105"),
    "negative size": (packed(head([-105]), RAW), "-105 bytes"),
    "fewer bytes": (packed(head([105]), RAW[:-1]), "104 bytes; the head announces 105"),
    "sound of another size": (
        packed(head([105, 8], media={"sound": {"channels": 1, "samples": 3, "rate": 8}}), RAW, bytes(8)),
        "8 bytes; expected 12",
    ),
    "sound that is NaN": (
        packed(head([105, 4], media={"sound": {"channels": 1, "samples": 1, "rate": 8}}), RAW, b"\0\0\xc0\x7f"),
        "not finite",
    ),
}

NO_PNG: dict[str, tuple[bytes, str]] = {
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(80), "no PNG file"),
    "cut short": (PNG[:-20], "no PNG file"),
    "a bit turned": (PNG[:45] + bytes([PNG[45] ^ 1]) + PNG[46:], "no PNG file"),
    "another size": (png(Image.new("RGB", (7, 6))), "6×7; the head says 5×7"),
    "grey": (png(Image.new("L", (7, 5))), "RGB of 8 bits"),
    "palette": (png(Image.new("P", (7, 5))), "RGB of 8 bits"),
    "transparent": (png(Image.new("RGB", (7, 5)), transparency=(0, 0, 0)), "RGB of 8 bits"),
    "16 bits": (png(Image.new("I;16", (7, 5))), "RGB of 8 bits"),
    "two frames": (
        png(Image.new("RGB", (7, 5)), save_all=True, append_images=[Image.new("RGB", (7, 5), "red")]),
        "RGB of 8 bits",
    ),
}


@pytest.mark.parametrize("data, told", WRONG.values(), ids=WRONG)
def test_what_is_no_request_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(WireError, match=told) as error:
        read(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("body, told", NO_PNG.values(), ids=NO_PNG)
def test_what_is_no_png_file_of_the_size_is_refused(body: bytes, told: str) -> None:
    with pytest.raises(WireError, match=told):
        read(packed(head([len(body)], media={"codec": "png"}), body))


def rgb16(height: int, width: int) -> bytes:
    """A PNG file of 16 bits a channel, which PIL would cut to 8."""
    file = io.BytesIO(b"")
    rows = zlib.compress(b"".join(b"\0" + bytes(width * 6) for _ in range(height)))
    file.write(b"\x89PNG\r\n\x1a\n")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        file.write(len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big"))
    return file.getvalue()


def test_no_bits_are_cut() -> None:
    body = rgb16(5, 7)
    assert Image.open(io.BytesIO(body)).mode == "RGB"  # PIL says nothing
    with pytest.raises(WireError, match="RGB of 8 bits"):
        read(packed(head([len(body)], media={"codec": "png"}), body))


def test_limits_are_looked_at_before_anything_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(wire.Image, "open", never)
    monkeypatch.setattr(wire.np, "empty", never)
    huge = {"codec": "png", "height": 60_000, "width": 60_000}
    for data, told in (
        (LENGTH.pack(2**32 - 1), "head: 4294967295 bytes"),
        (packed(head([9], media=huge), bytes(9)), "3600000000 pixels"),
        (packed(head([9], media=huge | {"height": 2**63}), bytes(9)), "pixels"),
        (packed(head([1] * 9, prompts=["a"] * 9, metadata=[{}] * 9, media={"codec": "png"})), "9 media"),
        (packed(head([1 << 20], media={"codec": "png"})), "nearest valid: 1048576"),
    ):
        with pytest.raises(TooLarge, match=told):
            read(data)


def test_a_bomb_in_a_png_file_is_not_unpacked() -> None:
    """The header says 5×7; the data would unpack to 100 MB."""
    good, bomb = png(Image.new("RGB", (7, 5))), zlib.compress(bytes(100_000_000), 9)
    chunk = len(bomb).to_bytes(4, "big") + b"IDAT" + bomb + zlib.crc32(b"IDAT" + bomb).to_bytes(4, "big")
    at = good.index(b"IDAT") - 4
    body = good[:at] + chunk + good[-12:]
    limits = Limits(rows=8, bytes=1 << 20, pixels=1 << 16)
    _, got = read(packed(head([len(body)], media={"codec": "png"}), body), limits)
    assert got.frames.shape == (1, 1, 5, 7, 3)
    text = b"zTXt" + b"k\0\0" + bomb
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    body = good[:at] + chunk + good[at:]
    with pytest.raises(WireError, match="no PNG file"):
        read(packed(head([len(body)], media={"codec": "png"}), body), limits)


def test_ffv1_of_another_size_length_or_codec_is_refused() -> None:
    av = pytest.importorskip("av")
    clip = media(1, 3, 16, 24)
    body = wire.pack(clip, ["a"], [{}], "ffv1")
    body = body[wire.head_size(body, LIMITS) :]

    def asked(data: bytes, **changes: int) -> bytes:
        form = {"codec": "ffv1", "frames": 3, "height": 16, "width": 24} | changes
        return packed(head([len(data)], media=form), data)

    wide = wire.pack(media(1, 1, 300, 300), ["a"], [{}], "ffv1")
    wide = wide[wire.head_size(wide, LIMITS) :]
    sides = b"\xb0\x82\x01\x2c\xba\x82\x01\x2c"  # 300 × 300 in Matroska
    bomb = wide.replace(sides, b"\xb0\x82\x3e\x80\xba\x82\x3e\x80")  # 16,000 × 16,000
    assert sides in wide
    small = {"frames": 1, "height": 200, "width": 300}
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.height, stream.width, stream.pix_fmt = 16, 24, "yuv420p"
        frame = av.VideoFrame.from_ndarray(clip.frames[0, 0].numpy(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    for data, told in (
        (asked(body, frames=2), "more than 2 frames"),
        (asked(body, frames=4), "3 frames; the head says 4"),
        (asked(body, height=17), "16×24; the head says 17×24"),
        (asked(body[: len(body) // 2]), "no FFV1|frames"),
        (asked(b"RIFF" + bytes(90)), "no FFV1"),
        (asked(file.getvalue()), "one stream of FFV1"),
        (asked(bomb, **small), "one stream of FFV1"),
        (asked(wide, **small), "one stream of FFV1|300×300"),
    ):
        with pytest.raises(WireError, match=told):
            read(data)


# ------------------------------------------------------------------------------------------------------------ answers
def answer(**changes: Any) -> Answer:
    said = {"version": 1, "reward": "r", "columns": ["r"], "values": [[0.5], [None]], "ok": [[True], [False]]}
    return wire.parse(Answer, json.dumps(said | {"reasons": [None, "blank"]} | changes).encode(), "answer")


def test_scores_are_the_same_bits_on_both_sides() -> None:
    value = torch.tensor([[0.1, -1e-38], [math.nan, 3e38], [math.nan, math.nan]])
    scores = Scores(value, value.isfinite(), ("a", "b"))
    sent = wire.answer_of("a", scores, [None, "why", None])
    assert sent.reasons == (None, "why", wire.UNSCORED)
    text = sent.model_dump_json()
    assert "NaN" not in text and "nan" not in text
    got = wire.scores_of(wire.parse(Answer, text.encode(), "answer"), 3, ("a", "b"))
    assert torch.equal(got.ok, scores.ok) and torch.equal(got.value[got.ok], value[scores.ok])
    assert got.value[~got.ok].isnan().all()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"values": [[0.5]], "ok": [[True]], "reasons": [None]}, "values has 1 rows for 2"),
        ({"ok": [[True]]}, "ok has 1 rows"),
        ({"reasons": [None]}, "reasons has 1 rows"),
        ({"values": [[0.5], [0.0]]}, "row 1: a value must be there exactly where ok"),
        ({"values": [[None], [None]]}, "row 0: a value must be there"),
        ({"reasons": [None, None]}, "row 1: a reason must be there"),
        ({"reasons": ["x", "y"]}, "row 0: a reason"),
        ({"values": [[1e39], [None]]}, "beyond float32"),
        ({"values": [[0.5, 0.5], [None]]}, "row 0 has 2 values"),
        ({"columns": ["other"]}, "columns other; expected r"),
    ],
)
def test_an_answer_that_is_none_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(WireError, match=told):
        wire.scores_of(answer(**changes), 2, ("r",))


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"version": 1}', b"<html>", b'{"version": 1, "values": [[NaN]]}', b"null", b'"x"', b"1"]
)
def test_what_is_no_answer_is_refused(text: bytes) -> None:
    with pytest.raises(WireError, match="answer"):
        wire.parse(Answer, text, "answer")


@pytest.mark.parametrize("value", ["0.5", True, "NaN"])
def test_a_value_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(WireError, match=r"values\.0"):
        answer(values=[[value], [None]])
