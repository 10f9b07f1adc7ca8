"""How close tempflow runs to the bare model, all sides measured in turn in one run on `shapes`.

    python benchmarks/floor.py [--prompts 4] [--repeats 5] [--threads 2] [--compile]

Prints ratios: rollout and training pass over the bare transformer at the same row counts and at its fastest batch size;
the wavefront over the same forest sampled the published way (trunk row by row, K children one batch) and row by row;
bfloat16 over float32; peak memory per live row. Forwards counted by a hook on the transformer must equal `cost()`.
With `--compile` both sides' blocks are compiled (`model.compile`), for full batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tempflow.algorithms import tempflow_grpo
from tempflow.config import GuardsConfig
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise
from tempflow.data.prompts import load_prompts
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.tools import Tools
from tempflow.request import Prompt, asked
from tempflow.rewards import build
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import credit
from tempflow.train.guards import Guards
from tempflow.train.source import collect
from tempflow.train.update import learn, lessons
from tempflow.train.weights import Learner, Trainable

SIZE = Size(32, 32)


def setting_for(dtype: str, rows: int, compiled: bool) -> Context:
    model = load("shapes", dtype=dtype)
    model.train_fully()
    for lack in model.equip(Tools(compile=compiled, compile_rows=(rows,))):
        print(lack)
    algorithm = tempflow_grpo(kl=0.0, clip=1e-2)
    return Context(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(algorithm.steps, SIZE),
        size=SIZE,
        guidance=1.0,
        rewards=[build("shapes")],
        seed=0,
        rollout_rows=rows,
        train_rows=rows,
        updates=1,
        max_grad_norm=1.0,
        sets={},
    )


def timed(*sides: Callable[[], float | None], repeats: int) -> list[float]:
    """Median seconds of each side, the sides taken in turn. A side may return its own figure instead."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for i, side in enumerate(sides):
            began = time.perf_counter()
            own = side()
            seconds[i].append(own if own is not None else time.perf_counter() - began)
    return [statistics.median(s) for s in seconds]


def bare(context: Context, batches: list[int], train: bool) -> None:
    """The transformer alone on these row counts: forward, or forward and backward."""
    model, dtype = context.model, next(context.model.network.parameters()).dtype
    condition = model.encode(asked(["a circle"]), SIZE)
    predict = model.predictor(condition, 1.0)
    context = torch.enable_grad if train else torch.no_grad
    for rows in batches:
        x = torch.zeros(rows, *model.noise_shape(SIZE), dtype=dtype)
        with context():
            v = predict(x, torch.full((rows,), 0.5), torch.zeros(rows, dtype=torch.long))
            if train:
                v.float().square().mean().backward()


def sizes_of(context: Context, work: Callable[[], object]) -> list[int]:
    """Row counts of the transformer's calls during `work`, by a hook on the transformer."""
    sizes: list[int] = []
    network: nn.Module = context.model.network
    hook = network.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    work()
    hook.remove()
    return sizes


def published_way(context: Context, texts: list[str], children_at_once: bool) -> int:
    """The same forest without the wavefront: trunk step by step, then each branch point's K children to the end, as one
    batch or one by one. Returns the rows given to the transformer."""
    model, algorithm, schedule = context.model, context.algorithm, context.schedule
    dynamics = algorithm.dynamics
    assert dynamics is not None
    predict = model.predictor(model.encode(asked(texts), SIZE), 1.0)
    noise, shape = Noise(0), model.noise_shape(SIZE)
    rows_given, seeds, branches = 0, 4, 6

    def velocity(x: torch.Tensor, i: int, slot: int) -> torch.Tensor:
        nonlocal rows_given
        rows_given += len(x)
        return predict(x, schedule.at(torch.full((len(x),), i)), torch.full((len(x),), slot))

    with torch.no_grad():
        for slot in range(len(texts)):
            for seed in range(seeds):
                trunk = noise.initial([(slot, seed)], shape)
                for i in range(algorithm.steps - 1):
                    step = torch.tensor([i])
                    v = velocity(trunk, i, slot)
                    law = dynamics.transition(trunk, v, schedule, step)
                    z = noise.edge([(slot, seed, *[branches] * i, k, i) for k in range(branches)], shape)
                    children = torch.cat([law.sample(z[k : k + 1]) for k in range(branches)])
                    for x in children.split(branches if children_at_once else 1):
                        for j in range(i + 1, algorithm.steps):
                            at = torch.full((len(x),), j)
                            x = ODE().transition(x, velocity(x, j, slot), schedule, at).mean
                    trunk = ODE().transition(trunk, v, schedule, step).mean
    return rows_given


def published_seconds(context: Context, texts: list[str], children_at_once: bool) -> float:
    began = time.perf_counter()
    published_way(context, texts, children_at_once)
    return time.perf_counter() - began


