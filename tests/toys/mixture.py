"""A two-dimensional toy with a known optimum: points from a mixture of four Gaussians, and a place named by the prompt.

The untrained model draws the same mixture whatever the prompt says; the reward asks for the corner that the prompt
names. Both ends of the scale are closed forms: the best mean reward is 1, the base's that of `base_reward`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from album import Album
from fake import Bench
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from tempflow.algorithms import Algorithm
from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.media import Kind, Media, Size
from tempflow.models.guidance import Guidance
from tempflow.models.protocol import Conditioning, Encoded, Predict, TextInputs
from tempflow.request import Prompt, asked
from tempflow.train.judged import LatentJudge, ScoreLatents, by_pictures

SHAPE = (1, 1, 2)  # one row of two latent cells, so that maps over positions have something to tell apart
SIDE = 8  # pixels along the square that shows a coordinate
RANGE = 4.0  # what it can show: −RANGE … RANGE
SIZE = Size(SIDE, 2 * SIDE)  # of the pictures that show a point

PROMPTS = ("north east", "north west", "south west", "south east")
MEANS = torch.tensor([[1.5, 1.5], [-1.5, 1.5], [-1.5, -1.5], [1.5, -1.5]])
WEIGHTS = torch.tensor([0.3, 0.3, 0.2, 0.2])
SPREAD = 0.4  # standard deviation of a mode
REACH = 1.5  # standard deviation of the reward's bell


def posterior(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x0 given x_σ = x is a mixture again: its weights [B, modes], means [B, modes, 2] and variance [B, 1]."""
    s = sigma[:, None]
    means = MEANS.to(x)
    variance = (1 - s).square() * SPREAD**2 + s.square()  # of x_σ within a mode, per coordinate
    away = x[:, None] - (1 - s)[..., None] * means
    share = (WEIGHTS.to(x).log() - away.square().sum(-1) / (2 * variance)).softmax(1)
    clean = means + ((1 - s) * SPREAD**2 / variance)[..., None] * away
    return share, clean, SPREAD**2 * s.square() / variance


def posterior_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[ε − x0 | x_σ = x] of the mixture, exactly; x [B, 2], σ in (0, 1], [B]."""
    share, clean, _ = posterior(x, sigma)
    return (x - (share[..., None] * clean).sum(1)) / sigma[:, None]


def expected_reward(x: Tensor, sigma: Tensor, goal: Tensor) -> Tensor:
    """E[reward of x0 | x_σ = x] of the mixture, exactly: what a perfect reward on noisy latents says; [B]."""
    share, clean, variance = posterior(x, sigma)
    width = REACH**2 + variance
    bell = REACH**2 / width * torch.exp(-(clean - goal[:, None]).square().sum(-1) / (2 * width))
    return (share * bell).sum(1)


def base_reward() -> float:
    """The mean reward of the mixture itself, over the prompts: a Gaussian's mean under Gaussians."""
    variance = REACH**2 + SPREAD**2
    distance = (MEANS[:, None] - MEANS).square().sum(-1)  # [prompt, mode]
    bell = REACH**2 / variance * torch.exp(-distance / (2 * variance))
    return (bell @ WEIGHTS).mean().item()


class Net(nn.Module):
    """v(x, σ, condition), with the condition's columns 0 at first: the prompt says nothing yet."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5 + len(PROMPTS), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        with torch.no_grad():
            self.body[0].weight[:, 5:] = 0.0

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        s = sigma.to(x).view(-1, 1)
        seen = torch.cat([x.flatten(1), s, s.square(), torch.cos(math.pi * s), condition.to(x)], 1)
        return self.body(seen).view(-1, *SHAPE)


@lru_cache(maxsize=1)
def pretrained(steps: int = 1500, rows: int = 512) -> Net:
    """The network fitted to the mixture's exact velocity. Made once a session; to be copied, not trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters())
        nothing = torch.zeros(rows, len(PROMPTS))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
            sigma = torch.rand(rows) * 0.98 + 0.02
            mode = torch.multinomial(WEIGHTS, rows, replacement=True)
            x0 = MEANS[mode] + SPREAD * torch.randn(rows, 2)
            x = (1 - sigma)[:, None] * x0 + sigma[:, None] * torch.randn(rows, 2)
            wrong = net(x, sigma, nothing).flatten(1) - posterior_velocity(x, sigma)
            optimizer.zero_grad()
            wrong.square().mean().backward()
            optimizer.step()
    return net


