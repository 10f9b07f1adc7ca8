"""The scorer that was trained on the shapes verifier: the same score with and without gradients, near its teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tempflow.media import Media
from tempflow.rewards import build
from tempflow.rewards.protocol import differentiable_of, prepare
from tempflow.shapes.prompts import Spec, specs
from tempflow.shapes.render import scene
from tempflow.shapes.scorer import FEATURES, PixelScorer, features, load, scorer_file
from tempflow.shapes.verify import judge

HELD = specs("test")[::6]
"""Prompts that it has not seen, of all kinds."""


def pictures(wanted: list[Spec], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([scene(spec, rng) for spec in wanted]))


def test_with_gradients_it_is_the_same_score() -> None:
    reward, shown = build("shapes_scorer"), pictures(list(HELD[:12]))
    prompts, metadata = [spec.prompt for spec in HELD[:12]], [{}] * 12
    plain = reward.score(Media.of(shown), prompts, metadata)
    assert plain.names == ("shapes_scorer",) and plain.ok.all() and 0 <= plain.value.min() <= plain.value.max() <= 1
    score = differentiable_of(reward)
    assert score is not None
    pixels = (shown.permute(0, 3, 1, 2)[:, None].float() / 255).requires_grad_(True)
    value = score(pixels, prompts, metadata)
    assert torch.equal(value.detach(), plain.value[:, 0])
    value[0].backward()
    assert pixels.grad is not None and pixels.grad[0].any() and not pixels.grad[1:].any()


def test_its_slope_is_a_difference_s() -> None:
    network, asked = load().double(), features([spec.prompt for spec in HELD[:4]]).double()
    pixels = (pictures(list(HELD[:4])).permute(0, 3, 1, 2).double() / 255).requires_grad_(True)
    (slope,) = torch.autograd.grad(network(pixels, asked).sum(), pixels)
    way = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ends = [network(pixels + sign * 1e-6 * way, asked) for sign in (1, -1)]
    assert torch.allclose((ends[0] - ends[1]) / 2e-6, (slope * way).flatten(1).sum(1), rtol=1e-5, atol=1e-8)


def test_it_tells_right_pictures_from_those_of_other_prompts() -> None:
    """Of rendered pictures of prompts that it has not seen; the training script measures the model's own."""
    wanted = list(HELD)
    shown, others = pictures(wanted), wanted[20:] + wanted[:20]
    network = load()
    pixels = shown.permute(0, 3, 1, 2).float() / 255
    right, wrong = (network(pixels, features([spec.prompt for spec in of])) for of in (wanted, others))
    truth = torch.tensor([judge(picture, spec).graded for picture, spec in zip(shown.numpy(), others, strict=True)])
    assert float((right > wrong)[truth < 1].float().mean()) > 0.8
    assert float(torch.corrcoef(torch.stack([wrong, truth]))[0, 1]) > 0.5


def test_its_weights_are_small_and_say_what_they_were_trained_on() -> None:
    assert scorer_file().stat().st_size <= 1 << 20
    with safe_open(scorer_file(), "pt") as file:
        assert file.metadata()["trained_on"] == "the graded shapes verifier" and file.metadata()["licence"]
    assert not any(p.requires_grad for p in load().parameters())


def test_features_tell_all_prompts_apart_but_for_the_order_of_two_things() -> None:
    rows = features([spec.prompt for spec in specs()])
    assert rows.shape == (len(specs()), FEATURES) and len(rows.unique(dim=0)) == len(specs())


def test_what_it_cannot_judge_is_one_line() -> None:
    reward = build("shapes_scorer")
    prepare(reward)
    with pytest.raises(ValueError, match=r"^prompts: 'a dog' is not a prompt of the shapes world; nearest valid: '"):
        reward.score(Media.of(pictures([HELD[0]])), ["a dog"], [{}])
    with pytest.raises(ValueError, match=r"^media is 16×32; the shapes scorer judges 32×32"):
        PixelScorer()(torch.zeros(1, 3, 16, 32), torch.zeros(1, FEATURES))
    with pytest.raises(ValueError, match="batch"):
        build("shapes_scorer", options={"batch": 0})
