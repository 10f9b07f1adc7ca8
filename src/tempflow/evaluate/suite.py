"""Fixed prompts, fixed seeds, deterministic sampling: the same noise for every model that is compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.evaluate.figures import Report
from tempflow.evaluate.source import find, load_source
from tempflow.models.protocol import Model, Predict, Size
from tempflow.perception.diversity import features, within_groups
from tempflow.rewards import score_all
from tempflow.rewards.protocol import Reward

__all__ = ["PROMPTS_AT_ONCE", "Report", "draw", "evaluate", "evaluate_path", "fixed_prompts", "sample_path"]

PROMPTS_AT_ONCE = 252
"""Pictures drawn, decoded and scored at once, in whole prompts."""


def fixed_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts in a fixed order: task kinds (metadata "kind") in turn, each kind's prompts in turn."""
    pools: dict[object, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        pools[prompt.metadata.get("kind", "")].append(prompt)
    kinds = list(pools.values())
    picked = [kinds[i % len(kinds)] for i in range(count)]
    return [pool[(i // len(kinds)) % len(pool)] for i, pool in enumerate(picked)]


def draw(
    model: Model,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    size: Size,
    rows: int,
    samples_per_prompt: int = 1,
) -> Tensor:
    """Deterministic samples, uint8 [N·samples_per_prompt, H, W, 3]; a prompt's pictures follow each other.

    Picture k of prompt n is a function of (seed, n, k, prompt n) and the weights: more pictures don't change the first.
    Raises ValueError for samples_per_prompt below 1.
    """
    how = _Sampling(steps, guidance, seed, size, rows, samples_per_prompt)
    return torch.cat([media for _, media, _ in _drawn(model, prompts, how)])


Stream = Literal["test", "validation"]
_ITERATION: dict[Stream, int] = {"test": -1, "validation": -2}  # a training run counts from 0: its noise is neither


def _go_on() -> None:
    """No pause."""


@dataclass(frozen=True)
class _Sampling:
    steps: int
    guidance: float
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


def _drawn(model: Model, prompts: Sequence[str], how: _Sampling) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Parts of what `draw` draws, as they are ready: which prompts, their pictures, and which of those are any."""
    schedule, shape = model.schedule(how.steps, how.size), model.noise_shape(how.size)
    at_once = max(1, PROMPTS_AT_ONCE // how.samples)
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        predict = model.predictor(model.encode(part), how.guidance)
        slots = range(how.first + first, how.first + first + len(part))

        def patient(x: Tensor, sigma: Tensor, row: Tensor, predict: Predict = predict, at: int = slots.start) -> Tensor:
            how.pause()
            return predict(x, sigma, row - at)

        forest = rollout(
            [plan.ode(how.steps, how.samples)] * len(part),
            ODE(),
            schedule,
            patient,
            Noise(how.seed, iteration=_ITERATION[how.stream]),
            shape=shape,
            slots=slots,
            max_rows=how.rows,
            device=model.device,
        )
        latents = forest.nodes[forest.leaves.node]
        yield slots, model.decode(latents, how.size), latents.isfinite().flatten(1).all(1).cpu()


def evaluate(
    model: Model,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    steps: int,
    guidance: float,
    seed: int,
    size: Size,
    rows: int,
    total: Mapping[str, float] | None = None,
    gold: Sequence[str] = (),
    samples_per_prompt: int = 1,
    first: int = 0,
    pause: Callable[[], None] = _go_on,
    stream: Stream = "test",
) -> Report:
    """Draws pictures of each prompt and scores them by every reward.

    total               weights of the rewards that a run trains on; adds their sum as a column named "reward", unless
                        one of them has that name
    gold                names of those of `rewards` that the model was not trained on
    samples_per_prompt  with 2 or more the report has the pictures' diversity within a prompt
    first               number of the first prompt, which its noise depends on: a rank judges a block of a longer list
    pause               called before every forward; may raise to leave
    stream              which noise: what chooses weights (a validation) shares none with what reports them (a test)

    Raises ValueError for samples_per_prompt below 1, and for a gold name that `total` weighs or no reward has.
    """
    trained = [name for name in gold if total is not None and total.get(name)]
    if trained:
        raise ValueError(f"gold: {trained[0]!r} is trained on; nearest valid: a reward that the training doesn't see")
    how = _Sampling(steps, guidance, seed, size, rows, samples_per_prompt, first, pause, stream)
    scored, seen, groups = list[Scores](), list[Tensor](), list[int]()
    for slots, media, sound in _drawn(model, [p.text for p in prompts], how):
        slot = [n for n in slots for _ in range(samples_per_prompt)]
        owner = [prompts[n - first] for n in slot]
        texts, metadata = [p.text for p in owner], [p.metadata for p in owner]
        scored.append(score_all(rewards, media, texts, metadata, groups=slot, sound=sound, pause=pause))
        groups += slot
        if samples_per_prompt > 1:
            seen.append(features(media))
    scores = Scores.cat(scored)
    if total is not None and "reward" not in scores.names:
        value, ok = scores.total(total)
        scores = Scores.stack([scores, Scores(value[:, None], ok[:, None], ("reward",))])
    return Report(
        scores,
        tuple(prompts[n - first].text for n in groups),
        tuple(str(prompts[n - first].metadata.get("kind", "")) for n in groups),
        steps,
        guidance,
        seed,
        tuple(gold),
        samples_per_prompt,
        within_groups(torch.cat(seen), torch.tensor(groups))[1] if seen else None,
    )


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
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    size: Size,
    device: str,
    out: str | Path,
) -> list[Path]:
    """One PNG a prompt, `out`/000.png …, by anything that `source.find` knows, in float32. Returns the files."""
    model = load_source(find(path), device=device)
    media = draw(model, prompts, steps=steps, guidance=guidance, seed=seed, size=size, rows=64)
    Path(out).mkdir(parents=True, exist_ok=True)
    files = [Path(out) / f"{i:03d}.png" for i in range(len(prompts))]
    for file, picture in zip(files, media, strict=True):
        Image.fromarray(picture.numpy()).save(file)
    return files
