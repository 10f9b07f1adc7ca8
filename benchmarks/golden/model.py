"""The tiny generator that golden updates train: eight latent elements, 88 weights, every result the same on any CPU.

It computes in float64 where it is asked to: what the loop rounds to float32 then rounds alike whatever kernels the CPU
has. It stands by itself, so that one copy of this file drives two revisions of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.golden import library
from benchmarks.golden.library import Conditioning, Encoded, Schedule, TextInputs, linear

SHAPE, SIZE = (2, 2, 2), (4, 4)
PROMPTS = ("a dim lamp", "the sun", "a candle at night", "fog")
SPREAD = 0.5
VIGNETTE = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0.7, 0], [0, 0.6, 0.9, 0], [0, 0, 0, 0]], dtype=torch.float64)


class Network(nn.Module):
    """The velocity of Gaussian data around a trained mean of the prompt, bent by a trained mixing of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.mix = nn.Linear(2, 8), nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.mean.weight.copy_(torch.linspace(-0.3, 0.3, 16).view(8, 2))
            self.mean.bias.copy_(torch.linspace(0.1, -0.1, 8))
            self.mix.weight.copy_(torch.linspace(0.2, -0.2, 64).view(8, 8).roll(3, 0))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        m = self.mean(condition).view(-1, *SHAPE)
        s = sigma.to(x.dtype).view(-1, 1, 1, 1)
        gain = (1 - s) * SPREAD**2 / ((1 - s).square() * SPREAD**2 + s.square())
        return (x - m - gain * (x - (1 - s) * m)) / s + torch.tanh(self.mix(x.flatten(1))).view(x.shape)


class Generator:
    """Implements `models.protocol.Model`, in float64 or float32."""

    name, licence = "golden", "Apache-2.0"
    makes, takes_sources, guidance = "picture", False, library.guidance()

    def __init__(self, dtype: torch.dtype) -> None:
        self.network, self.dtype, self.device = Network().to(dtype), dtype, torch.device("cpu")

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule("mean"), network.get_submodule("mix")]

    def encode(self, prompts: Sequence[Any], size: Any = None) -> Conditioning:
        """Of prompts, which older revisions have as texts."""
        embeds = torch.stack([self.text_inputs(p).tokens["text"] for p in prompts])
        return Conditioning(tuple(prompts), {"embeds": embeds}, {"embeds": torch.zeros(len(prompts), 1, 2)})

    def text_inputs(self, prompt: Any) -> TextInputs:
        text = getattr(prompt, "text", prompt)
        token = torch.tensor([[len(text) / 16, sum(c in "aeiou" for c in text) / 8]])
        return TextInputs({"text": token}, {"text": torch.ones(1, dtype=torch.bool)})

    def encode_inputs(self, prompt: Any, tokens: Mapping[str, Tensor]) -> Encoded:
        return Encoded({"embeds": tokens["text"]}, {"text": tokens["text"].mean(1)})

    def schedule(self, steps: int, size: Any) -> Schedule:
        return linear(steps, 2.0)

    def noise_shape(self, size: Any) -> tuple[int, ...]:
        return SHAPE

    def predictor(
        self, condition: Conditioning, guidance: Any, network: nn.Module | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        module = self.network if network is None else network
        tokens, factor = condition.tensors["embeds"][:, 0].to(self.dtype), getattr(guidance, "guidance", guidance)

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            v = module(x.to(self.dtype), sigma, tokens[rows])
            if factor == 1:
                return v
            base = module(x.to(self.dtype), sigma, torch.zeros_like(tokens[rows]))
            return base + factor * (v - base)

        return predict

    def decode(self, x: Tensor, size: Any) -> Any:
        """Two by two pixels for each of the latent's, and a vignette: without it a picture's border would be as light
        as its inside, and the last bit would say which of the two ViPO takes for the content."""
        wide = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
        tint = wide[:, 0, ..., None] * torch.tensor([0.0, 9.0, -9.0], dtype=torch.float64)
        light = 127.5 + 40 * wide.mean(1) + 20 * VIGNETTE
        return library.media((light[..., None] + tint).clamp(0, 255).round().to(torch.uint8).contiguous())

    def decode_pixels(self, x: Tensor, size: Any) -> Tensor:
        """The same light and tint before they are rounded, [B, 1, 3, 4, 4] in 0 … 1, float64."""
        wide = x.double().repeat_interleave(2, 2).repeat_interleave(2, 3)
        tint = wide[:, 0, ..., None] * torch.tensor([0.0, 9.0, -9.0], dtype=torch.float64)
        light = 127.5 + 40 * wide.mean(1) + 20 * VIGNETTE
        return ((light[..., None] + tint).clamp(0, 255) / 255).permute(0, 3, 1, 2)[:, None]

    def encode_media(self, media: Any, size: Any) -> Tensor:
        grey = (
            library.pictures(media).double().mean(-1).unflatten(2, (2, 2)).unflatten(1, (2, 2)).mean((2, 4)) - 127.5
        ) / 40
        return torch.stack([grey, grey.flip(-1)], 1).float()

    def save(self, folder: str, network: nn.Module | None = None) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = (self.network if network is None else network).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, f"{folder}/model.safetensors")


