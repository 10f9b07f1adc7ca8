"""Scoring a chunk while the next is grown, against one after the other: `shapes`, interleaved in one run, medians.

    python -m benchmarks.overlap [--prompts 8] [--repeats 5] [--kinds sleep opencv python remote]

A reward takes as long as growing does (rollout, decoding, signals), measured in the same run without overlap. It is
"sleep" (as a remote reward or a judge: it waits), "opencv" (the strict verifier, again and again: numpy and OpenCV),
"python" (a loop that holds Python's lock) or "remote" (a server in a process of its own, asked over loopback, that
waits; its scores are compared with those that the same function gives here). Prints, by kind of reward, the seconds of
an iteration with and without overlap beside max(rollout, reward) + train, the least that overlap could take, and the
ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from benchmarks.served import SECONDS, served
from tempflow.algorithms import tempflow_grpo
from tempflow.config.guards import GuardsConfig
from tempflow.data.prompts import Prompt, load_prompts
from tempflow.media import Media, Size
from tempflow.models import load
from tempflow.models.guidance import Guidance
from tempflow.rewards import Reward, build, from_function
from tempflow.rewards.remote import remote
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import credit
from tempflow.train.guards import Guards
from tempflow.train.source import collect
from tempflow.train.update import learn, lessons
from tempflow.train.weights import Learner, Trainable

SIZE = Size(32, 32)
GROWING = ("rollout", "decode", "signals")
STRICT = build("shapes_strict")


@dataclass
class Slow:
    """A reward whose work is `units` a picture: seconds of sleep, judgements, or loops; its score is the mean level."""

    kind: str
    prompts: dict[str, Prompt]
    units: float = 0.0

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        count = round(self.units * len(images))
        if self.kind in ("sleep", "remote"):
            time.sleep(self.units * len(images))
        elif self.kind == "opencv":
            for n in range(count):
                self._judge(images[n % len(images)], prompts[n % len(images)])
        else:
            for _ in range(count):
                sum(range(2000))
        return [float(np.asarray(image).mean()) / 255 for image in images]

    def set_to(self, seconds: float) -> None:
        """So much work that a picture takes about `seconds`."""
        self.units = seconds
        if self.kind not in ("sleep", "remote"):
            pictures = [Image.new("RGB", (SIZE.width, SIZE.height), (n, 40, 90)) for n in range(50)]
            self.units = 4.0
            began = time.perf_counter()
            self(pictures, [*self.prompts][:1] * 50)
            self.units = seconds / ((time.perf_counter() - began) / (4 * 50))

    def _judge(self, image: Image.Image, prompt: str) -> None:
        STRICT.score(Media.of(torch.from_numpy(np.array(image))[None]), [prompt], [self.prompts[prompt].metadata])


@dataclass
class Seen:
    """Seconds of one iteration: all of it, growing, waiting for scores, and the rest (credit and training)."""

    all: float
    growing: float
    reward: float

    @property
    def rest(self) -> float:
        return self.all - self.growing - self.reward


def context_for(leaves: int) -> Context:
    model = load("shapes", dtype="float32")
    model.train_fully()
    algorithm = tempflow_grpo(steps=6, seeds=1, branches=6, clip=1e-3, kl=0.0)
    return Context(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(algorithm.steps, SIZE),
        size=SIZE,
        guidance=Guidance(),
        rewards=(),
        seed=0,
        rollout_rows=96,
        train_rows=48,
        updates=1,
        max_grad_norm=1.0,
        sets={},
        rollout_leaves=leaves,
    )


def iteration_of(context: Context, prompts: list[Prompt]) -> Callable[[], Seen]:
    """Iteration 0, again and again: the learning rate is 0."""
    trainable = Trainable(context.model.network)
    learners = {"policy": Learner(trainable, torch.optim.SGD(trainable.masters, lr=0.0))}
    guards = Guards(GuardsConfig(), lambda iteration, alarms: None, print)

    def iterate() -> Seen:
        clock, began = Clock(), time.perf_counter()
        experience = collect(context, prompts, 0, Counter(), clock)
        taught = lessons(context, prompts, 0, experience, [credit(context, experience)])
        learn(context, prompts, taught, learners, Counter(), clock, guards)
        took = time.perf_counter() - began
        return Seen(took, sum(clock.seconds[name] for name in GROWING), clock.seconds["reward"])

    return iterate


def measure(kind: str, prompts: list[Prompt], leaves: int, repeats: int) -> str:
    """A row of the table."""
    slow = Slow(kind, {prompt.text: prompt for prompt in prompts})
    context = replace(context_for(leaves), rewards=[from_function(slow, name=kind)])
    pictures = context.algorithm.cost(0, len(prompts)).leaves
    serial = iteration_of(replace(context, overlap=False), prompts)
    serial()
    seconds = statistics.median(serial().growing for _ in range(3)) / pictures
    slow.set_to(seconds)
    if kind != "remote":
        return row_of(kind, context, prompts, repeats)
    slow.units = 0.0
    here = collect(context, prompts, 0, Counter(), Clock()).scores
    with served("slow", environment={SECONDS: str(seconds)}) as (url, token, _):
        far: list[Reward] = [remote(url=url, token_file=token, batch=leaves)]
        context = replace(context, rewards=far)
        there = collect(context, prompts, 0, Counter(), Clock()).scores
        assert torch.equal(here.value, there.value) and bool(there.ok.all()), "the server's scores are other bits"
        return row_of(kind, context, prompts, repeats)


def row_of(kind: str, context: Context, prompts: list[Prompt], repeats: int) -> str:
    """Iterations with and without overlap in turn."""
    overlapped, serial = (iteration_of(replace(context, overlap=o), prompts) for o in (True, False))
    both, ratios = ([], []), list[float]()
    for _ in range(repeats):
        one, other = overlapped(), serial()
        both[0].append(one)
        both[1].append(other)
        ratios.append(one.all / (max(other.growing, other.reward) + other.rest))
    one, other = ([statistics.median(getattr(s, f) for s in seen) for f in ("all", "reward")] for seen in both)
    growing, rest = (statistics.median(getattr(s, f) for s in both[1]) for f in ("growing", "rest"))
    least = max(growing, other[1]) + rest
    cells = [growing, other[1], rest, least, other[0], one[0], one[1]]
    ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return f"| {kind} | " + " | ".join(f"{c:.2f}" for c in cells) + f" | {ratio:.2f} ({low:.2f} … {high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--leaves", type=int, default=30, help="rollout_leaves: 30 is a prompt a chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=["sleep", "opencv", "python", "remote"], default=["sleep"])
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    prompts = list(load_prompts("shapes:train"))[::50][: a.prompts]
    print(f"{a.prompts} prompts, chunks of {a.leaves} leaves, {a.threads} threads, load {os.getloadavg()[0]:.1f}")
    columns = ("reward", "growing", "reward alone", "train", "least", "serial", "overlap", "of it waiting", "ratio")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for kind in a.kinds:
        print(measure(kind, prompts, a.leaves, a.repeats), flush=True)


if __name__ == "__main__":
    main()
