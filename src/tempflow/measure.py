"""How long a run will take, from a few seconds of measurement on the machine that is to run it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from tempflow.config import Config
from tempflow.cost import RunCost
from tempflow.media import Media
from tempflow.models.guidance import guidance_of
from tempflow.rewards import score_all
from tempflow.train.build import build_reward, prepare_model, prompt_sources, takes_sources

SECONDS = 10.0
"""What a measurement takes, without loading the model; more where a single row takes longer."""

PROMPTS = 8
"""Prompts whose conditions and scores are measured."""


LOOKING = "validations and tests"

BUSY = 0.7
"""Share of its threads' time that a process has to itself; with less, other work slowed the measurement down."""


@dataclass(frozen=True)
class Rate:
    """`seconds` that one row takes where `rows` are computed at once, the median of `calls` such calls."""

    rows: int
    seconds: float
    calls: int


@dataclass(frozen=True)
class Measured:
    """What a row costs here.

    device   that was measured
    forward  a row of sampling, without gradient; guidance's second row is in it
    train    a row of training: the forward and the backward of a mean square
    decode   a latent to a picture
    rewards  name -> a picture's score
    share    of its threads' time that this process had while it measured; 1 on other devices than a CPU
    """

    device: str
    forward: Rate
    train: Rate
    decode: Rate
    rewards: Mapping[str, Rate]
    share: float = 1.0

    def parts(self, cost: RunCost) -> dict[str, float]:
        """Seconds of the whole run by kind of work."""
        per_picture = self.decode.seconds + sum(rate.seconds for rate in self.rewards.values())
        others = cost.total.trained_edges * len(cost.others)
        row = self.forward.seconds / (2 if cost.guided else 1)
        return {
            "rollout": cost.total.forwards * self.forward.seconds,
            "decoding": cost.total.leaves * self.decode.seconds,
            "rewards": cost.total.leaves * (per_picture - self.decode.seconds),
            "training, at most": cost.total.trained_edges * self.train.seconds + others * self.forward.seconds,
            LOOKING: cost.looked_rows * row + cost.looked_at * per_picture,
        }

    def table(self, cost: RunCost) -> Table:
        """What was measured, and the times that follow, for a terminal."""
        table = Table(title=f"measured on {self.device}")
        for column in ("", "an iteration", "the run"):
            table.add_column(column, justify="right" if column else "left")
        parts = self.parts(cost)
        for label, seconds in parts.items():
            each = "" if label == LOOKING else clock(seconds / cost.iterations)
            table.add_row(label, each, clock(seconds))
        table.add_section()
        training = sum(parts.values()) - parts[LOOKING]
        table.add_row("together", clock(training / cost.iterations), clock(sum(parts.values())))
        rates = {"forward": self.forward, "training row": self.train, "decode": self.decode, **self.rewards}
        told = [f"{name} {rate.seconds * 1e3:.3g} ms (by {rate.rows})" for name, rate in rates.items()]
        table.caption = (
            f"Measured: {'; '.join(told)}. Not measured, so not in it: loading, encoding prompts and pictures, noise, "
            "signals, credit, the loss itself, optimizer steps, latent rewards, checkpoints, other ranks."
        )
        if self.share < BUSY:
            table.caption += f" Other work left this process {self.share:.0%} of its cores' time: alone it is faster."
        return table


def measured(config: Config, seconds: float = SECONDS) -> Measured:
    """Loads the run's model on its device and times what a run does most, about `seconds` in all.

    Raises ValueError where the model, the prompts or a reward are not there.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    reads, draws = config.algorithm.build().reads, partial(takes_sources, config, None)
    prompts = prompt_sources(config, None, None, reads, draws)["data.train"][:PROMPTS]
    rewards = [build_reward(reward) for reward in config.rewards]
    model = prepare_model(config)
    shape, size = model.noise_shape(config.size), config.size
    guidance = guidance_of(model.guidance, config.model.guidance, config.model.guidance_options)
    predict = model.predictor(model.encode(prompts, size), guidance)
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(rows, *shape, generator=generator).to(model.device)
        return x, torch.full((rows,), 0.5, device=model.device), torch.arange(rows) % len(prompts)

    def forward(rows: int) -> None:
        with torch.no_grad():
            predict(*inputs(rows))

    def train(rows: int) -> None:
        predict(*inputs(rows)).float().square().mean().backward()
        for parameter in model.network.parameters():
            parameter.grad = None

    pictures: dict[int, Media] = {}

    def decode(rows: int) -> None:
        pictures[rows] = model.decode(inputs(rows)[0], size)

    def score(reward_rows: int, which: int) -> None:
        owner = [prompts[row % len(prompts)] for row in range(reward_rows)]
        media = pictures[max(pictures)][slice(reward_rows)]
        texts, metadata = [p.text for p in owner], [p.metadata for p in owner]
        score_all([rewards[which]], media, texts, metadata, groups=list(range(reward_rows)))

    wait = torch.cuda.synchronize if model.device.type == "cuda" else _no_wait
    began, worked = time.perf_counter(), time.process_time()
    first = _rate(forward, config.rollout_rows, 0.35 * seconds, wait)
    second = _rate(train, config.train_rows, 0.35 * seconds, wait)
    third = _rate(decode, config.rollout_rows, 0.15 * seconds, wait)
    scored = {
        reward.name: _rate(lambda n, i=i: score(n, i), max(pictures), 0.15 * seconds / len(rewards), wait)
        for i, reward in enumerate(rewards)
    }
    share = (time.process_time() - worked) / (time.perf_counter() - began) / torch.get_num_threads()
    return Measured(
        str(model.device), first, second, third, scored, min(1.0, share) if model.device.type == "cpu" else 1.0
    )


def _no_wait() -> None:
    """A CPU has done what it was told."""


def _rate(work: Callable[[int], None], most: int, seconds: float, wait: Callable[[], None]) -> Rate:
    """How long a row takes at up to `most` rows a call: their number doubles as long as `seconds` allow."""

    def timed(rows: int) -> float:
        started = time.perf_counter()
        work(rows)
        wait()
        return time.perf_counter() - started

    began, rows = time.perf_counter(), 1
    timed(rows)  # what the first call sets up is no part of it
    took = timed(rows)
    while rows < most and 4 * took < seconds - (time.perf_counter() - began):
        rows = min(most, 2 * rows)
        took = timed(rows)
    times = [took]
    while time.perf_counter() - began + took < seconds:
        times.append(timed(rows))
    return Rate(rows, statistics.median(times) / rows, len(times))


def clock(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return (
        f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.1f} h"
        if minutes < 2880
        else f"{minutes / 1440:.1f} days"
    )
