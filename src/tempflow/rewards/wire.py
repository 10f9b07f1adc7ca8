"""What a reward server and its clients say to each other: the requests and answers of docs/reward_server.md, as bytes.

A request is the length of its head (four bytes, little endian), the head (JSON), and what the head announces: frames as
PNG files, raw bytes or FFV1 in Matroska, and sound as float32. Nothing of it is code, a pickle or a path. Everything
here is a pure function; nothing is decoded before its size is known to be allowed.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field, JsonValue, ValidationError

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media
from tempflow.names import cut
from tempflow.rewards.sources import received, sendable
from tempflow.strict import Strict

VERSION = 1
"""Of the wire. A server refuses another one."""

CONTENT = "application/vnd.tempflow.score"
"""The content type of a request."""

Codec = Literal["png", "raw", "ffv1"]
"""How frames travel; every one of them keeps every bit."""

LENGTH = struct.Struct("<I")
"""The head's length, in front of it."""

MAX_HEAD = 8 << 20
"""Bytes of a head."""

MAX_ANSWER = 64 << 20
"""Bytes of an answer that a client reads."""

MAX_DEPTH = 16
"""Nesting of a prompt's metadata."""

UNSCORED = "the reward could not score it"
"""The reason where a reward says no more than that."""

PNG_FAULTS = (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What PIL raises on bytes that are no PNG file, are cut short, or unpack to too much."""


class WireError(ValueError):
    """Bytes that are no request or no answer; the message says what is wrong with them, in one line."""


class TooLarge(WireError):
    """A request that is larger than the server allows."""


class Limits(Strict):
    """What a request may hold."""

    rows: int = Field(ge=1, description="media")
    bytes: int = Field(ge=1, description="of the request")
    pixels: int = Field(ge=1, description="of all frames of all media")


Items = Field(strict=False)
"""A tuple, which JSON writes as a list."""


class Sound(Strict):
    """Sound of each medium: float32, little endian, channel after channel."""

    channels: int = Field(ge=1)
    samples: int = Field(ge=1)
    rate: int = Field(ge=1, description="samples a second")


class Form(Strict):
    """What all media of a request have in common."""

    codec: Codec = Field(description="png: a PNG file a frame; raw: uint8 RGB, a body a medium; ffv1: Matroska, as raw")
    frames: int = Field(ge=1, description="of a medium; 1 is a picture")
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fps: float | None = Field(default=None, gt=0, description="frames a second")
    sound: Sound | None = None


class Head(Strict):
    """The JSON in front of a request's bodies."""

    version: Literal[1]
    prompts: Annotated[tuple[str, ...], Items] = Field(min_length=1, description="one a medium")
    metadata: Annotated[tuple[dict[str, JsonValue], ...], Items] = Field(description="one a medium; {} where nothing")
    media: Form
    bodies: Annotated[tuple[int, ...], Items] = Field(
        description="bytes of each body, in order: frames medium by medium, then one of all sound, if there is any"
    )


class Prompts(Strict):
    """Prompts of a run, for the reward to say whether it can judge them; JSON."""

    version: Literal[1]
    prompts: Annotated[tuple[str, ...], Items]
    metadata: Annotated[tuple[dict[str, JsonValue], ...], Items] = Field(description="one a prompt; {} where nothing")


class Answer(Strict):
    """Scores of a request's media, in their order. A score is null exactly where it failed; it is never 0 for that."""

    version: Literal[1]
    reward: str
    columns: Annotated[tuple[str, ...], Items] = Field(min_length=1, description="distinct names of the scores")
    values: Annotated[tuple[Annotated[tuple[float | None, ...], Items], ...], Items]
    ok: Annotated[tuple[Annotated[tuple[bool, ...], Items], ...], Items] = Field(description="where a value is a score")
    reasons: Annotated[tuple[str | None, ...], Items] = Field(description="a medium: why a score of it failed, or null")


class About(Strict):
    """What a server scores by."""

    version: Literal[1]
    reward: str
    columns: Annotated[tuple[str, ...], Items] | None = Field(description="null until the reward has answered once")
    groupwise: bool = Field(description="whether a request holds all media of one prompt, and of no other")
    takes: Kind
    codecs: Annotated[tuple[Codec, ...], Items]
    limits: Limits


Told = TypeVar("Told", bound=Strict)


def parse(model: type[Told], data: bytes | bytearray | memoryview, what: str) -> Told:
    """JSON as a `model`. Raises WireError, naming the field, for bytes that are none: not UTF-8, NaN, a key twice."""
    try:
        text = bytes(data)
        tree = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        if b"\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()  # half a surrogate, which JSON can escape, is no text
        return model.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in fault["loc"])
        told = cut(fault["msg"].removeprefix("Value error, "), 200)
        raise WireError(f"{what}: {cut(field)}: {told}" if field else f"{what}: {told}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of too many digits
        raise WireError(f"{what}: no JSON of version {VERSION} ({cut(str(error), 200)})") from None


def _no_constant(name: str) -> None:
    raise WireError(f"{name} is no number")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise WireError("a key stands twice")
    return found


# ----------------------------------------------------------------------------------------------------------- requests
def pack(media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]], codec: Codec = "png") -> bytes:
    """A request, with the bytes of source pictures that metadata hold (`rewards.sources`).

    Raises WireError for metadata that JSON cannot say, ValueError for a source that cannot be read, ImportError for
    "ffv1" without its library.
    """
    _, frames, height, width, _ = media.frames.shape
    rows = [row.contiguous().numpy() for row in media.frames]
    if codec == "png":
        bodies = [_to_png(frame) for row in rows for frame in row]
    elif codec == "raw":
        bodies = [row.tobytes() for row in rows]
    else:
        bodies = [_to_ffv1(row) for row in rows]
    form: dict[str, object] = {"codec": codec, "frames": frames, "height": height, "width": width, "fps": media.fps}
    if media.sound is not None:
        _, channels, samples = media.sound.shape
        form["sound"] = {"channels": channels, "samples": samples, "rate": media.sound_rate}
        bodies.append(media.sound.contiguous().numpy().astype("<f4").tobytes())
    head = _head(prompts, sendable(metadata, data=True), media=form, bodies=[len(b) for b in bodies])
    return b"".join([LENGTH.pack(len(head)), head, *bodies])


