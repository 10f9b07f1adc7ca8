"""What a reward does with pictures whose scores are looked at: whether it can be trusted before a run leans on it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.data.pictures import FORMATS, Pictures
from tempflow.data.prompts import load_prompts, source_path
from tempflow.doctor.check import Check
from tempflow.media import Media, Size
from tempflow.request import Prompt
from tempflow.rewards.protocol import Reward, check, check_prompts, prepare

CLOSE = 1e-4
"""Share of the scores' spread by which two ways of asking the same may differ, beside rounding."""

GOLDEN_CLOSE = 1e-3
"""The same for golden scores, which another machine may have made."""

PICTURE = "image"
"""The key under which a line names its picture."""

LONG = "a red circle, " * 750
"""A prompt of more than 10 000 characters."""


@dataclass(frozen=True)
class Sample:
    """Pictures with the prompts that they are judged by."""

    media: Media
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, object]]
    names: Sequence[str] = field(default_factory=list[str])

    def rows(self, rows: Sequence[int]) -> Sample:
        """Some of them, in that order."""
        names = [self.names[i] for i in rows] if self.names else []
        return Sample(self.media[list(rows)], [self.prompts[i] for i in rows], [self.metadata[i] for i in rows], names)

    def seen(self, frames: Tensor) -> Sample:
        """The same prompts with other pictures."""
        return Sample(
            Media(frames, self.media.fps, self.media.sound, self.media.sound_rate), self.prompts, self.metadata
        )


def sample_of(source: str, count: int) -> Sample:
    """At most `count` pictures with their prompts.

    source  a .jsonl whose lines have "prompt" and "image", a path beside it; "": rendered pictures of `shapes` prompts,
            every fourth of the prompt before

    Raises ValueError for prompts or pictures that are none, ImportError without what rendering needs.
    """
    if source:
        prompts = load_prompts(source, uses=(PICTURE,))[:count]
        picture = Image.open(source_path(source).parent / str(prompts[0].metadata.get(PICTURE)), formats=FORMATS)
        with picture:
            size = Size(picture.height, picture.width)
        pictures = Pictures.beside(source, (PICTURE,), size)
        pictures.check(prompts)
        media, names = pictures(prompts), [str(p.metadata[PICTURE]) for p in prompts]
    else:
        from tempflow.shapes.prompts import balanced
        from tempflow.shapes.render import scene

        wanted = balanced("test", count)
        rng = np.random.default_rng(0)
        shown = [wanted[n - 1] if n % 4 == 3 else spec for n, spec in enumerate(wanted)]
        media = Media.of(torch.from_numpy(np.stack([scene(spec, rng) for spec in shown])))
        prompts, names = [Prompt(spec.prompt, {"kind": spec.kind}) for spec in wanted], []
    return Sample(media, [p.text for p in prompts], [p.metadata for p in prompts], names)


def reward_checks(reward: Reward, sample: Sample, golden: Path | None = None) -> tuple[list[Check], dict[str, Any]]:
    """Every check of a reward by a sample of at least two pictures, and the scores as JSON; see docs/rewards.md.

    Loads the reward. Raises ValueError for prompts that it cannot judge or a golden file that is none, and what its
    loading raises.
    """
    check_prompts(reward, sample.prompts, sample.metadata)
    started = time.perf_counter()
    prepare(reward)
    loaded = time.perf_counter() - started
    asking = _Asking(reward)
    started = time.perf_counter()
    scores = asking(sample)
    first = time.perf_counter() - started
    checks = [Check("loading", "ok", f"{loaded:.1f} s"), _values(scores)]
    if not scores.ok.any():
        return checks, _figures(scores, sample)
    spread = _spread(scores)
    checks += [
        _timing(asking, sample, first),
        _same("asked twice", "the scores differ: a draw, a cache or dropout", scores, asking(sample), spread),
        *_rows(asking, sample, scores, spread),
        _prompted(asking, sample, scores, spread),
        _swapped(reward, sample),
        _floats(reward, sample),
        *_seen(asking, sample, scores, spread),
        *_odd(asking, sample),
    ]
    if golden is not None:
        checks.append(_golden(scores, sample, golden, spread))
    return checks, _figures(scores, sample)


