"""The adapter draws what diffusers draws: grids, ODE latents and media against StableDiffusion3Pipeline itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arithmetic import EXACT, agree
from diffusers import FlowMatchEulerDiscreteScheduler
from worlds import NOISE, SIZE, World, ours, theirs

from tempflow.core import plan
from tempflow.core.dynamics import ODE, FlowSDE
from tempflow.core.rollout import rollout
from tempflow.media import Size
from tempflow.request import asked

DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.4}
SCHEDULERS = {
    "shift 1": FlowMatchEulerDiscreteScheduler(shift=1.0),
    "shift 3": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "shift 5": FlowMatchEulerDiscreteScheduler(shift=5.0),
    "dynamic": FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    "dynamic linear": FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear", max_shift=1.5),
    "karras": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
}


@pytest.fixture(params=SCHEDULERS)
def scheduled(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Both sides with another scheduler."""
    scheduler = SCHEDULERS[request.param]
    for pipe in (world.adapter.pipe, world.plain):
        monkeypatch.setattr(pipe, "scheduler", type(scheduler).from_config(scheduler.config))
    return world


def one_prompt_agrees(world: World, steps: int, guidance: float) -> bool:
    prompts = [world.prompts[0]]
    a = ours(world.adapter, prompts, steps, guidance, world.size, roots=2)
    b = theirs(world.plain, prompts, steps, guidance, world.size, world.tokens, roots=2)
    return agree(a, b)


@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_one_prompt_is_bit_equal(world: World, steps: int, guidance: float) -> None:
    assert one_prompt_agrees(world, steps, guidance)


def test_one_prompt_of_the_embedded_pipeline_is_bit_equal(shapes_world: World) -> None:
    assert one_prompt_agrees(shapes_world, 4, 3.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.0])
def test_many_prompts_differ_by_the_text_encoders_rounding_alone(world: World, guidance: float) -> None:
    """The pipeline encodes prompts as one batch and we one by one; given our embeddings it is bit-equal."""
    prompts = list(world.prompts)
    a = ours(world.adapter, prompts, 4, guidance, world.size, roots=2)
    b = theirs(world.plain, prompts, 4, guidance, world.size, world.tokens, roots=2)
    assert (a - b).abs().max() <= 1e-5 * max(1.0, guidance) * a.abs().max()  # guidance enlarges the rounding
    condition = world.adapter.encode(asked(prompts), SIZE)
    repeat = lambda t: t.repeat_interleave(2, 0)  # noqa: E731
    c = world.plain(
        prompt_embeds=repeat(condition.tensors["embeds"]),
        pooled_prompt_embeds=repeat(condition.tensors["pooled"]),
        negative_prompt_embeds=repeat(condition.negative["embeds"]),
        negative_pooled_prompt_embeds=repeat(condition.negative["pooled"]),
        height=world.size.height,
        width=world.size.width,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=NOISE.initial([(p, r) for p in range(3) for r in range(2)], world.adapter.noise_shape(world.size)),
        output_type="latent",
    ).images
    assert agree(a, c)
    assert len(a.unique(dim=0)) == 6


def test_other_sizes_and_schedulers_are_bit_equal(scheduled: World) -> None:
    prompts = [scheduled.prompts[1]]
    for size in (scheduled.size, *scheduled.others):
        a = ours(scheduled.adapter, prompts, 2, 3.0, size)
        assert agree(a, theirs(scheduled.plain, prompts, 2, 3.0, size, scheduled.tokens))


def test_guidance_and_prompts_matter(world: World) -> None:
    """Otherwise equality would say little."""
    base = ours(world.adapter, list(world.prompts), 4, 1.0, world.size)
    guided = ours(world.adapter, list(world.prompts), 4, 3.0, world.size)
    turned = ours(world.adapter, list(world.prompts[::-1]), 4, 1.0, world.size)
    assert (base - guided).abs().mean() > 1e-2
    assert (base[0] - turned[0]).abs().mean() > 1e-2