def pack_prompts(prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> bytes:
    """Prompts alone, as `Prompts`; of source pictures the sums. Raises WireError for metadata that JSON cannot say."""
    return _head(prompts, sendable(metadata, data=False))


def _head(prompts: Sequence[str], metadata: Sequence[Mapping[str, object]], **more: object) -> bytes:
    said = {"version": VERSION, "prompts": [*prompts], "metadata": [{**m} for m in metadata], **more}
    try:
        head = json.dumps(said, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"prompts or metadata cannot be sent as JSON ({cut(str(error), 200)})") from error
    if len(head) > MAX_HEAD:
        raise TooLarge(f"prompts and metadata take {len(head)} bytes; nearest valid: at most {MAX_HEAD}")
    return head


def head_size(start: bytes | bytearray, limits: Limits) -> int:
    """Bytes of the head and its length, from a request's first four bytes. Raises WireError for a head without end."""
    size = LENGTH.unpack_from(start)[0]
    if size > MAX_HEAD:
        raise TooLarge(f"head: {size} bytes; nearest valid: at most {MAX_HEAD}")
    if LENGTH.size + size > limits.bytes:
        raise TooLarge(f"head: {size} bytes, of a request of at most {limits.bytes}")
    return LENGTH.size + size


def read_head(start: bytes | bytearray | memoryview, limits: Limits) -> Head:
    """The head of a request, from its first `head_size` bytes; what it announces is allowed and consistent.

    Raises WireError, TooLarge where `limits` are exceeded.
    """
    head = parse(Head, memoryview(start)[LENGTH.size :], "head")
    rows, form = len(head.prompts), head.media
    _check_metadata(rows, head.metadata)
    received(head.metadata)
    if rows > limits.rows:
        raise TooLarge(f"head: {rows} media; nearest valid: at most {limits.rows}")
    pixels = rows * form.frames * form.height * form.width
    if pixels > limits.pixels:
        raise TooLarge(f"head: media of {pixels} pixels; nearest valid: at most {limits.pixels}")
    expected = _body_sizes(head)
    if len(head.bodies) != len(expected):
        raise WireError(f"head: {len(head.bodies)} bodies; expected {len(expected)} of {rows} media as {form.codec}")
    for number, (size, exact) in enumerate(zip(head.bodies, expected, strict=True)):
        if size < 1 or exact not in (None, size):
            raise WireError(f"head: bodies.{number}: {size} bytes; expected {'some' if exact is None else exact}")
    if len(start) + sum(head.bodies) > limits.bytes:
        raise TooLarge(f"head: a request of {len(start) + sum(head.bodies)} bytes; nearest valid: {limits.bytes}")
    return head


def read_prompts(data: bytes | bytearray) -> Prompts:
    """What `pack_prompts` made. Raises WireError."""
    found = parse(Prompts, data, "prompts")
    _check_metadata(len(found.prompts), found.metadata)
    return found


def _check_metadata(rows: int, metadata: Sequence[Mapping[str, object]]) -> None:
    if len(metadata) != rows:
        raise WireError(f"head: metadata has {len(metadata)} entries for {rows} prompts")
    if any(_depth(m) > MAX_DEPTH for m in metadata):
        raise WireError(f"head: metadata is nested deeper than {MAX_DEPTH}")


def _body_sizes(head: Head) -> list[int | None]:
    """Bytes that each body must have; None where only its decoder can tell."""
    form, rows = head.media, len(head.prompts)
    if form.codec == "png":
        sizes: list[int | None] = [None] * (rows * form.frames)
    else:
        sizes = [form.frames * form.height * form.width * 3 if form.codec == "raw" else None] * rows
    if form.sound is not None:
        sizes.append(rows * form.sound.channels * form.sound.samples * 4)
    return sizes


def _depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(_depth, inside), default=0)


