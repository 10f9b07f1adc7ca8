"""Guidance as a family's small object, and negative prompts, by the pipeline's own pictures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from worlds import NOISE, World

from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import rollout
from tempflow.models.flux import FluxGuidance
from tempflow.models.guidance import Guidance, guidance_of, guided
from tempflow.models.protocol import Conditioning, shared
from tempflow.models.qwen_image import QwenGuidance
from tempflow.models.z_image import ZImageGuidance
from tempflow.request import Prompt


def test_plain_guidance_is_the_formula() -> None:
    a, b = torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([0.5, -1.0], dtype=torch.bfloat16)
    assert torch.equal(Guidance(3.0)(a, b), torch.tensor([2.0, 8.0])) and Guidance(3.0)(a, b).dtype == torch.float32
    assert (Guidance().rows, Guidance(1.5).rows, Guidance(2.0).at(1.0)) == (1, 2, Guidance())
    assert guided(2) == Guidance(2.0) and guided(Guidance(4.0)) == Guidance(4.0)
    with pytest.raises(ValueError, match="guidance: nan is no number"):
        Guidance(float("nan"))


@dataclass(frozen=True)
class Rescaled(Guidance):
    rescale: float = 0.0


def test_a_familys_options_are_known_by_name() -> None:
    assert guidance_of(Rescaled, 4.0, {"rescale": 0.7}) == Rescaled(4.0, 0.7)
    assert guided(3.0, Rescaled) == Rescaled(3.0) and Rescaled(4.0, 0.7).at(2.0) == Rescaled(2.0, 0.7)
    with pytest.raises(ValueError, match=r"model.guidance_options: 'rescal' is unknown; nearest valid: 'rescale'"):
        guidance_of(Rescaled, 4.0, {"rescal": 0.7})
    with pytest.raises(ValueError, match=r"'rescale' is unknown; this family has none; nearest valid: \{\}"):
        guidance_of(Guidance, 4.0, {"rescale": 0.7})


@pytest.mark.parametrize(
    ("guidance", "asked"),
    [
        (Guidance(4.5), {"guidance_scale": 4.5}),
        (FluxGuidance(3.5), {"guidance_scale": 3.5}),
        (FluxGuidance(3.5, 2.0), {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": ""}),
        (QwenGuidance(4.0), {"true_cfg_scale": 4.0, "negative_prompt": " "}),
        (QwenGuidance(1.0), {"true_cfg_scale": 1.0}),
        (ZImageGuidance(6.0), {"guidance_scale": 5.0}),
    ],
)
def test_model_cards_ask_in_the_pipelines_own_words(guidance: Guidance, asked: dict[str, object]) -> None:
    assert guidance.call_options() == asked


def drawn(world: World, prompts: tuple[Prompt, ...], guidance: float) -> torch.Tensor:
    adapter, size = world.adapter, world.size
    forest = rollout(
        [plan.ode(4, 1)] * len(prompts),
        ODE(),
        adapter.schedule(4, size),
        adapter.predictor(adapter.encode(prompts, size), guidance),
        NOISE,
        shape=adapter.noise_shape(size),
    )
    return forest.nodes[forest.leaves.node]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_negative_prompts_give_the_pipelines_pictures(world: World, guidance: float) -> None:
    """Each request's own, in one batch; at guidance 1 the pipeline makes no use of them either."""
    texts, negatives = world.prompts, (world.prompts[2], "", world.prompts[0])
    ours = drawn(world, tuple(Prompt(t, {}, n) for t, n in zip(texts, negatives, strict=True)), guidance)
    plain = drawn(world, tuple(Prompt(t) for t in texts), guidance)
    pipe, size = world.plain, world.size
    noise = NOISE.initial([(n, 0) for n in range(3)], world.adapter.noise_shape(size))
    for row, (text, negative) in enumerate(zip(texts, negatives, strict=True)):
        want = pipe(
            text,
            negative_prompt=negative,
            height=size.height,
            width=size.width,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=noise[row : row + 1],
            output_type="latent",
            max_sequence_length=world.tokens,
        ).images
        assert (ours[row] - want[0]).abs().max() <= 1e-5 * max(1.0, guidance) * want.abs().max()
    moved = [float((a - b).abs().max()) > 1e-2 for a, b in zip(ours, plain, strict=True)]
    assert moved == ([False] * 3 if guidance == 1 else [True, False, True])


def test_rows_that_are_alike_share_memory_and_repeat_alike() -> None:
    row = torch.arange(6.0).view(1, 2, 3)
    alike = shared(row, 3)
    condition = Conditioning(tuple(map(Prompt, "abc")), {"x": torch.randn(3, 2)}, {"x": alike})
    twice = condition.repeated(2)
    assert twice.prompts == tuple(map(Prompt, "aabbcc"))
    assert torch.equal(twice.tensors["x"], condition.tensors["x"].repeat_interleave(2, 0))
    assert twice.negative is not None and torch.equal(twice.negative["x"], row.expand(6, 2, 3))
    assert twice.negative["x"].untyped_storage().nbytes() == row.untyped_storage().nbytes()
