"""What a second-order solver saves on `shapes`: distance from the exact flow, and the strict score, by steps.

    python -m benchmarks.solvers [--prompts 240] [--exact 200]

Same prompts and noise for all; "exact" is Euler in many steps. Distance: root mean square over latents, of the exact
latents' own root mean square.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.runs import table
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.solver import SOLVERS, Solver
from tempflow.data.prompts import load_prompts
from tempflow.evaluate.suite import fixed_prompts
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.protocol import Model
from tempflow.request import Prompt
from tempflow.rewards import build, score_all

SIZE, STEPS = Size(32, 32), (4, 6, 8, 10)


def latents(model: Model, prompts: list[Prompt], steps: int, solver: Solver | None) -> Tensor:
    """[N, *S], a picture a prompt."""
    predict = model.predictor(model.encode(prompts, SIZE), 1.0)
    grid, shape = model.schedule(steps, SIZE), model.noise_shape(SIZE)
    chain = plan.ode(steps, 1)
    forest = rollout(
        [chain] * len(prompts), ODE(), grid, predict, Noise(4321), shape=shape, solver=solver, max_rows=192
    )
    return forest.nodes[forest.leaves.node]


def strict(model: Model, prompts: list[Prompt], x: Tensor) -> float:
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    scores = score_all([build("shapes_strict")], model.decode(x, SIZE), texts, metadata, list(range(len(prompts))))
    return scores.value[:, 0].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--exact", type=int, default=200, help="Euler steps of the reference")
    a = parser.parse_args()
    model, prompts = load("shapes"), fixed_prompts(load_prompts("shapes:validation"), a.prompts)
    exact = latents(model, prompts, a.exact, None)
    scale = exact.square().mean().sqrt()
    rows = [["euler", str(a.exact), "0", f"{strict(model, prompts, exact):.3f}"]]
    for name, solver in SOLVERS.items():
        for steps in STEPS:
            x = latents(model, prompts, steps, solver)
            away = ((x - exact).square().mean().sqrt() / scale).item()
            rows.append([name, str(steps), f"{away:.3f}", f"{strict(model, prompts, x):.3f}"])
    print(table(["solver", "forwards a picture", "distance", "strict"], rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