def read_media(head: Head, bodies: memoryview) -> Media:
    """The media of a request: what comes behind its head, decoded. Raises WireError for bodies that are not what the
    head says, ImportError for FFV1 without its library."""
    form, rows = head.media, len(head.prompts)
    if len(bodies) != sum(head.bodies):
        raise WireError(f"bodies: {len(bodies)} bytes; the head announces {sum(head.bodies)}")
    parts, at = [], 0
    for size in head.bodies:
        parts.append(bodies[at : at + size])
        at += size
    sound = None
    if form.sound is not None:
        heard = np.frombuffer(parts.pop(), "<f4").astype(np.float32)
        if not np.isfinite(heard).all():
            raise WireError("sound: not finite")
        sound = torch.from_numpy(heard).view(rows, form.sound.channels, form.sound.samples)
    frames = np.empty((rows, form.frames, form.height, form.width, 3), np.uint8)
    if form.codec == "png":
        flat = frames.reshape(-1, *frames.shape[2:])
        for number, part in enumerate(parts):
            flat[number] = _from_png(part, form, f"frame {number % form.frames} of medium {number // form.frames}")
    for row, part in enumerate(parts if form.codec != "png" else ()):
        if form.codec == "raw":
            frames[row] = np.frombuffer(part, np.uint8).reshape(frames.shape[1:])
        else:
            _from_ffv1(part, frames[row], f"medium {row}")
    return Media(torch.from_numpy(frames), form.fps, sound, form.sound.rate if form.sound is not None else None)


def _to_png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _from_png(part: memoryview, form: Form, where: str) -> np.ndarray:
    """One frame. The size and the checksums are looked at before a pixel is unpacked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(part), formats=("PNG",)) as picture:
                if picture.size != (form.width, form.height):
                    told = f"{picture.size[1]}×{picture.size[0]}"
                    raise WireError(f"{where}: {told}; the head says {form.height}×{form.width}")
                # PIL would cut 16 bits to 8 without a word; the tile tells how the file's pixels are stored.
                stored = [tile[3] for tile in picture.tile]
                if stored != ["RGB"] or "transparency" in picture.info or getattr(picture, "n_frames", 1) > 1:
                    raise WireError(f"{where}: nearest valid: a PNG file of one frame, RGB of 8 bits")
                picture.verify()
            with Image.open(io.BytesIO(part), formats=("PNG",)) as picture:
                return np.asarray(picture)
    except WireError:
        raise
    except PNG_FAULTS as error:
        raise WireError(f"{where}: no PNG file that can be read ({cut(str(error), 200)})") from None


# --------------------------------------------------------------------------------------------------------------- FFV1
def has_ffv1() -> bool:
    """Whether its library is there."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("the codec ffv1 needs PyAV: pip install 'tempflow[video]'", name="av") from error
    return av


