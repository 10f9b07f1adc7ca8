"""A page of pictures: a row a prompt, its samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, CAPTION, GAP, COLUMNS = 128, 22, 8, 8


def grid(media: Tensor, prompts: Sequence[str], path: Path) -> None:
    """Writes a PNG. media: uint8 [P·K, H, W, 3] (`Media.strips`), the K of a prompt together; prompts: P texts.

    Raises ValueError where the pictures don't share out among the prompts.
    """
    samples, over = divmod(len(media), max(1, len(prompts)))
    if over or not samples:
        raise ValueError(f"media has {len(media)} pictures for {len(prompts)} prompts; nearest valid: as many for each")
    blocks = max(1, COLUMNS // samples)  # prompts side by side
    scale = CELL / max(media.shape[1:3])
    height, width = (max(1, round(side * scale)) for side in media.shape[1:3])
    block = (samples * (width + GAP), height + CAPTION + GAP)
    page = Image.new("RGB", (blocks * block[0] + GAP, -(-len(prompts) // blocks) * block[1] + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for n, prompt in enumerate(prompts):
        x, y = GAP + n % blocks * block[0], GAP + n // blocks * block[1]
        pen.text((x, y), _cut(prompt, block[0] - GAP, font), fill="black", font=font)
        for k in range(samples):
            picture = Image.fromarray(media[n * samples + k].numpy())
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            page.paste(picture.resize((width, height), how), (x + k * (width + GAP), y + CAPTION))
    page.save(path)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    line = text
    while font.getlength(line) > width and len(line) > 1:
        line = line[:-2] + "…"
    return line
