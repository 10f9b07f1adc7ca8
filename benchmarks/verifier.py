"""Attacks on the shapes verifier: is its strict verdict worth being trained against?

    python benchmarks/verifier.py [--count 200] [--steps 3000] [--output runs/verifier]

Prints, seeds fixed: how often rendered truth passes (per task kind); how often wrong pictures do (scenes of another
meaning, noise, cheap tricks); what hill-climbing on pixels reaches from noise, a wrong scene and a blank, and how far a
right picture can be walked away from what it was while it still passes. Writes what passed as PNG grids, to be looked
at: a picture that a person would reject and that passes is a hole. Less than two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.catalog import DOUBTFUL, FAIR, WRONG
from benchmarks.tricks import Trick
from tempflow.shapes.prompts import COLORS, KINDS, Object, Spec, balanced, specs
from tempflow.shapes.render import PALETTE, SIZE, Placed, aside, compose, draw, polygon, scene
from tempflow.shapes.verify import LARGEST_SMALL, MIN_ASIDE, SMALLEST_BIG, judge

Case = tuple[np.ndarray, Spec]


def rng_for(name: str) -> np.random.Generator:
    return np.random.default_rng([20, zlib.crc32(name.encode())])


def rates(cases: Sequence[Case]) -> tuple[float, float]:
    """Share called right, and mean graded score."""
    verdicts = [judge(picture, spec) for picture, spec in cases]
    return float(np.mean([v.strict for v in verdicts])), float(np.mean([v.graded for v in verdicts]))


# -------------------------------------------------------------------------------------------- truth, mismatch, noise
def shows(objects: Sequence[Placed], spec: Spec) -> bool:
    """Whether a drawn scene means what `spec` asks for, or nearly so (a diagonal, a size between the two)."""
    if len(objects) != len(spec.objects):
        return False
    orders = [list(objects), list(objects)[::-1]] if len(objects) == 2 else [list(objects)]
    return any(_shows(order, spec) for order in orders)


def _shows(order: Sequence[Placed], spec: Spec) -> bool:
    if not all(_is(placed, wanted) for placed, wanted in zip(order, spec.objects, strict=True)):
        return False
    if spec.relation is None:
        return True
    dx, dy = order[1].x - order[0].x, order[1].y - order[0].y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[spec.relation]
    return along > 5 and along > abs(across) - 1


def _is(placed: Placed, wanted: Object) -> bool:
    if placed.shape != wanted.shape or wanted.color not in (None, placed.color):
        return False
    radius = placed.radius * float(np.abs(polygon(placed.shape)).max())
    if (wanted.size == "small" and radius > SMALLEST_BIG) or (wanted.size == "big" and radius < LARGEST_SMALL):
        return False
    if wanted.place is None:
        return True
    along, across = aside(placed.x, placed.y, wanted.place)
    return along > MIN_ASIDE - 1 and along > abs(across) - 1


def truth(count: int) -> dict[str, list[Case]]:
    rng = rng_for("truth")
    return {kind: [(scene(s, rng), s) for s in (_any(rng, kind) for _ in range(count))] for kind in KINDS}


@cache
def _pool(kind: str | None) -> list[Spec]:
    return [s for s in specs() if kind in (None, s.kind)]


def _any(rng: np.random.Generator, kind: str | None = None) -> Spec:
    pool = _pool(kind)
    return pool[rng.integers(len(pool))]


@cache
def _by_frame() -> dict[tuple[int, str], list[Spec]]:
    """Prompts by what is left of them when one word is blanked out."""
    frames: dict[tuple[int, str], list[Spec]] = {}
    for spec in specs():
        for frame in _frames(spec):
            frames.setdefault(frame, []).append(spec)
    return frames


def _frames(spec: Spec) -> list[tuple[int, str]]:
    words = spec.prompt.split()
    return [(i, " ".join([*words[:i], "_", *words[i + 1 :]])) for i in range(len(words))]


def one_word_away(spec: Spec, rng: np.random.Generator) -> Spec | None:
    """A prompt that differs from this one in one word, if the word drawn has another."""
    near = [s for s in _by_frame()[_frames(spec)[rng.integers(len(spec.prompt.split()))]] if s != spec]
    return near[rng.integers(len(near))] if near else None


def mismatched(count: int) -> dict[str, list[Case]]:
    """Pictures of one meaning asked for another: any other prompt, one of the same kind, one that is a word away."""
    rng = rng_for("mismatched")
    others: dict[str, Callable[[Spec], Spec | None]] = {
        "any other prompt": lambda spec: _any(rng),
        "another of its kind": lambda spec: _any(rng, spec.kind),
        "one word away": lambda spec: one_word_away(spec, rng),
    }
    cases: dict[str, list[Case]] = {name: [] for name in others}
    for name, found in cases.items():
        while len(found) < count:
            spec = _any(rng, KINDS[rng.integers(len(KINDS))])
            asked = others[name](spec)
            if asked is None:
                continue
            objects, shade = compose(spec, rng)
            if not shows(objects, asked):
                found.append((draw(objects, (shade, shade, shade)), asked))
    return cases


def noise(count: int) -> dict[str, list[Case]]:
    rng = rng_for("noise")
    shape = (SIZE, SIZE, 3)

    def smooth() -> np.ndarray:
        field = cv2.GaussianBlur(rng.normal(0, 1, shape), (0, 0), rng.uniform(1, 6))
        return 127 + field / field.std() * rng.uniform(20, 120)

    def blobs() -> np.ndarray:
        """Smooth noise cut at a level: soft-edged blobs of one palette colour on the dark ground."""
        field = cv2.GaussianBlur(rng.normal(0, 1, shape[:2]), (0, 0), rng.uniform(2, 6))
        share = np.clip((field / field.std() - rng.uniform(0.5, 2)) * 4, 0, 1)[..., None]
        return 28 + share * (np.array(PALETTE[COLORS[rng.integers(len(COLORS))]]) - 28.0)

    def salt() -> np.ndarray:
        return np.where(rng.random((SIZE, SIZE, 1)) < rng.uniform(0.01, 0.3), rng.integers(0, 256, shape), 28)

    makers = {
        "uniform": lambda: rng.integers(0, 256, shape),
        "gaussian": lambda: rng.normal(rng.uniform(30, 128), rng.uniform(10, 80), shape),
        "smooth": smooth,
        "blobs": blobs,
        "salt": salt,
    }
    return {
        n: [(np.clip(make(), 0, 255).astype(np.uint8), _any(rng)) for _ in range(count)] for n, make in makers.items()
    }


# ------------------------------------------------------------------------------------------------------ hill-climbing
def nudge(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of one to eight pixels' side set to a palette colour, the ground or any colour, or shaded."""
    out = picture.copy()
    h, w = np.minimum(rng.geometric(0.35, 2), 8)
    y, x = rng.integers(0, SIZE - h + 1), rng.integers(0, SIZE - w + 1)
    patch = out[y : y + h, x : x + w]
    kind = rng.integers(4)
    if kind == 0:
        patch[:] = PALETTE[COLORS[rng.integers(len(COLORS))]]
    elif kind == 1:
        patch[:] = 28
    elif kind == 2:
        patch[:] = rng.integers(0, 256, 3)
    else:
        patch[:] = np.clip(patch + rng.normal(0, 40, 3), 0, 255)
    return out


