"""A small network that looks at pixels and says how the verifier would grade them: what gradients can go through.

It was trained on the verifier's graded score (`scripts/train_shapes_scorer.py`), so it is near it on pictures like
those that it has seen, and wrong on others: whoever climbs its gradient learns its mistakes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.shapes.prompts import COLORS, KINDS, PLACES, RELATIONS, SHAPES, SIZES, Object, by_prompt

SIDE = 32
CELLS = 8
"""Rows and columns of what the network keeps of a picture of 32×32."""

_FIELDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shape", SHAPES),
    ("color", COLORS),
    ("size", SIZES),
    ("place", PLACES),
)
_OBJECT = sum(len(values) for _, values in _FIELDS)
FEATURES = len(KINDS) + len(RELATIONS) + 4 + 2 * _OBJECT
"""Numbers that say what a prompt asks for."""


def features(prompts: Sequence[str]) -> Tensor:
    """What prompts of this world ask for as zeros and ones, float32 [N, FEATURES]: the kind, the relation, how many
    objects, and shape, colour, size and place of the first two. Raises KeyError for a prompt of another world."""
    known, rows = by_prompt(), list[list[float]]()
    for prompt in prompts:
        spec = known[prompt]
        row = [float(spec.kind == kind) for kind in KINDS]
        row += [float(spec.relation == relation) for relation in RELATIONS]
        row += [float(len(spec.objects) == count) for count in (1, 2, 3, 4)]
        for number in range(2):
            row += _object(spec.objects[number]) if number < len(spec.objects) else [0.0] * _OBJECT
        rows.append(row)
    return torch.tensor(rows).view(len(rows), FEATURES)


def _object(wanted: Object) -> list[float]:
    return [float(getattr(wanted, name) == value) for name, values in _FIELDS for value in values]


class PixelScorer(nn.Module):
    """Pictures and prompts' features to the verifier's graded score, 0 to 1.

    Convolutions make 64 cells of a picture, whatever the prompt. Each of several queries, which the prompt makes, opens
    some cells and adds up what is there: a sum, so that objects can be counted.
    """

    def __init__(self, width: int = 96, queries: int = 6, depth: int = 64) -> None:
        super().__init__()
        self.queries, self.depth = queries, depth
        self.eyes = nn.Sequential(
            *_convolved(5, width // 4, 1),
            *_convolved(width // 4, width // 2, 2),
            *_convolved(width // 2, width // 2, 1),
            *_convolved(width // 2, width, 2),
            *_convolved(width, width, 1),
        )
        self.place = nn.Parameter(torch.randn(CELLS * CELLS, width) * 0.1)
        self.key, self.value = nn.Linear(width, depth), nn.Linear(width, depth)
        self.reads = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.query = nn.Linear(width, queries * (depth + 1))
        held = queries * (depth + 1) + 2 * width
        self.judges = nn.Sequential(nn.Linear(held + width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.says = nn.Linear(width, 1)

    def seen(self, pixels: Tensor) -> Tensor:
        """The cells of pictures, [N, 3, 32, 32] in 0 … 1 → [N, 64, width]."""
        line = torch.linspace(-1, 1, pixels.shape[-1], dtype=pixels.dtype, device=pixels.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(pixels), -1, -1, -1)
        return self.eyes(torch.cat([pixels * 2 - 1, grid], 1)).flatten(2).transpose(1, 2) + self.place

    def judged(self, cells: Tensor, asked: Tensor) -> Tensor:
        """The logit of the score, [N], of cells [N, 64, width] for prompts' features [N, FEATURES]."""
        read = self.reads(asked)
        query, bias = self.query(read).view(len(read), self.queries, -1).split([self.depth, 1], 2)
        opens = (query @ self.key(cells).transpose(1, 2) / self.depth**0.5 + bias).sigmoid()
        found = torch.cat([opens @ self.value(cells), opens.sum(2, keepdim=True)], 2).flatten(1) / CELLS
        known = torch.cat([found, cells.mean(1), cells.amax(1), read], 1)
        return self.says(self.judges(known))[:, 0]

    def forward(self, pixels: Tensor, asked: Tensor) -> Tensor:
        """[N] in 0 … 1. pixels: [N, 3, 32, 32] in 0 … 1. Raises ValueError for another size."""
        if pixels.shape[2:] != (SIDE, SIDE):
            high, wide = pixels.shape[2:]
            raise ValueError(
                f"media is {high}×{wide}; the shapes scorer judges {SIDE}×{SIDE}; nearest valid: {SIDE}×{SIDE}"
            )
        return self.judged(self.seen(pixels), asked).sigmoid()


def _convolved(given: int, made: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(given, made, 3, stride, 1), nn.GroupNorm(8, made), nn.SiLU()


def scorer_file() -> Path:
    """Where the embedded weights lie."""
    return Path(str(resources.files("tempflow"))) / "shapes" / "scorer" / "scorer.safetensors"


def save(network: PixelScorer, file: Path, metadata: dict[str, str]) -> None:
    """Writes the weights in float16: half the size, and a score moves by less than a thousandth."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().contiguous() for name, t in network.state_dict().items()}, file, metadata)


def load(file: Path | None = None) -> PixelScorer:
    """The network, frozen, in float32; the embedded one without a file."""
    network = PixelScorer()
    network.load_state_dict({name: t.float() for name, t in load_file(scorer_file() if file is None else file).items()})
    return network.requires_grad_(False).eval()
