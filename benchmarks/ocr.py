"""How well the OCR reward reads: fonts × sizes × noise, and pictures a second.

    python -m benchmarks.ocr [--threads 2] [--texts 4] [--side 512]

A text stands once in a picture, at a place, in a colour and on a ground that a seed draws; then noise of that standard
deviation is added to each pixel and channel. A cell is the mean reward of `--texts` texts, by the substring rule and,
behind the stroke, by the exact one. The last line scores the same pictures against other texts' prompts: what a picture
gets that shows a wrong text. Fonts: DejaVu's, which come with matplotlib, and PIL's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tempflow.rewards.ocr import OCR, agreement

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSans-Oblique", "DejaVuSansMono", "PIL")
SIZES = (10, 14, 24, 48)
NOISES = (0, 20, 60)
TEXTS = ("OPEN", "Fresh Coffee", "No. 42", "Don't panic!", "Ürün 7€", "quick brown fox")


@dataclass(frozen=True)
class Case:
    font: str
    size: int
    noise: int
    text: str


def font_of(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name not in FONTS[:-1]:
        return ImageFont.load_default(size=size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf"), size)


def drawn(case: Case, side: int) -> np.ndarray:
    """uint8 [side, side, 3]. Dark on light, or light on dark; the text inside the picture."""
    draw = np.random.default_rng([FONTS.index(case.font), case.size, TEXTS.index(case.text)])
    light, dark = draw.integers(180, 256, 3), draw.integers(0, 76, 3)
    ground, ink = (light, dark) if draw.random() < 0.5 else (dark, light)
    picture = Image.new("RGB", (side, side), tuple(int(c) for c in ground))
    pen, font = ImageDraw.Draw(picture), font_of(case.font, case.size)
    left, top, right, bottom = (int(edge) for edge in pen.textbbox((0, 0), case.text, font=font))
    x, y = draw.integers(8, max(9, side - right - 8)), draw.integers(8, max(9, side - bottom - 8))
    pen.text((int(x) - left, int(y) - top), case.text, font=font, fill=tuple(int(c) for c in ink))
    noisy = np.asarray(picture) + draw.normal(0, case.noise or 1e-9, (side, side, 3))
    return noisy.round().clip(0, 255).astype(np.uint8)


def cases(texts: int) -> Iterator[Case]:
    for font in FONTS:
        for size in SIZES:
            for noise in NOISES:
                yield from (Case(font, size, noise, text) for text in TEXTS[:texts] if drawable(font, text))


def drawable(name: str, text: str) -> bool:
    """Whether the font has all its characters: PIL's has no Ü and no €."""
    font = font_of(name, 24)

    def shape(letter: str) -> bytes:
        picture = Image.new("L", (48, 48))
        ImageDraw.Draw(picture).text((8, 8), letter, font=font, fill=255)
        return picture.tobytes()

    return all(c.isspace() or shape(c) != shape("\uffff") for c in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=4, choices=range(2, len(TEXTS) + 1))
    parser.add_argument("--side", type=int, default=512)
    a = parser.parse_args()
    reward = OCR(threads=a.threads)
    reward.prepare()
    seen: dict[Case, str] = {}
    wall, processor = time.perf_counter(), time.process_time()
    for case in cases(a.texts):
        seen[case] = reward.read(drawn(case, a.side))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(
        f"{len(seen)} pictures of {a.side}², {a.threads} threads: {len(seen) / wall:.2f} a second by the clock, ",
        end="",
    )
    print(f"{processor / len(seen):.2f} s of processor time each\n")
    print("| font | size | " + " | ".join(f"σ {noise}" for noise in NOISES) + " |")
    print("|---|---|" + "---|" * len(NOISES))
    for font in FONTS:
        for size in SIZES:
            cells = [told(seen, lambda c, f=font, s=size, n=n: (c.font, c.size, c.noise) == (f, s, n)) for n in NOISES]
            print(f"| {font} | {size} px | " + " | ".join(cells) + " |")
    print("| all | all | " + " | ".join(told(seen, lambda c, n=n: c.noise == n) for n in NOISES) + " |")
    wrong = [agreement(text, TEXTS[(TEXTS.index(case.text) + 1) % a.texts]) for case, text in seen.items()]
    print(f"\nagainst another text's prompt: mean {np.mean(wrong):.2f}, largest {max(wrong):.2f}")


def told(seen: dict[Case, str], keep: Callable[[Case], bool]) -> str:
    """Mean rewards of some cases, by both rules."""
    rows = [(text, case.text) for case, text in seen.items() if keep(case)]
    loose, exact = ([agreement(*row, exact=rule) for row in rows] for rule in (False, True))
    return f"{np.mean(loose):.2f} / {np.mean(exact):.2f}"


if __name__ == "__main__":
    main()