def test_schedule_is_the_pipelines_own(scheduled: World) -> None:
    """After a call, the pipeline's scheduler holds the grid that it walked."""
    for size in (scheduled.size, scheduled.others[0]):
        for steps in (1, 5):
            theirs(scheduled.plain, [scheduled.prompts[0]], steps, 1.0, size, scheduled.tokens)
            grid = scheduled.adapter.schedule(steps, size)
            assert torch.equal(grid.sigmas, scheduled.plain.scheduler.sigmas)
            assert grid.sigmas.dtype == torch.float32 and grid.steps == steps


def test_dynamic_shift_depends_on_the_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.adapter.pipe, "scheduler", SCHEDULERS["dynamic"])
    small, large = (world.adapter.schedule(4, s).sigmas[1] for s in (world.others[0], Size(64, 64)))
    assert large > small


def test_schedule_survives_rounding_above_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=0.2)
    scheduler.set_timesteps(3)
    assert scheduler.sigmas[0] > 1
    monkeypatch.setattr(world.adapter.pipe, "scheduler", scheduler)
    assert torch.equal(world.adapter.schedule(3, world.size).sigmas, scheduler.sigmas.clamp(max=1))


def test_schedule_rejects_no_steps(world: World) -> None:
    with pytest.raises(ValueError, match=r"steps: 0 is too small; the nearest valid value is 1"):
        world.adapter.schedule(0, world.size)


@pytest.mark.parametrize("which", [0, 1])
def test_media_are_the_pipelines(world: World, which: int) -> None:
    size = (world.size, world.others[0])[which]
    prompts = [world.prompts[0]]
    media = world.adapter.decode(ours(world.adapter, prompts, 3, 3.0, size, roots=3), size).pictures()
    assert media.dtype == torch.uint8 and media.shape == (3, size.height, size.width, 3) and media.is_contiguous()
    pil = theirs(world.plain, prompts, 3, 3.0, size, world.tokens, roots=3, output="pil")
    assert agree(media, torch.from_numpy(np.stack([np.asarray(p) for p in pil])))
    floats = theirs(world.plain, prompts, 3, 3.0, size, world.tokens, roots=3, output="np")
    assert np.abs(media.numpy() / 255 - floats).max() <= (0.5001 if EXACT else 0.51) / 255
    assert media.float().std() > 1


def test_decoding_in_parts_changes_no_picture(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, *world.adapter.noise_shape(world.size), generator=torch.Generator().manual_seed(0))
    whole = world.adapter.decode(x, world.size).pictures()
    seen: list[int] = []
    decode = world.adapter.pipe.vae.decode
    monkeypatch.setattr(world.adapter.pipe.vae, "decode", lambda z, **k: (seen.append(len(z)), decode(z, **k))[1])
    monkeypatch.setattr("tempflow.models.diffusers_model.VAE_PIXELS", 2 * world.size.pixels)
    parts = world.adapter.decode(x, world.size).pictures()
    assert seen == [2, 2, 1]
    assert (whole.int() - parts.int()).abs().max() <= 1  # a value between two levels may round either way
    monkeypatch.setattr("tempflow.models.diffusers_model.VAE_PIXELS", 1)
    assert len(world.adapter.decode(x[:2], world.size)) == 2 and seen[3:] == [1, 1]


@pytest.mark.parametrize("size", [Size(32, 32), Size(16, 48)])
def test_flow_sde_without_noise_is_the_pipeline(tiny_world: World, size: Size) -> None:
    adapter, prompts = tiny_world.adapter, [tiny_world.prompts[2]]
    forests = [
        rollout(
            [tree],
            dynamics,
            adapter.schedule(4, size),
            adapter.predictor(adapter.encode(asked(prompts), SIZE), 3.0),
            NOISE,
            shape=adapter.noise_shape(size),
        )
        for tree, dynamics in ((plan.chain(4, 1), FlowSDE(0.0)), (plan.ode(4, 1), ODE()))
    ]
    a, b = (f.nodes[f.leaves.node] for f in forests)
    assert torch.equal(a, b)
    assert agree(b, theirs(tiny_world.plain, prompts, 4, 3.0, size, tiny_world.tokens))
