"""Each tiny pipeline's own drawing equals a plain Euler loop over its network: the record of what is known of a family.

The loop is in `families/`: what the network is given for σ, the sign of its output, the grid, the rule of guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import cogview4, flux, flux2, lumina2, qwen_image, sana, stable_diffusion, z_image
from families.common import NEGATIVES, plain
from torch import Tensor, nn

from tempflow.models.quiet import quiet

STEPS = 3
VISIBLE = 0.01
"""By at least so much, of their size, a change of the conditions moves the latents; equality holds to 1e-5."""


@dataclass(frozen=True)
class Case:
    module: Any
    make: Callable[[], Any]
    extra: dict[str, Any] = field(default_factory=dict)
    """What `theirs` and `velocity` take beside, where guidance is on."""
    negatives_count: bool = True
    loop: Callable[..., Tensor] = plain
    statistics: tuple[tuple[str, Any], ...] = (("scaling_factor", 1.0),)
    """Settings of the autoencoder that say nothing; the folder's own are others, and its pictures show it."""


SHIFT = (("scaling_factor", 1.0), ("shift_factor", 0.0))
UNET: dict[str, Any] = {"module": stable_diffusion, "loop": stable_diffusion.plain}
CASES = {
    "flux": Case(flux, flux.pipeline, {"true_cfg": 2.0}, statistics=SHIFT),
    "qwen_image": Case(
        qwen_image, qwen_image.pipeline, statistics=(("latents_mean", [0.0] * 4), ("latents_std", [1.0] * 4))
    ),
    "sdxl": Case(**UNET, make=stable_diffusion.sdxl),
    "sd15": Case(**UNET, make=stable_diffusion.sd15),
    "sd15 of v": Case(**UNET, make=lambda: stable_diffusion.sd15("v_prediction")),
    "z_image": Case(z_image, z_image.pipeline, statistics=SHIFT),
    "flux2 dev": Case(flux2, flux2.dev, negatives_count=False, statistics=()),
    "flux2 klein": Case(flux2, flux2.klein, negatives_count=False, statistics=()),
    "sana": Case(sana, sana.pipeline),
    "cogview4": Case(cogview4, cogview4.pipeline),
    "lumina2": Case(lumina2, lumina2.pipeline, statistics=SHIFT),
}


