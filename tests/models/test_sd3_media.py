"""Pictures to latents: diffusers' own encoding, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from worlds import World

from tempflow import models
from tempflow.media import Media, Size
from tempflow.shapes.prompts import balanced


def noise(count: int, size: Size, seed: int = 0) -> Tensor:
    """Smooth random pictures."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (size.height, size.width), mode="bilinear")
    return (fine * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def theirs(world: World, media: Tensor) -> Tensor:
    """As StableDiffusion3Img2ImgPipeline prepares its latents, but for the posterior's mode in place of a sample."""
    pipe = world.plain
    images = [Image.fromarray(m.numpy()) for m in media]
    prepared = pipe.image_processor.preprocess(images).to(pipe.vae.dtype)
    with torch.no_grad():
        z = pipe.vae.encode(prepared).latent_dist.mode()
    return (z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def test_it_is_diffusers_own_encoding(world: World) -> None:
    for size in (world.size, *world.others):
        media = noise(3, size)
        got = world.adapter.encode_media(media, size)
        assert got.dtype == torch.float32 and got.shape == (3, *world.adapter.noise_shape(size))
        # the last bits depend on where numpy's memory begins
        torch.testing.assert_close(got, theirs(world, media), rtol=1e-5, atol=2e-5)
        assert torch.equal(got, world.adapter.encode_media(media, size)) and not got.requires_grad


def test_parts_bound_memory_and_change_no_more_than_rounding(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    media, seen = noise(5, world.size), list[int]()
    whole = world.adapter.encode_media(media, world.size)
    handle = world.adapter.pipe.vae.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr("tempflow.models.diffusers_model.VAE_PIXELS", 2 * world.size.pixels)
    parts = world.adapter.encode_media(media, world.size)
    handle.remove()
    assert seen == [2, 2, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_half_precision_comes_out_in_float32(tiny_world: World) -> None:
    half = models.load(str(tiny_world.folder), dtype="bfloat16")
    media = noise(2, tiny_world.size)
    got, want = (m.encode_media(media, tiny_world.size) for m in (half, tiny_world.adapter))
    assert got.dtype == torch.float32 and 0 < float((got - want).abs().max()) < 0.1 * float(want.abs().max())


def test_rendered_shapes_survive(shapes_world: World) -> None:
    """The strict verifier calls what comes back right nearly always, and pixels hardly change."""
    pytest.importorskip("cv2")
    from tempflow.rewards.shapes import ShapesReward
    from tempflow.shapes.render import scene

    wanted, rng = balanced("validation", 60), np.random.default_rng(0)
    media = torch.stack([torch.from_numpy(scene(spec, rng)) for spec in wanted])
    back = shapes_world.adapter.decode(shapes_world.adapter.encode_media(media, Size(32, 32)), Size(32, 32)).pictures()
    scores = ShapesReward(graded=False).score(back, [s.prompt for s in wanted], [{}] * 60)
    assert float(scores.value.mean()) >= 0.9
    assert float((back.float() - media.float()).abs().mean()) < 4


def test_media_of_another_kind(world: World) -> None:
    media = noise(1, world.size)
    for wrong in (media.float(), media[..., :1], media[0]):
        with pytest.raises(ValueError, match=r"nearest valid: torch.uint8 \[N, H, W, 3\] on cpu"):
            world.adapter.encode_media(wrong, world.size)
    for wrong in (media[:, :-1], Media(media[:, None].expand(-1, 2, -1, -1, -1))):
        with pytest.raises(ValueError, match=rf"and {world.size} is asked for; nearest valid: pictures"):
            world.adapter.encode_media(wrong, world.size)
    with pytest.raises(ValueError, match="height: 3 must be a multiple of"):
        world.adapter.encode_media(noise(1, Size(3, 32)), Size(3, 32))