CODES = torch.tensor([[1.0, 0.2], [0.3, 1.0], [-0.8, 0.4], [-0.5, -0.9], [0.6, -1.0]], dtype=torch.float64)


class Words(nn.Module):
    """Logits of clean tokens: a trained row for each place by the prompt, and a trained table of the tokens seen."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.mix = nn.Linear(2, 4 * len(CODES)), nn.Embedding(len(CODES), len(CODES))
        with torch.no_grad():
            self.mean.weight.copy_(torch.linspace(-0.3, 0.3, 8 * len(CODES)).view(-1, 2).roll(3, 0))
            self.mean.bias.copy_(torch.linspace(0.1, -0.1, 4 * len(CODES)).roll(1, 0))
            self.mix.weight.copy_(torch.linspace(1.0, -1.0, len(CODES) ** 2).view(len(CODES), -1).roll(2, 0))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return self.mean(condition).view(-1, 2, 2, len(CODES)) + self.mix(x)


class Tokens(Generator):
    """The same of four tokens, each a quarter of the picture; a token is the lighter the larger its number."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.network = Words().to(dtype)

    @property
    def jump(self) -> Any:
        return library.metric_jump(CODES)

    def noise_shape(self, size: Any) -> tuple[int, ...]:
        return (2, 2)

    def predictor(
        self, condition: Conditioning, guidance: Any, network: nn.Module | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        module = self.network if network is None else network
        tokens = condition.tensors["embeds"][:, 0].to(self.dtype)
        return lambda x, sigma, rows: module(x, sigma, tokens[rows])

    def decode(self, x: Tensor, size: Any) -> Any:
        grey = (20 + 50 * x).to(torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return library.media(grey[..., None].expand(-1, -1, -1, 3).contiguous())


def worth(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Light, whose pixels count differently, so that hardly two pictures are worth the same; the sun is to be dark."""
    pixels = [image.convert("L").tobytes() for image in images]
    light = [sum((1 + 0.03 * place) * p for place, p in enumerate(grey)) / 4800 for grey in pixels]
    return [-value if prompt == "the sun" else value for value, prompt in zip(light, prompts, strict=True)]


def evenness(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """A second reward, which pulls elsewhere."""
    pixels = [image.convert("L").tobytes() for image in images]
    return [(min(grey) - max(grey)) / 255 for grey in pixels]


class Light:
    """As `worth` with gradients; every fifth picture of a call fails."""

    name, groupwise = "light", False

    def score(self, media: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        pixels = library.pictures(media).permute(0, 3, 1, 2)[:, None].double() / 255
        return library.scores(self.differentiable(pixels, prompts, metadata).float(), self.name)

    def differentiable(self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        grey, place = pixels.mean((1, 2)).flatten(1), torch.arange(16, dtype=torch.float64)
        sign = torch.tensor([-1.0 if prompt == "the sun" else 1.0 for prompt in prompts], dtype=torch.float64)
        value = ((1 + 0.03 * place) * (grey - 0.2 * grey.square())).mean(1) * sign
        return torch.where(torch.arange(len(value)) % 5 == 3, torch.nan, value)


def patchy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    """Every fifth score fails, and fog is always worth the same."""
    values = worth(images, prompts)
    return [
        None if number % 5 == 3 else 0.5 if prompt == "fog" else value
        for number, (prompt, value) in enumerate(zip(prompts, values, strict=True))
    ]


def pictures(folder: Path) -> list[dict[str, str]]:
    """Prompts that name pictures of their own, which it draws: a bright one chosen, a dark one rejected.

    Pictures of prompts given as objects are looked for in the working directory.
    """
    lines: list[dict[str, str]] = []
    for number, prompt in enumerate(PROMPTS):
        line = {"prompt": prompt}
        for key, low in (("chosen", 150), ("rejected", 60)):
            line[key] = f"{number}_{key}.png"
            shades = bytes(low + (31 * number + 17 * place) % 50 for place in range(48))
            Image.frombytes("RGB", SIZE, shades).save(folder / line[key])
        lines.append({**line, "image": line["chosen"]})
    return lines


def judged(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
    """A latent reward: how light the state is."""
    return x.double().flatten(1).mean(1) * (1 + sigma.double())