@dataclass(frozen=True)
class _Asking:
    """A call of the reward as a run makes it; what it raises is what it raises."""

    reward: Reward

    def __call__(self, sample: Sample) -> Scores:
        media = sample.media.clone()
        scores = self.reward.score(media, [*sample.prompts], [dict(m) for m in sample.metadata])
        return check(scores, len(media), self.reward.name)


def _values(scores: Scores) -> Check:
    failed = int((~scores.ok).any(1).sum())
    told = []
    for column, name in enumerate(scores.names):
        good = scores.value[scores.ok[:, column], column]
        told.append(f"{name} {good.min():.4g} … {good.max():.4g}" if len(good) else f"{name}: none")
    found = f"{len(scores)} pictures: {', '.join(told)}" + (f"; {failed} failed" if failed else "")
    if failed:
        return Check("scores", "fails" if failed == len(scores) else "warning", found, "see why it fails on them")
    if _spread(scores) == 0:
        return Check("scores", "warning", found, "all are equal, which teaches nothing; give other pictures")
    return Check("scores", "ok", found)


def _timing(asking: _Asking, sample: Sample, first: float) -> Check:
    started = time.perf_counter()
    asking(sample)
    again = time.perf_counter() - started
    rate = len(sample.media) / max(again, 1e-9)
    return Check("speed", "ok", f"{rate:.3g} pictures a second, {len(sample.media)} at once (first call {first:.2f} s)")


def _rows(asking: _Asking, sample: Sample, scores: Scores, spread: float) -> list[Check]:
    """Whether a picture's score depends on its neighbours or its place; a reward of whole groups may."""
    if asking.reward.groupwise:
        return [Check("one at a time", "ok", "not asked: it compares the pictures of a prompt")]
    alone = Scores.cat([asking(sample.rows([i])) for i in range(len(sample.media))])
    turned = [*range(len(sample.media))][::-1]
    back = asking(sample.rows(turned)).select(torch.tensor(turned))
    return [
        _same("one at a time", "scores depend on the batch", scores, alone, spread),
        _same("another order", "scores do not follow their pictures", scores, back, spread),
    ]


def _prompted(asking: _Asking, sample: Sample, scores: Scores, spread: float) -> Check:
    """Each picture with the prompt of the next that has another."""
    texts = list(sample.prompts)
    if len(set(texts)) < 2:
        return Check("other prompts", "warning", "not asked: all prompts are equal", "give two prompts at least")
    order = [next(j for j in (*range(i + 1, len(texts)), *range(i)) if texts[j] != texts[i]) for i in range(len(texts))]
    other = Sample(sample.media, [texts[i] for i in order], [sample.metadata[i] for i in order])
    swapped = asking(other)
    if _apart(scores, swapped) <= CLOSE * spread:
        return Check("other prompts", "warning", "the scores stay: it does not look at prompts", "is that meant?")
    both = scores.ok[:, 0] & swapped.ok[:, 0]
    better = int((scores.value[both, 0] > swapped.value[both, 0]).sum())
    state, advice = ("ok", "") if 2 * better >= int(both.sum()) else ("warning", "most like another prompt better")
    return Check("other prompts", state, f"{better} of {int(both.sum())} pictures score higher by their own", advice)


def _swapped(reward: Reward, sample: Sample) -> Check:
    try:
        reward.score([*sample.prompts], sample.media, sample.metadata)  # type: ignore[arg-type]
    except Exception:  # what it raises is its own
        return Check("arguments swapped", "ok", "refused")
    return Check("arguments swapped", "warning", "prompts in place of pictures were scored", "check types in `score`")


def _floats(reward: Reward, sample: Sample) -> Check:
    """Pictures as floats in [0, 1], which many scorers take for nearly black ones."""
    try:
        reward.score(sample.media.pictures().float() / 255, [*sample.prompts], sample.metadata)  # type: ignore[arg-type]
    except Exception:  # what it raises is its own
        return Check("pictures in [0, 1]", "ok", "refused")
    return Check("pictures in [0, 1]", "warning", "were scored", "refuse what is not uint8 (`Media.of` does)")


