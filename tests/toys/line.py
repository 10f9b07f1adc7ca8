"""A one-dimensional linear toy with a known direction: Gaussian data whose mean for each of two prompts is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mixture import SIDE, painted, points_of, seen, shades, toward
from torch import Generator, Tensor, nn

from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.media import Kind, Media, Size
from tempflow.models.guidance import Guidance
from tempflow.models.protocol import Conditioning, Encoded, Predict, TextInputs
from tempflow.request import Prompt
from tempflow.train.judged import ScoreLatents

PROMPTS = ("up", "down")
SPREAD = 0.5


class Velocity(nn.Module):
    """The exact velocity of x0 ~ N(mean of the prompt, SPREAD²): linear in x and in the mean, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(len(PROMPTS), 1, bias=False)
        nn.init.zeros_(self.mean.weight)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return toward(self.mean(condition).view(-1, 1, 1, 1), SPREAD, x, sigma)


class Line:
    """Implements `models.protocol.Model`; latents are [1, 1, 1]."""

    name, licence, size = "line", "Apache-2.0", Size(SIDE, SIDE)
    makes: Kind = "picture"
    takes_sources, guidance, dtype = False, Guidance, torch.float32

    def __init__(self) -> None:
        self.network = Velocity()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def means(self) -> list[float]:
        """Of "up" and of "down"."""
        return self.network.mean.weight.detach()[0].tolist()

    def teacher(self) -> nn.Module:
        """One that knows where the prompt points, a unit away."""
        knows = Velocity()
        with torch.no_grad():
            knows.mean.weight.copy_(torch.tensor([[1.0, -1.0]]))
        return knows

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule("mean")]

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        return Conditioning(tuple(prompts), {"embeds": torch.eye(2)[[PROMPTS.index(p.text) for p in prompts], None]})

    def text_inputs(self, prompt: Prompt) -> TextInputs:
        return TextInputs({"text": torch.eye(2)[None, PROMPTS.index(prompt.text)]}, {"text": torch.ones(1).bool()})

    def encode_inputs(self, prompt: Prompt, tokens: Mapping[str, Tensor]) -> Encoded:
        return Encoded({"embeds": tokens["text"]}, {"text": tokens["text"].mean(1)})

    def schedule(self, steps: int, size: Size) -> Schedule:
        return linear(steps)

    def noise_shape(self, size: Size) -> tuple[int, ...]:
        return (1, 1, 1)

    def predictor(
        self, condition: Conditioning, guidance: Guidance | float, network: nn.Module | None = None
    ) -> Predict:
        module, tokens = self.network if network is None else network, condition.tensors["embeds"][:, 0]
        return lambda x, sigma, rows: module(x, sigma, tokens[rows])

    def decode(self, x: Tensor, size: Size) -> Media:
        return Media.of(painted(x.flatten(1)))

    def decode_pixels(self, x: Tensor, size: Size) -> Tensor:
        return shades(x.flatten(1))

    def encode_media(self, media: Media, size: Size) -> Tensor:
        return seen(media.pictures()).float().view(-1, 1, 1, 1)

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        raise NotImplementedError("a toy is not kept")


@dataclass(frozen=True)
class Height:
    """How far the point lies in the direction that the prompt names; linear."""

    name: str = "height"
    groupwise: bool = False

    def differentiable(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> Tensor:
        return points_of(pixels)[:, 0] * torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])

    def score(self, media: Media | Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        sign = torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])
        value = (seen(Media.of(media).pictures())[:, 0] * sign).float()[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


def drawn(count: int, generator: Generator) -> Tensor:
    """Points that the untrained model draws, [count, 1]."""
    return SPREAD * torch.randn(count, 1, generator=generator)


def judge(condition: Conditioning) -> ScoreLatents:
    """The same of a noisy latent: the expected height grows with it."""
    sign = condition.tensors["embeds"][:, 0] @ torch.tensor([1.0, -1.0])

    def scores(x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        value = (x.flatten(1)[:, 0] * sign[rows])[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), ("expected",))

    return scores
