"""How often a latent reward is right where Step-GRPO asks it: among candidates drawn from one state.

    python -m benchmarks.latent_reward --dynamics flow --noise-level 0.9 --steps 6

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

from tempflow.core import plan
from tempflow.core.dynamics import CPS, DanceSDE, Dynamics, FlowSDE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.latent_reward import LatentReward, bind
from tempflow.models import SD3, load
from tempflow.models.protocol import Predict
from tempflow.rewards.shapes import ShapesReward
from tempflow.shapes.prompts import balanced

SIZE = (32, 32)
ROWS = 512
DYNAMICS = {"flow": FlowSDE, "cps": CPS, "dance": DanceSDE}


def finished(predict: Predict, schedule: Schedule, x: Tensor, start: int, rows: Tensor) -> Tensor:
    """Latents at σ = 0, by ODE steps from `start`."""
    sigmas = schedule.sigmas
    for i in range(start, schedule.steps):
        parts = zip(x.split(ROWS), rows.split(ROWS), strict=True)
        v = torch.cat([predict(a, sigmas[i].expand(len(a)), r) for a, r in parts])
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


@torch.no_grad()
def table(model: SD3, reward: LatentReward, dynamics: Dynamics, a: argparse.Namespace) -> list[dict[str, float]]:
    """One row a step: σ of the candidates, share of sibling pairs that the reward orders as their ends are graded."""
    known = {s.prompt for s in balanced("train", 4000)}  # those that the package's reward was trained on
    texts = [p for p in dict.fromkeys(s.prompt for s in balanced("validation", 4000)) if p not in known][: a.prompts]
    schedule, condition = model.schedule(a.steps, SIZE), model.encode(texts)
    predict, score = model.predictor(condition, 1.0), bind(model, reward, condition)
    forest = rollout(
        [plan.candidates(a.steps, a.chains, a.candidates)] * len(texts),
        dynamics,
        schedule,
        predict,
        Noise(a.seed),
        shape=model.noise_shape(SIZE),
        max_rows=ROWS,
    )
    lines = []
    for step in range(a.steps - 1):
        edges = (forest.edges.step == step).nonzero().squeeze(1)
        x, rows = forest.nodes[forest.edges.child[edges]], forest.edges.prompt[edges]
        sigma = schedule.sigmas[step + 1]
        judged = torch.cat(
            [score(b, sigma.expand(len(b)), r) for b, r in zip(x.split(ROWS), rows.split(ROWS), strict=True)]
        )
        ends = finished(predict, schedule, x, step + 1, rows)
        graded = ShapesReward().score(model.decode(ends, SIZE), [texts[r] for r in rows.tolist()], [{}] * len(rows))
        order = forest.edges.parent[edges].argsort(stable=True)
        best = graded.value[order, 0].view(-1, a.candidates).double()
        said = judged[order].view(-1, a.candidates).double()
        gap, told = best[:, :, None] - best[:, None], said[:, :, None] - said[:, None]
        pairs = gap > a.margin
        lines.append(
            {
                "step": step,
                "sigma": round(float(sigma), 4),
                "right": round(float((told > 0)[pairs].double().mean()), 3),
                "pairs": int(pairs.sum()),
                "of": best.numel() * (a.candidates - 1) // 2,
                "spread_of_grades": round(float(best.std(1).mean()), 4),
                "spread_of_reward": round(float(said.std(1).mean()), 4),
            }
        )
    return lines


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
