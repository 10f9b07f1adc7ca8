"""What sharing pairs and stratifying t take off the noise of likelihood surrogates: V-GRPO's claims on `shapes`.

    python -m benchmarks.surrogate [--prompts 3] [--redraws 8] [--gradients 10] [--output FILE]

Groups of 24 real samples by the ODE on 16 steps (so that 1, 2, 4 and 8 strata are of one size, and every way of drawing
has one mean), scored by the recipes' rewards. float32, one thread, the untrained model. A redraw draws all (t, ε) anew.

First the surrogate, a mean over `pairs`: its spread over redraws for one sample, within a group (as V-GRPO reports it;
this holds the samples' true differences too), and that of a sample's difference from its group over redraws, which is
the noise that a comparison sees. All are divided by the surrogate's mean. Then what matters: the gradient over all
weights of −mean A·L for one fixed group with fixed advantages at equal forwards, as trace of its covariance over
redraws / |mean|², the mean's square without bias from the inner products of different redraws. ± is a jackknife over
redraws. Prints tables in Markdown, and draws them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.likelihood import Group, group_of, values
from tempflow.core.likelihood_proxy import (
    Adaptive,
    LikelihoodProxy,
    Matching,
    corrupt,
    noise_of_velocity,
    square_error,
)
from tempflow.core.objective.leaves import noised, renoise_leaves
from tempflow.core.renoise import Renoise
from tempflow.core.rng import Stream
from tempflow.core.schedule import Schedule
from tempflow.core.state import Reduce, mean_dims
from tempflow.core.times import Id, StratifiedGridTimes, Times

STEPS = 16
COUNTS = (1, 2, 4, 8)
PAIRS = 4
"""Of a sample, where gradients are taken: V-GRPO's."""


@dataclass(frozen=True)
class NoiseError:
    """−mean (ε̂ − ε)²: the surrogate of a model that predicts noise."""

    def __call__(self, velocity: Tensor, x0: Tensor, noise: Tensor, t: Tensor, mean: Reduce = mean_dims) -> Tensor:
        return -square_error(noise_of_velocity(corrupt(x0, noise, t), velocity, t), noise, mean)


@dataclass(frozen=True)
class RandomTimes:
    """`number` times of the grid, each drawn from all of it."""

    number: int

    def count(self, steps: int) -> int:
        return self.number

    def __call__(self, stream: Stream, ids: Sequence[Id], schedule: Schedule) -> Tensor:
        index = torch.tensor([stream.integers(i, schedule.steps, self.number) for i in ids])
        return schedule.sigmas.double()[index]


SURROGATES: Mapping[str, LikelihoodProxy] = {
    "adaptive x0": Adaptive(),
    "velocity": Matching(0),
    "noise": NoiseError(),
}
TIMES: Mapping[str, Callable[[int], Times]] = {"random": RandomTimes, "stratified": StratifiedGridTimes}
SHARES: Mapping[str, tuple[int | None, int | None]] = {"none": (None, None), "t": (2, None), "t and ε": (2, 2)}
"""Ids are (redraw, slot, root): 2 shares within a prompt's group of one redraw."""


@dataclass(frozen=True)
class Spread:
    """Three coefficients of variation with their errors: over redraws, within a group, of differences."""

    redraw: tuple[float, float]
    within: tuple[float, float]
    difference: tuple[float, float]


def jackknife(statistic: Callable[[Tensor], float], rows: Tensor) -> tuple[float, float]:
    """The statistic of [R, …] and its standard error by leaving out a row at a time."""
    count = len(rows)
    keep = ~torch.eye(count, dtype=torch.bool)
    left = torch.tensor([statistic(rows[k]) for k in keep], dtype=torch.float64)
    error = ((count - 1) * (left - left.mean()).square().mean()).sqrt()
    return statistic(rows), float(error)


def spreads(estimates: Tensor) -> Spread:
    """Of estimates [R, P, G]."""
    size = abs(float(estimates.mean()))
    apart = estimates - estimates.mean(2, keepdim=True)
    group = estimates.shape[2]
    return Spread(
        jackknife(lambda e: float(e.var(0).mean().sqrt()) / size, estimates),
        jackknife(lambda e: float(e.var(2).mean().sqrt()) / size, estimates),
        # a sample's own mean is in its group's: G/(G−1) makes independent noise read the same as over redraws
        jackknife(lambda e: float((e.var(0).mean() * group / (group - 1)).sqrt()) / size, apart),
    )


