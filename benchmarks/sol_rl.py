"""What Sol-RL's drafts are worth on `shapes`: how well they rank, what they cost, and (`--final`) what a run gains.

    python -m benchmarks.sol_rl [--prompts 6] [--time-prompts 1] [--repeats 5]     # about six minutes on a slow core
    python -m benchmarks.sol_rl --final --output runs/sol_rl [--budget 190000] [--seeds 0 1 2]

Fidelity: a pool of noises for each prompt, drawn in full (10 steps, float32) and by every kind of draft. Agreement is a
mean over prompts whose pool has any spread. Rewards are coarse, so pools have ties: Kendall is τ_b, Spearman takes mean
ranks, and an overlap draws lots among the tied, so that even the full scores overlap with themselves by less than 1
(row "itself"). Contrast: mean |R − mean of the kept| of the kept noises' full rewards, over the pool's own std.

Time: an iteration of 24-in-24, of 24-in-96 drawn in full, and of Sol-RL, the sides taken in turn, medians of wall time;
ratios stand beside those of their counted forwards. Seconds of the processor ("CPU", and all of the fidelity table) are
for one thread, and hold where other work shares the machine. A precision slower than half of float32 here is left out
unless it is named.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.runs import affordable, gain, lines, run_all, samples, table, tested
from tempflow.algorithms import Algorithm, diffusion_nft, sol_rl
from tempflow.config import Config, GuardsConfig, parse_config
from tempflow.core.credit import Extremes
from tempflow.core.draft import Draft, Precision, kendall, overlap
from tempflow.core.dynamics import ODE
from tempflow.core.plan import ode
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.data.prompts import load_prompts
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.precision import cheap_copy, lack
from tempflow.models.protocol import Model
from tempflow.recipes.shapes import EVALUATION, OPTIMIZER, REWARDS
from tempflow.request import Prompt, asked
from tempflow.rewards import build, score_all
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import credit
from tempflow.train.guards import Guards
from tempflow.train.source import collect
from tempflow.train.update import learn, lessons
from tempflow.train.weights import Drafter, Learner, Trainable, WeightSets

SIZE, SEED, ROWS = Size(32, 32), 11, 192
FULL_STEPS, KEEP = 10, 24
DRAFT_STEPS = (2, 3, 4, 6, 8, 10)
ENDS, SHOWN = (4, 8, 12), 12
"""Sizes of the ends whose overlap is printed, and the one that is drawn."""
FRACTION = 0.6
"""Of the sampler's t that are trained: the paper's table, second-hand."""
CPU = "CPU"
IMAGE = Path("docs/img/sol_rl.png")


# ------------------------------------------------------------------------------------------------------------- fidelity
@dataclass(frozen=True, eq=False)
class Drawn:
    """scores [P, N] of a pool of each prompt; seconds of the processor for the walking alone, for a prompt."""

    scores: Tensor
    seconds: float


def drawn(model: Model, precision: Precision, steps: int, prompts: Sequence[Prompt], pool: int) -> Drawn:
    """Each prompt's pool by so many ODE steps in that precision; noise is a function of prompt and place alone."""
    network = None if precision == "full" else cheap_copy(model.network, model.blocks(model.network), precision)
    predict = model.predictor(model.encode(prompts, SIZE), 1.0, network=network)
    rewards, parts, seconds = [build(r["name"]) for r in REWARDS], [], 0.0
    for slot, prompt in enumerate(prompts):
        began = time.process_time()
        forest = rollout(
            [ode(steps, pool)],
            ODE(),
            model.schedule(steps, SIZE),
            predict,
            Noise(SEED, 0),
            shape=model.noise_shape(SIZE),
            slots=[slot],
            max_rows=ROWS,
        )
        seconds += time.process_time() - began
        media = model.decode(forest.nodes[forest.leaves.node], SIZE)
        scores = score_all(rewards, media, [prompt.text] * pool, [prompt.metadata] * pool, [slot] * pool)
        parts.append(scores.total(None)[0])
    return Drawn(torch.stack(parts), seconds / len(prompts))


def speed(model: Model, precision: Precision) -> float:
    """Rows a second of the processor, of a forward, the best of three."""
    network = None if precision == "full" else cheap_copy(model.network, model.blocks(model.network), precision)
    predict = model.predictor(model.encode(asked(["a red circle"]), SIZE), 1.0, network=network)
    rows, best = ROWS // 2, float("inf")
    with torch.no_grad():
        for _ in range(3):
            began = time.process_time()
            predict(torch.zeros(rows, *model.noise_shape(SIZE)), torch.full((rows,), 0.5), torch.zeros(rows).long())
            best = min(best, time.process_time() - began)
    return rows / best