class Corner(nn.Module):
    """The exact velocity of N(the prompt's corner, SPREAD²): what a teacher knows that the untrained model does not."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return toward((condition.to(x) @ MEANS.to(x)).view(-1, *SHAPE), SPREAD, x, sigma)


def toward(mean: Tensor, spread: float, x: Tensor, sigma: Tensor) -> Tensor:
    """E[ε − x0 | x_σ = x] of N(mean, spread²), exactly; x [B, 1, 1, N]."""
    s = sigma.to(x).view(-1, 1, 1, 1)
    gain = (1 - s) * spread**2 / ((1 - s).square() * spread**2 + s.square())
    return (x - mean - gain * (x - (1 - s) * mean)) / s


class Mixture:
    """Implements `models.protocol.Model`; each has a pretrained network of its own."""

    name, licence, size = "mixture", "Apache-2.0", SIZE
    makes: Kind = "picture"
    takes_sources, guidance, dtype = False, Guidance, torch.float32

    def __init__(self) -> None:
        self.network = copy.deepcopy(pretrained())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def teacher(self) -> nn.Module:
        return Corner()

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule("body")]

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        number = torch.tensor([PROMPTS.index(p.text) for p in prompts])
        return Conditioning(tuple(prompts), {"embeds": torch.eye(len(PROMPTS))[number, None]})

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        return TextInputs(
            {"text": torch.eye(len(PROMPTS))[None, PROMPTS.index(prompt.text)]}, {"text": torch.ones(1).bool()}
        )

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        return Encoded({"embeds": tokens["text"]}, {"text": tokens["text"].mean(1)})

    def schedule(self, steps: int, size: Size) -> Schedule:
        return linear(steps)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return SHAPE

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        module = self.network if network is None else network
        tokens = condition.tensors["embeds"][:, 0]
        return lambda x, sigma, rows: module(x, sigma, tokens[rows])

    def decode(self, x: Tensor, size: Size) -> Media:
        return Media.of(painted(x.flatten(1)))

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        return shades(x.flatten(1))

    def encode_media(self, media: Media, size: Size) -> Tensor:
        return seen(media.pictures()).float().view(-1, *SHAPE)

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        save_file((self.network if network is None else network).state_dict(), f"{folder}/model.safetensors")


def painted(points: Tensor) -> Tensor:
    """Pictures of points [N, D]: a grey square for each coordinate, side by side, uint8 [N, SIDE, D·SIDE, 3].

    A square's bytes differ by 1 at most, and their sum is the coordinate in steps of 2·RANGE/48960: neighbours look
    alike, and the reward still reads the point as closely as it needs.
    """
    count = SIDE * SIDE * 3
    level = ((points.double() / RANGE + 1) / 2 * count * 255).clamp(0, count * 255).round().long()[..., None]
    square = (level // count + (torch.arange(count) < level % count)).to(torch.uint8)
    return torch.cat(list(square.view(*points.shape, SIDE, SIDE, 3).unbind(1)), 2).contiguous()


def shades(points: Tensor) -> Tensor:
    """The same pictures with gradients, [N, 1, 3, SIDE, D·SIDE] in 0 … 1."""
    level = ((points / RANGE + 1) / 2).clamp(0, 1).repeat_interleave(SIDE, 1)
    return level[:, None, None, None].expand(-1, 1, 3, SIDE, -1)


def points_of(pixels: Tensor) -> Tensor:
    """The points [N, D] that such pictures show, with gradients."""
    return (2 * pixels.mean((1, 2, 3)).unflatten(1, (-1, SIDE)).mean(2) - 1) * RANGE


def seen(media: Tensor) -> Tensor:
    """The points [N, D] that pictures show, float64."""
    squares = media.double().unflatten(2, (-1, SIDE)).mean((1, 3, 4)) / 255
    return (2 * squares - 1) * RANGE


@dataclass(frozen=True)
class Closeness:
    """A bell around the corner that the prompt names: 1 there, in (0, 1]."""

    name: str = "closeness"
    groupwise: bool = False

    def differentiable(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> Tensor:
        goal = MEANS[torch.tensor([PROMPTS.index(p) for p in prompts])]
        return torch.exp(-(points_of(pixels) - goal).square().sum(1) / (2 * REACH**2))

    def score(self, media: Media | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        goal = MEANS[torch.tensor([PROMPTS.index(p) for p in prompts])]
        value = torch.exp(-(seen(Media.of(media).pictures()) - goal).square().sum(1) / (2 * REACH**2)).float()[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


@dataclass(frozen=True)
class Chance:
    """Says nothing about the picture: numbers drawn from a hash of its bytes."""

    name: str = "chance"
    groupwise: bool = False

    def score(self, media: Media | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        media = Media.of(media).pictures()
        weight = torch.arange(1, media[0].numel() + 1, dtype=torch.float64).sqrt()
        value = (media.flatten(1).double() @ weight * 1e3).frac().float()[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


@torch.no_grad()
def samples(model: Mixture, count: int = 256, steps: int = 10) -> tuple[Tensor, list[str]]:
    """Points [4·count, 2] drawn by ODE, from the same noises for every prompt, with their prompts."""
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(17)).repeat(len(PROMPTS), 1, 1, 1)
    rows = torch.arange(len(PROMPTS)).repeat_interleave(count)
    predict = model.predictor(model.encode(asked(PROMPTS), SIZE), 1.0)
    schedule = model.schedule(steps, SIZE)
    x = noise
    for i in range(steps):
        step = torch.full((len(x),), i)
        x = x - schedule.delta(step).view(-1, 1, 1, 1) * predict(x, schedule.at(step), rows)
    return x.flatten(1), [PROMPTS[i] for i in rows.tolist()]


def mean_reward(model: Mixture, count: int = 256, steps: int = 10) -> float:
    """The mean over prompts and fixed noises, through pictures as in training."""
    x, prompts = samples(model, count, steps)
    media = model.decode(x.view(-1, *SHAPE), SIZE)
    return Closeness().score(media, prompts, [{}] * len(prompts)).value.mean().item()


def gap_closed(before: float, after: float) -> float:
    """1 at the optimum (a mean reward of 1), 0 where nothing was learnt."""
    return (after - before) / (1 - before)


def judge(condition: Conditioning) -> ScoreLatents:
    """For algorithms that ask for a reward on noisy latents."""
    goal = condition.tensors["embeds"][:, 0] @ MEANS

    def scores(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = expected_reward(x.flatten(1), sigma, goal[rows])[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), ("expected",))

    return scores


def drawn(count: int, generator: Generator) -> Tensor:
    """Points of the mixture, [count, 2]: what the untrained model draws."""
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return MEANS[mode] + SPREAD * torch.randn(count, 2, generator=generator)


def bench(
    algorithm: Algorithm,
    model: Any = None,
    reward: Any = None,
    judge: Any = judge,
    drawn: Any = drawn,
    **context: Any,
) -> Bench:
    """The real loop's parts on the mixture, two updates an iteration, so that ratios differ from 1. What an algorithm
    asks for beside rewards, it gets: a judge of latents, pictures of what the untrained model draws, or a teacher that
    knows where the prompt points."""
    context = {"rollout_rows": 4096, "train_rows": 4096, "updates": 2, **context}
    asked = by_pictures if algorithm.latent_reward is None else LatentJudge(judge)
    reward = reward or Closeness()
    if algorithm.offline is not None:
        keys = len(algorithm.offline.keys)
        context["pictures"] = Album(lambda n, generator: painted(drawn(n, generator)), reward, keys)
    model = model or Mixture()
    run = Bench(model, algorithm, reward, latent_reward=asked, size=model.size, **context)
    if not algorithm.rolls_out and "reference" in algorithm.sets:
        run.context = replace(run.context, sets={**run.context.sets, "reference": model.teacher()})
    return run


def train(run: Bench, iterations: int, repeat: int = 1, rate: float = 1e-2) -> None:
    """Iterations over all prompts, each `repeat` times; the learning rate falls from `rate` to 0 on a straight line."""
    of_role = {"policy": 1.0} | {role.name: role.rate for role in run.context.algorithm.roles}
    for iteration in range(iterations):
        for name, learner in run.learners.items():
            for group in learner.optimizer.param_groups:
                group["lr"] = of_role[name] * rate * (1 - iteration / iterations)
        run.iterate(iteration, PROMPTS * repeat)
