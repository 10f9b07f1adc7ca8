"""Perturbed conditions: the blend over σ, the loss by hand, and what the optimizer must reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempflow.core.perturb import Perturbation
from tempflow.core.rng import Stream

USUAL = Perturbation(4, fade=0.5, spread=0.5, target=0.9, band=0.05, init=0.1, embed_steps=50, embed_rate=0.03)
STREAM = Stream(3, "test")


def tokens(count: int = 6, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def means(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plainest encoder: a prompt is the mean of its words."""
    return {name: given.mean(1) for name, given in words.items()}


def learned(perturbation: Perturbation, given: Tensor, id: int = 0) -> Tensor:
    return perturbation.offsets({"text": given}, means, STREAM, (id,))["text"]


def cosines(given: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the learned embeddings with the prompt's own, and of each two of them; in float64."""
    e = (given + offsets).double().mean(1)
    unit = e / e.norm(dim=1, keepdim=True)
    all_of_them = unit @ unit.T
    k, other = torch.triu_indices(len(e) - 1, len(e) - 1, 1)
    return all_of_them[0, 1:], all_of_them[1:, 1:][k, other]


# ------------------------------------------------------------------------------------------------------- the blend
@pytest.mark.parametrize("fade", [1e-6, 0.1, 0.3, 0.5, 1.0])
def test_strength_is_the_clipped_line(fade: float) -> None:
    given = replace(USUAL, fade=fade)
    assert given.strength(1.0) == 1.0
    assert given.strength(1 - fade) == pytest.approx(0.0, abs=1e-9) and given.strength(0.0) == 0.0
    assert given.strength(1 - fade / 2) == pytest.approx(0.5, abs=1e-9)
    values = [given.strength(i / 1000) for i in range(1001)]
    assert values == sorted(values) and min(values) == 0
    assert all(given.strength(s) == 0 for s in (0.0, max(0.0, 1 - fade - 1e-3)))


def test_without_fade_nothing_is_perturbed_even_at_one() -> None:
    none = replace(USUAL, fade=0.0)
    assert [none.strength(s) for s in (0.0, 0.5, 1.0)] == [0, 0, 0]


# -------------------------------------------------------------------------------------------------------- the loss
def at(*degrees: float) -> Tensor:
    turned = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]
    return torch.tensor(turned, dtype=torch.float64)


def test_the_anchors_part_is_zero_inside_the_band_and_linear_outside() -> None:
    alone = replace(USUAL, spread=0.0, target=0.9, band=0.05)
    anchor = at(0)[0] * 7  # lengths do not count
    for degrees in (20.0, 25.0, 31.0):  # cosines .94 … .857
        assert alone.loss(3 * at(degrees, -degrees), anchor).item() == 0
    for degrees, outside in ((0.0, 1 - 0.95), (60.0, 0.85 - 0.5), (90.0, 0.85)):
        assert alone.loss(at(degrees), anchor).item() == pytest.approx(outside, abs=1e-12)
        assert alone.loss(at(degrees, 25.0, -degrees), anchor).item() == pytest.approx(2 * outside, abs=1e-12)


def test_the_other_part_is_the_mean_cosine_of_pairs() -> None:
    free = replace(USUAL, spread=3.0, band=2.0)
    found = free.loss(at(0, 60, 90) * torch.tensor([[1.0], [2.0], [5.0]]), at(45)[0]).item()
    assert found == pytest.approx(3 * (0.5 + 0.0 + math.cos(math.radians(30))) / 3, abs=1e-12)
    assert free.loss(at(10), at(45)[0]).item() == 0  # one differs from no other


# ---------------------------------------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize("count", [3, 4, 12])
def test_it_parts_the_conditions_as_far_as_the_band_lets_it(count: int) -> None:
    """The optimum is a simplex on the band's lower edge: c² − s²/(M − 1) for M vectors at cosine c to the anchor."""
    given = tokens()
    before = learned(replace(USUAL, count=count, embed_steps=0), given)
    anchor, pairs = cosines(given, learned(replace(USUAL, count=count), given))
    assert float((anchor - 0.85).abs().max()) < 5e-3
    best = 0.85**2 - (1 - 0.85**2) / (count - 2)
    assert pairs.mean().item() == pytest.approx(best, abs=1e-2)
    assert pairs.mean() < cosines(given, before)[1].mean() - 0.1


def test_two_that_are_spread_too_strongly_leave_the_band() -> None:
    """At λ_div = 1 two of them gain more by parting than they lose: d/dθ (cos 2θ − 2 cos θ) = 0 at cos θ = ½."""
    given = tokens()
    anchor, pairs = cosines(given, learned(replace(USUAL, count=3, spread=1.0, embed_steps=200), given))
    torch.testing.assert_close(anchor, torch.full_like(anchor, 0.5), rtol=0, atol=5e-3)
    torch.testing.assert_close(pairs, torch.full_like(pairs, -0.5), rtol=0, atol=1e-2)


