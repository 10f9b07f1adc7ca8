"""How much of an iteration's gradient is signal: TempFlow-GRPO beside Flow-GRPO at the untrained `shapes` model.

    python -m benchmarks.snr [--iterations 24]

Gradients of independent iterations from the same weights (no update is made) give, without bias, the squared length of
their mean (the signal, by inner products of different iterations) and of what is left (the noise). Adam's progress in a
noisy regime grows with the signal-to-noise ratio, so its value for equal forwards is what a method's design buys. All
is shown by step too, with the share of the signal that each step gives and the reward's spread where groups are drawn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.learning import METHODS
from tempflow.algorithms.lesson import Batch
from tempflow.config import parse_config
from tempflow.core.groups import moments
from tempflow.data.prompts import load_prompts
from tempflow.data.sampler import prompts_for
from tempflow.media import Size
from tempflow.models import load
from tempflow.recipes.shapes import REWARDS
from tempflow.rewards import build
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import Advantages, Experience, credit
from tempflow.train.source import collect
from tempflow.train.update import lessons, predictors

SIZE = Size(32, 32)


@dataclass(frozen=True, eq=False)
class Seen:
    """gradients [I, T−1, D] by iteration and step; spread [I, T−1]; forwards, edges and rewards of an iteration."""

    gradients: Tensor
    spread: Tensor
    forwards: float
    edges: float
    rewards: float

    @property
    def rms(self) -> Tensor:
        """[T−1], of each step's gradients."""
        return self.gradients.float().square().sum(2).mean(0).sqrt()


def setting_of(method: str) -> tuple[Context, int]:
    fields, prompts = METHODS[method]
    config = parse_config({"name": method, "iterations": 1, "algorithm": fields, "rewards": REWARDS})
    model = load("shapes", revision=None, dtype="float32", device="cpu")
    model.train_fully()
    algorithm = config.algorithm.build()
    return Context(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(algorithm.steps, SIZE),
        size=SIZE,
        guidance=1.0,
        rewards=[build(r["name"]) for r in REWARDS],
        seed=7,
        rollout_rows=192,
        train_rows=96,
        updates=1,
        max_grad_norm=1.0,
        sets={},
    ), prompts


def gradient(context: Context, experience: Experience, given: Advantages, rows: Tensor, valid: int) -> Tensor:
    """Of the mean loss over `valid` edges, from the edges `rows`, flat."""
    parameters = [p for p in context.model.network.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None
    models, phase = predictors(context, experience.prompts), context.algorithm.first
    (lesson,) = lessons(context, experience.prompts, experience.iteration, experience, [given])
    for part in rows.split(context.train_rows):
        zeros, count = torch.zeros_like(part), len(part)
        batch = Batch(part, zeros, torch.arange(count), count, valid, 1)
        (phase.loss(models, lesson, batch).value * (count / valid)).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def measure(method: str, iterations: int) -> Seen:
    context, count = setting_of(method)
    prompts = load_prompts("shapes:train")
    kinds = [str(p.metadata.get("kind", "")) for p in prompts]
    steps = context.algorithm.steps - 1
    gradients, spreads, edges = list[Tensor](), list[Tensor](), 0
    counter = Counter()
    for iteration in range(iterations):
        chosen = prompts_for(iteration, prompts, count, context.seed, strata=kinds)
        experience = collect(context, [prompts[i] for i in chosen], iteration, counter, Clock())
        given, whole = credit(context, experience), experience.whole
        trained = whole.edges.trained & given.advantage.ok
        edges += int(trained.sum())
        value, _ = whole.backup(*experience.scores.total(context.algorithm.credit.reward_weights))
        deviation = moments(value, trained, context.algorithm.credit.groups(whole.edges), unbiased=False)[1]
        here = [trained & given.advantage.live & (whole.edges.step == i) for i in range(steps)]
        gradients.append(
            torch.stack(
                [gradient(context, experience, given, h.nonzero()[:, 0], int(trained.sum())) for h in here]
            ).bfloat16()
        )
        spreads.append(torch.stack([deviation[trained & (whole.edges.step == i)].mean() for i in range(steps)]))
    rewards = counter.decodes / iterations
    return Seen(
        torch.stack(gradients),
        torch.stack(spreads),
        counter.rollout / iterations + edges / iterations,
        edges / iterations,
        rewards,
    )


def products(gradients: Tensor) -> Tensor:
    """[I, I] inner products in float64, of [I, D]."""
    wide = gradients.float()
    return (wide @ wide.T).double()


def power(inner: Tensor) -> tuple[float, float]:
    """Signal and noise power from inner products of independent gradients."""
    count = len(inner)
    own = inner.diagonal().mean().item()
    signal = (inner.sum().item() - inner.diagonal().sum().item()) / (count * (count - 1))
    return signal, own - signal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--methods", nargs="+", default=["tempflow", "flow_group"])
    a = parser.parse_args()
    means: dict[str, tuple[Tensor, float]] = {}
    for method in a.methods:
        seen = measure(method, a.iterations)
        whole = seen.gradients.float().sum(1)
        signal, noise = power(products(whole))
        means[method] = (whole.mean(0), signal)
        print(
            f"{method}: {seen.forwards:.0f} forwards, {seen.rewards:.0f} pictures and {seen.edges:.0f} edges an "
            f"iteration; signal {signal:.3g}, noise {noise:.3g}, ratio {signal / noise:.4f}, "
            f"for 1000 forwards {1000 * signal / noise / seen.forwards:.5f}"
        )
        for i in range(seen.gradients.shape[1]):
            s, n = power(products(seen.gradients[:, i]))
            print(
                f"  step {i}: signal {s:.3g}, noise {n:.3g}, ratio {s / n:+.4f}, "
                f"spread of the reward in a group {seen.spread[:, i].mean():.3f}"
            )
        flat = seen.gradients.float() / seen.rms[:, None]
        signal, noise = power(products(flat.sum(1)))
        print(
            f"  every step's gradient at one size: ratio {signal / noise:.4f}, "
            f"for 1000 forwards {1000 * signal / noise / seen.forwards:.5f}"
        )
    names = list(means)
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            (g, s), (h, t) = means[first], means[second]
            if min(s, t) <= 0:
                print(f"{first} and {second}: no signal above the noise, so no cosine; take more iterations")
                continue
            cosine = float((g.double() * h.double()).sum()) / (s * t) ** 0.5
            print(f"cosine of mean gradients of {first} and {second}, noise taken out: {cosine:.2f}")


if __name__ == "__main__":
    main()
