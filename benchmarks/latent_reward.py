"""How often a latent reward is right where Step-GRPO asks it: among candidates drawn from one state.

    python -m benchmarks.latent_reward --prompts 60 --chains 1 --dynamics cps --noise-level 0.8

Chains of held-out prompts draw candidates at every step. Each candidate is taken to its end without noise and graded;
the reward is right on a pair of siblings if it puts the better end first. Beside it: the spread (std) among siblings of
grades and of the reward, and the pairs that differ by the margin at all. Training asks no other question of it.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from tempflow.core.dynamics import CPS, DanceSDE, Dynamics, FlowSDE
from tempflow.core.rollout import Noise
from tempflow.latent_reward import LatentReward, LatentScorer, bind, siblings
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.sd3 import SD3
from tempflow.request import asked
from tempflow.rewards.shapes import ShapesReward
from tempflow.shapes.prompts import balanced
from tempflow.stats import interval

SIZE = Size(32, 32)
ROWS = 512
DYNAMICS = {"flow": FlowSDE, "cps": CPS, "dance": DanceSDE}


@torch.no_grad()
def table(model: SD3, reward: LatentReward, dynamics: Dynamics, a: argparse.Namespace) -> list[dict[str, object]]:
    """One row a step: σ of the candidates, share of sibling pairs that the reward orders as their ends are graded."""
    known = {s.prompt for s in balanced("train", 4000)}  # those that the package's reward was trained on
    texts = [p for p in dict.fromkeys(s.prompt for s in balanced("validation", 4000)) if p not in known][: a.prompts]
    condition = model.encode(asked(texts), SIZE)
    rated = siblings(
        texts,
        model.predictor(condition, 1.0),
        model.schedule(a.steps, SIZE),
        dynamics,
        lambda x, prompts: ShapesReward().score(model.decode(x, SIZE), prompts, [{}] * len(prompts)).value[:, 0],
        Noise(a.seed),
        shape=model.noise_shape(SIZE),
        chains=a.chains,
        candidates=a.candidates,
        rows=ROWS,
    )
    assert rated.sigma is not None
    judge, lines = LatentScorer(bind(model, reward, condition), rows=ROWS), list[dict[str, object]]()
    said = judge(rated.latents, rated.sigma, rated.rows).value[:, 0].double()
    order = rated.paired.argsort(stable=True)
    grades, told, level = (v[order].view(-1, a.candidates) for v in (rated.scores.double(), said, rated.sigma))
    prompt = rated.rows[order].view(-1, a.candidates)[:, 0]
    for sigma in rated.sigma.unique().flip(0):
        here = level[:, 0] == sigma
        best, score = grades[here], told[here]
        pairs, right = best[:, :, None] - best[:, None] > a.margin, score[:, :, None] > score[:, None]
        lines.append(
            {
                "sigma": round(float(sigma), 4),
                "right": round(float(right[pairs].double().mean()), 3) if pairs.any() else None,
                "interval": _interval(right, pairs, prompt[here]) if pairs.any() else None,
                "pairs": int(pairs.sum()),
                "of": best.numel() * (a.candidates - 1) // 2,
                "spread_of_grades": round(float(best.std(1).mean()), 4),
                "spread_of_reward": round(float(score.std(1).mean()), 4),
            }
        )
    return lines


def _interval(right: Tensor, pairs: Tensor, prompt: Tensor) -> list[float]:
    """95 % bootstrap interval of the share of pairs that is right; prompts are drawn, with all their states.

    right, pairs: bool [states, candidates, candidates]; prompt: long [states].
    """
    state = pairs.nonzero()[:, 0]
    return [round(v, 3) for v in interval(right[pairs].double().numpy(), clusters=prompt[state].tolist())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="shapes", help="folder of a latent reward")
    parser.add_argument("--dynamics", choices=sorted(DYNAMICS), default="flow")
    parser.add_argument("--noise-level", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--chains", type=int, default=4, help="per prompt")
    parser.add_argument("--candidates", type=int, default=6, help="at every step but the last")
    parser.add_argument("--prompts", type=int, default=40, help="validation prompts that training has not seen")
    parser.add_argument("--margin", type=float, default=0.1, help="least difference of two grades")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    began, model = time.time(), load("shapes")
    for line in table(model, LatentReward.load(a.reward), DYNAMICS[a.dynamics](a.noise_level), a):
        print(json.dumps({"dynamics": a.dynamics, "noise": a.noise_level, **line}), flush=True)
    print(json.dumps({"seconds": round(time.time() - began, 1)}))


if __name__ == "__main__":
    main()