def true_spread(estimates: Tensor) -> float:
    """The coefficient of variation within a group without any noise, from independent redraws [R, P, G]."""
    noise = estimates.var(0) / len(estimates)
    return float((estimates.mean(0).var(1) - noise.mean(1)).mean().clamp(min=0).sqrt()) / abs(float(estimates.mean()))


@torch.no_grad()
def all_estimates(group: Group, redraws: int) -> dict[tuple[str, str, str, int], Tensor]:
    """[R, P, G] by surrogate, times, share and number of pairs."""
    found: dict[tuple[str, str, str, int], Tensor] = {}
    for times in TIMES:
        # independent times are the same in number whatever follows them: fewer pairs are the first of many
        for number in (max(COUNTS),) if times == "random" else COUNTS[1:]:
            for share in ("none", "t and ε"):
                draws = Renoise(TIMES[times](number), *SHARES[share])
                seen = {name: list[Tensor]() for name in SURROGATES}
                for redraw in range(redraws):
                    for name, value in values(group, draws, redraw, SURROGATES, seed=number).items():
                        seen[name].append(value.double())
                for name, rows in seen.items():
                    whole = torch.stack(rows)  # [R, N, M]
                    for count in COUNTS if times == "random" else (number,):
                        mean = whole[:, :, :count].mean(2).view(redraws, group.prompts, -1)
                        found[name, times, share, count] = mean
    return found


def gradients(group: Group, surrogate: LikelihoodProxy, draws: Renoise, redraws: int, seed: int) -> Tensor:
    """Of −mean A·L over all weights, [R, D]: one group, its advantages fixed, pairs drawn anew each time."""
    parameters = [p for p in group.model.network.parameters() if p.requires_grad]
    found = list[Tensor]()
    for redraw in range(redraws):
        for p in parameters:
            p.grad = None
        batch = renoise_leaves(group.x0, group.advantage, group.rows, group.ids(redraw), draws, seed, group.schedule)
        for part in range(0, len(batch), 24):
            some = batch.take(slice(part, part + 24))
            at = noised({"policy": group.predict}, ("policy",), some)
            estimate = at.by_sample(surrogate(at.policy, at.x0, at.noise, at.t)).mean(1)
            (-(some.advantage * estimate).sum() / len(batch)).backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    return torch.stack(found)


def gram(rows: Tensor) -> Tensor:
    """Inner products, float64, of [N, D]: float32 over a part of D at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(1 << 18, 1):
        total += (part @ part.T).double()
    return total


def noise_of(inner: Tensor) -> float:
    """Trace of the sample covariance from inner products [R, R]."""
    count = len(inner)
    return float((inner.diagonal().sum() - inner.sum() / count) / (count - 1))


def gradient_table(groups: Sequence[Group], redraws: int) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Noise / signal of the gradient by surrogate, times and share, a mean over groups; ± over redraws."""
    cases = [("adaptive x0", times, share) for times in TIMES for share in SHARES]
    cases += [(name, *way) for name in ("velocity", "noise") for way in (("random", "none"), ("stratified", "t and ε"))]
    found = {case: list[tuple[float, float]]() for case in cases}
    for group in groups:
        for name in SURROGATES:
            mine = [case for case in cases if case[0] == name]
            rows = [
                gradients(group, SURROGATES[name], Renoise(TIMES[case[1]](PAIRS), *SHARES[case[2]]), redraws, 100 + k)
                for k, case in enumerate(mine)
            ]
            inner = gram(torch.cat(rows))
            count = len(inner)
            # every way of drawing has the same mean, so all pairs of different redraws tell of it
            signal = float(inner.sum() - inner.diagonal().sum()) / (count * (count - 1))
            for k, case in enumerate(mine):
                own = inner[k * redraws : (k + 1) * redraws, k * redraws : (k + 1) * redraws]
                index = torch.arange(redraws)
                noise, error = jackknife(lambda i, own=own: noise_of(own[i][:, i]), index)
                found[case].append((noise / signal, error / signal))
            print(
                f"  {group.text!r}, {name}: |mean gradient|² {signal:.3g}, {len(rows) * redraws} gradients", flush=True
            )
    return {
        case: (sum(v for v, _ in each) / len(each), sum(e * e for _, e in each) ** 0.5 / len(each))
        for case, each in found.items()
    }


