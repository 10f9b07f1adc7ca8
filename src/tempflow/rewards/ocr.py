"""OCR: whether a picture shows the text that its prompt has in double quotes (the rule of flow_grpo's text reward).

Both texts are made plain: Unicode's NFKC, lower case, straight quotes and apostrophes, no spaces. The reward is 1 where
the asked text stands in what was read, else 1 − distance ÷ length of the asked text, by Levenshtein's distance and at
least 0. So other text beside the asked one, and the asked one over and over, cost nothing, and models learn to write
more than was asked; with `exact` they cost what the distance says.

rapidocr's PP-OCRv6 reads, from weights in its wheel, offline. It drops lines of which it is less sure than .5.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.names import SCREEN, cut
from tempflow.rewards.protocol import check_media
from tempflow.rewards.scorer import require

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[ocr]", "0 to 1"

KEY = "target"
"""Of a prompt's line: the text to show, where the prompt has none in double quotes, or several."""

QUOTES = dict.fromkeys(map(ord, "“”„‟«»「」『』〝〞〟"), '"')
APOSTROPHES = dict.fromkeys(map(ord, "‘’‚‛ʼ′`´"), "'")
SINGLE = re.compile(r"(?<!\w)'[^']+'(?!\w)")
HINT = f'nearest valid: one text in double quotes, as in a sign that says "OPEN", or the key {KEY!r} beside the prompt'

_log = logging.getLogger(__name__)


def ocr(*, exact: bool = False, threads: Annotated[int, Field(ge=1)] | None = None) -> OCR:
    """How much of the text that the prompt quotes the picture shows, 0 to 1."""
    require("ocr", "rapidocr", "onnxruntime", "rapidfuzz")
    return OCR(exact, threads)


class OCR:
    """Reads pictures, and compares what it read with what was asked: see `agreement`.

    exact    False: text beside the asked one costs nothing
    threads  of one reading; None: all cores

    Blank pictures have 0: nothing was read, which is an answer.
    """

    name, groupwise = "ocr", False

    def __init__(self, exact: bool = False, threads: int | None = None) -> None:
        self.exact, self.threads = exact, threads
        self._lock = Lock()
        self._reader: Any = None
        self._told = False

    def prepare(self) -> None:
        """Loads the weights, and reads a picture. Raises what rapidocr does, and OSError where it cannot read."""
        picture = Image.new("RGB", (160, 64), "white")
        ImageDraw.Draw(picture).text((16, 12), "OPEN", fill="black", font_size=32)
        seen = self.read(np.asarray(picture))
        if plain(seen) != "open":
            raise OSError(f"rapidocr reads {cut(seen)!r} in a picture that says 'OPEN'; install it anew: {NEEDS}")

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError, naming it, for a prompt that does not say what text is asked for."""
        for prompt, line in zip(prompts, metadata, strict=True):
            asked(prompt, line)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column. A row is failed where its prompt asks for no text, or the picture cannot be read (one of 4096×16
        cannot)."""
        pictures = check_media(media, prompts, metadata).pictures().numpy()
        value = torch.full((len(pictures), 1), torch.nan)
        for row, (picture, prompt, line) in enumerate(zip(pictures, prompts, metadata, strict=True)):
            try:
                target = asked(prompt, line)
                value[row] = agreement(self.read(picture), target, exact=self.exact)
            except Exception as error:  # of rapidocr, of OpenCV, of onnxruntime: they have no common class
                self._tell(error)
        return Scores(value, value.isfinite(), (self.name,))

    def read(self, picture: np.ndarray) -> str:
        """The text in a picture, uint8 RGB [H, W, 3]: its lines from top to bottom, joined without anything between."""
        with self._lock:
            if self._reader is None:
                self._reader = self._made()
            lines = getattr(self._reader(Image.fromarray(picture)), "txts", None)
        return "".join(lines or ())

    def _made(self) -> Any:
        from rapidocr import RapidOCR

        options: dict[str, Any] = {"Global.log_level": "error", "Global.use_cls": False}
        if self.threads is not None:
            options["EngineConfig.onnxruntime.intra_op_num_threads"] = min(self.threads, os.cpu_count() or 1)
        return RapidOCR(params=options)

    def _tell(self, error: Exception) -> None:
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        _log.log(level, "reward 'ocr': a score is failed: %s: %s", type(error).__name__, cut(str(error), 2 * SCREEN))


def asked(prompt: str, metadata: Mapping[str, object]) -> str:
    """The text that a picture of `prompt` is to show: its line's "target", or what it has in double quotes, straight,
    typographic or full-width.

    Raises ValueError, naming the prompt, for no such text, several, an empty one, and a quote without its partner.
    """
    target = metadata.get(KEY)
    if target not in (None, ""):
        if isinstance(target, str) and plain(target):
            return target
        raise ValueError(f"prompts: {cut(prompt)!r} has {cut(repr(target))} as its {KEY!r}; nearest valid: a text")
    straight = even(prompt)
    _, *others = straight.split('"')
    texts = others[::2]
    if not texts:
        fault = "no text in double quotes" + (" (single ones are apostrophes)" if SINGLE.search(straight) else "")
    elif len(others) % 2:
        fault = "a double quote without its partner"
    elif len(texts) > 1:
        fault = f"{len(texts)} texts in double quotes"
    elif not plain(texts[0]):
        fault = "nothing between its double quotes"
    else:
        return texts[0]
    raise ValueError(f"prompts: {cut(prompt)!r} has {fault}; {HINT}")


def agreement(recognised: str, target: str, *, exact: bool = False) -> float:
    """How well a text that was read agrees with the one that was asked for, 0 to 1; both are made `plain` first.

    1 where the target stands in it, which `exact` leaves out; else 1 − d ÷ n, n the target's characters, d the distance
    of the two or n, whichever is smaller. Raises ValueError for a target of which nothing is left.
    """
    from rapidfuzz.distance import Levenshtein

    read, wanted = plain(recognised), plain(target)
    if not wanted:
        raise ValueError(f"target: {cut(target)!r} has no characters; nearest valid: a text")
    if not exact and wanted in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """By NFKC, in lower case, with straight quotes and apostrophes, without spaces and invisible characters."""
    return "".join(c for c in even(text).lower() if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf"))


def even(text: str) -> str:
    """By NFKC, with straight quotes and apostrophes."""
    marks = QUOTES | APOSTROPHES  # before NFKC, which takes "´" apart, and after it, which makes "″" two apostrophes
    return unicodedata.normalize("NFKC", text.translate(marks)).translate(marks)