def _to_ffv1(row: np.ndarray) -> bytes:
    """A clip, every bit of it, as FFV1 in Matroska."""
    av, file = _av(), io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(1))
        stream.height, stream.width, stream.pix_fmt = *row.shape[1:3], "bgr0"
        stream.thread_count = 1
        for frame in row:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="bgr0")))
        container.mux(stream.encode())
    return file.getvalue()


def _from_ffv1(part: memoryview, out: np.ndarray, where: str) -> None:
    """Decodes a clip into `out`, uint8 [F, H, W, 3]. Size, codec and streams are looked at before a frame is."""
    av = _av()
    frames, height, width, _ = out.shape
    try:
        # Opening a container may already decode a frame, to see what it is: of no more pixels than are expected.
        most = {"max_pixels": str(height * width)}
        with av.open(io.BytesIO(part), "r", format="matroska", options=most) as container:
            streams = container.streams
            context = streams[0].codec_context if len(streams) == 1 and streams[0].type == "video" else None
            if context is None or context.name != "ffv1" or context.pix_fmt != "bgr0":
                raise WireError(f"{where}: nearest valid: one stream of FFV1, bgr0")
            if (context.height, context.width) != (height, width):
                raise WireError(f"{where}: {context.height}×{context.width}; the head says {height}×{width}")
            context.thread_count, count = 1, 0
            for picture in container.decode(video=0):
                if count == frames or (picture.height, picture.width) != (height, width):
                    raise WireError(f"{where}: more than {frames} frames of {height}×{width}")
                out[count] = picture.to_ndarray(format="rgb24")
                count += 1
    except WireError:
        raise
    except (av.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise WireError(f"{where}: no FFV1 that can be read ({cut(str(error), 200)})") from None
    if count != frames:
        raise WireError(f"{where}: {count} frames; the head says {frames}")


# ------------------------------------------------------------------------------------------------------------ answers
def answer_of(reward: str, scores: Scores, reasons: Sequence[str | None]) -> Answer:
    """`scores` as they travel. `reasons`: of each row why a score failed; used where one has."""
    ok = scores.ok.tolist()
    rows = zip(scores.value.tolist(), ok, strict=True)
    values = [[v if good else None for v, good in zip(*row, strict=True)] for row in rows]
    told = [None if all(row) else reason or UNSCORED for row, reason in zip(ok, reasons, strict=True)]
    return Answer.model_validate(
        {
            "version": VERSION,
            "reward": reward,
            "columns": scores.names,
            "values": values,
            "ok": ok,
            "reasons": told,
        }
    )


def scores_of(answer: Answer, rows: int, columns: Sequence[str] | None) -> Scores:
    """An answer as scores of `rows` media.

    columns  those that the server had before; None: any

    Raises WireError for another number of rows, other columns, a value beyond float32, or a value that is there and
    failed, or not there and ok.
    """
    names = answer.columns
    scored = any(any(row) for row in answer.ok)  # a server that has never scored anything knows only one column
    if scored and columns is not None and names != tuple(columns):
        raise WireError(f"answer: columns {cut(', '.join(names))}; expected {cut(', '.join(columns))}")
    if len(set(names)) != len(names):
        raise WireError(f"answer: columns {cut(', '.join(names))} are not distinct")
    for field, given in (("values", answer.values), ("ok", answer.ok), ("reasons", answer.reasons)):
        if len(given) != rows:
            raise WireError(f"answer: {field} has {len(given)} rows for {rows} media")
    for row, (values, ok, reason) in enumerate(zip(answer.values, answer.ok, answer.reasons, strict=True)):
        if len(values) != len(names) or len(ok) != len(names):
            raise WireError(f"answer: row {row} has {len(values)} values and {len(ok)} flags for {len(names)} columns")
        if [v is not None for v in values] != [*ok]:
            raise WireError(f"answer: row {row}: a value must be there exactly where ok is true")
        if all(ok) != (reason is None):
            raise WireError(f"answer: row {row}: a reason must be there exactly where a score failed")
    value = torch.tensor([[math.nan if v is None else v for v in row] for row in answer.values], dtype=torch.float32)
    good = torch.tensor(answer.ok, dtype=torch.bool)
    if not bool(value[good].isfinite().all()):
        raise WireError("answer: a value is beyond float32")
    return Scores(value, good, names)