def climb(picture: np.ndarray, spec: Spec, steps: int, rng: np.random.Generator) -> tuple[np.ndarray, float, bool]:
    """Keeps every nudge that does not lower the graded score; stops when strict is reached."""
    best = judge(picture, spec)
    for _ in range(steps):
        trial = nudge(picture, rng)
        verdict = judge(trial, spec)
        if verdict.graded >= best.graded:
            picture, best = trial, verdict
        if best.strict:
            break
    return picture, best.graded, best.strict


def drift(picture: np.ndarray, spec: Spec, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Walks a right picture as far from itself as it goes while every step stays right: the verifier's tolerance."""
    start, here, away = picture.astype(np.int32), picture, 0.0
    for _ in range(steps):
        trial = nudge(here, rng)
        distance = float(np.square(trial - start).sum())
        if distance > away and judge(trial, spec).strict:
            here, away = trial, distance
    return here


def starts(spec: Spec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    wrong = next(s for s in (_any(rng) for _ in range(999)) if s.kind != spec.kind)
    return {
        "noise": rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8),
        "a wrong scene": scene(wrong, rng),
        "a blank": np.full((SIZE, SIZE, 3), 28, np.uint8),
    }


# ------------------------------------------------------------------------------------------------------------ report
def grid(pictures: Sequence[np.ndarray], path: Path, columns: int = 12, zoom: int = 4) -> None:
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (SIZE + 2), columns * (SIZE + 2), 3), 110, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (SIZE + 2) + 1, i % columns * (SIZE + 2) + 1
        sheet[y : y + SIZE, x : x + SIZE] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST).save(path)