class Scene:
    """One pipeline, built once, and its drawing of two prompts from one noise."""

    def __init__(self, case: Case) -> None:
        self.case, self.family = case, case.module
        with quiet():
            self.pipe = case.make()
        self.size = self.family.SIZES[0]
        self.guidance = self.family.GUIDANCE
        self.latents = self.theirs()

    def noise(self, size: tuple[int, int]) -> Tensor:
        shape = self.family.noise_shape(self.pipe, size)
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))

    def asked(self, **changed: Any) -> dict[str, Any]:
        """A whole set of arguments; those that are not given are this scene's."""
        size = changed.get("size", self.size)
        prompts, negatives = list(self.family.PROMPTS[:2]), list(NEGATIVES[:2])
        usual = {"prompts": prompts, "negatives": negatives, "steps": STEPS, "size": size, "guidance": self.guidance}
        return {**usual, "latents": self.noise(size), **changed}

    def _extra(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self.case.extra if asked["guidance"] != 1 else {}

    def theirs(self, pipe: Any = None, **changed: Any) -> Any:
        asked = self.asked(**changed)
        return self.family.theirs(self.pipe if pipe is None else pipe, **asked, **self._extra(asked))

    def ours(self, **changed: Any) -> Tensor:
        asked = self.asked(**changed)
        return self.case.loop(self.family, self.pipe, **asked, **self._extra(asked))


@cache
def scene_of(name: str) -> Scene:
    """Built once; who changes it puts it back."""
    return Scene(CASES[name])


@pytest.fixture(params=CASES)
def scene(request: pytest.FixtureRequest) -> Scene:
    return scene_of(request.param)


def moved(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest latent (of 1, for smaller ones)."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))


def test_a_plain_loop_draws_what_the_pipeline_draws(scene: Scene) -> None:
    assert moved(scene.ours(), scene.latents) <= 1e-5


def test_it_does_so_without_guidance_at_another_size_and_number_of_steps(scene: Scene) -> None:
    asked = {"guidance": 1.0, "size": scene.family.SIZES[1], "steps": 5}
    assert moved(scene.ours(**asked), scene.theirs(**asked)) <= 1e-5


def test_prompt_and_guidance_move_the_latents_and_negatives_where_they_count(scene: Scene) -> None:
    assert moved(scene.theirs(prompts=scene.family.PROMPTS[1:]), scene.latents) > VISIBLE
    assert moved(scene.theirs(guidance=scene.guidance + 1), scene.latents) > VISIBLE
    by_negatives = moved(scene.theirs(negatives=NEGATIVES[1:]), scene.latents)
    assert by_negatives > VISIBLE if scene.case.negatives_count else by_negatives == 0


def test_the_scheduler_s_shift_moves_the_latents(scene: Scene) -> None:
    kept = scene.pipe.scheduler
    scene.pipe.scheduler = type(kept).from_config(kept.config, **scene.family.SHIFTED)
    try:
        changed = scene.theirs()
    finally:
        scene.pipe.scheduler = kept
    assert moved(changed, scene.latents) > VISIBLE


def test_a_saved_folder_draws_the_same_to_the_bit(scene: Scene, tmp_path: Path) -> None:
    with quiet():
        scene.pipe.save_pretrained(tmp_path / "a" / "folder")
        again = type(scene.pipe).from_pretrained(str(tmp_path / "a" / "folder"), use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    for name, part in scene.pipe.components.items():
        if isinstance(part, nn.Module):
            weights = getattr(again, name).state_dict()
            assert all(torch.equal(weights.pop(key), value) for key, value in part.state_dict().items())
            assert not weights
    assert torch.equal(scene.theirs(again), scene.latents)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2_000_000


def test_pictures_are_visible_and_so_are_the_autoencoder_s_statistics(scene: Scene) -> None:
    pictures = scene.theirs(output="np")
    assert pictures.shape == (2, *scene.size, 3)
    assert np.isfinite(pictures).all() and pictures.std() > 0.05
    assert ((pictures > 0) & (pictures < 1)).mean() > 0.5
    vae = scene.pipe.vae
    for name, nothing in scene.case.statistics:
        kept = vae.config[name]
        vae.register_to_config(**{name: nothing})
        try:
            without = scene.theirs(output="np")
        finally:
            vae.register_to_config(**{name: kept})
        assert np.abs(without - pictures).max() > VISIBLE


def test_flux2_s_statistics_are_visible_in_its_pictures() -> None:
    scene = scene_of("flux2 dev")
    pictures, norm = scene.theirs(output="np"), scene.pipe.vae.bn
    for buffer, nothing in ((norm.running_mean, 0.0), (norm.running_var, 1.0)):
        kept = buffer.clone()
        buffer.fill_(nothing)
        without = scene.theirs(output="np")
        buffer.copy_(kept)
        assert np.abs(without - pictures).max() > VISIBLE


def test_klein_gives_back_the_autoencoder_s_own_latents() -> None:
    scene = scene_of("flux2 klein")
    asked = scene.asked()
    raw = scene.pipe(
        prompt=asked["prompts"],
        height=scene.size[0],
        width=scene.size[1],
        num_inference_steps=STEPS,
        guidance_scale=scene.guidance,
        latents=asked["latents"],
        output_type="latent",
        max_sequence_length=32,
    ).images
    mean, std = flux2.whitening(scene.pipe)
    assert raw.shape == (2, 4, 8, 12)
    assert moved(scene.latents * std + mean, flux2.patchify(raw)) <= 1e-6


def test_distilled_ones_take_no_guidance() -> None:
    for name, make in (("flux", lambda: flux.pipeline(False)), ("flux2 klein", lambda: flux2.klein(True))):
        scene = Scene(Case(CASES[name].module, make))
        assert torch.equal(scene.theirs(guidance=1.0), scene.latents)
        assert moved(scene.ours(), scene.latents) <= 1e-5


def test_sdxl_takes_no_negative_text_for_zeros_and_an_empty_one_for_a_text() -> None:
    scene = scene_of("sdxl")
    nothing, empty = scene.theirs(negatives=[None, None]), scene.theirs(negatives=["", ""])
    assert moved(nothing, empty) > VISIBLE
    assert moved(scene.ours(negatives=[None, None]), nothing) <= 1e-5
    assert moved(scene.ours(negatives=["", ""]), empty) <= 1e-5


def test_qwen_s_template_is_34_tokens_as_with_the_real_tokenizer() -> None:
    pipe = scene_of("qwen_image").pipe
    before, _ = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx


def test_a_pipeline_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = flux2.klein()
    assert torch.equal(torch.rand(3), expected)
    first = scene_of("flux2 klein").pipe
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(first, name).state_dict(), getattr(again, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_sana_s_own_sampler_by_hand() -> None:
    scene = scene_of("sana")
    theirs = scene.theirs(steps=5, dpm=True)
    assert moved(sana.plain_dpm(scene.pipe, **scene.asked(steps=5)), theirs) <= 1e-5
    assert moved(theirs, scene.theirs(steps=5)) > VISIBLE