def test_without_spread_it_stops_where_the_band_begins() -> None:
    given = tokens()
    anchor, _ = cosines(given, learned(replace(USUAL, spread=0.0), given))
    assert bool((anchor < 0.96).all()) and bool((anchor > 0.94 - 0.03).all())
    inside = replace(USUAL, spread=0.0, band=2.0)
    assert torch.equal(learned(inside, given), learned(replace(inside, embed_steps=0), given))


def test_the_first_is_the_prompts_own() -> None:
    offsets = learned(USUAL, tokens())
    assert offsets.shape == (4, 6, 32) and bool((offsets[0] == 0).all()) and bool((offsets[1:] != 0).all())


def test_it_learns_through_the_encoder() -> None:
    """Of an encoder that sees one direction of the first word alone, that is all that moves; the others keep their
    noise. It is the encoder's own vectors that part, and keep their cosine."""
    given, gaze = tokens(), torch.zeros(32)
    gaze[:8] = 1

    def first_word(words: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"text": torch.tanh(words["text"][:, 0] * gaze)}

    start = learned(replace(USUAL, embed_steps=0), given)
    offsets = USUAL.offsets({"text": given}, first_word, STREAM, (0,))["text"]
    moved = (offsets - start)[1:] != 0
    assert bool(moved[:, 0, :8].all()) and not bool(moved[:, 1:].any()) and not bool(moved[:, 0, 8:].any())
    said = first_word({"text": given + offsets})["text"]
    assert float((torch.cosine_similarity(said[1:], said[:1]) - 0.85).abs().max()) < 0.02


def test_every_encoder_has_offsets_and_a_loss_of_its_own() -> None:
    """Two at once learn what each would alone but for their noise; one that sees no word learns nothing."""
    a, b = tokens(), tokens(4, 16, seed=1)
    both = USUAL.offsets({"a": a, "b": b, "none": a[:0]}, lambda w: means({"a": w["a"], "b": w["b"]}), STREAM, (0,))
    assert torch.equal(both["a"], USUAL.offsets({"a": a}, means, STREAM, (0,))["a"])
    assert both["b"].shape == (4, 4, 16) and both["none"].shape == (4, 0, 32)
    anchor, _ = cosines(b, both["b"])
    assert float((anchor - 0.85).abs().max()) < 2e-2


def test_the_start_is_noise_in_each_tokens_root_mean_square() -> None:
    given = tokens(40, 64) * torch.linspace(0.1, 10, 40)[:, None]
    offsets = learned(replace(USUAL, count=9, init=0.2, embed_steps=0), given)[1:]
    relative = offsets / given.square().mean(1).sqrt()[:, None]
    assert relative.std().item() == pytest.approx(0.2, rel=0.02)
    assert relative.std((0, 2)).sub(0.2).abs().max() < 0.03  # of every token


def test_scale_does_not_matter() -> None:
    given = tokens()
    torch.testing.assert_close(learned(USUAL, given * 32), learned(USUAL, given) * 32, rtol=1e-3, atol=1e-2)


def test_it_is_a_function_of_its_arguments() -> None:
    given = tokens()
    want = learned(USUAL, given)
    with torch.no_grad():
        assert torch.equal(learned(USUAL, given), want) and not want.requires_grad
    assert not torch.equal(learned(USUAL, given, 1), want)
    other = USUAL.offsets({"text": given}, means, Stream(4, "test"), (0,))["text"]
    assert not torch.equal(other, want)


def test_bfloat16_tokens_give_float32_offsets() -> None:
    given = tokens().bfloat16()
    assert torch.equal(learned(USUAL, given), learned(USUAL, given.float()))


def test_nothing_to_learn() -> None:
    given = tokens()
    assert not learned(replace(USUAL, count=1), given).any()
    assert not learned(replace(USUAL, init=0.0, embed_steps=0), given).any()
    assert learned(USUAL, given[:0]).shape == (4, 0, 32)
    two = learned(replace(USUAL, count=2), given)
    assert bool(two[1].any()) and bool(two.isfinite().all())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "count: 0 must be finite and at least 1; nearest valid: 1"),
        ("fade", 1.5, "fade: 1.5 must be in [0, 1]; nearest valid: 1"),
        ("fade", math.nan, "fade: nan must be in [0, 1]; nearest valid: 0"),
        ("spread", -1.0, "spread: -1.0 must be finite and at least 0; nearest valid: 0"),
        ("target", -2.0, "target: -2.0 must be in [-1, 1]; nearest valid: -1"),
        ("band", math.inf, "band: inf must be finite and at least 0; nearest valid: 0"),
        ("init", -0.1, "init: -0.1 must be finite and at least 0; nearest valid: 0"),
        ("init", 0.0, "init: 0 leaves equal conditions no direction to part in; nearest valid: 0.1"),
        ("embed_steps", -1, "embed_steps: -1 must be finite and at least 0; nearest valid: 0"),
        ("embed_rate", 0.0, "embed_rate: 0.0 must be finite and above 0; 0.03 is usual"),
    ],
)
def test_bad_values(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(USUAL, **{field: value})
    assert message in str(caught.value)
