"""Two modes on a line: distribution matching alone loses one where its fake score lags; DP-DMD keeps both.

    python -m benchmarks.two_modes [--updates 500] [--seeds 3] [--output FILE]

The teacher is exact: the velocity of ½N(−1.5, .2²) + ½N(1.5, .2²). The student is a small network that regressed that
velocity, so it draws both modes, and it walks four Euler steps on σ = 1, .9, .75, .5, 0. Two ways to train it, by the
objectives of the package's algorithms:

    dmd       `dmd2(stop="end", through=None)`: matching of the last state, through all four steps
    dp_dmd    `dp_dmd`: the same by the noisy x_t on steps 2 to 4 behind a cut; the first step's velocity regresses the
              teacher's, half of ten steps from the same noise. λ = 1: here both losses are of one size

with two models of the student's own samples:

    exact     the posterior mean over 256 samples of the student as it is now
    lagging   a network, as the student at first, that takes one step for each of the student's, ten times smaller

t is uniform in [.02, .98] for both. For each seed, over the second half of the updates: the share of samples on the
emptier side (½ is the teacher's), its mean and its least; and the mean share of samples within three deviations of a
mode. A fake score that lags lets the student swing from mode to mode, so one moment tells little. Where it is exact,
matching alone keeps both modes too. float32, one thread.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from tempflow.algorithms import dmd2, dp_dmd
from tempflow.core.distill import velocity_error
from tempflow.core.likelihood_proxy import corrupt, velocity_of_x0
from tempflow.core.objective.edges import Predict
from tempflow.core.objective.noises import NoiseBatch
from tempflow.core.rng import Stream
from tempflow.core.schedule import explicit
from tempflow.core.unroll import unroll

MODES, SPREAD = torch.tensor([-1.5, 1.5]), 0.2
GRID = explicit((1, 0.75, 0.5, 0.25), 3.0)
BATCH, OTHERS = 64, 256
RATE, LAG = 1e-3, 0.1
EVERY = 5
METHODS, FAKES = ("dmd", "dp_dmd"), ("exact", "lagging")


def teacher(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    """E[ε − x0 | x_t] of the two modes, [B, 1]."""
    t = sigma.view(-1, 1)
    variance = (1 - t).square() * SPREAD**2 + t.square()
    gap = x - (1 - t) * MODES
    mode = (-gap.square() / (2 * variance)).softmax(1)
    clean = (mode * (MODES + (1 - t) * SPREAD**2 / variance * gap)).sum(1, keepdim=True)
    return (x - clean) / t


class Network(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        t = sigma.view(-1, 1)
        return self.layers(torch.cat([x, t, t * t, (3 * t).cos(), x * t, (6 * t).sin()], 1))


@dataclass(frozen=True)
class Draws:
    """Everything random in a run, from one generator."""

    generator: Generator

    def noise(self, count: int = BATCH) -> Tensor:
        return torch.randn(count, 1, generator=self.generator)

    def times(self, low: float = 0.02, high: float = 0.98) -> Tensor:
        return low + (high - low) * torch.rand(BATCH, generator=self.generator)


def rows(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.long)


def walked(network: Predict, noise: Tensor) -> Tensor:
    """The student's samples, without gradients."""
    return unroll(noise, GRID, network, rows(noise), last=0).x


def pretrained(updates: int = 800) -> Network:
    """The student that regressed the teacher's velocity."""
    torch.manual_seed(0)
    network, draws = Network(), Draws(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - update / updates)
        t, side = draws.times(1e-3, 1.0), torch.randint(0, 2, (BATCH,), generator=draws.generator)
        x = corrupt(MODES[side, None] + SPREAD * draws.noise(), draws.noise(), t)
        step(optimizer, velocity_error(network(x, t, rows(x)), teacher(x, t, rows(x))).mean())
    return network


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def posterior_mean(samples: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] where x0 is any of `samples` [N, 1], alike."""
    s = t.view(-1, 1)
    weight = (-(x - (1 - s) * samples.T).square() / (2 * s.square())).softmax(1)
    return weight @ samples


def losses(method: str) -> tuple[Any, Any]:
    """The fake score's objective and the student's, as the algorithm has them, with the same times."""
    plain = dmd2(stop="end", through=None, teacher_guidance=1.0)
    diverse = dp_dmd(teacher_guidance=1.0, teacher_steps=10, taught=5, weight=1.0)
    if method == "dmd":
        fake, student = (phase.objective for phase in plain.phases)
        return fake, student
    fake, student = (phase.objective for phase in diverse.phases)
    times = plain.objective.times
    return replace(fake, times=times), replace(student, matching=replace(student.matching, times=times))


def batch(seed: int, update: int, count: int = BATCH) -> NoiseBatch:
    """Fresh starting noises."""
    ids = tuple((0, update, 0, number) for number in range(count))
    x = Stream(seed, "start").normal(ids, (1,)).float()
    return NoiseBatch(x, rows(x), ids, seed, GRID)


def exact(student: Network, seed: int, update: int) -> Predict:
    """The velocity that the student's samples have, by a fresh lot of them."""
    own = walked(student, Stream(seed, "others").normal([(update, n) for n in range(OTHERS)], (1,)).float())

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return velocity_of_x0(x, posterior_mean(own, x, sigma.to(x)), sigma.to(x))

    return predict


