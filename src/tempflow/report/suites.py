"""The page about a suite: its tables, how it was made, and some of its pictures. One file, nothing fetched."""

from __future__ import annotations

import base64
import io
from datetime import datetime
from pathlib import Path

from PIL import Image

from tempflow.folder import write_file
from tempflow.report.figures import flat
from tempflow.report.page import environment
from tempflow.report.runs import read_suite

PAGE, SIDE = "report.html", 160
"""What the page is called in the suite's folder; the longer side of its pictures, in pixels."""


def write_suite(folder: Path) -> Path:
    """Writes report.html into a suite's folder; returns it. Whatever comes from the suite is escaped.

    Raises ValueError for a folder without a finished suite, ImportError without jinja2.
    """
    told = read_suite(folder)
    prompts = [
        {
            "number": prompt["number"],
            "prompt": prompt["prompt"],
            "pictures": [
                {"files": [_small(folder / file) for file in cell["files"]], "value": _words(cell["value"])}
                for cell in prompt["pictures"]
            ],
        }
        for prompt in told["shown"]
    ]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = environment().get_template("suite.html")
    text = page.render(suite=told, shown=prompts, settings=flat(told["settings"]), now=now)
    return write_file(folder / PAGE, text, PAGE)


def _small(file: Path) -> str | None:
    """The picture as base64 of a PNG; None where it is not there any more."""
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as picture:
            small = picture.convert("RGB")
    except OSError:
        return None
    scale = SIDE / max(small.size)
    sides = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
    out = io.BytesIO()
    small.resize(sides, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()


def _words(value: object) -> str:
    if isinstance(value, list):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:.3g}" if isinstance(value, int | float) else "failed"
