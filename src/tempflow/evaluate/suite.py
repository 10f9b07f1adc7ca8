"""Fixed prompts, fixed seeds, deterministic sampling: the same noise for every model that is compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.scores import Scores
from tempflow.data.prompts import Prompt
from tempflow.models import load
from tempflow.models.protocol import Model, Size
from tempflow.rewards import score_all
from tempflow.rewards.protocol import Reward

PROMPTS_AT_ONCE = 252


@dataclass(frozen=True, eq=False)
class Report:
    """Scores of one model on one list of prompts: `scores` has a row per prompt; `kinds` are their task kinds."""

    scores: Scores
    kinds: tuple[str, ...]
    steps: int
    guidance: float
    seed: int

    def mean(self, name: str) -> float:
        """Mean over valid rows; NaN when there is none."""
        column = self.scores.names.index(name)
        ok = self.scores.ok[:, column]
        return float(self.scores.value[ok, column].mean()) if bool(ok.any()) else float("nan")

    def by_kind(self, name: str) -> dict[str, float]:
        """Mean by task kind, in order of first appearance."""
        rows: dict[str, list[int]] = defaultdict(list)
        for i, kind in enumerate(self.kinds):
            rows[kind].append(i)
        part = {k: Report(self.scores.select(torch.tensor(r)), (), 0, 0, 0).mean(name) for k, r in rows.items()}
        return part

    def values(self, name: str) -> np.ndarray:
        """float64 [N], NaN where failed: for paired comparisons."""
        return self.scores.value[:, self.scores.names.index(name)].double().numpy()

    def to_json(self) -> dict[str, Any]:
        """Figures ready for JSON."""
        return {
            "count": len(self.scores),
            "failed": int((~self.scores.ok).any(1).sum()),
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "mean": {n: self.mean(n) for n in self.scores.names},
            "by_kind": {n: self.by_kind(n) for n in self.scores.names},
        }

    def table(self) -> str:
        """A plain-text table: a row per kind, a column per reward."""
        names = self.scores.names
        columns = [self.by_kind(n) for n in names]
        rows = [[kind, *(f"{c[kind]:.3f}" for c in columns)] for kind in columns[0]]
        rows.append(["all", *(f"{self.mean(n):.3f}" for n in names)])
        head = ["kind", *names]
        width = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in [head, *rows]]
        return "\n".join(lines)


def fixed_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts in a fixed order: task kinds (metadata "kind") in turn, each kind's prompts in turn."""
    pools: dict[object, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        pools[prompt.metadata.get("kind", "")].append(prompt)
    kinds = list(pools.values())
    picked = [kinds[i % len(kinds)] for i in range(count)]
    return [pool[(i // len(kinds)) % len(pool)] for i, pool in enumerate(picked)]


def draw(
    model: Model, prompts: Sequence[str], *, steps: int, guidance: float, seed: int, size: Size, rows: int
) -> Tensor:
    """Deterministic samples, uint8 [N, H, W, 3]. Picture n is a function of (seed, n, prompt n) and the weights."""
    schedule, shape = model.schedule(steps, size), model.noise_shape(size)
    media = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[first : first + PROMPTS_AT_ONCE]
        predict = model.predictor(model.encode(part), guidance)
        forest = rollout(
            [plan.ode(steps, 1)] * len(part),
            ODE(),
            schedule,
            lambda x, sigma, row, predict=predict, first=first: predict(x, sigma, row - first),
            Noise(seed, iteration=-1),  # a training run counts from 0: its noise is never this
            shape=shape,
            slots=range(first, first + len(part)),
            max_rows=rows,
            device=model.device,
        )
        media.append(model.decode(forest.nodes[forest.leaves.node], size))
    return torch.cat(media)


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
) -> Report:
    """Draws one picture a prompt and scores it by every reward.

    `total`: weights of the rewards that a run trains on; adds their sum as a column named "reward", unless one of them
    has that name.
    """
    texts = [p.text for p in prompts]
    media = draw(model, texts, steps=steps, guidance=guidance, seed=seed, size=size, rows=rows)
    metadata: list[Mapping[str, object]] = [p.metadata for p in prompts]
    scores = score_all(rewards, media, texts, metadata, groups=range(len(texts)))
    if total is not None and "reward" not in scores.names:
        value, ok = scores.total(total)
        scores = Scores.stack([scores, Scores(value[:, None], ok[:, None], ("reward",))])
    return Report(scores, tuple(str(p.metadata.get("kind", "")) for p in prompts), steps, guidance, seed)


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
    """`evaluate` of "shapes", a pipeline folder or a hub id, in float32."""
    model = load(path, device=device)
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
    """One PNG a prompt, `out`/000.png …, by "shapes", a pipeline folder or a hub id. Returns the files."""
    media = draw(load(path, device=device), prompts, steps=steps, guidance=guidance, seed=seed, size=size, rows=64)
    Path(out).mkdir(parents=True, exist_ok=True)
    files = [Path(out) / f"{i:03d}.png" for i in range(len(prompts))]
    for file, picture in zip(files, media, strict=True):
        Image.fromarray(picture.numpy()).save(file)
    return files