def peak_memory() -> int:
    """Peak resident bytes since the last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def fastest_batch(context: Context, train: bool) -> tuple[int, float]:
    """The row count at which the bare transformer is fastest, and its seconds a row there."""
    best_rows, best = 0, float("inf")
    for rows in (16, 32, 48, 64, 96, 128, 192, 256):
        batches = [rows] * max(1, 512 // rows)
        (seconds,) = timed(partial(bare, context, batches, train), repeats=3)
        best_rows, best = min((best_rows, best), (rows, seconds / sum(batches)), key=lambda pair: pair[1])
    return best_rows, best


def measure(dtype: str, a: argparse.Namespace, prompts: list[Prompt]) -> dict[str, float]:
    """All ratios in one precision; returns rows a second of rollout and training."""
    speed: dict[str, float] = {}
    texts = [p.text for p in prompts]
    print(f"\n{dtype}, {a.threads} threads, {len(prompts)} prompts, at most {a.rows} rows a forward")
    context = setting_for(dtype, a.rows, a.compile)
    (plan,) = context.algorithm.plans(0, 1)
    bare(context, [a.rows], train=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_memory()
    counter = Counter()
    roll = sizes_of(context, lambda: collect(context, prompts, 0, counter, Clock()))
    live = plan.cost().leaves * len(prompts)
    each = (peak_memory() - before) / live / 1024
    print(f"  peak memory over the model's own: {each:.1f} KiB a live row ({live} rows at the end)")
    told = plan.cost().forwards * len(prompts)
    assert (sum(roll) == told or a.compile) and counter.rollout == told, "forwards differ from cost()"
    print(f"  forwards by hook {sum(roll)}, by cost() {told}: {sum(roll) / told:.3f} (above 1: some are filled up)")
    leaves = torch.zeros(plan.cost().leaves * len(prompts), *context.model.noise_shape(SIZE))

    def rollout_side() -> float:
        clock = Clock()
        collect(context, prompts, 0, Counter(), clock)
        return clock.seconds["rollout"] + clock.seconds["decode"]

    def floor_side() -> None:
        bare(context, roll, train=False)
        context.model.decode(leaves, SIZE)

    ours, floor = timed(rollout_side, floor_side, repeats=a.repeats)
    print(f"  rollout + decode {ours:.2f} s / bare forwards + decode {floor:.2f} s = {ours / floor:.3f}")
    best_rows, best = fastest_batch(context, train=False)

    def decode_side() -> None:
        context.model.decode(leaves, SIZE)

    (decode,) = timed(decode_side, repeats=3)
    fastest = best * sum(roll) + decode
    print(f"  rollout + decode / bare at its fastest batch ({best_rows} rows, {1 / best:.0f}/s) = {ours / fastest:.3f}")

    trainable = Trainable(context.model.network)
    learners = {"policy": Learner(trainable, torch.optim.AdamW(trainable.masters, lr=0.0, fused=True))}
    experience = collect(context, prompts, 0, Counter(), Clock())
    given = credit(context, experience)
    watcher = Guards(GuardsConfig(), lambda iteration, alarms: None, print)

    def one_update() -> float:
        clock = Clock()
        taught = lessons(context, prompts, 1, experience, [given])
        learn(context, prompts, taught, learners, Counter(), clock, watcher)
        return clock.seconds["train"]

    steps = sizes_of(context, one_update)
    ours, floor = timed(one_update, lambda: bare(context, steps, train=True), repeats=a.repeats)
    print(f"  training pass {ours:.2f} s / bare forward+backward {floor:.2f} s = {ours / floor:.3f}")
    best_rows, best = fastest_batch(context, train=True)
    print(
        f"  training pass / bare at its fastest batch ({best_rows} rows, {1 / best:.0f}/s) = "
        f"{ours / (best * sum(steps)):.3f}"
    )
    speed["train"] = sum(steps) / ours

    def wavefront() -> float:
        clock = Clock()
        collect(context, prompts[:1], 0, Counter(), clock)
        return clock.seconds["rollout"]

    rows_given = published_way(context, texts[:1], True)
    assert rows_given == plan.cost().forwards
    wave, batch, single = timed(
        wavefront,
        lambda: published_seconds(context, texts[:1], True),
        lambda: published_seconds(context, texts[:1], False),
        repeats=3,
    )
    print(f"  published way {batch:.2f} s / wavefront {wave:.2f} s = {batch / wave:.2f}x")
    print(f"  row by row {single:.2f} s / wavefront {wave:.2f} s = {single / wave:.2f}x")
    speed["rollout"] = plan.cost().forwards / wave
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--compile", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    prompts = list(load_prompts("shapes:train"))[::50][: a.prompts]
    speed = {dtype: measure(dtype, a, prompts) for dtype in ("float32", "bfloat16")}
    for what in ("rollout", "train"):
        ratio = speed["bfloat16"][what] / speed["float32"][what]
        both = f"{speed['bfloat16'][what]:.0f} against {speed['float32'][what]:.0f} rows/s"
        print(f"bfloat16 / float32, {what}: {ratio:.2f}x ({both})")


if __name__ == "__main__":
    main()
