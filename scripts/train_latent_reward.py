"""Trains a noise-conditional latent reward (DRM) on the `shapes` model, and says how often it is right.

    python scripts/train_latent_reward.py --output runs/latent-reward

The package's own (`reward: shapes`; a quarter of an hour of a slow core) was made by

    python scripts/train_latent_reward.py --output src/tempflow/shapes/latent_reward --bits 7 \\
        --prompts 960 --held-prompts 240 --pictures 8 --drop 0 --steps 700 --candidates 1

One that learned from candidates of one state, as `drm_grpo` asks about, was made by

    python scripts/train_latent_reward.py --start shapes --siblings --output runs/latent-reward \\
        --prompts 4000 --pictures 2 --steps 800 --bits 7

Pictures of train prompts are drawn with the pipeline and judged by the graded verifier; pictures of one prompt whose
scores differ make pairs. With `--siblings` pairs are candidates of one state of `drm_grpo`'s recipe instead, judged by
how each ends without more noise. Accuracy is measured on validation prompts, which training does not see (of siblings:
`python -m benchmarks.latent_reward`). `--candidates K` then samples these prompts with the reward choosing among K
successors a step, beside plain sampling with the same noise.
Runs are bounded by steps; two runs with equal arguments write equal weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tempflow.core import plan
from tempflow.core.dynamics import CPS, FlowSDE
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.folder import claim
from tempflow.latent_reward import (
    LatentReward,
    LatentScorer,
    Rated,
    RewardTraining,
    accuracy,
    bind,
    guided_sample,
    pairs_of,
    siblings,
    train_latent_reward,
)
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.sd3 import SD3
from tempflow.request import asked
from tempflow.rewards.shapes import ShapesReward
from tempflow.shapes.prompts import Split, balanced

SIZE = Size(32, 32)
STEPS = 10
CHUNK = 512


def graded(model: SD3, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """The graded verifier's score of each latent's picture."""
    return ShapesReward().score(model.decode(latents, SIZE), prompts, [{}] * len(prompts)).value[:, 0]


def prompts_of(split: Split, count: int) -> tuple[str, ...]:
    """The distinct prompts among the split's first `count`."""
    return tuple(dict.fromkeys(s.prompt for s in balanced(split, count)))


def drawn(model: SD3, texts: tuple[str, ...], pictures: int, noise_level: float, seed: int) -> Rated:
    """`pictures` of each prompt, sampled with noise."""
    forest = rollout(
        [plan.chain(STEPS, pictures)] * len(texts),
        FlowSDE(noise_level),
        model.schedule(STEPS, SIZE),
        model.predictor(model.encode(asked(texts), SIZE), 1.0),
        Noise(seed),
        shape=model.noise_shape(SIZE),
        max_rows=CHUNK,
    )
    latents, rows = forest.nodes[forest.leaves.node], forest.leaves.prompt
    return Rated(latents, graded(model, latents, [texts[r] for r in rows.tolist()]), rows, texts)


def some(pairs: Tensor, most: int) -> Tensor:
    """At most so many of the pairs, evenly drawn."""
    return pairs[Stream(0, "script.pairs").permutation((0,), len(pairs))[:most]]


def sampled(model: SD3, reward: LatentReward, prompts: tuple[str, ...], roots: int, k: int, level: float) -> float:
    """Mean graded score of guided sampling with k candidates."""
    found = guided_sample(
        FlowSDE(level),
        model.schedule(STEPS, SIZE),
        model.predictor(model.encode(asked(prompts), SIZE), 1.0),
        LatentScorer.of(model, reward, prompts, SIZE, rows=CHUNK),
        Noise(seed=77),
        shape=model.noise_shape(SIZE),
        slots=range(len(prompts)),
        roots=roots,
        candidates=k,
    )
    return float(graded(model, found.x, [prompts[p] for p in found.prompt.tolist()]).mean())


