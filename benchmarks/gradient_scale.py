"""How large a step's gradient is, by a real backward on `shapes`, against the closed form c = |b|/S times its weight.

    python -m benchmarks.gradient_scale [--prompts 6] [--group 8] [--steps 10] [--output docs/img/gradient_scale.png]

One rollout of noisy chains by Flow-GRPO's step (noise 0.7); its trained edges get advantages ±1 by coin, so that only
steps differ. Each method's loss is then run backward, a step's edges at a time, before any update. Measured twice: at
the network's output (root mean square over edges, for which the closed form is exact but for the noise's own length)
and over all weights, which adds how much each weight moves the velocity at that σ. All weights and both ratios are
compared on the same step and the same rollout, whatever step their papers use. Prints both, with the ratio of the
largest to the smallest step, and draws them relative to their means.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tempflow.core import plan, weight
from tempflow.core.dynamics import FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.edges import EdgeBatch
from tempflow.core.objective.ratio import NormRatio, PolicyRatio, Ratio, StepRatio
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.data.prompts import load_prompts
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.protocol import Model, Predict

SIZE = Size(32, 32)
DYNAMICS = FlowSDE(0.7)
METHODS: Mapping[str, tuple[Ratio, weight.Weight]] = {
    "none (Flow-GRPO)": (StepRatio(), weight.uniform),
    "TempFlow: S": (StepRatio(), weight.noise_aware),
    "Guard, published: 1/Δ": (NormRatio(), weight.inverse_step),
    "Guard, equalised: 1/|b|": (NormRatio(), weight.equalised),
    "Flash: S/|b|": (StepRatio(), weight.rectified),
}


def closed_form(method: str, forest: Forest, schedule: Schedule, steps: Tensor) -> Tensor:
    """w·|b|/S of each step, [T']; times S for Guard's ratio, whose gradient is |b|."""
    ratio, weigh = METHODS[method]
    w = weigh(forest, schedule, DYNAMICS)
    w = torch.stack([w[forest.edges.step == i][0] for i in steps])
    _, b, std = DYNAMICS.coefficients(schedule, steps)
    return w * b.abs() * (1.0 if isinstance(ratio, NormRatio) else 1 / std)


def step_batch(forest: Forest, schedule: Schedule, w: Tensor, coin: Tensor, step: int) -> EdgeBatch:
    edges, rows = forest.edges, (forest.edges.step == step).nonzero()[:, 0]
    assert edges.mean is not None
    return EdgeBatch(
        x=forest.nodes[edges.parent[rows]],
        y=forest.nodes[edges.child[rows]],
        step=edges.step[rows],
        scale=edges.scale[rows],
        rows=edges.prompt[rows],
        log_prob=edges.log_prob[rows],
        advantage=coin[rows],
        weight=w[rows],
        schedule=schedule,
        dynamics=DYNAMICS,
        mean=edges.mean[rows],
    )


def measure(model: Model, predict: Predict, ratio: Ratio, batch: EdgeBatch) -> tuple[float, float]:
    """(an edge's gradient at the output, times √D; the gradient over all weights), before any update."""
    seen: list[Tensor] = []

    def watched(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        v = predict(x, sigma, rows)
        v.retain_grad()
        seen.append(v)
        return v

    model.network.zero_grad()
    loss = PolicyRatio(ratio=ratio)({"policy": watched}, batch)
    worst = float(loss.metrics["log_ratio_abs"].max())
    assert worst < 1e-5, f"log ratio {worst} before any update"
    loss.value.backward()
    (v,) = seen
    assert v.grad is not None
    # the loss is a mean over the batch, and log p one over D elements: both are taken out
    at_output = v.grad.flatten(1).norm(dim=1).square().mean().sqrt() * len(v) * v[0].numel() ** 0.5
    whole = torch.stack([p.grad.norm() for p in model.network.parameters() if p.grad is not None]).norm()
    return float(at_output), float(whole)


def draw(
    steps: Tensor, closed: Mapping[str, Tensor], output: Mapping[str, Tensor], whole: Mapping[str, Tensor], path: Path
) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(METHODS):
        color = f"C{number}"
        left.plot(steps, relative(closed[method]), color=color, lw=1.2)
        mark = {"ls": "", "marker": "s" if "equalised" in method else "o", "ms": 9 if "equalised" in method else 5}
        mark |= {"color": color, "mfc": "none" if "equalised" in method else color}  # it lies under Flash's
        left.plot(steps, relative(output[method]), label=method, **mark)
        right.plot(steps, relative(whole[method]), **(mark | {"ls": "-", "lw": 1}))
    left.set(
        title="at the network's output (dots) and closed form (lines)", ylabel="gradient of a step / mean of steps"
    )
    right.set(title="over all weights of the network")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="step (0: pure noise)")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def relative(values: Tensor) -> Tensor:
    return values / values.mean()


def spread(values: Tensor) -> float:
    return float(values.max() / values.min())


def line(name: str, values: Tensor) -> str:
    return (
        f"  {name:18s}" + " ".join(f"{v:6.3f}" for v in relative(values).tolist()) + f"   max/min {spread(values):6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", dest="out", type=Path, default=Path("docs/img/gradient_scale.png"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    model = load("shapes", dtype="float32")
    model.train_fully()
    schedule = model.schedule(a.steps, SIZE)
    predict = model.predictor(model.encode(load_prompts("shapes:train")[: a.prompts], SIZE), 1.0)
    with torch.no_grad():
        chains = plan.chain(a.steps, a.group, stochastic=range(a.steps - 1))
        noise, shape = Noise(0, 0), model.noise_shape(SIZE)
        # in rows of one step's batch: what a network computes may depend on how many rows it is given
        rows = a.prompts * a.group
        forest = rollout(
            [chains] * a.prompts, DYNAMICS, schedule, predict, noise, shape=shape, max_rows=rows, keep_mean=True
        )
    coin = torch.tensor(Stream(0, "gradient_scale").integers((0,), 2, len(forest.edges))).float() * 2 - 1
    steps = torch.arange(a.steps - 1)
    measured = measure_all(model, predict, forest, schedule, coin, steps)
    closed = {method: closed_form(method, forest, schedule, steps) for method in METHODS}
    output = {method: torch.tensor([m[0] for m in seen]) for method, seen in measured.items()}
    whole = {method: torch.tensor([m[1] for m in seen]) for method, seen in measured.items()}
    print(f"{len(forest.edges)} edges, {a.steps - 1} trained steps; each line relative to its mean over steps")
    for method in METHODS:
        error = (output[method] / closed[method] - 1).abs().max()
        print(f"{method}: measured over closed form within {float(error):.1%}")
        for name, values in (("closed form", closed), ("at the output", output), ("over the weights", whole)):
            print(line(name, values[method]))
    draw(steps, closed, output, whole, a.out)
    print(f"drawn to {a.out}")


def measure_all(
    model: Model, predict: Predict, forest: Forest, schedule: Schedule, coin: Tensor, steps: Tensor
) -> dict[str, list[tuple[float, float]]]:
    measured: dict[str, list[tuple[float, float]]] = {}
    for method, (ratio, weigh) in METHODS.items():
        w = weigh(forest, schedule, DYNAMICS)
        measured[method] = [
            measure(model, predict, ratio, step_batch(forest, schedule, w, coin, int(i))) for i in steps
        ]
    return measured


if __name__ == "__main__":
    main()
