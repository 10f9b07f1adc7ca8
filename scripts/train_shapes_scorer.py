"""Trains the differentiable scorer of the `shapes` world on the verifier, and says how near it comes.

    OMP_NUM_THREADS=1 python scripts/train_shapes_scorer.py --output runs/scorer.safetensors

The package's own (eleven minutes of a slow core, or twelve with what it says of them afterwards) was made by

    OMP_NUM_THREADS=1 python scripts/train_shapes_scorer.py --output src/tempflow/shapes/scorer/scorer.safetensors \\
        --walks 1500 --steps 1500

It sees pictures of train prompts alone: those that the base model draws, at several qualities (by ten, four and two
steps, and the clean pictures that it foresees on the way), and rendered truths, which are drawn anew for each step.
Every picture is judged for its own prompt and for prompts that differ little; the verifier's graded score is what the
network learns. Then pictures of validation and test prompts, which it has not seen, tell how near it comes: the
correlation with the verifier over all of them and within a prompt, and how often it puts the better of two pictures of
a prompt first. Runs are bounded by steps; two runs with equal arguments on one machine write equal weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.core.rng import Stream
from tempflow.core.unroll import unroll
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.protocol import Model
from tempflow.request import asked
from tempflow.shapes.prompts import SHAPES, Spec, Split, specs
from tempflow.shapes.render import scene
from tempflow.shapes.scorer import PixelScorer, features, save
from tempflow.shapes.scorer import load as load_scorer
from tempflow.shapes.verify import judge

SIZE = Size(32, 32)
ROWS = 96
QUALITIES = ((10, (5, 7, 9, 10)), (4, (2, 3, 4)), (2, (1, 2)))
"""Steps of a walk, and the nodes at which the clean picture is taken: x̂0 there, or the sample at the last."""


@dataclass(frozen=True, eq=False)
class Rated:
    """Pictures uint8 [N, 32, 32, 3], K prompts' features [N, K, …] for each, and the verifier's graded scores [N, K].

    owner  of which prompt each was drawn, [N]
    """

    pictures: Tensor
    asked: Tensor
    score: Tensor
    owner: Tensor


def drawn(model: Model, wanted: Sequence[Spec], steps: int, nodes: Sequence[int], seed: int) -> Tensor:
    """A picture of each prompt at each node, uint8 [len(nodes) · N, 32, 32, 3], node by node."""
    schedule, found = model.schedule(steps, SIZE), list[list[Tensor]]()
    for first in range(0, len(wanted), ROWS):
        part = [spec.prompt for spec in wanted[first : first + ROWS]]
        ids = [(first + row,) for row in range(len(part))]
        x = schedule.start(Stream(seed, "scorer").normal(ids, model.noise_shape(SIZE)))
        predict = model.predictor(model.encode(asked(part), SIZE), 1.0)
        with torch.no_grad():
            walk = unroll(x, schedule, predict, torch.arange(len(part)), look=False)
        clean = [walk.x if node == steps else walk.visits[node].clean(schedule) for node in nodes]
        found.append([model.decode(latents, SIZE).pictures() for latents in clean])
    return torch.cat([torch.cat(of) for of in zip(*found, strict=True)])


def near(spec: Spec, others: Sequence[Spec], rng: np.random.Generator) -> Spec:
    """Another prompt, most often one of its kind that shares an object's shape."""
    alike = [o for o in others if o.kind == spec.kind and o.objects[0].shape == spec.objects[0].shape]
    among = alike if alike and rng.random() < 0.7 else others
    return among[int(rng.integers(len(among)))]


def rated(pictures: Tensor, wanted: Sequence[Spec], more: int, others: Sequence[Spec], seed: int) -> Rated:
    """The verifier's scores of pictures for their own prompts and for `more` others each."""
    rng, rows, scores = np.random.default_rng(seed), list[Tensor](), list[list[float]]()
    for picture, spec in zip(pictures.numpy(), wanted, strict=True):
        of = [spec, *(near(spec, others, rng) for _ in range(more))]
        rows.append(features([one.prompt for one in of]))
        scores.append([judge(picture, one).graded for one in of])
    place = {spec: number for number, spec in enumerate(dict.fromkeys(wanted))}
    return Rated(pictures, torch.stack(rows), torch.tensor(scores), torch.tensor([place[spec] for spec in wanted]))


def truths(others: Sequence[Spec], count: int, more: int, seed: int) -> Rated:
    """Rendered pictures; a part of them with a little noise, which the verifier sees too."""
    rng = np.random.default_rng(seed)
    wanted = [others[int(n)] for n in rng.integers(len(others), size=count)]
    pictures = np.stack([scene(spec, rng) for spec in wanted]).astype(np.float64)
    spread = np.where(rng.random(count) < 0.5, 0.0, rng.uniform(0, 12, count))[:, None, None, None]
    pictures = np.clip(pictures + spread * rng.standard_normal(pictures.shape), 0, 255).round().astype(np.uint8)
    return rated(torch.from_numpy(pictures), wanted, more, others, seed + 1)