def usable(model: Model, named: Sequence[Precision] | None) -> list[Precision]:
    """The precisions to look at: those named, or all that work here at half of full's speed or more. Says the rest."""
    if named:
        return list(dict.fromkeys(("full", *named)))
    full, kept = speed(model, "full"), list[Precision](["full"])
    for precision in get_args(Precision)[1:]:
        missing = lack(precision, model.device)
        rate = 0.0 if missing else speed(model, precision)
        if 2 * rate >= full:
            kept.append(precision)
        why = missing or f"{rate:.0f} rows/s against {full:.0f} in full"
        print(f"{precision}: {why}{'' if precision in kept else '; left out'}", flush=True)
    return kept


def contrast(chosen_by: Tensor, full: Tensor, keep: int) -> float:
    """Mean |R − mean of the kept| over the pool's standard deviation, of the full rewards of what a draft chose.

    chosen_by, full: [N], a prompt's scores.
    """
    kept = Draft(len(full), 1).choose(chosen_by, chosen_by.isfinite(), keep, Stream(SEED, "bench"), (0,))
    rewards = full[list(kept)]
    return float((rewards - rewards.mean()).abs().mean() / full.std(unbiased=False))


def agreement(draft: Tensor, full: Tensor, keep: int) -> dict[str, float]:
    """Mean figures over prompts, [P, N] each; prompts of which either side has no spread are left out of all."""
    live = [i for i in range(len(full)) if min(draft[i].unique().numel(), full[i].unique().numel()) > 1]
    rows = [(draft[i].double(), full[i].double()) for i in live]
    figures: dict[str, Callable[[Tensor, Tensor], float]] = {
        "τ": kendall,
        "ρ": lambda a, b: float(spearmanr(a.numpy(), b.numpy()).statistic),
        "contrast": lambda a, b: contrast(a, b, keep),
    }
    for k in ENDS:
        figures[f"best {k}"] = lambda a, b, k=k: overlap(a, b, k)
        figures[f"worst {k}"] = lambda a, b, k=k: overlap(-a, -b, k)
    return {name: statistics.fmean(of(a, b) for a, b in rows) if rows else float("nan") for name, of in figures.items()}


def ties(scores: Tensor) -> tuple[float, float, float]:
    """Of [P, N]: distinct values a pool, the share of its pairs that tie, the share at its highest value; means."""
    count = scores.shape[1]
    counts = [row.unique(return_counts=True)[1] for row in scores]
    tied = [float((c * (c - 1)).sum()) / (count * (count - 1)) for c in counts]
    top = [float((row == row.max()).float().mean()) for row in scores]
    return statistics.fmean(len(c) for c in counts), statistics.fmean(tied), statistics.fmean(top)


def fidelity(a: argparse.Namespace, model: Model, prompts: Sequence[Prompt], precisions: Sequence[Precision]) -> None:
    """Prints the table and draws the figure."""
    full = drawn(model, "full", FULL_STEPS, prompts, a.pool)
    spread = sum(row.unique().numel() > 1 for row in full.scores)
    values, tied, top = ties(full.scores)
    print(
        f"\nfidelity: {len(prompts)} prompts, {spread} with spread, {a.pool} noises each, keep {a.keep}; a pool has "
        f"{values:.1f} different scores, {100 * tied:.0f} % of its pairs tie, {100 * top:.0f} % have its best score"
    )
    names = ["τ", "ρ", *(f"{end} {k}" for k in ENDS for end in ("best", "worst")), "contrast"]
    rows, found = list[list[str]](), dict[tuple[Precision, int], dict[str, float]]()
    for precision in precisions:
        for steps in a.draft_steps:
            same = precision == "full" and steps == FULL_STEPS
            draft = full if same else drawn(model, precision, steps, prompts, a.pool)
            seen = agreement(draft.scores, full.scores, a.keep)
            found[precision, steps] = seen | {"seconds": draft.seconds}
            label = "full (itself)" if same else precision
            cells = [f"{seen[n]:.3f}" for n in names]
            rows.append([label, str(steps), *cells, str(a.pool * steps), f"{draft.seconds:.2f}"])
    random = agreement(torch.rand(full.scores.shape, generator=torch.Generator().manual_seed(0)), full.scores, a.keep)
    rows.append(["by lot", "–", *(f"{random[n]:.3f}" for n in names), "0", "0"])
    print(table(["draft", "steps", *names, "forwards", "seconds"], rows), flush=True)
    draw(found, a.image)


