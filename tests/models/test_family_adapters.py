"""Every family's adapter draws what its pipeline draws, trains by both kinds of method, and gives back what it learned.

`families/` holds the tiny random-weight pipelines and their own calls. One fast case a family here; the rest is slow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import cogview4, flux, flux2, lumina2, qwen_image, sana, stable_diffusion, z_image
from families.common import NEGATIVES
from safetensors.torch import save_file
from torch import Tensor

import tempflow
from tempflow import models
from tempflow.config import Config
from tempflow.core import plan
from tempflow.core.dynamics import ODE
from tempflow.core.rollout import Noise, rollout
from tempflow.core.schedule import Schedule
from tempflow.export import export_run
from tempflow.grid import Grid
from tempflow.media import Media, Size
from tempflow.models.comfyui import comfyui_tensors
from tempflow.models.guidance import Guidance
from tempflow.models.lora import Factors, layer_shapes, lora_of
from tempflow.models.lora_files import load_lora, read_lora
from tempflow.models.quiet import quiet
from tempflow.request import Prompt
from tempflow.rewards.function import from_function

NOISE = Noise(seed=5)
VISIBLE = 0.02
"""By at least so much, of their size, a change of what is asked moves the latents; equality holds to 1e-5."""


@dataclass(frozen=True)
class Case:
    """A family's tiny pipeline, and how its call and ours are asked for the same thing.

    extra        what the pipeline's call takes beside, where guidance is on, and what ours has as options
    negatives    what both take for negative prompts; None: the family has none
    least        steps below which the pipeline's own grid is not finite
    refuses      whether ours refuses a prompt that has one
    comfyui      targets of the LoRA that ComfyUI's form is tried with, (): the family's own; None: it has no such form
    by_diffusers  whether diffusers' loader takes that form of the tiny network
    into, out    from our latents to the pipeline's own and back, where they differ: f(adapter, latents, schedule)
    """

    module: Any
    make: Callable[[], Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    negatives: Sequence[str] | None = tuple(NEGATIVES)
    least: int = 1
    refuses: bool = False
    comfyui: Sequence[str] | None = ()
    by_diffusers: bool = True
    out: Callable[[Any, Tensor, Schedule], Tensor] = lambda adapter, x, schedule: x


CASES = {
    # diffusers' converter takes FLUX.1's own widths for granted in single blocks
    "flux": Case(
        flux, flux.pipeline, {"true_cfg": 2.0}, comfyui=(r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..+",)
    ),
    "qwen_image": Case(qwen_image, qwen_image.pipeline, least=2),
    "z_image": Case(z_image, z_image.pipeline),
    "sana": Case(sana, sana.pipeline, comfyui=None),
    "cogview4": Case(cogview4, cogview4.pipeline, comfyui=None),
    "lumina2": Case(lumina2, lumina2.pipeline, by_diffusers=False),  # as FLUX.1's, of Lumina-Image 2's own widths
    "sd15": Case(stable_diffusion, stable_diffusion.sd15),
    "sdxl": Case(stable_diffusion, stable_diffusion.sdxl),
    "flux2 dev": Case(flux2, flux2.dev, negatives=None),
    "flux2 klein": Case(flux2, flux2.klein, negatives=None, refuses=True),
}


class Scene:
    """One folder, loaded by the adapter and by diffusers alone."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.family, self.folder = case, case.module, folder
        with quiet():
            case.make().save_pretrained(folder)
            self.adapter: Any = models.load(str(folder))
            self.pipe = self.load()
        self.guidance = float(self.family.GUIDANCE)

    def load(self, folder: Path | None = None) -> Any:
        """The pipeline as plain diffusers loads it."""
        import diffusers

        with quiet():
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder or self.folder), use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def asked(
        self,
        guidance: float | None = None,
        prompts: Sequence[str] | None = None,
        negatives: Sequence[str] | None = None,
        steps: int = 3,
        size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        told = self.case.negatives or [""] * len(NEGATIVES)
        prompts = self.family.PROMPTS[:2] if prompts is None else prompts
        return {
            "guidance": self.guidance if guidance is None else guidance,
            "prompts": list(prompts),
            "negatives": list(told[: len(prompts)] if negatives is None else negatives),
            "steps": steps,
            "size": self.family.SIZES[0] if size is None else size,
        }

    def extra(self, guidance: float) -> Mapping[str, Any]:
        return {} if guidance == 1 else self.case.extra

    def ours(self, adapter: Any = None, **changed: Any) -> Tensor:
        """Latents of an ODE rollout, in the pipeline's own coordinates."""
        adapter, a = adapter or self.adapter, self.asked(**changed)
        size = Size(*a["size"])
        schedule = adapter.schedule(a["steps"], size)
        prompts = [Prompt(text, negative=n) for text, n in zip(a["prompts"], a["negatives"], strict=True)]
        guidance: Guidance = adapter.guidance(a["guidance"], **self.extra(a["guidance"]))
        forest = rollout(
            [plan.ode(a["steps"], 1)] * len(prompts),
            ODE(),
            schedule,
            adapter.predictor(adapter.encode(prompts, size), guidance),
            NOISE,
            shape=adapter.noise_shape(size),
        )
        return self.case.out(adapter, schedule.samples(forest.nodes[forest.leaves.node]), schedule)

    def theirs(self, pipe: Any = None, output: str = "latent", **changed: Any) -> Any:
        a = self.asked(**changed)
        shape = self.adapter.noise_shape(Size(*a["size"]))
        noise = NOISE.initial([(row, 0) for row in range(len(a["prompts"]))], shape)
        return self.family.theirs(pipe or self.pipe, **a, latents=noise, output=output, **self.extra(a["guidance"]))


@pytest.fixture(scope="module", params=CASES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(CASES[request.param], tmp_path_factory.mktemp("families") / "model")


def moved(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest latent (of 1, for smaller ones)."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).abs().max() / max(1.0, float(b.abs().max())))


# --------------------------------------------------------------------------------------------------------------- parity
def test_it_draws_what_the_pipeline_draws(scene: Scene) -> None:
    assert moved(scene.ours(), scene.theirs()) <= 1e-5


def test_what_is_asked_matters(scene: Scene) -> None:
    """Or equality would say little."""
    base = scene.ours()
    assert moved(scene.ours(prompts=scene.family.PROMPTS[1:]), base) > VISIBLE
    assert moved(scene.ours(guidance=scene.guidance + 1), base) > VISIBLE
    if scene.case.refuses:
        with pytest.raises(ValueError, match=r"prompt .*: negative_prompt 'blue'.*nearest valid: ''"):
            scene.ours(negatives=NEGATIVES[1:])
        return
    by_negatives = moved(scene.ours(negatives=NEGATIVES[1:]), base)
    assert by_negatives > VISIBLE if scene.case.negatives is not None else by_negatives == 0


def test_another_shift_breaks_the_equality(scene: Scene) -> None:
    kept = scene.adapter.pipe.scheduler
    scene.adapter.pipe.scheduler = type(kept).from_config(kept.config, **scene.family.SHIFTED)
    try:
        changed = scene.ours()
    finally:
        scene.adapter.pipe.scheduler = kept
    assert moved(changed, scene.theirs()) > VISIBLE


def test_a_stated_grid_is_drawn_by_the_pipeline_with_its_points(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the call that a model card states."""
    adapter, family = scene.adapter, type(scene.adapter).family
    u = (1.0, 0.7, 0.2)
    if family.networks == ("unet",):
        with pytest.raises(ValueError, match=r"grid: \(1, 0\.7, 0\.2\) of .*DDIM's own times; .*'scheduler'"):
            adapter.state_grid(Grid(u))
        return
    pipeline, call = type(scene.pipe), type(scene.pipe).__call__
    stated = family.grid_call(u, adapter.settings)
    with_points = wraps(call)(lambda pipe, *a, **asked: call(pipe, *a, **{**asked, **stated}))
    monkeypatch.setattr(pipeline, "__call__", with_points)
    own = adapter.schedule(3, Size(*scene.family.SIZES[0])).sigmas
    try:
        adapter.state_grid(Grid(u))
        walked = adapter.schedule(3, Size(*scene.family.SIZES[0])).sigmas
        assert moved(scene.ours(), scene.theirs()) <= 1e-5
        if isinstance(scene.pipe.scheduler, type(adapter.walked())):  # Sana's call is given another one for a while
            assert torch.equal(walked, scene.pipe.scheduler.sigmas)
        assert not torch.allclose(walked, own, atol=0.01)
        with pytest.raises(ValueError, match=r"steps: 4 steps, and the grid \(1, 0\.7, 0\.2\) has 3 points.*: 3$"):
            adapter.schedule(4, Size(*scene.family.SIZES[0]))
    finally:
        adapter.state_grid(Grid())
    assert torch.equal(adapter.schedule(3, Size(*scene.family.SIZES[0])).sigmas, own)


def test_pictures_have_gradients(scene: Scene) -> None:
    """What is rounded to a picture, each from its own latents, and nothing of the decoder learns."""
    size = Size(*scene.family.SIZES[0])
    noise = NOISE.initial([(row, 0) for row in range(2)], scene.adapter.noise_shape(size))
    x = noise.clone().requires_grad_(True)
    pixels = scene.adapter.decode_pixels(x, size)
    plain = scene.adapter.decode(noise, size).frames.permute(0, 1, 4, 2, 3).float() / 255
    assert pixels.shape == plain.shape == (2, 1, 3, size.height, size.width) and pixels.dtype == torch.float32
    assert float((pixels.detach() - plain).abs().max()) <= 0.5 / 255 + 1e-5
    pixels[0].square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[0].any() and not x.grad[1].any()
    assert all(p.grad is None for p in scene.adapter.pipe.vae.parameters())


def test_pictures_are_the_pipelines(scene: Scene) -> None:
    size = Size(*scene.family.SIZES[0])
    a = scene.asked()
    schedule = scene.adapter.schedule(a["steps"], size)
    prompts = [Prompt(text, negative=n) for text, n in zip(a["prompts"], a["negatives"], strict=True)]
    forest = rollout(
        [plan.ode(a["steps"], 1)] * 2,
        ODE(),
        schedule,
        scene.adapter.predictor(
            scene.adapter.encode(prompts, size),
            scene.adapter.guidance(scene.guidance, **scene.extra(scene.guidance)),
        ),
        NOISE,
        shape=scene.adapter.noise_shape(size),
    )
    ours = scene.adapter.decode(schedule.samples(forest.nodes[forest.leaves.node]), size).pictures().numpy()
    theirs = scene.theirs(output="np")
    assert ours.shape == theirs.shape and ours.std() > 5
    assert np.abs(ours / 255 - theirs).max() <= 0.51 / 255


def test_media_come_back_nearly(scene: Scene) -> None:
    """Up to what a random autoencoder loses: latents of pictures are as `decode` takes them."""
    size = Size(*scene.family.SIZES[0])
    x = scene.adapter.encode_media(Media.of(torch.randint(0, 256, (3, *scene.family.SIZES[0], 3)).byte()), size)
    assert x.shape == (3, *scene.adapter.noise_shape(size)) and x.dtype == torch.float32
    assert x.isfinite().all() and 0.1 < float(x.std()) < 10


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_it_draws_so_at_all_lengths_and_sizes(scene: Scene, steps: int, place: int, guided: bool) -> None:
    asked: dict[str, Any] = {"steps": max(steps, scene.case.least), "size": scene.family.SIZES[place]}
    asked["guidance"] = scene.guidance if guided else 1.0
    error = moved(scene.ours(**asked), scene.theirs(**asked))
    print(f"error {error:.1e}")
    assert error <= 1e-5


def test_rows_do_not_depend_on_their_neighbours(scene: Scene) -> None:
    both, alone = scene.ours(), scene.ours(prompts=scene.family.PROMPTS[:1])
    assert moved(both[:1], alone) <= 1e-5


def test_bfloat16_draws_something_finite(scene: Scene) -> None:
    """A random network's sense of time is too fine for more: bfloat16 moves FLUX.1's latents by half their size."""
    with quiet():
        rounded = models.load(str(scene.folder), dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    drawn = scene.ours(rounded, steps=2)
    assert drawn.dtype == torch.float32 and moved(drawn, scene.ours(steps=2)) > 0


@pytest.mark.parametrize("side", [0, 1])
def test_a_size_that_cannot_be_drawn_is_refused(scene: Scene, side: int) -> None:
    size = list(scene.family.SIZES[0])
    size[side] += 1
    with pytest.raises(ValueError, match=rf"{('height', 'width')[side]}: {size[side]} .*nearest is \d+"):
        scene.adapter.noise_shape(Size(*size))


# ------------------------------------------------------------------------------------------------------------- training
def brightness(images: Any, prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image, dtype=np.float32).mean() / 255) for image in images]


def configured(scene: Scene, folder: Path, algorithm: Mapping[str, Any], training: str) -> Config:
    height, width = scene.family.SIZES[0]
    return Config.model_validate(
        {
            "name": "family",
            "iterations": 1,
            "output": str(folder),
            "rollout_rows": 6,
            "train_rows": 4,
            "algorithm": algorithm,
            "model": {
                "path": str(scene.folder),
                "height": height,
                "width": width,
                "guidance": scene.guidance,
                "guidance_options": scene.extra(scene.guidance),
                "training": training,
                "lora_rank": 2,
                "lora_alpha": 4,
            },
            "data": {"prompts_per_iteration": 2},
            "optimizer": {"learning_rate": 1e-2},
            "evaluation": {"validation_prompts": 2, "test_prompts": 2, "steps": 2, "metric": "reward"},
        }
    )


METHODS = {
    "tempflow_grpo": {"name": "tempflow_grpo", "steps": 3, "seeds": 1, "branches": 3},
    "diffusion_nft": {"name": "diffusion_nft", "steps": 2, "group": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_an_iteration_and_what_it_leaves(scene: Scene, tmp_path: Path, method: str, training: str) -> None:
    """Trained, exported, loaded by plain diffusers: the same latents as the run's own model, and not the base's."""
    config = configured(scene, tmp_path / "run", METHODS[method], training)
    negatives = [""] * len(NEGATIVES) if scene.case.refuses else NEGATIVES
    prompts = [Prompt(text, negative=n) for text, n in zip(scene.family.PROMPTS, negatives, strict=True)]
    tempflow.train(config, reward=from_function(brightness), prompts=prompts, test_prompts=prompts)
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    if method == "tempflow_grpo":
        assert told["log_ratio_max"] == 0
        assert told["rollout_gap_max"] <= 4  # roundings
    export_run(tmp_path / "run", tmp_path / "out", weights="policy")
    card = (tmp_path / "out" / "README.md").read_text()
    said = scene.adapter.guidance(1.0, **scene.extra(scene.guidance)).call_options()
    assert all(f"{name}=" in card for name in said) and ("guidance_scale=" in card) == ("guidance_scale" in said)
    if training == "lora":
        pipe = scene.load()
        load_by_diffusers(pipe, tmp_path / "out")
        ours = models.load(str(scene.folder))
        load_lora(ours, tmp_path / "out")
        if scene.case.comfyui is None:
            with pytest.raises(ValueError, match=r"form: 'comfyui' of .*not known here; nearest valid: 'lora'"):
                export_run(tmp_path / "run", tmp_path / "comfy", weights="policy", form="comfyui")
        else:
            export_run(tmp_path / "run", tmp_path / "comfy", weights="policy", form="comfyui")
            again = models.load(str(scene.folder))
            load_lora(again, tmp_path / "comfy" / "comfy.safetensors")
            assert moved(scene.ours(again), scene.ours(ours)) <= 1e-5
    else:
        pipe, ours = scene.load(tmp_path / "out"), models.load(str(tmp_path / "out"))
    drawn = scene.theirs(pipe)
    assert moved(scene.ours(ours), drawn) <= 1e-5
    assert moved(drawn, scene.theirs()) > 1e-4


def test_comfyuis_form_draws_the_same_by_diffusers(scene: Scene, tmp_path: Path) -> None:
    """Where the pipeline's own loader takes it."""
    shapes = type(scene.adapter).layers_in(scene.folder, "tiny")
    assert shapes == layer_shapes(scene.adapter.network)
    naming = scene.adapter.comfyui(list(shapes))
    assert (naming is None) == (scene.case.comfyui is None)
    if naming is None or not scene.case.by_diffusers:
        return
    trained: Any = models.load(str(scene.folder))
    trained.add_lora(2, 4, scene.case.comfyui or None)
    draw = torch.Generator().manual_seed(1)
    for parameter in trained.network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=draw)
    save_file(comfyui_tensors(lora_of(trained.network), naming, shapes), tmp_path / "lora.safetensors")
    drawn, pipe = scene.ours(trained, steps=2), scene.load()
    load_by_diffusers(pipe, tmp_path, "lora.safetensors")
    assert moved(drawn, scene.ours(steps=2)) > VISIBLE
    assert moved(scene.theirs(pipe, steps=2), drawn) <= 1e-5


def test_comfyuis_form_of_every_layer_is_read_back(scene: Scene, tmp_path: Path) -> None:
    shapes = layer_shapes(scene.adapter.network)
    naming = scene.adapter.comfyui(list(shapes))
    if naming is None:
        return
    named = sorted({part.layer for parts in naming.names.values() for part in parts})
    assert set(shapes) - set(named) <= {"norm_out.linear"}  # FLUX.2's
    draw = torch.Generator().manual_seed(1)
    lora: dict[str, Factors] = {}
    for n, layer in enumerate(named):
        out, *into = shapes[layer]
        a = torch.randn(1 + n % 3, *into, generator=draw)
        lora[layer] = Factors(a, torch.randn(out, len(a), *(1,) * (len(into) - 1), generator=draw), 0.5)
    save_file(comfyui_tensors(lora, naming, shapes), tmp_path / "lora.safetensors")
    found = scene.adapter.fit_lora(read_lora(tmp_path / "lora.safetensors")).network
    assert set(found) == set(lora)
    for layer, factors in found.items():
        torch.testing.assert_close(factors.dense(), lora[layer].dense(), rtol=1e-5, atol=1e-5)


def load_by_diffusers(pipe: Any, folder: Path, name: str = "pytorch_lora_weights.safetensors") -> None:
    """By the pipeline's loader, or the network's own where the pipeline has none."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(folder), weight_name=name)
    else:
        pipe.transformer.load_lora_adapter(str(folder), weight_name=name)


def test_encoding_names_its_device(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own guess is where its first part lies, which may be waiting on the CPU."""
    adapter: Any = models.load(str(scene.folder))

    def guess(pipe: object) -> torch.device:
        raise AssertionError("the pipeline guesses where to compute")

    monkeypatch.setattr(type(adapter.pipe), "_execution_device", property(guess))
    adapter.encode([Prompt(scene.family.PROMPTS[0])], Size(*scene.family.SIZES[0]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["flow_grpo", "dance_grpo", "flow_cps", "grpo_guard", "ddpo"])
def test_rollout_and_training_agree_in_every_dynamics(scene: Scene, tmp_path: Path, method: str, dtype: str) -> None:
    """At the first update the ratio is 1, and the rollout's log-probs are the training's up to rounding."""
    options = {"steps": 3, "group": 3} if method != "ddpo" else {"steps": 3}
    base = configured(scene, tmp_path / "run", {"name": method, **options}, "lora")
    config = base.replace(model=base.model.model_copy(update={"dtype": dtype}))
    prompts = [Prompt(text) for text in scene.family.PROMPTS]
    tempflow.train(config, reward=from_function(brightness), prompts=prompts, test_prompts=prompts, quiet=True)
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"log ratio {told['log_ratio_max']:.1e}, gap {told['rollout_gap_max']:.2f} roundings")
    assert told["log_ratio_max"] == 0
    assert told["rollout_gap_max"] <= 4  # roundings
