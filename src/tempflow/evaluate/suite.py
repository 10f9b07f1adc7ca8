"""Fixed prompts, fixed seeds: the same noise for every model that is compared, and nothing else that is random."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tempflow.core import plan
from tempflow.core.rollout import Noise, rollout
from tempflow.core.scores import Scores
from tempflow.evaluate.figures import Report, Walk
from tempflow.evaluate.source import find, load_source
from tempflow.folder import check, check_idle, claim, held
from tempflow.grid import SCHEDULER, Grid
from tempflow.media import Media, Size
from tempflow.models.family import check_size
from tempflow.models.finite import WHOLE, Decoded, NotFiniteError, decoded, encoded, told
from tempflow.models.guidance import Guidance, guided
from tempflow.models.protocol import Model, Predict, WalksGrids, layout_of, sampler_of
from tempflow.perception.diversity import features, within_groups
from tempflow.request import Prompt
from tempflow.rewards import check_takes, score_all
from tempflow.rewards.compose import Composition
from tempflow.rewards.protocol import Reward

__all__ = [
    "PROMPTS_AT_ONCE",
    "Report",
    "draw",
    "draw_strips",
    "drawn",
    "evaluate",
    "evaluate_path",
    "fixed_prompts",
    "sample_path",
]

FOLDER = "pictures"
"""What a folder of pictures is marked as."""

PROMPTS_AT_ONCE = 252
"""Pictures, or frames of clips, drawn, decoded and scored at once, in whole prompts; fewer of large ones."""


def fixed_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts in a fixed order: task kinds (`Prompt.kind`) in turn, each kind's prompts in turn."""
    pools: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        pools[prompt.kind].append(prompt)
    kinds = list(pools.values())
    picked = [kinds[i % len(kinds)] for i in range(count)]
    return [pool[(i // len(kinds)) % len(pool)] for i, pool in enumerate(picked)]


def draw(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: Guidance | float,
    seed: int,
    size: Size,
    rows: int,
    samples_per_prompt: int = 1,
) -> Media:
    """Deterministic samples, N·samples_per_prompt media; a prompt's follow each other.

    Picture k of prompt n is a function of (seed, n, k, prompt n) and the weights: more pictures don't change the first.
    One that is not finite is crossed out. Raises ValueError for samples_per_prompt below 1.
    """
    how = _Sampling(steps, guided(guidance, model.guidance), seed, size, rows, samples_per_prompt)
    return Media.cat([_crossed(seen) for _, seen, _ in _drawn(model, prompts, how)])


def draw_strips(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: Guidance | float,
    seed: int,
    size: Size,
    rows: int,
    samples_per_prompt: int = 1,
) -> Tensor:
    """What `draw` draws, as `Media.strips`, uint8 [N·samples_per_prompt, H, K·W, 3]; of the clips few are held at a
    time."""
    how = _Sampling(steps, guided(guidance, model.guidance), seed, size, rows, samples_per_prompt)
    return torch.cat([_crossed(seen).strips() for _, seen, _ in _drawn(model, prompts, how)])


def drawn(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: Guidance | float,
    seed: int,
    size: Size,
    rows: int,
    samples_per_prompt: int = 1,
    first: int = 0,
) -> Iterator[tuple[range, Decoded]]:
    """What `draw` draws, in parts as they are ready: numbers of the prompts, and their pictures with what is wrong with
    them. first: number of the first prompt, which its noise depends on."""
    guide = guided(guidance, model.guidance)
    how = _Sampling(steps, guide, seed, size, rows, samples_per_prompt, first)
    return ((slots, seen) for slots, seen, _ in _drawn(model, prompts, how))


def _crossed(seen: Decoded) -> Media:
    """The media; in the place of one that broke a red cross on grey, which nobody takes for what a model drew."""
    media = seen.media.clone()
    height, width = media.frames.shape[2:4]
    across, down = torch.arange(width) * height // width, torch.arange(height)[:, None]
    cross = torch.full((height, width, 3), 128, dtype=torch.uint8)
    cross[(down == across) | (down == height - 1 - across)] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    media.frames[~seen.ok] = cross
    return media


Stream = Literal["test", "validation"]
_ITERATION: dict[Stream, int] = {"test": -1, "validation": -2}  # a training run counts from 0: its noise is neither


def _go_on() -> None:
    """No pause."""


@dataclass(frozen=True)
class _Sampling:
    steps: int
    guidance: Guidance
    seed: int
    size: Size
    rows: int
    samples: int
    first: int = 0
    pause: Callable[[], None] = _go_on
    stream: Stream = "test"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples_per_prompt: {self.samples} is too few; nearest valid: 1")


def _drawn(model: Model, prompts: Sequence[Prompt], how: _Sampling) -> Iterator[tuple[range, Decoded, float]]:
    """Parts of what `draw` draws, as they are ready: which prompts, their pictures, and the seconds that these took
    once the prompts were encoded."""
    check_size(how.size, model.makes, model.name)
    schedule, shape, sampler = model.schedule(how.steps, how.size), model.noise_shape(how.size), sampler_of(model)
    # tokens have no deterministic steps: their draws are fixed by the seed, as a picture's first noise is
    walk = plan.chain(how.steps, how.samples, train=()) if sampler.stochastic else plan.ode(how.steps, how.samples)
    at_once = max(1, how.size.at_once(PROMPTS_AT_ONCE) // how.samples)
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        slots = range(how.first + first, how.first + first + len(part))
        condition = encoded(model, part, how.size)
        layout = layout_of(model, condition, how.size, slots.start).to(model.device)
        predict, began = model.predictor(condition, how.guidance), time.perf_counter()

        def with_pause(
            x: Tensor, sigma: Tensor, row: Tensor, predict: Predict = predict, at: int = slots.start
        ) -> Tensor:
            how.pause()
            return predict(x, sigma, row - at)

        forest = rollout(
            [walk] * len(part),
            sampler,
            schedule,
            with_pause,
            Noise(how.seed, iteration=_ITERATION[how.stream]),
            shape=shape,
            slots=slots,
            max_rows=how.rows,
            layout=layout,
            device=model.device,
        )
        seen = decoded(model, schedule.samples(forest.nodes[forest.leaves.node]), how.size)
        yield slots, seen, time.perf_counter() - began


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    steps: int,
    guidance: Guidance | float,
    seed: int,
    size: Size,
    rows: int,
    total: Mapping[str, float] | None = None,
    compose: Composition | None = None,
    gold: Sequence[str] = (),
    samples_per_prompt: int = 1,
    first: int = 0,
    pause: Callable[[], None] = _go_on,
    stream: Stream = "test",
) -> Report:
    """Draws pictures of each prompt and scores them by every reward.

    total               weights of the rewards that a run trains on; adds their sum as a column named "reward", unless
                        one of them has that name
    compose             what they become in place of that sum, where it is no sum
    gold                names of those of `rewards` that the model was not trained on
    samples_per_prompt  with 2 or more the report has the pictures' diversity within a prompt
    first               number of the first prompt, which its noise depends on: a rank judges a block of a longer list
    pause               called before every forward; may raise to leave
    stream              which noise: what chooses weights (a validation) shares none with what reports them (a test)

    Raises ValueError for samples_per_prompt below 1, a reward that takes what the model does not make, and a gold name
    that `total` weighs or no reward has.
    """
    trained = [name for name in gold if total is not None and total.get(name)]
    if trained:
        raise ValueError(f"gold: {trained[0]!r} is trained on; nearest valid: a reward that the training doesn't see")
    check_takes(rewards, model.makes, model.name)
    guide = guided(guidance, model.guidance)
    how = _Sampling(steps, guide, seed, size, rows, samples_per_prompt, first, pause, stream)
    scored, seen, broken, groups = list[Scores](), list[Tensor](), list[Tensor](), list[int]()
    taken = 0.0
    for slots, part, seconds in _drawn(model, prompts, how):
        taken += seconds
        slot = [n for n in slots for _ in range(samples_per_prompt)]
        owner = [prompts[n - first] for n in slot]
        texts, metadata = [p.text for p in owner], [p.told for p in owner]
        scored.append(score_all(rewards, part.media, texts, metadata, groups=slot, ok=part.ok, pause=pause))
        groups += slot
        broken.append(part.broken)
        if samples_per_prompt > 1:
            seen.append(features(part.media.pictures()))
    scores = Scores.cat(scored)
    if compose is not None:
        scores = compose(scores, groups)
    if total is not None and "reward" not in scores.names:
        value, ok = scores.total(total)
        scores = Scores.stack([scores, Scores(value[:, None], ok[:, None], ("reward",))])
    return Report(
        scores,
        tuple(prompts[n - first].text for n in groups),
        tuple(prompts[n - first].kind for n in groups),
        steps,
        guide.guidance,
        seed,
        tuple(gold),
        samples_per_prompt,
        _diversity(torch.cat(seen), torch.cat(broken) == WHOLE, torch.tensor(groups) - first) if seen else None,
        torch.cat(broken),
        walk_of(model, steps, guide, size),
        taken / len(groups),
    )


def walk_of(model: Model, steps: int, guidance: Guidance, size: Size) -> Walk:
    """How the model draws a picture in so many steps."""
    grid = str(model.stated_grid()) if isinstance(model, WalksGrids) else SCHEDULER
    return Walk(grid, model.schedule(steps, size).useful, steps * guidance.rows)


def _diversity(seen: Tensor, ok: Tensor, groups: Tensor) -> Tensor:
    """float64 [prompts]: the mean distance between a prompt's pictures, of those that are any."""
    found = torch.full((int(groups.max()) + 1,), math.nan, dtype=torch.float64)
    numbers, distance = within_groups(seen[ok], groups[ok])
    found[numbers] = distance
    return found


def evaluate_path(
    path: str,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    steps: int,
    guidance: float,
    seed: int,
    size: Size,
    device: str,
    rows: int,
) -> Report:
    """`evaluate` of anything that `source.find` knows, in float32."""
    model = load_source(find(path), device=device)
    return evaluate(model, prompts, rewards, steps=steps, guidance=guidance, seed=seed, size=size, rows=rows)


def sample_path(
    path: str,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    guidance: Guidance | float,
    seed: int,
    size: Size,
    device: str,
    out: str | Path,
    grid: Grid | None = None,
    base: str = "",
) -> list[Path]:
    """One PNG a prompt, `out`/000.png …, by anything that `source.find` knows, in float32. Returns the files. A clip is
    an animated PNG, and has its sound beside it as a WAV. `grid`: another than the weights' own; `base`: what a LoRA is
    laid on.

    Names sort in the prompts' order; where there are pictures already, numbers go on after theirs, and nothing is
    written over. Raises ValueError, before anything is loaded, where the folder `out` holds what is not ours
    (`folder.check`), another process is at work in it, or names would not sort any more; NotFiniteError, when all
    others are written, for pictures that are not finite.
    """
    check(out, FOLDER, "output")
    check_idle(out, "output")
    numbered(Path(out), len(prompts))
    model = load_source(find(path, base), device=device, grid=grid)
    guide = guided(guidance, model.guidance)
    how = _Sampling(steps, guide, seed, size, rows=64, samples=1)
    with held(claim(out, FOLDER, "output")) as folder:
        return _written(model, prompts, how, numbered(folder, len(prompts)))


def _written(model: Model, prompts: Sequence[Prompt], how: _Sampling, files: list[Path]) -> list[Path]:
    """Writes the files; returns them. See `sample_path`."""
    broken: list[Tensor] = []
    for slots, seen, _ in _drawn(model, prompts, how):
        for row, file in enumerate(files[slots.start : slots.stop]):
            if bool(seen.ok[row]):
                seen.media.write(row, file)
        broken.append(seen.broken)
    lost = told(torch.cat(broken), [p.text for p in prompts])
    if lost:
        whole = int((torch.cat(broken) == WHOLE).sum())
        raise NotFiniteError("; ".join(lost) + f". The other {whole} are in {files[0].parent}")
    return files


def numbered(folder: Path, count: int) -> list[Path]:
    """`count` new PNGs in `folder`, numbered after those that are there, at least three digits wide.

    Raises ValueError where a name with as many digits as the last needs would not sort among those that are there.
    """
    there = [file.stem for file in folder.glob("*.png") if file.stem.isascii() and file.stem.isdigit()]
    first = max(map(int, there), default=-1) + 1
    width = max(3, len(str(first + count - 1)), *map(len, there))
    if any(len(stem) < width for stem in there):
        raise ValueError(
            f"output: {str(folder)!r} holds {min(there)}.png; {count} more need {width} digits, and would not sort; "
            f"nearest valid: '{folder}-2'"
        )
    return [folder / f"{number:0{width}d}.png" for number in range(first, first + count)]
