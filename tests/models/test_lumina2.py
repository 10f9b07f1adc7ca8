"""What Lumina-Image 2 alone has: a norm along the lines of the picture, and a shift that goes by the channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import lumina2
from families.common import NEGATIVES, PROMPTS, length
from torch import Tensor

from tempflow import models
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.media import Size
from tempflow.models.guidance import guidance_of
from tempflow.models.lumina2 import Lumina2Guidance
from tempflow.models.quiet import quiet
from tempflow.request import Prompt

SIZE = Size(*lumina2.SIZES[0])
NOISE = Noise(seed=5)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("lumina2") / "model"
    with quiet():
        lumina2.pipeline().save_pretrained(place)
        return models.load(str(place))


def drawn(adapter: Any, guidance: Lumina2Guidance) -> tuple[Tensor, Tensor]:
    """Ours and the pipeline's own, of two prompts in three steps."""
    shape = adapter.noise_shape(SIZE)
    prompts = [Prompt(text, negative=n) for text, n in zip(PROMPTS[:2], NEGATIVES[:2], strict=True)]
    predict = adapter.predictor(adapter.encode(prompts, SIZE), guidance)
    forest = rollout([plan.ode(3, 1)] * 2, ODE(), adapter.schedule(3, SIZE), predict, NOISE, shape=shape)
    theirs = adapter.pipe(
        PROMPTS[:2],
        negative_prompt=NEGATIVES[:2],
        height=SIZE.height,
        width=SIZE.width,
        num_inference_steps=3,
        guidance_scale=guidance.guidance,
        cfg_normalization=guidance.cfg_normalization,
        latents=NOISE.initial([(0, 0), (1, 0)], shape),
        output_type="latent",
        max_sequence_length=length(adapter.pipe.tokenizer, 256),
    ).images
    return forest.nodes[forest.leaves.node], theirs


def test_guidance_keeps_the_prompts_norm_in_every_line_and_may_be_plain(adapter: Any) -> None:
    positive, negative = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    guided = Lumina2Guidance(4.0)(positive, negative)
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1), atol=1e-5)
    plain = Lumina2Guidance(4.0, cfg_normalization=False)
    assert torch.equal(plain(positive, negative), negative + 4.0 * (positive - negative))
    ours, theirs = drawn(adapter, plain)
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert float((drawn(adapter, Lumina2Guidance(4.0))[0] - ours).abs().max()) > 0.1


def test_the_option_goes_by_the_pipelines_own_name() -> None:
    plain = guidance_of(Lumina2Guidance, 4.0, {"cfg_normalization": False})
    assert isinstance(plain, Lumina2Guidance) and plain == Lumina2Guidance(4.0, False)
    assert plain.call_options() == {"guidance_scale": 4.0, "cfg_normalization": False}
    assert Lumina2Guidance(4.0).call_options() == {"guidance_scale": 4.0}
    with pytest.raises(ValueError, match=r"guidance_options: 'cfg_normalisation' .*'cfg_normalization'"):
        guidance_of(Lumina2Guidance, 4.0, {"cfg_normalisation": False})


def test_a_dynamic_shift_goes_by_the_channels_as_in_the_pipeline(adapter: Any) -> None:
    kept = adapter.pipe.scheduler
    adapter.pipe.scheduler = type(kept).from_config(kept.config, use_dynamic_shifting=True, base_shift=1.5)
    try:
        ours, theirs = drawn(adapter, Lumina2Guidance(4.0))
        small, large = (adapter.schedule(3, Size(*size)).sigmas for size in lumina2.SIZES)
    finally:
        adapter.pipe.scheduler = kept
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    assert torch.equal(small, large) and not torch.allclose(small, adapter.schedule(3, SIZE).sigmas, atol=0.01)


def test_the_system_prompt_stands_before_prompts_alone(adapter: Any) -> None:
    told = adapter.encode([Prompt("a small bird", negative="a small bird")], SIZE)
    assert told.tensors["mask"].sum() > told.negative["mask"].sum()
    _, _, embeds, mask = adapter.pipe.encode_prompt(
        ["anything"], negative_prompt=["a small bird"], max_sequence_length=length(adapter.pipe.tokenizer, 256)
    )
    assert torch.equal(told.negative["embeds"], embeds) and torch.equal(told.negative["mask"], mask)


def test_more_lines_than_the_network_has_places_for_are_refused(adapter: Any) -> None:
    """The tiny one has 16 of 16 pixels a side."""
    adapter.noise_shape(Size(256, 16))
    with pytest.raises(ValueError, match=r"height: 272 must be a multiple of 16 up to 256; nearest is 256"):
        adapter.noise_shape(Size(272, 16))