def _seen(asking: _Asking, sample: Sample, scores: Scores, spread: float) -> list[Check]:
    """How much a score owes to what carries a picture: its size, and JPEG."""
    ways: list[tuple[str, Callable[[Image.Image], Image.Image]]] = [("halved and back", _halved), ("JPEG 75", _jpeg)]
    found = []
    for name, way in ways:
        frames = sample.media.frames
        changed = [[np.asarray(way(Image.fromarray(f.numpy()))) for f in clip] for clip in frames]
        try:
            other = asking(sample.seen(torch.from_numpy(np.array(changed))))
        except Exception as error:  # what it raises is its own
            found.append(Check(name, "warning", f"raises {type(error).__name__}: {error}"[:200]))
            continue
        moved = _apart(scores, other)
        share = f", {moved / spread:.0%} of the spread" if spread else ""
        found.append(Check(name, "ok", f"moves a score by up to {moved:.3g}{share}"))
    return found


def _odd(asking: _Asking, sample: Sample) -> list[Check]:
    """An empty prompt and an endless one must be scored, or refused; never end the process."""
    found = []
    for name, text in (("empty prompt", ""), ("10 500 characters", LONG)):
        one = sample.rows([0])
        try:
            scores = asking(Sample(one.media, [text], one.metadata))
            said = f"scored {scores.value[0, 0]:.4g}" if scores.ok[0, 0] else "a failed score"
        except Exception as error:  # what it raises is its own
            said = f"refused: {' '.join(str(error).split())[:60]}"
        found.append(Check(name, "ok", said))
    return found


def _golden(scores: Scores, sample: Sample, file: Path, spread: float) -> Check:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        names, rows = tuple(held["columns"]), {row["name"]: row["scores"] for row in held["pictures"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"golden: {str(file)!r} is no file of scores ({error}); nearest valid: --write FILE"
        ) from error
    if names != scores.names or [*rows] != [*(sample.names or sample.prompts)]:
        return Check("golden scores", "fails", f"of {names} and other pictures", "give the pictures they were made of")
    want = [[math.nan if v is None else float(v) for v in row] for row in rows.values()]
    held_scores = Scores(torch.tensor(want), ~torch.tensor(want).isnan(), names)
    apart = _apart(scores, held_scores)
    state = "ok" if apart <= GOLDEN_CLOSE * spread + 1e-6 else "fails"
    return Check(
        "golden scores", state, f"at most {apart:.3g} apart", "" if state == "ok" else "other weights or library?"
    )


def _figures(scores: Scores, sample: Sample) -> dict[str, Any]:
    rows = [
        {"name": name, "scores": [float(v) if ok else None for v, ok in zip(value, good, strict=True)]}
        for name, value, good in zip(
            sample.names or sample.prompts, scores.value.tolist(), scores.ok.tolist(), strict=True
        )
    ]
    return {"columns": list(scores.names), "pictures": rows}


def _spread(scores: Scores) -> float:
    good = scores.value[scores.ok.all(1)]
    return float((good.amax(0) - good.amin(0)).max()) if len(good) else 0.0


def _apart(a: Scores, b: Scores) -> float:
    """The largest difference of two scores of one picture; infinite where one failed and the other did not."""
    if a.names != b.names or not torch.equal(a.ok, b.ok):
        return math.inf
    return float((a.value - b.value)[a.ok].abs().max()) if a.ok.any() else 0.0


def _same(name: str, why: str, a: Scores, b: Scores, spread: float) -> Check:
    apart = _apart(a, b)
    size = float(a.value[a.ok].abs().max())
    if apart <= CLOSE * spread + 1e-5 * size:
        return Check(name, "ok", "the same scores" if apart == 0 else f"the same to {apart:.1g}")
    return Check(name, "fails", f"up to {apart:.3g} apart", why)


def _halved(picture: Image.Image) -> Image.Image:
    small = picture.resize((max(1, picture.width // 2), max(1, picture.height // 2)), Image.Resampling.BICUBIC)
    return small.resize(picture.size, Image.Resampling.BICUBIC)


def _jpeg(picture: Image.Image) -> Image.Image:
    file = BytesIO()
    picture.save(file, format="JPEG", quality=75)
    return Image.open(file).convert("RGB")
