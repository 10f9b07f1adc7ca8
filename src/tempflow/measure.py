"""How long a run will take, from a few seconds of measurement on the machine that is to run it; and how many rows at a
time fit into its memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from tempflow.config import Config
from tempflow.core.schedule import linear
from tempflow.cost import RunCost, beside, memory_of, run_cost
from tempflow.media import Media, Size
from tempflow.models import resolved_device
from tempflow.models.guidance import guidance_of
from tempflow.models.protocol import Model, Predict, sampler_of
from tempflow.models.tools import TakesTools
from tempflow.request import Prompt
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
        row = self.forward.seconds / (2 if cost.guided else 1)
        return {
            "rollout": cost.total.forwards * self.forward.seconds,
            "decoding": cost.total.leaves * self.decode.seconds,
            "rewards": cost.total.leaves * (per_picture - self.decode.seconds),
            "training, at most": cost.total.trained_edges * self.train.seconds + cost.beside * self.forward.seconds,
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


@dataclass(frozen=True, eq=False)
class Work:
    """What a run does most, on its own model and the first of its prompts. A row's σ is 0.5.

    predict  the velocity, of tokens logits, conditions and guidance bound
    """

    model: Model
    prompts: Sequence[Prompt]
    size: Size
    predict: Predict
    generator: torch.Generator

    @staticmethod
    def of(config: Config) -> Work:
        """Loads the run's model on its device. Raises ValueError where that or the prompts are not there."""
        torch.set_num_threads(config.threads or torch.get_num_threads())
        reads, draws = config.algorithm.build().reads, partial(takes_sources, config, None)
        prompts = prompt_sources(config, None, None, reads, draws)["data.train"][:PROMPTS]
        model = prepare_model(config)
        guidance = guidance_of(model.guidance, config.model.guidance, config.model.guidance_options)
        predict = model.predictor(model.encode(prompts, config.size), guidance)
        if config.model.drop_encoders and isinstance(model, TakesTools):
            model.drop_encoders()
        return Work(model, prompts, config.size, predict, torch.Generator().manual_seed(0))

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """States that a sampler starts from, their σ, and which prompts they are of."""
        device, path, shape = self.model.device, sampler_of(self.model).corruption, self.model.noise_shape(self.size)
        draw = torch.rand if path.noise == "uniform" else torch.randn
        x = path.start(draw(rows, *shape, generator=self.generator), linear(1)).to(device)
        return x, torch.full((rows,), 0.5, device=device), torch.arange(rows, device=device) % len(self.prompts)

    def forward(self, rows: int) -> None:
        """A forward of sampling."""
        with torch.no_grad():
            self.predict(*self.inputs(rows))

    def train(self, rows: int, others: bool = False) -> None:
        """A forward and the backward of a mean square; with `others` another weight set's forward between them."""
        inputs = self.inputs(rows)
        velocity = self.predict(*inputs)
        if others:
            with torch.no_grad():
                self.predict(*inputs)
        velocity.float().square().mean().backward()
        for parameter in self.model.network.parameters():
            parameter.grad = None

    def wait(self) -> None:
        """Until the device has done what it was told; a CPU has."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        elif self.model.device.type == "mps":
            torch.mps.synchronize()


def measured(config: Config, seconds: float = SECONDS) -> Measured:
    """Loads the run's model on its device and times what a run does most, about `seconds` in all.

    Raises ValueError where the model, the prompts or a reward are not there.
    """
    rewards = [build_reward(reward) for reward in config.rewards]
    work = Work.of(config)
    prompts = work.prompts
    pictures: dict[int, Media] = {}

    def decode(rows: int) -> None:
        pictures[rows] = work.model.decode(work.inputs(rows)[0], config.size)

    def score(reward_rows: int, which: int) -> None:
        owner = [prompts[row % len(prompts)] for row in range(reward_rows)]
        media = pictures[max(pictures)][slice(reward_rows)]
        texts, metadata = [p.text for p in owner], [p.metadata for p in owner]
        score_all([rewards[which]], media, texts, metadata, groups=list(range(reward_rows)))

    began, worked = time.perf_counter(), time.process_time()
    first = _rate(work.forward, config.rollout_rows, 0.35 * seconds, work.wait)
    second = _rate(work.train, config.train_rows, 0.35 * seconds, work.wait)
    third = _rate(decode, config.rollout_rows, 0.15 * seconds, work.wait)
    scored = {
        reward.name: _rate(lambda n, i=i: score(n, i), max(pictures), 0.15 * seconds / len(rewards), work.wait)
        for i, reward in enumerate(rewards)
    }
    share = (time.process_time() - worked) / (time.perf_counter() - began) / torch.get_num_threads()
    device = work.model.device
    return Measured(str(device), first, second, third, scored, min(1.0, share) if device.type == "cpu" else 1.0)


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


# ------------------------------------------------------------------------------------------------------ rows that fit
SPARE = 0.1
"""Share of the free memory that is left free: for rewards, decodes, fragments, and what an estimate lacks."""

FINE = 16
"""The search ends when the rows are known up to a part of so many."""


@dataclass(frozen=True)
class Rows:
    """The largest that fit on `device`, and how that was found."""

    rollout: int
    train: int
    device: str
    how: str


def rows_that_fit(config: Config, ranks: int = 1) -> Rows:
    """Searches the largest `rollout_rows` and `train_rows`: by trial on a GPU, by the estimate of `cost.memory_of` on a
    CPU, which does not say when it is full, and for a sharded network, which a single process does not have.

    Neither is more than an iteration can use. Raises ValueError where not even one row fits, or nothing can be said.
    """
    cost, device = run_cost(config), torch.device(resolved_device(config.device))
    algorithm = config.algorithm.build()
    pool = algorithm.begins.pool
    widest = max(cost.first.leaves, pool * config.data.prompts_per_iteration)
    most = widest, -(-cost.first.trained_edges // config.optimizer.updates_per_iteration)
    if device.type == "cpu" or (config.parallel.mode == "fsdp" and ranks > 1):
        free = int(free_memory(device) * (1 - SPARE))
        found = [largest(partial(_estimated, config, cost, ranks, free, phase), count) for phase, count in
                 zip(("sampling", "training"), most, strict=True)]  # fmt: skip
        how = f"by the estimate, for {free / 2**30:.1f} GiB, {SPARE:.0%} less than is free"
    else:
        found, how = _tried(config, cost, most), f"by trial, with {SPARE:.0%} of the free memory to spare"
    for field, rows in zip(("rollout_rows", "train_rows"), found, strict=True):
        if rows == 0:
            raise ValueError(
                f"find_rows: not even one row of {field} fits on {device}; nearest valid: model.checkpointing true, "
                "model.training 'lora', or a smaller size"
            )
    return Rows(found[0], found[1], str(device), how)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of 1 … `most` that fits, up to one part in `FINE`: doubled while it fits, then bisected. 0
    where 1 does not."""
    low, high = 0, min(1, most)
    while low < high and fits(high):
        low, high = high, min(2 * high, most)
    while high - low > max(1, low // FINE):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _estimated(config: Config, cost: RunCost, ranks: int, free: int, phase: str, rows: int) -> bool:
    """Whether that phase of the run fits into `free` bytes with so many rows at a time."""
    found = memory_of(config.replace(rollout_rows=rows, train_rows=rows), cost, ranks)
    if isinstance(found, str):
        raise ValueError(
            f"find_rows: memory cannot be estimated ({found}); nearest valid: a run on a GPU, or rows given"
        )
    return sum(found.held.values()) + found.phases[phase] <= free


def _tried(config: Config, cost: RunCost, most: tuple[int, int]) -> list[int]:
    """By forwards and backwards on the run's own model, with all that training holds beside it in memory."""
    work = Work.of(config)
    trained = [p for p in work.model.network.parameters() if p.requires_grad]
    half = max((p.element_size() for p in trained if p.dtype != torch.float32), default=0)
    held = sum(beside(config, cost, sum(p.numel() for p in trained), half).values())
    with spared(work.model.device):
        try:
            ballast = torch.empty(held, dtype=torch.uint8, device=work.model.device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_short(error):
                raise
            return [0, 0]
        steps = work.forward, partial(work.train, others=cost.beside > 0)
        found = [largest(partial(fits, step, work.wait), count) for step, count in zip(steps, most, strict=True)]
        del ballast
    return found


def fits(step: Callable[[int], None], wait: Callable[[], None], rows: int) -> bool:
    """Whether the step goes through with so many rows. What a failed one took is given back."""
    try:
        step(rows)
        wait()
        return True
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_short(error):
            raise
    gc.collect()  # frames of the failed step may hold tensors in a circle
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def is_short(error: Exception) -> bool:
    """Whether a device says by it that its memory is full: CUDA has an error of its own for that, MPS has not."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def spared(device: torch.device) -> Iterator[None]:
    """Inside, a GPU refuses what would take the last `SPARE` of its free memory."""
    if device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((own + free * (1 - SPARE)) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; of a CPU's what the system and its container leave. Raises ValueError where
    the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    said = Path("/proc/meminfo")
    if not said.is_file():
        raise ValueError("find_rows: this system does not say how much memory is free; nearest valid: rows given")
    (line,) = (line for line in said.read_text().splitlines() if line.startswith("MemAvailable:"))
    free, group = 1024 * int(line.split()[1]), Path("/sys/fs/cgroup")
    told = [(group / name).read_text().strip() for name in LIMITS] if all((group / n).is_file() for n in LIMITS) else []
    return min(free, int(told[0]) - int(told[1])) if told and told[0].isdigit() else free


LIMITS = ("memory.max", "memory.current")
"""What a container may use, and what it does."""