def train(start: Network, method: str, fake: str, updates: int, seed: int, watch: Callable[[Network], None]) -> Network:
    """The student after so many updates; `watch` sees it before every `EVERY`-th."""
    student, model = copy.deepcopy(start), copy.deepcopy(start)
    optimizer = torch.optim.AdamW(student.parameters(), RATE, betas=(0.9, 0.95))
    follower = torch.optim.AdamW(model.parameters(), RATE * LAG, betas=(0.9, 0.95))
    follows, matching = losses(method)
    for update in range(updates):
        if update % EVERY == 0:
            watch(student)
        own = exact(student, seed, update) if fake == "exact" else model
        step(optimizer, matching({"policy": student, "reference": teacher, "fake": own}, batch(seed, 2 * update)).value)
        if fake == "lagging":
            step(follower, follows({"policy": student, "fake": model}, batch(seed, 2 * update + 1)).value)
    return student


def samples(student: Network, count: int = 4096) -> Tensor:
    """What it draws from fixed noises, [count]."""
    return walked(student, torch.randn(count, 1, generator=torch.Generator().manual_seed(99)))[:, 0]


def rarer(x: Tensor) -> float:
    """The share of the samples that lie on the emptier side."""
    left = float((x < 0).float().mean())
    return min(left, 1 - left)


def near(x: Tensor) -> float:
    """The share of samples within three deviations of a mode."""
    return float(((x[:, None] - MODES).abs().amin(1) < 3 * SPREAD).float().mean())


@dataclass(frozen=True)
class Seen:
    """Of one run: the student's samples at the end, and by update the shares `rarer` and `near`."""

    end: Tensor
    rarer: list[float]
    near: list[float]

    @property
    def line(self) -> tuple[float, float, float]:
        """Over the second half of the updates: mean and least of the one, mean of the other."""
        half = len(self.rarer) // 2
        late, close = self.rarer[half:], self.near[half:]
        return sum(late) / len(late), min(late), sum(close) / len(close)


def run(start: Network, method: str, fake: str, updates: int, seed: int) -> Seen:
    shares, close = list[float](), list[float]()

    def watch(student: Network) -> None:
        x = samples(student, 512)
        shares.append(rarer(x))
        close.append(near(x))

    end = samples(train(start, method, fake, updates, seed, watch))
    return Seen(end, shares, close)


def draw(runs: dict[tuple[str, str], list[Seen]], file: Path) -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False)
    for column, fake in enumerate(FAKES):
        above, below = axes[0, column], axes[1, column]
        for method, colour in zip(METHODS, ("tab:red", "tab:blue"), strict=True):
            ends = torch.cat([seen.end for seen in runs[fake, method]]).clamp(-3, 3)
            above.hist(ends, bins=120, range=(-3, 3), density=True, histtype="step", label=method, color=colour)
            for seen in runs[fake, method]:
                below.plot(range(0, EVERY * len(seen.rarer), EVERY), seen.rarer, color=colour, alpha=0.6, lw=1)
        above.set(title=f"{fake} fake score", xlabel="samples after the last update, all seeds", ylim=(0, 3))
        below.set(xlabel="student update", ylabel="share of the rarer mode", ylim=(0, 0.52))
    axes[0, 0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/img/two_modes.png"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    start = pretrained()
    before = samples(start)
    print(f"start: rarer mode {rarer(before):.3f}, near a mode {near(before):.3f}")
    print("| fake score | method | rarer mode: mean, least; near a mode (each seed) |\n|---|---|---|")
    runs: dict[tuple[str, str], list[Seen]] = {}
    for fake in FAKES:
        for method in METHODS:
            seen = [run(start, method, fake, a.updates, seed) for seed in range(a.seeds)]
            runs[fake, method] = seen
            cells = " / ".join(", ".join(f"{value:.3f}" for value in one.line) for one in seen)
            print(f"| {fake} | {method} | {cells} |", flush=True)
    draw(runs, a.output)
    print(f"drawn to {a.output}")


if __name__ == "__main__":
    main()
