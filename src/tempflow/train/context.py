"""What the parts of an iteration share: the run's context, its counters and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from tempflow.algorithms.base import Algorithm
from tempflow.core.cost import equivalents
from tempflow.core.objective.old import rounding_of
from tempflow.core.schedule import Schedule
from tempflow.media import Media, Size
from tempflow.models.compiled import compile_seconds
from tempflow.models.conditions import Learned
from tempflow.models.guidance import Guidance, guided
from tempflow.models.protocol import Model
from tempflow.request import Prompt
from tempflow.rewards.compose import Composition
from tempflow.rewards.protocol import Reward
from tempflow.train.judged import Judge, by_pictures
from tempflow.train.parallel import SINGLE, Shards, World
from tempflow.train.signals import FIGURES
from tempflow.train.weights import Drafter

TF32_EPS = 2.0**-10
"""Of the format in which NVIDIA's tensor cores take float32 where torch lets them."""

ReadPictures = Callable[[Sequence[Prompt]], Media]
"""read(prompts) -> N·keys media, a prompt's in the order of the algorithm's keys."""


def no_pictures(prompts: Sequence[Prompt]) -> Media:
    """Raises ValueError: the prompts' own pictures are not read."""
    raise ValueError("pictures: nothing reads them; nearest valid: data.pictures.Pictures")


@dataclass
class Counter:
    """Rows given to the network so far (guidance not doubled), media decoded, and reward calls; evaluation is apart.

    guided     whether each row has the negative prompt's beside it
    rollout    with the drafts', which `draft` has of these
    reference  without gradient in updates: of other networks than the one that learns, and where noises are unrolled
    alone      of networks with a guidance of their own, where the negative prompts' rows are counted
    old        for old log-probs alone: by the policy before an iteration's first update, or by the set that rolled out
    latent     through a latent reward: no forwards of the network, but compute
    scores     valid ones that losses asked for, with their sum and their squares' sum: what `spread` is of
    """

    guided: bool = False
    rollout: int = 0
    draft: int = 0
    train: int = 0
    reference: int = 0
    alone: int = 0
    old: int = 0
    latent: int = 0
    decodes: int = 0
    reward_calls: int = 0
    scores: int = 0
    score_sum: float = 0.0
    score_squares: float = 0.0

    @property
    def spread(self) -> float | None:
        """The standard deviation of those scores; None of fewer than two."""
        if self.scores < 2:
            return None
        mean = self.score_sum / self.scores
        return max(0.0, self.score_squares / self.scores - mean * mean) ** 0.5

    @property
    def forwards(self) -> int:
        return self.rollout + self.train + self.reference + self.alone + self.old

    @property
    def equivalents(self) -> int:
        """Compute in forward-equivalents (`core.cost.equivalents`); a draft's row counts as any other."""
        plain = self.rollout + self.reference + self.old
        return equivalents(plain, self.train, guided=self.guided, latent=self.latent, alone=self.alone)


@dataclass
class Clock:
    """Wall time by phase, in seconds; kept apart from metrics, which must be equal from run to run. What compiling took
    in a phase stands beside it, as a phase of its own."""

    seconds: dict[str, float] = field(default_factory=dict)
    compiled: float = field(default_factory=compile_seconds)

    def add(self, phase: str, since: float) -> float:
        now, compiled = time.perf_counter(), compile_seconds()
        within, self.compiled = compiled - self.compiled, compiled
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since - within
        if within:
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + within
        return now


@dataclass(frozen=True, eq=False)
class Context:
    """What stays the same over a run. Its algorithm draws from its seed.

    sets            the networks beside the policy by name: other roles, and the weight sets that the algorithm asks for
    world           the ranks that share the run; each needs a prompt of every iteration
    shards          what keeps ranks of a sharded network in step; None where every rank has all of it
    latent_reward   whose scores credit sees (`judged`)
    figures         what to measure of leaves and their pictures (`signals.FIGURES`)
    norms           whether to measure how large the policy's velocities are beside the reference's
    drafter         the network that drafts, in the precision that the algorithm asks for
    pictures        reads the prompts' own pictures, where the algorithm takes offline samples
    reward_weights  weights of the rewards in their sum, by which evaluations judge; None: 1 each
    compose         what several rewards become, beside a sum by weight; None: nothing else
    scheduled       iteration, from 0 -> weights of the rewards in it; None: they stay
    pause           called between batches of work; may raise to leave the iteration
    learned         what prompts' sampling conditions differ by, where the algorithm asks for some
    """

    model: Model
    algorithm: Algorithm
    schedule: Schedule
    size: Size
    guidance: Guidance
    rewards: Sequence[Reward]
    seed: int
    rollout_rows: int
    train_rows: int
    updates: int
    max_grad_norm: float
    sets: Mapping[str, nn.Module]
    world: World = SINGLE
    shards: Shards | None = None
    latent_reward: Judge = by_pictures
    figures: Collection[str] = FIGURES
    norms: bool = False
    drafter: Drafter = field(default_factory=lambda: Drafter("full"))
    pictures: ReadPictures = no_pictures
    reward_weights: Mapping[str, float] | None = None
    compose: Composition | None = None
    scheduled: Callable[[int], Mapping[str, float]] | None = None
    pause: Callable[[], None] = lambda: None
    rollout_leaves: int = 1024
    overlap: bool = True
    learned: Learned = field(default_factory=Learned)

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", self.algorithm.seeded(self.seed))
        object.__setattr__(self, "guidance", guided(self.guidance, self.model.guidance))
        if self.drafter.precision != self.algorithm.draft_precision:
            given = self.drafter.precision
            raise ValueError(f"drafter: {given!r}, but {self.algorithm.draft}; nearest valid: Drafter.of(…)")

    def at(self, iteration: int) -> Context:
        """The same with the iteration's weights of the rewards."""
        if self.scheduled is None:
            return self
        weights = self.scheduled(iteration)
        compose = None if self.compose is None else replace(self.compose, weights=weights)
        if compose is not None and compose.adds:
            return replace(self, compose=compose)
        credit = self.algorithm.credit.weighted(weights)
        return replace(self, compose=compose, algorithm=replace(self.algorithm, credit=credit))

    @cached_property
    def rounding(self) -> float:
        """The relative rounding error of a velocity, by the coarsest dtype that the network computes in."""
        network, device = self.model.network, self.model.device
        dtypes = {p.dtype for p in network.parameters() if p.dtype.is_floating_point}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        backends = torch.backends
        if device.type == "cuda" and (backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32):
            eps = max(eps, TF32_EPS)
        return rounding_of(eps, self.guidance.guidance)

    def in_step(self) -> AbstractContextManager[None]:
        """Around forwards without a backward, of which ranks may run different numbers (`Shards.in_step`)."""
        return nullcontext() if self.shards is None else self.shards.in_step()