def draw(found: Mapping[tuple[Precision, int], Mapping[str, float]], path: Path) -> None:
    """τ and the overlap of both ends against the seconds of a prompt's draft; points are labelled with steps."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    parts = {"Kendall τ": ["τ"], f"overlap, k = {SHOWN}": [f"best {SHOWN}", f"worst {SHOWN}"]}
    for ax, (label, names) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        for precision in dict.fromkeys(p for p, _ in found):
            points = [(seen, steps) for (p, steps), seen in found.items() if p == precision]
            xs = [seen["seconds"] for seen, _ in points]
            ys = [statistics.fmean(seen[n] for n in names) for seen, _ in points]
            ax.plot(xs, ys, "o-", label=precision)
            for x, y, (_, steps) in zip(xs, ys, points, strict=True):
                ax.annotate(str(steps), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
        ax.set_xlabel("seconds of a prompt's draft", fontsize=9)
        ax.set_ylabel(label, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


# ----------------------------------------------------------------------------------------------------------------- time
def naive(group: int, pool: int) -> Algorithm:
    """All of the pool in full, then the best and worst of it trained."""
    base = diffusion_nft(steps=FULL_STEPS, group=pool, fraction=FRACTION, kl=0.0)
    return replace(base, credit=Extremes(base.credit, group // 2, group - group // 2))


def sides(a: argparse.Namespace, precisions: Sequence[Precision]) -> dict[str, Algorithm]:
    few = [s for s in a.draft_steps if s < FULL_STEPS]
    drafted = {
        f"{a.keep} in {a.pool}, {s} steps{'' if p == 'full' else f', {p}'}": sol_rl(
            FULL_STEPS, a.keep, a.pool, s, fraction=FRACTION, kl=0.0, draft_precision=p
        )
        for p in precisions
        for s in (few if p == "full" else few[-1:])
    }
    plain = diffusion_nft(steps=FULL_STEPS, group=a.keep, fraction=FRACTION, kl=0.0)
    return {f"{a.keep} in {a.keep}": plain, f"{a.keep} in {a.pool}, in full": naive(a.keep, a.pool)} | drafted


class Side:
    """One algorithm, ready to iterate; its weights do not move."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.model = load("shapes")
        self.model.train_fully()
        self.trainable = Trainable(self.model.network)
        weight_sets = WeightSets.of(algorithm, self.trainable)
        self.optimizer = torch.optim.AdamW(self.trainable.masters, lr=0.0, fused=True)
        self.context = Context(
            model=self.model,
            algorithm=algorithm,
            schedule=self.model.schedule(algorithm.steps, SIZE),
            size=SIZE,
            guidance=1.0,
            rewards=[build(r["name"]) for r in REWARDS],
            seed=SEED,
            rollout_rows=ROWS,
            train_rows=ROWS // 2,
            updates=1,
            max_grad_norm=1.0,
            sets={name: weights.network() for name, weights in weight_sets.sets.items()},
            drafter=Drafter.of(algorithm, self.model, self.trainable, weight_sets.sets),
        )
        self.watcher = Guards(GuardsConfig(), lambda iteration, alarms: None, lambda line: None)

    def iterate(self, prompts: Sequence[Prompt]) -> tuple[Clock, Counter]:
        """Iteration 0 again."""
        clock, counter = Clock(), Counter()
        experience = collect(self.context, prompts, 0, counter, clock)
        given = credit(self.context, experience)
        taught = lessons(self.context, prompts, 0, experience, [given])
        learners = {"policy": Learner(self.trainable, self.optimizer)}
        learn(self.context, prompts, taught, learners, counter, clock, self.watcher)
        return clock, counter


def timing(a: argparse.Namespace, prompts: Sequence[Prompt], precisions: Sequence[Precision]) -> None:
    """Prints a table: medians by phase, and ratios to the first two sides."""
    ready = {name: Side(algorithm) for name, algorithm in sides(a, precisions).items()}
    clocks: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    forwards: dict[str, int] = {}
    for repeat in range(a.repeats + 1):
        for name, side in ready.items():
            began = time.process_time()
            clock, counter = side.iterate(prompts)
            forwards[name] = counter.forwards
            if repeat:  # the first warms up
                clocks[name].append({**clock.seconds, CPU: time.process_time() - began})
    phases = ("rollout", "draft", "decode", "reward", "train")
    first, second = list(ready)[:2]
    total = {name: statistics.median(sum(c.values()) - c[CPU] for c in seen) for name, seen in clocks.items()}
    rows = []
    for name, seen in clocks.items():
        split = [f"{statistics.median(c.get(p, 0.0) for c in seen):.2f}" for p in phases]
        ratios = [
            f"{total[name] / total[base]:.2f} ({forwards[name] / forwards[base]:.2f})" for base in (first, second)
        ]
        cpu = statistics.median(c[CPU] for c in seen)
        rows.append([name, *split, f"{total[name]:.2f}", f"{cpu:.2f}", str(forwards[name]), *ratios])
    print(f"\ntime: {len(prompts)} prompts, medians of {a.repeats}, seconds; in brackets the ratio of counted forwards")
    print(table(["side", *phases, "all", CPU, "forwards", f"/ {first}", f"/ {second}"], rows), flush=True)