def train(a: argparse.Namespace, found: Rated, others: Sequence[Spec], began: float) -> PixelScorer:
    torch.manual_seed(a.seed)
    network, order = PixelScorer(), torch.Generator().manual_seed(a.seed)
    optimizer = torch.optim.AdamW(network.parameters(), a.lr, weight_decay=1e-2)
    late = 0.0
    for step in range(a.steps):
        done = step / a.steps
        optimizer.param_groups[0]["lr"] = a.lr * min(1.0, (step + 1) / 50) * (1 + np.cos(np.pi * done)) / 2
        rows = torch.randint(len(found.pictures), (a.batch * 2 // 3,), generator=order)
        fresh = truths(others, a.batch // 3, a.more, 10**6 * (a.seed + 1) + 2 * step)
        pictures = torch.cat([found.pictures[rows], fresh.pictures])
        asks, score = torch.cat([found.asked[rows], fresh.asked]), torch.cat([found.score[rows], fresh.score])
        pixels = pictures.permute(0, 3, 1, 2).float() / 255
        cells = network.seen(pixels).repeat_interleave(score.shape[1], 0)
        loss = F.binary_cross_entropy_with_logits(network.judged(cells, asks.flatten(0, 1)), score.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        late += (float(loss.detach()) - late) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            log("train", began, step=step + 1, loss=round(late, 4))
    return network.requires_grad_(False).eval()


def held_out(model: Model, split: Split, pictures: int, seed: int) -> Rated:
    """Pictures of every prompt of a split, drawn by ten and by four steps."""
    wanted = [spec for spec in specs(split) for _ in range(pictures)]
    found = [drawn(model, wanted, steps, (steps,), seed + steps) for steps in (10, 4)]
    return rated(torch.cat(found), wanted * 2, 0, wanted, seed)


def told(network: PixelScorer, held: Rated) -> dict[str, float]:
    """How near the network comes to the verifier."""
    parts = [
        network(pixels.permute(0, 3, 1, 2).float() / 255, asks)
        for pixels, asks in zip(held.pictures.split(256), held.asked[:, 0].split(256), strict=True)
    ]
    said, score = torch.cat(parts), held.score[:, 0]
    centred = [torch.stack([of - mean[held.owner], score])[0] for of, mean in ((said, _means(said, held.owner)),)]
    within = _correlation(centred[0], score - _means(score, held.owner)[held.owner])
    right = {0.1: [0, 0], 0.0: [0, 0]}
    for owner in held.owner.unique().tolist():
        rows = (held.owner == owner).nonzero()[:, 0].tolist()
        for one, other in combinations(rows, 2):
            gap = float(score[one] - score[other])
            for least, count in right.items():
                if abs(gap) > least:
                    count[0] += int((float(said[one] - said[other]) > 0) == (gap > 0))
                    count[1] += 1
    return {
        "correlation": round(_correlation(said, score), 4),
        "within_prompts": round(within, 4),
        "error": round(float((said - score).abs().mean()), 4),
        "pair_accuracy": round(right[0.1][0] / right[0.1][1], 4),
        "pairs": right[0.1][1],
        "pair_accuracy_any_gap": round(right[0.0][0] / right[0.0][1], 4),
        "scorer": round(float(said.mean()), 4),
        "verifier": round(float(score.mean()), 4),
    }


def _means(x: Tensor, owner: Tensor) -> Tensor:
    count = int(owner.max()) + 1
    return torch.zeros(count).index_add(0, owner, x) / owner.bincount(minlength=count)


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    began, model, others = time.process_time(), load("shapes"), specs("train")
    rng = np.random.default_rng(a.seed)
    pictures, wanted = list[Tensor](), list[Spec]()
    for steps, nodes in QUALITIES:
        some = [others[int(n)] for n in rng.integers(len(others), size=a.walks)]
        pictures.append(drawn(model, some, steps, nodes, a.seed + steps))
        wanted += some * len(nodes)
    found = rated(torch.cat(pictures), wanted, a.more, others, a.seed)
    log("drawn", began, pictures=len(found.pictures), graded=round(float(found.score[:, 0].mean()), 4))
    network = train(a, found, others, began)
    made = {"licence": model.licence, "trained_on": "the graded shapes verifier", "shapes": " ".join(SHAPES)}
    save(network, a.out, made)
    kept = load_scorer(a.out)
    for split in ("validation", "test"):
        held = held_out(model, split, a.held, a.seed + 100)
        log(split, began, prompts=len(specs(split)), pictures=len(held.pictures), **told(kept, held))


def log(what: str, began: float, **line: object) -> None:
    seconds = round(time.process_time() - began, 1)
    print(json.dumps({"what": what, **line, "cpu_seconds": seconds}), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", dest="out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--walks", type=int, default=3000, help="of the base model, by each number of steps")
    parser.add_argument("--more", type=int, default=3, help="other prompts that a picture is judged for")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=72, help="pictures in a step, a third of them rendered anew")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held", type=int, default=4, help="pictures of a held-out prompt, by ten and by four steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