def line(name: str, cases: Sequence[Case]) -> None:
    strict, graded = rates(cases)
    print(f"  {name:36} n {len(cases):5}   strict {strict:7.2%}   graded {graded:.2f}")


def tricks(title: str, group: dict[str, Trick], count: int, out: Path) -> None:
    print(f"\n{title}")
    passed = []
    for name, trick in group.items():
        rng = rng_for(name)
        cases = [trick(rng) for _ in range(count)]
        line(name, cases)
        passed += [picture for picture, spec in cases if judge(picture, spec).strict][:4]
    if passed:
        grid(passed, out)
        print(f"  what passed (at most four of each): {out}")


def climbing(steps: int, out: Path) -> None:
    print(f"\nHill-climbing on pixels, {steps} steps each, one prompt of each kind twice")
    asked = balanced("validation", 12)
    ends: dict[str, list[np.ndarray]] = {}
    reached: dict[str, list[tuple[float, bool]]] = {}
    for i, spec in enumerate(asked):
        rng = rng_for(f"climb {i}")
        for name, picture in starts(spec, rng).items():
            end, graded, strict = climb(picture, spec, steps, rng)
            ends.setdefault(name, []).append(end)
            reached.setdefault(name, []).append((graded, strict))
    for name, values in reached.items():
        graded = [g for g, _ in values]
        right = sum(s for _, s in values)
        print(
            f"  from {name:14} strict {right:2} of {len(values)}   "
            f"graded mean {np.mean(graded):.2f}, best {max(graded):.2f}"
        )
    grid([p for pictures in ends.values() for p in pictures], out / "climb.png")
    print(f"  the pictures reached, a row per start: {out / 'climb.png'}")
    far: list[np.ndarray] = []
    for i, spec in enumerate(asked):
        rng = rng_for(f"drift {i}")
        picture = scene(spec, rng)
        far += [picture, drift(picture, spec, steps, rng)]
    moved = [np.sqrt(np.square(far[i].astype(float) - far[i + 1]).mean()) for i in range(0, len(far), 2)]
    print(f"  walked away from right while staying right: root mean square change {np.mean(moved):.1f} of 255")
    grid([*far[::2], *far[1::2]], out / "drift.png")
    print(f"  before (upper row) and after (lower): {out / 'drift.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=200, help="pictures per trick; truth, mismatch and noise take five times that"
    )
    parser.add_argument("--steps", type=int, default=3000, help="of a hill-climb")
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/verifier"))
    a = parser.parse_args()
    began = time.perf_counter()
    cv2.setNumThreads(1)
    many = 5 * a.count
    print("Rendered truth (to pass)")
    shown = truth(many)
    for kind, cases in shown.items():
        line(kind, cases)
    for title, group in (("Mismatched (to fail)", mismatched(many)), ("Noise (to fail)", noise(many))):
        print(f"\n{title}")
        for name, cases in group.items():
            line(name, cases)
    tricks("Tricks that a person would call wrong (to fail)", WRONG, a.count, a.out / "wrong.png")
    tricks("Doubtful: a person might accept them", DOUBTFUL, a.count, a.out / "doubtful.png")
    tricks("Fair: a person would accept them (to pass)", FAIR, a.count, a.out / "fair.png")
    climbing(a.steps, a.out)
    cases = [case for group in shown.values() for case in group]
    start = time.process_time()
    rates(cases)
    speed = len(cases) / (time.process_time() - start)
    print(f"\n{speed:.0f} judgements per second of one core; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