def main() -> None:
    a = arguments()
    claim(a.out, "latent reward", "--output")
    torch.set_num_threads(a.threads)
    began, model = time.time(), load("shapes")
    texts = prompts_of("train", a.prompts)
    if a.siblings:
        of_siblings(a, model, texts, began)
        return
    rated = drawn(model, texts, a.pictures, a.noise_level, seed=a.seed)
    held = drawn(model, prompts_of("validation", a.held_prompts), a.pictures, a.noise_level, seed=a.seed + 1)
    held_pairs = some(pairs_of(held, a.margin), a.held_pairs)
    count = len(pairs_of(rated, a.margin))
    log("drawn", began, prompts=len(texts), pictures=len(rated.latents), pairs=count, held_prompts=len(held.prompts))
    reward = trained(a, model, rated, began)
    score = bind(model, reward, model.encode(asked(held.prompts), SIZE))
    for bucket in accuracy(score, held, held_pairs, buckets=a.buckets):
        span = f"({bucket.low:.2f}, {bucket.high:.2f}]"
        log("held out", began, sigma=span, accuracy=round(bucket.accuracy, 3), pairs=bucket.pairs)
    for k in (1, a.candidates) if a.candidates > 1 else ():
        value = sampled(model, reward, held.prompts, a.roots, k, a.noise_level)
        log("sampled", began, candidates=k, graded=round(value, 4), pictures=len(held.prompts) * a.roots)


def trained(a: argparse.Namespace, model: SD3, rated: Rated, began: float) -> LatentReward:
    """The reward trained on these, as it was kept."""
    config = RewardTraining(a.steps, a.pairs, a.lr, margin=a.margin, share_noise=a.share_noise, seed=a.seed)
    means = [0.0, 0.0]

    def report(step: int, loss: float, right: float) -> None:
        for n, value in enumerate((loss, right)):
            means[n] += (value - means[n]) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            log("train", began, step=step + 1, loss=round(means[0], 4), accuracy=round(means[1], 3))

    made = {"drop": a.drop, "width": a.width, "seed": a.seed, "licence": model.licence}
    start = LatentReward.load(a.start) if a.start else LatentReward.from_transformer(model.network, **made)
    reward = train_latent_reward(model, rated, config, SIZE, reward=start, report=report)
    reward.save(a.out, bits=a.bits)
    return LatentReward.load(a.out)


def of_siblings(a: argparse.Namespace, model: SD3, texts: tuple[str, ...], began: float) -> None:
    """Trains on candidates of one state, as the recipe of `drm_grpo` draws them."""
    rated = siblings(
        texts,
        model.predictor(model.encode(asked(texts), SIZE), 1.0),
        model.schedule(6, SIZE),
        CPS(0.8),
        lambda x, prompts: graded(model, x, prompts),
        Noise(a.seed),
        shape=model.noise_shape(SIZE),
        chains=a.pictures,
        candidates=6,
        rows=CHUNK,
    )
    log("drawn", began, prompts=len(texts), states=len(rated.latents), pairs=len(pairs_of(rated, a.margin)))
    trained(a, model, rated, began)


def log(what: str, began: float, **line: object) -> None:
    print(json.dumps({"what": what, **line, "seconds": round(time.time() - began, 1)}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", dest="out", type=Path, required=True, help="folder for the reward's two files")
    parser.add_argument("--prompts", type=int, default=300, help="first of the train prompts, each taken once")
    parser.add_argument(
        "--held-prompts",
        type=int,
        default=120,
        help="first of the validation prompts, each taken once",
    )
    parser.add_argument("--pictures", type=int, default=8, help="drawn for each prompt")
    parser.add_argument(
        "--siblings",
        action="store_true",
        help="train on candidates of one state, as `shapes_drm_grpo` draws them: --pictures are chains; what is about "
        "noise, held-out pairs or sampling afterwards is not asked",
    )
    parser.add_argument("--start", help="folder of the reward to go on from; else one is made of the model")
    parser.add_argument("--noise-level", type=float, default=0.7, help="of the SDE that draws them")
    parser.add_argument("--margin", type=float, default=0.1, help="least difference of graded scores in a pair")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=24, help="in each step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--width", type=int, default=64, help="channels of the head")
    parser.add_argument("--drop", type=int, help="last blocks that are left off; as the paper does where not given")
    parser.add_argument("--bits", type=int, choices=range(2, 9), help="keep matrices in so many; else in float32")
    parser.add_argument("--share-noise", action="store_true", help="one ε for both of a pair")
    parser.add_argument("--held-pairs", type=int, default=600)
    parser.add_argument("--buckets", type=int, default=5, help="equal parts of (0, 1] in which accuracy is measured")
    parser.add_argument("--candidates", type=int, default=4, help="of guided sampling afterwards; 1: none")
    parser.add_argument("--roots", type=int, default=6, help="samples a prompt in guided sampling")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