# ---------------------------------------------------------------------------------------------------------------- final
def finals(a: argparse.Namespace) -> dict[str, dict[int, Config]]:
    """Method → seed → run, each of about `a.budget` forward-equivalents.

    Drawing the pool in full is a draft of all steps: the kept are then drawn twice, to the same pictures, and the
    second time is not counted.
    """
    common = {"steps": FULL_STEPS, "group": a.keep, "fraction": FRACTION, "kl": 0.0, "eps": 0.1}
    pool = {**common, "name": "sol_rl", "pool": a.pool}
    again = a.keep * FULL_STEPS
    methods: dict[str, tuple[dict, int]] = {
        f"{a.keep} in {a.keep}": ({**common, "name": "diffusion_nft"}, 0),
        f"{a.keep} in {a.pool}, in full": ({**pool, "draft_steps": FULL_STEPS}, again),
        f"{a.keep} in {a.pool}, drafts of {a.final_steps}": ({**pool, "draft_steps": a.final_steps}, 0),
    }
    return {name: {seed: final(a, name, *method, seed) for seed in a.seeds} for name, method in methods.items()}


def final(a: argparse.Namespace, name: str, algorithm: Mapping, free: int, seed: int) -> Config:
    label = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    fields = {
        "name": label,
        "seed": seed,
        "iterations": 1,
        "output": str(a.out / label),
        "threads": 1,
        "algorithm": dict(algorithm),
        "data": {"prompts_per_iteration": a.final_prompts},
        "rollout_rows": ROWS,
        "rewards": REWARDS,
        "optimizer": {**OPTIMIZER, "learning_rate": a.rate, "warmup_iterations": 5},
        "evaluation": {**EVALUATION, "validation_prompts": a.validation, "test_prompts": a.test},
    }
    built = parse_config(fields).algorithm.build().seeded(seed)
    iterations = affordable(built, a.final_prompts, a.budget, free=free * a.final_prompts)
    warm = min(5, iterations - 1)
    optimizer = {**fields["optimizer"], "warmup_iterations": warm}
    return parse_config({**fields, "iterations": iterations, "optimizer": optimizer})


def compare(a: argparse.Namespace) -> None:
    """Runs what is not there yet, and prints test scores and each method's paired difference from the first."""
    runs = finals(a)
    run_all([config for by_seed in runs.values() for config in by_seed.values()], a.side_by_side, resume=True)
    scores = {name: np.array([samples(c.output) for c in seeds.values()]) for name, seeds in runs.items()}
    first, rows = next(iter(scores)), list[list[str]]()
    prompts = tested(next(iter(runs[first].values())))
    for name, seen in scores.items():
        config = next(iter(runs[name].values()))
        taus = [
            m["draft/kendall"]
            for c in runs[name].values()
            for m in lines(c.output, "metrics.jsonl")
            if "draft/kendall" in m
        ]
        mean, low, high = gain(seen[:, 1], scores[first][:, 1], prompts)
        less = "–" if name == first else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        tau = f"{statistics.fmean(taus):.2f}" if taus else "–"
        rows.append([name, str(config.iterations), f"{seen[:, 0].mean():.3f}", f"{seen[:, 1].mean():.3f}", less, tau])
    print(f"\nfinal: about {a.budget} forward-equivalents a run, seeds {a.seeds}, strict score on {a.test} pictures")
    print(table(["method", "iterations", "before", "after", f"less {first}, 95 %", "τ of the kept"], rows), flush=True)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="of the fidelity table")
    parser.add_argument("--pool", type=int, default=96)
    parser.add_argument("--keep", type=int, default=KEEP)
    parser.add_argument("--draft-steps", type=int, nargs="+", default=list(DRAFT_STEPS))
    parser.add_argument("--precisions", nargs="+", choices=get_args(Precision)[1:])
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--time-prompts", type=int, default=1, help="0 leaves the timing out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--final", action="store_true", help="whole runs instead: hours")
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/sol_rl"))
    parser.add_argument("--budget", type=int, default=190_000, help="of a run of --final, in forward-equivalents")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--final-prompts", type=int, default=4, help="of an iteration")
    parser.add_argument("--final-steps", type=int, default=4, help="of a draft")
    parser.add_argument("--validation", type=int, default=360)
    parser.add_argument("--test", type=int, default=1008)
    parser.add_argument("--side-by-side", type=int, default=2)
    return parser.parse_args(words)


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    if a.final:
        compare(a)
        return
    model = load("shapes")
    precisions = usable(model, a.precisions)
    every = list(load_prompts("shapes:train"))
    if a.prompts:
        fidelity(a, model, every[:: len(every) // a.prompts][: a.prompts], precisions)
    if a.time_prompts:
        timing(a, every[:: len(every) // a.time_prompts][: a.time_prompts], precisions)


if __name__ == "__main__":
    main()
