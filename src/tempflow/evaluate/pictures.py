"""What a picture says better: sample grids and curves, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, CAPTION, GAP = 128, 30, 8


def before_after(before: Tensor, after: Tensor, prompts: Sequence[str], path: Path, columns: int = 6) -> None:
    """Pairs of pictures (before | after) over their prompt. before, after: uint8 [N, H, W, 3]; wide ones, a clip's
    frames side by side, are as high as others."""
    wide = max(1, round(before.shape[2] / before.shape[1]))
    columns = max(1, columns // wide)
    rows = -(-len(prompts) // columns)
    width, height = 2 * CELL * wide + GAP, CELL + CAPTION
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP + CAPTION), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    pen.text((GAP, GAP), "left: before   right: after   (same prompt, same noise)", fill="black", font=font)
    for i, prompt in enumerate(prompts):
        x, y = GAP + (i % columns) * (width + GAP), CAPTION + (i // columns) * (height + GAP)
        pen.text((x, y), prompt[:44], fill="black", font=font)
        for j, media in enumerate((before, after)):
            cell = Image.fromarray(media[i].numpy()).resize((CELL * wide, CELL), Image.Resampling.NEAREST)
            page.paste(cell, (x + j * (CELL * wide + 4), y + CAPTION - 8))
    page.save(path)


def curve(evaluations: Sequence[dict[str, Any]], metric: str, path: Path) -> None:
    """Validation score over compute, in all and by kind.

    Raises ImportError with the command to run where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'tempflow[plots]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    spent = [e["forward_equivalents"] for e in evaluations]
    for kind in evaluations[0]["by_kind"][metric]:
        if kind:
            axes.plot(spent, [e["by_kind"][metric][kind] for e in evaluations], lw=1, alpha=0.6, label=kind)
    means = np.array([e["mean"][metric] for e in evaluations])
    axes.plot(spent, means, "k-", lw=2.2, label="all")
    known = means[np.isfinite(means)]
    if len(known):
        best = int(np.nanargmax(means))
        axes.plot(spent[best], means[best], "k*", ms=12, label="best, kept")
    axes.set(xlabel="forward-equivalents (a row without gradient 1, with gradient 3)", ylabel=f"validation {metric}")
    if ((known >= 0) & (known <= 1)).all():
        axes.set_ylim(0, 1)
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
