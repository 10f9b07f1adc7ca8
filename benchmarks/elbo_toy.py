"""Why `elbo_pg` by its defaults closes little of the toy's gap: one change at a time, on the mixture of `tests/toys`.

    python -m benchmarks.elbo_toy [--only NAME …] [--seeds 5 6 7]

Six steps, groups of twelve, two groups a prompt, two updates an iteration, AdamW at 6e-3 falling to 0 over 50
iterations, KL 0: the toys' own settings, with the rollout and the advantage of the released scripts (ODE,
0.1·(R − mean)). Prints the share of the gap that is closed by seed, and the spread of a prompt's points at the end.
Before that, how far the policy moves in an iteration's first update, mean |δ|, beside the mean |A| that moves it: the
proximal objective's optimum would be δ = A.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / room) for room in ("toys", "train")]

from mixture import PROMPTS, Mixture, bench, gap_closed, mean_reward, samples, train  # noqa: E402

from tempflow.algorithms import Algorithm, diffusion_nft, elbo_pg  # noqa: E402
from tempflow.core.objective.likelihood import PolicyGradient  # noqa: E402
from tempflow.core.objective.regularizer import PredictionDistance  # noqa: E402
from tempflow.train.experience import credit  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One change: another algorithm, rate, number of iterations, or setting of the bench."""

    algorithm: Algorithm
    rate: float = 6e-3
    iterations: int = 50
    betas: tuple[float, float] = (0.9, 0.999)
    setting: Mapping[str, Any] = field(default_factory=dict)


def elbo(**fields: Any) -> Algorithm:
    return elbo_pg(**{"steps": 6, "group": 12, "kl": 0.0, **fields})


def anchored(coefficient: float) -> Algorithm:
    """With a squared velocity distance to old, and the advantage not scaled down."""
    plain = elbo(gain=1.0)
    assert isinstance(plain.objective, PolicyGradient)
    return plain.taught(replace(plain.objective, regularizers=(PredictionDistance("old", coefficient),)))


CASES: Mapping[str, Case] = {
    "defaults": Case(elbo()),
    "gain 10": Case(elbo(gain=10.0)),
    "AdamW's β2 0.9": Case(elbo(), betas=(0.9, 0.9)),
    "groups of 48": Case(elbo(group=48)),
    "old follows at once": Case(elbo(lag="type0")),
    "20 steps": Case(elbo(steps=20)),
    "uniform surrogate": Case(elbo(likelihood="uniform")),
    "t2 surrogate": Case(elbo(likelihood="t2")),
    "one update": Case(elbo(), setting={"updates": 1}),
    "rate 2e-3, 150 iterations": Case(elbo(), 2e-3, 150),
    "rate 3e-3, 100 iterations": Case(elbo(), 3e-3, 100),
    "150 iterations": Case(elbo(), iterations=150),
    "rate 1e-3": Case(elbo(), 1e-3),
    "KL 1e-2": Case(elbo(kl=1e-2)),
    "anchor to old 0.1, gain 1": Case(anchored(0.1)),
    "anchor to old 0.5, gain 1": Case(anchored(0.5)),
    "pepg": Case(elbo(kind="pepg")),
    "pepg, gain 1": Case(elbo(kind="pepg", gain=1.0)),
    "group's scale, gain 1": Case(elbo(scale="group", gain=1.0)),
    "group's scale, gain 1, rate 2e-3, 150 iterations": Case(elbo(scale="group", gain=1.0), 2e-3, 150),
    "sde": Case(elbo(rollout="sde")),
    "diffusion_nft, A = R − mean": Case(
        replace(diffusion_nft(steps=6, group=12, kl=0.0, advantage_max=1.0), credit=elbo(gain=1.0).credit)
    ),
}


def moved(rate: float, iterations: int = 10) -> tuple[list[float], list[float]]:
    """Mean |A| and mean |δ| after the first of two updates, by iteration, at a constant rate."""
    run = bench(elbo(), seed=5)
    advantage, shift = list[float](), list[float]()
    for iteration in range(iterations):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        experience = run.collect(iteration, PROMPTS * 2)
        advantage.append(float(credit(run.context, experience).advantage.value.abs().mean()))
        # the metric is a mean over both updates, and δ is 0 at the first
        shift.append(2 * run.update(experience, iteration)["log_ratio_abs"])
    return advantage, shift


def closed(case: Case, seed: int) -> tuple[float, float]:
    """The share of the gap, and the deviation of a prompt's points."""
    run = bench(case.algorithm, seed=seed, **case.setting)
    for group in run.optimizer.param_groups:
        group["betas"] = case.betas
    train(run, case.iterations, 2, case.rate)
    points = samples(run.model)[0].view(len(PROMPTS), -1, 2)
    return gap_closed(mean_reward(Mixture()), mean_reward(run.model)), float(points.std(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7])
    a = parser.parse_args()
    torch.set_num_threads(1)
    for rate in (6e-3, 2e-3):
        advantage, shift = moved(rate)
        print(f"rate {rate:g}: |A| {' '.join(f'{v:.3f}' for v in advantage)}")
        print(f"            |δ| {' '.join(f'{v:.3f}' for v in shift)}", flush=True)
    print("\n| change | gap closed, by seed | spread at the end |\n|---|---|---|")
    for name in a.only:
        found = [closed(CASES[name], seed) for seed in a.seeds]
        gaps, spreads = (" ".join(f"{v:.2f}" for v in column) for column in zip(*found, strict=True))
        print(f"| {name} | {gaps} | {spreads} |", flush=True)


if __name__ == "__main__":
    main()
