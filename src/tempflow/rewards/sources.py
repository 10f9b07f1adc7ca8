"""The pictures that an edit starts from, as judges are shown them.

A prompt's own `sources` come beside its metadata, under `request.SOURCES`, as `Source`s (`Prompt.told`). Over the wire
they go as their files' bytes, since another machine cannot read their paths: no path that a client sends is opened. A
prompt without such may name pictures in its metadata under "image" or "images", as paths in a folder.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from tempflow.request import SOURCES, Source

PIXELS = 1 << 26
"""The most that a source picture may have."""

FORMATS = ("PNG", "JPEG", "WEBP")

SUM, DATA = "sha256", "data"
"""What is sent of a source: its sum, and its file's bytes as base64 where no medium before it in the request has it."""


def source_pictures(metadata: Mapping[str, object], folder: str) -> tuple[bytes, ...]:
    """The source pictures of a prompt, as PNG, in order.

    metadata  `Prompt.told`, or what became of it over the wire
    folder    which paths under "image" and "images" start from and lie in: the prompt file's

    Raises ValueError where there are none, or one that is no picture, lies outside the folder, or is another than when
    the prompts were read.
    """
    own, sent = sources_of(metadata), _sent_of(metadata)
    if own or sent:
        return tuple(map(_own, own)) or tuple(map(_sent, sent))
    return _named(metadata, Path(folder).expanduser())


def check_sources(metadata: Mapping[str, object], folder: str) -> None:
    """Raises ValueError as `source_pictures` does; of pictures that are sent later the sums alone are there."""
    sent = _sent_of(metadata)
    if not sent or any(DATA in one for one in sent):
        source_pictures(metadata, folder)


# ------------------------------------------------------------------------------------------------------------ the wire
def sendable(metadata: Sequence[Mapping[str, object]], data: bool) -> list[dict[str, Any]]:
    """Metadata of a request's media as JSON can say them: sources by their sums, and where `data` each once with its
    bytes. Raises ValueError as `source_pictures` does."""
    sent, found = set[str](), list[dict[str, Any]]()
    for row in metadata:
        told: dict[str, Any] = dict(row)
        own = sources_of(row)
        if own:
            told[SOURCES] = said = [{SUM: one.digest} for one in own]
            for entry, one in zip(said, own, strict=True):
                if data and one.digest not in sent:
                    entry[DATA] = base64.b64encode(_bytes(one)).decode()
                    sent.add(one.digest)
        found.append(told)
    return found


def received(metadata: Sequence[dict[str, Any]]) -> None:
    """Gives each source of a request's metadata its bytes, where a medium before has them. In place."""
    there: dict[str, str] = {}
    for row in metadata:
        for one in _sent_of(row):
            data = there.setdefault(one[SUM], one[DATA]) if DATA in one else there.get(one[SUM])
            if data is not None:
                one[DATA] = data


def parted(metadata: Sequence[Mapping[str, object]], rows: int, most: int) -> Iterator[slice]:
    """Stretches of at most `rows` media whose sources, each once, have at most `most` bytes; a medium at least. Raises
    ValueError for a file that cannot be read."""
    begun, there = 0, dict[str, int]()
    for at, row in enumerate(metadata):
        own = {one.digest: _size(one) for one in sources_of(row)}
        over = bool(own.keys() - there.keys()) and sum({**there, **own}.values()) > most
        if at > begun and (at - begun == rows or over):
            yield slice(begun, at)
            begun, there = at, {}
        there |= own
    if begun < len(metadata):
        yield slice(begun, len(metadata))


def sources_of(metadata: Mapping[str, object]) -> tuple[Source, ...]:
    """A prompt's own sources."""
    given = metadata.get(SOURCES)
    own = tuple(one for one in given if isinstance(one, Source)) if isinstance(given, tuple | list) else ()
    return own if isinstance(given, tuple | list) and len(own) == len(given) else ()


# --------------------------------------------------------------------------------------------------------------- parts
def _sent_of(metadata: Mapping[str, object]) -> list[dict[str, str]]:
    """A prompt's sources as they came over the wire."""
    given = metadata.get(SOURCES)
    sent = given if isinstance(given, list) else []
    fit = (isinstance(one, dict) and SUM in one and one.keys() <= {SUM, DATA} for one in sent)
    return sent if all(fit) and all(isinstance(text, str) for one in sent for text in one.values()) else []


def _own(source: Source) -> bytes:
    return _png(_bytes(source), f"source picture {str(source.path)[-60:]!r}")


def _sent(one: Mapping[str, str]) -> bytes:
    what = f"source picture of sha256 {one[SUM][:12]!r}"
    if DATA not in one:
        raise ValueError(f"{what} was not sent; nearest valid: its bytes as base64 under {DATA!r}")
    try:
        data = base64.b64decode(one[DATA], validate=True)
    except ValueError as error:
        raise ValueError(f"{what} is no base64 ({error})") from None
    if hashlib.sha256(data).hexdigest() != one[SUM]:
        raise ValueError(f"{what} is another one")
    return _png(data, what)


def _named(metadata: Mapping[str, object], home: Path) -> tuple[bytes, ...]:
    """The pictures that the metadata name, in the folder."""
    told = [metadata[key] for key in ("image", "images") if metadata.get(key)]
    given = [name for part in told for name in (part if isinstance(part, list | tuple) else [part])]
    names = [name for name in given if isinstance(name, str) and name]
    if not names or len(names) < len(given):
        raise ValueError('no source picture; nearest valid: metadata with "image", a path')
    found: list[bytes] = []
    for name in names:
        file = home / name
        what = f"source picture {name[:60]!r}"
        try:
            if not file.resolve().is_relative_to(home.resolve()):
                raise ValueError(f"{what} lies outside {home}; nearest valid: sources, the folder that it lies in")
            data = _file(file, file.stat().st_mtime_ns)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ValueError(f"{what} cannot be read in {home} ({why}); nearest valid: a picture there") from None
        found.append(_png(data, f"{what} in {home}"))
    return tuple(found)


def _bytes(source: Source) -> bytes:
    """A source's file, which is as it was when the prompts were read. Raises ValueError."""
    what = f"source picture {str(source.path)[-60:]!r}"
    try:
        data = _file(source.path, source.path.stat().st_mtime_ns)
    except OSError as error:
        raise ValueError(f"{what} cannot be read ({error.strerror}); nearest valid: the file put back") from None
    if hashlib.sha256(data).hexdigest() != source.digest:
        raise ValueError(f"{what} is another than when the prompts were read; nearest valid: the file put back")
    return data


def _size(source: Source) -> int:
    return len(_bytes(source)) * 4 // 3 + 4  # as base64


@lru_cache(maxsize=64)
def _file(file: Path, changed: int) -> bytes:
    """`changed`: when, so that another file of that name is read anew."""
    return file.read_bytes()


def _png(data: bytes, what: str) -> bytes:
    """The picture as PNG. Raises ValueError for bytes that are no picture."""
    try:
        return _reencoded(data)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"{what} cannot be read ({why}); nearest valid: a picture, {', '.join(FORMATS)}") from None


@lru_cache(maxsize=64)
def _reencoded(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        if picture.width * picture.height > PIXELS:
            raise OSError(0, f"more than {PIXELS:,} pixels")
        return encoded(picture.convert("RGB"))


def encoded(picture: Image.Image) -> bytes:
    """As PNG."""
    out = io.BytesIO()
    picture.save(out, format="PNG", compress_level=1)
    return out.getvalue()
