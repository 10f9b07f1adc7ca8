"""One algorithm for every kind of rollouts, on the fake; what two rollouts have, to be compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fake import PROMPTS, SIZE, Bench, album, brightness, flow, tempflow
from PIL import Image
from torch import Tensor

from tempflow.algorithms import (
    Algorithm,
    diffusion_dpo,
    diffusion_nft,
    drm_grpo,
    dynamic_treerpo,
    e2po,
    otca,
    sol_rl,
    vipo,
)
from tempflow.core.scores import Scores
from tempflow.data.pictures import Pictures
from tempflow.data.prompts import Prompt, load_prompts
from tempflow.train.judged import LatentJudge
from tempflow.train.rollouts import Rollouts
from tempflow.train.source import chunks_of, source_of

KINDS: dict[str, Callable[[], Algorithm]] = {
    "edges": lambda: tempflow(kl=0.1),
    "chains": lambda: flow(kl=0.1, std="global"),
    "leaves": lambda: diffusion_nft(steps=4, group=6),
    "edge traits": lambda: otca(4, 6, kind="flow", noise_level=0.7, clip=0.02),
    "leaf traits": lambda: vipo(steps=4, group=6, kind="flow", noise_level=0.7, clip=0.5),
    "means": lambda: dynamic_treerpo(4, 1, 2, 3, every=1, clip=0.02),
    "conditions": lambda: e2po(steps=4, noises=2, conditions=3),
    "drafts": lambda: sol_rl(steps=4, group=6, pool=9, draft_steps=2, draft_precision="bfloat16"),
    "latent scores": lambda: drm_grpo("judge", 4, 2, 3, clip=0.02),
    "offline": lambda: diffusion_dpo(pairs=3, beta=20.0),
}

LEAVES = {"latent scores": 4, "offline": 4}
"""Of a chunk, 12 where nothing is said: so there are several."""


def patchy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """By the picture and its prompt alone: one prompt's fail, and some of another's."""
    values = brightness(images, prompts)
    return [
        None if p == PROMPTS[1] or (p == "fog" and v is not None and v > 0.5) else v
        for p, v in zip(prompts, values, strict=True)
    ]


def judged(condition: Any) -> Callable[[Tensor, Tensor, Tensor], Scores]:
    """A latent reward that fails where the latent is dark."""

    def judge(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = x.float().flatten(1).mean(1)
        return Scores(value[:, None], (value > -1)[:, None], ("latent",))

    return judge


def bench_of(kind: str, folder: Path, **options: Any) -> tuple[Bench, list[Prompt]]:
    """A bench that advances in several chunks, and the prompts of its iterations."""
    algorithm = KINDS[kind]()
    given: dict[str, Any] = {"rollout_leaves": LEAVES.get(kind, 12), "reward": patchy, "updates": 2, **options}
    if algorithm.latent_reward is not None:
        given["latent_reward"] = LatentJudge(judged)
    bench, prompts = Bench(algorithm=algorithm, **given), [Prompt(p) for p in PROMPTS]
    if algorithm.offline is not None:
        file = folder / "album" / "pairs.jsonl"
        file = file if file.exists() else album(folder / "album")
        bench.context = replace(bench.context, pictures=Pictures.beside(str(file), algorithm.offline.keys, SIZE))
        prompts = list(load_prompts(str(file), uses=("chosen", "rejected", "image")))
    return bench, prompts


def parts_of(bench: Bench, prompts: list[Prompt], order: Callable[[list], list] = list) -> list[Rollouts]:
    """The first iteration's chunks, computed in that order."""
    plans = bench.context.algorithm.plans(0, len(prompts))
    chunks = order(chunks_of(plans, bench.context.rollout_leaves, range(len(prompts))))
    return source_of(bench.context, prompts, 0, bench.clock).roll_out(chunks)


def parts(item: Any, name: str = "") -> dict[str, Any]:
    """Everything that a dataclass holds, by where it is: tensors and plain values."""
    if is_dataclass(item):
        return {k: v for f in fields(item) for k, v in parts(getattr(item, f.name), f"{name}.{f.name}").items()}
    if isinstance(item, Mapping):
        return {k: v for key, value in item.items() for k, v in parts(value, f"{name}[{key}]").items()}
    if isinstance(item, tuple | list):
        return {k: v for n, value in enumerate(item) for k, v in parts(value, f"{name}[{n}]").items()}
    return {name: item}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Any, b: Any) -> None:
    """Raises AssertionError, naming the place, where two dataclasses are not the same to the last bit."""
    one, other = parts(a), parts(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert bits(value) == bits(other[name]), name
        else:
            assert value == other[name], name
