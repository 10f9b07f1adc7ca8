"""A small network that was trained on the shapes verifier: a reward of that world with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tempflow.rewards.scorer import Batch, Scorer
from tempflow.shapes.prompts import check_known

if TYPE_CHECKING:
    from tempflow.shapes.scorer import PixelScorer

LICENCE, NEEDS, RANGE = "Apache-2.0", "", "0 to 1"
DIFFERENTIABLE = True


def shapes_scorer(*, device: str = "cpu", batch: Batch = 256) -> ShapesScorer:
    """A network's guess of the shapes verifier's graded score, with gradients.

    It was trained on the verifier, and is not the verifier: whoever climbs it long enough finds pictures that it likes
    and the verifier does not. Judge what it taught by `shapes` or `shapes_strict`.
    """
    return ShapesScorer("shapes_scorer", _load, _rate, batch=batch, device=device, pixels=_rate_pixels)


class ShapesScorer(Scorer["PixelScorer"]):
    """Of pictures of 32×32 and prompts of the `shapes` world."""

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt that is not of this world."""
        check_known(prompts)


def _load(device: str) -> PixelScorer:
    from tempflow.shapes.scorer import load

    return load().to(device)


def _rate(network: PixelScorer, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    return _rate_pixels(network, pictures.to(network.place.device).permute(0, 3, 1, 2).float() / 255, prompts)


def _rate_pixels(network: PixelScorer, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    from tempflow.shapes.scorer import features

    check_known(prompts)
    return network(pixels, features(prompts).to(pixels.device))