def draw(
    table: Mapping[tuple[str, str, str, int], Spread],
    floor: float,
    gradient: Mapping[tuple[str, str, str], tuple[float, float]],
    path: Path,
) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for color, times in enumerate(TIMES):
        for share, style in (("none", "-"), ("t and ε", "--")):
            label = f"{times}, {'shared' if share != 'none' else 'independent'}"
            counts = COUNTS if times == "random" else COUNTS[1:]
            cells = [table["adaptive x0", times, share, count] for count in counts]
            for axes, pick in ((left, "within"), (middle, "difference")):
                pairs = [getattr(cell, pick) for cell in cells]
                axes.errorbar(
                    counts, [v for v, _ in pairs], [e for _, e in pairs], ls=style, color=f"C{color}", label=label
                )
    left.axhline(floor, color="grey", lw=0.8, label="without noise")
    left.set(title="surrogate: spread within a group / mean", xlabel="pairs", ylabel="coefficient of variation")
    middle.set(title="surrogate: noise of a difference / mean", xlabel="pairs")
    for axes in (left, middle):
        axes.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS, ylim=(0, None))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    cases = [case for case in gradient if case[0] == "adaptive x0"]
    for n, case in enumerate(cases):
        value, error = gradient[case]
        right.bar(n, value, yerr=error, color=f"C{list(TIMES).index(case[1])}", alpha=0.4 + 0.3 * (n % 3))
    right.set(
        title=f"gradient: noise / signal, {PAIRS} pairs",
        xticks=range(len(cases)),
        xticklabels=[f"{times}\n{share}" for _, times, share in cases],
        xlabel="t, and what a group shares",
    )
    right.tick_params(axis="x", labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def plus(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--redraws", type=int, default=8)
    parser.add_argument("--gradients", type=int, default=10)
    parser.add_argument("--groups", type=int, default=1, help="of which gradients are taken")
    parser.add_argument("--output", dest="out", type=Path, default=Path("docs/img/surrogate_variance.png"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    group = group_of(a.prompts, STEPS)
    found = all_estimates(group, a.redraws)
    table = {case: spreads(estimates) for case, estimates in found.items()}
    print(f"{a.prompts} groups of {len(group.x0) // a.prompts}, {a.redraws} redraws\n")
    print(
        "| surrogate | t | pairs | over redraws | within, own | within, shared | difference, own | difference, shared |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in SURROGATES:
        for times in TIMES:
            for count in COUNTS if times == "random" else COUNTS[1:]:  # one stratum is the whole grid
                alone, shared = table[name, times, "none", count], table[name, times, "t and ε", count]
                cells = [plus(alone.redraw), plus(alone.within), plus(shared.within)]
                cells += [plus(alone.difference), plus(shared.difference)]
                print(f"| {name} | {times} | {count} | {' | '.join(cells)} |")
    floors = {name: true_spread(found[name, "stratified", "none", 8]) for name in SURROGATES}
    print("\nspread within a group without noise: " + ", ".join(f"{n} {v:.3f}" for n, v in floors.items()))
    print(f"{time.perf_counter() - began:.0f} s so far; gradients:", flush=True)
    gradient = gradient_table(group.spread_out()[: a.groups], a.gradients)
    print(f"\n{a.gradients} redraws of {PAIRS} pairs each; trace of covariance / |mean|²\n")
    print("| surrogate | t | shared | noise / signal | of the first |")
    print("|---|---|---|---|---|")
    for case, (value, error) in gradient.items():
        first = gradient[case[0], "random", "none"][0]
        print(f"| {' | '.join(case)} | {value:.2f} ± {error:.2f} | {value / first:.2f} ± {error / first:.2f} |")
    draw(table, floors["adaptive x0"], gradient, a.out)
    print(f"\ndrawn to {a.out}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
