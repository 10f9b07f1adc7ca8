"""Pipeline folders as people have them: without T5, without a shift, with other schedulers, damaged; drawn as diffusers
draws them, or refused in one line that names the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic import agree
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from lora_world import own_pipeline
from safetensors.torch import load_file, save_file
from worlds import SIZE, World, ours, plain_pipeline, theirs

from tempflow import models
from tempflow.media import Size
from tempflow.models.family import Family
from tempflow.models.pipeline_folder import check_folder
from tempflow.models.sd3 import SD3
from tempflow.request import Prompt, asked

Change = Callable[[Path], None]


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def edited(file: Path, **fields: Any) -> None:
    told = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in told.items() if value != "gone"}))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        models.load(str(folder))
    text = str(error.value)
    assert text.startswith("model.path: ") and len(text.splitlines()) == 1 and len(text) < 700
    assert "trust_remote_code" not in text
    return text


# --------------------------------------------------------------------------------------------------------------- no T5
@pytest.mark.parametrize("null", [[None, None], None, "gone"])
def test_without_t5_it_draws_what_diffusers_draws(tiny_world: World, copied: Path, tmp_path: Path, null: Any) -> None:
    edited(copied / "model_index.json", text_encoder_3=null, tokenizer_3=null)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(copied / part)
    adapter = models.load(str(copied))
    plain = StableDiffusion3Pipeline(**{**tiny_world.plain.components, "text_encoder_3": None, "tokenizer_3": None})
    prompts = [tiny_world.prompts[0]]
    drawn = ours(adapter, prompts, 2, 3.0, Size(32, 32))
    assert agree(drawn, theirs(plain, prompts, 2, 3.0, Size(32, 32), 256))  # the pipeline's own default
    with_t5 = theirs(tiny_world.plain, prompts, 2, 3.0, Size(32, 32), tiny_world.tokens)
    assert (drawn - with_t5).abs().max() > 1e-2
    inputs = adapter.text_inputs(Prompt(prompts[0]))
    assert set(inputs.tokens) == {"text_encoder", "text_encoder_2"}
    again = adapter.encode_inputs(Prompt(prompts[0]), {name: tokens[None] for name, tokens in inputs.tokens.items()})
    assert agree(again.tensors["embeds"], adapter.encode(asked(prompts), SIZE).tensors["embeds"])
    if null is None:
        adapter.save(str(tmp_path / "again"))
        again = models.load(str(tmp_path / "again"))
        assert torch.equal(ours(again, prompts, 2, 3.0, Size(32, 32)), drawn)


def test_without_t5_in_python(tiny_world: World) -> None:
    """With T5's tokenizer still there, and as many zeros as it allows."""
    plain = StableDiffusion3Pipeline(**{**tiny_world.plain.components, "text_encoder_3": None})
    prompts = [tiny_world.prompts[0]]
    adapter = SD3(plain, "x", "y")
    assert agree(ours(adapter, prompts, 2, 3.0, Size(32, 32)), theirs(plain, prompts, 2, 3.0, Size(32, 32), 16))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer_2", "vae"])
def test_a_part_that_is_needed(tiny_world: World, copied: Path, part: str) -> None:
    edited(copied / "model_index.json", **{part: [None, None]})
    assert f"has no {part} in its model_index.json; only text_encoder_3 and" in refusal(copied)
    with pytest.raises(ValueError, match=f"has no {part}; only text_encoder_3"):
        SD3(Missing(tiny_world.plain, part), "x", "y")


class Missing:
    """A pipeline that lacks a part."""

    def __init__(self, pipe: StableDiffusion3Pipeline, part: str) -> None:
        self._pipe, self._part = pipe, part

    def __getattr__(self, name: str) -> Any:
        return None if name == self._part else getattr(self._pipe, name)


def test_t5_without_its_tokenizer(copied: Path) -> None:
    edited(copied / "model_index.json", tokenizer_3=[None, None])
    assert "has a text_encoder_3 and no tokenizer_3; nearest valid: both or neither" in refusal(copied)


@pytest.mark.parametrize("part", ["processor", "image_processor"])
def test_a_part_without_weights_that_a_family_names(copied: Path, part: str) -> None:
    edited(copied / "model_index.json", **{part: ["transformers", "Qwen2VLProcessor"]})
    family = Family("Made up", needed=("transformer", part), weightless=(part,))
    with pytest.raises(ValueError, match=rf"^model\.path: 'x' lacks the folder {part} \(Qwen2VLProcessor\); get it"):
        check_folder("x", copied, family)
    (copied / part).mkdir()
    assert check_folder("x", copied, family) == ()
    with pytest.raises(ValueError, match=rf"{part}/config\.json' is missing"):
        check_folder("x", copied, Family("Made up", needed=("transformer", part)))


# --------------------------------------------------------------------------------------------------------- autoencoder
@pytest.mark.parametrize(("shift", "scale"), [(None, 1.5305), (0.0609, None), (None, None)])
def test_an_autoencoder_without_shift_or_scale(
    tiny_world: World, copied: Path, shift: float | None, scale: float | None
) -> None:
    """As diffusers decodes with a shift of 0 and a scale of 1: given null, it fails."""
    edited(copied / "vae" / "config.json", shift_factor=shift, scaling_factor=scale)
    adapter, plain = models.load(str(copied)), plain_pipeline(copied)
    assert plain.vae.config.shift_factor == shift
    plain.vae.register_to_config(shift_factor=shift or 0.0, scaling_factor=scale or 1.0)
    prompts = [tiny_world.prompts[0]]
    media = adapter.decode(ours(adapter, prompts, 2, 3.0, Size(32, 32)), Size(32, 32)).pictures()
    pictures = theirs(plain, prompts, 2, 3.0, Size(32, 32), tiny_world.tokens, output="np")
    assert (media.float() / 255 - torch.from_numpy(pictures)).abs().max() <= 0.51 / 255
    z = plain.vae.encode(media.permute(0, 3, 1, 2).float() / 255 * 2 - 1).latent_dist.mode()
    wanted = (z - (shift or 0.0)) * (scale or 1.0)
    assert torch.allclose(adapter.encode_media(media, Size(32, 32)), wanted, atol=1e-5)


def test_a_tiny_autoencoder(tiny_world: World) -> None:
    """It has no posterior: its latents are what they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        )
    plain = StableDiffusion3Pipeline(**{**own_pipeline(tiny_world).components, "vae": vae.eval()})
    adapter, prompts = SD3(plain, "x", "y"), [tiny_world.prompts[0]]
    media = adapter.decode(ours(adapter, prompts, 2, 3.0, Size(32, 32)), Size(32, 32)).pictures()
    plain.set_progress_bar_config(disable=True)
    pictures = theirs(plain, prompts, 2, 3.0, Size(32, 32), tiny_world.tokens, output="np")
    assert (media.float() / 255 - torch.from_numpy(pictures)).abs().max() <= 0.51 / 255
    assert adapter.encode_media(media, Size(32, 32)).shape == (1, 16, 4, 4)


# ---------------------------------------------------------------------------------------------------------- schedulers
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "other timesteps": {"num_train_timesteps": 500, "shift": 2.0},
    "terminal": {"shift_terminal": 0.1},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "karras, dynamic": {"use_karras_sigmas": True, **DYNAMIC},
    "linear, terminal": {"time_shift_type": "linear", "shift_terminal": 0.05, **DYNAMIC},
}


@pytest.mark.parametrize("settings", ACCEPTED)
def test_what_is_accepted_is_the_pipelines_own_grid(tiny_world: World, settings: str) -> None:
    pipe = own_pipeline(tiny_world)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**ACCEPTED[settings])
    adapter, prompts = SD3(pipe, "x", "y"), [tiny_world.prompts[0]]
    drawn = ours(adapter, prompts, 4, 3.0, Size(32, 32))
    wanted = theirs(pipe, prompts, 4, 3.0, Size(32, 32), tiny_world.tokens)
    grid = adapter.schedule(4, Size(32, 32)).sigmas
    assert torch.equal(grid, pipe.scheduler.sigmas.clamp(max=1))
    assert torch.equal(grid[:-1] * pipe.scheduler.config.num_train_timesteps, pipe.scheduler.timesteps)
    assert agree(drawn, wanted)


REFUSED: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}, "the scheduler 'FlowMatchHeunDiscreteScheduler', whose steps"),
    "LCM": ("FlowMatchLCMScheduler", {}, "the scheduler 'FlowMatchLCMScheduler', whose steps"),
    "UniPC": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "the scheduler 'UniPCMultistepScheduler'"),
    "no flow": ("DDIMScheduler", {}, "the scheduler 'DDIMScheduler', whose steps are not those walked here; nearest"),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "with invert_sigmas True: its σ run from"),
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "with stochastic_sampling True: "),
    "unknown shift": ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "cubic"}, "cannot be loaded: "),
    "two grids": (
        "FlowMatchEulerDiscreteScheduler",
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "Only one of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(copied: Path, case: str) -> None:
    kind, settings, message = REFUSED[case]
    edited(copied / "model_index.json", scheduler=["diffusers", kind])
    edited(copied / "scheduler" / "scheduler_config.json", _class_name=kind, **settings)
    assert message in refusal(copied)


def test_a_scheduler_put_in_later_is_looked_at_too(tiny_world: World) -> None:
    pipe = own_pipeline(tiny_world)
    adapter = SD3(pipe, "x", "y")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match=r"^model.path: 'x' has a .* with invert_sigmas True"):
        adapter.schedule(2, Size(32, 32))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(ValueError, match=r"^model.path: the scheduler of 'x' gives no falling grid for 1 steps"):
        adapter.schedule(1, Size(32, 32))


# ------------------------------------------------------------------------------------------------------ what is broken
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def without_one(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def with_another(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "extra.weight": torch.ones(1)}, folder / WEIGHTS, {"format": "pt"})


def of_another_width(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.bias"] = torch.ones(3)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def a_shard_gone(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    index = {"weight_map": {"x": "diffusion_pytorch_model-00001-of-00002.safetensors", "y": "lost.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def a_variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")


def own_code(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('run')")
    edited(folder / "model_index.json", transformer=["mine", "Mine"])


def own_pipeline_code(folder: Path) -> None:
    edited(folder / "model_index.json", _class_name=["pipeline", "Mine"])


def no_json(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


BROKEN: dict[str, tuple[Change, str]] = {
    "cut short": (cut, f"{WEIGHTS}' is no safetensors, or damaged ("),
    "emptied": (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}' is no safetensors, or damaged ("),
    "a tensor gone": (without_one, "lacks 'proj_out.weight' in transformer (1 of its tensors); get it again"),
    "a tensor more": (with_another, "has an unknown 'extra.weight' in transformer (1 of its tensors)"),
    "another width": (of_another_width, "cannot be loaded: "),
    "a shard gone": (a_shard_gone, "lost.safetensors' is missing; "),
    "a variant alone": (a_variant, "is missing; there is diffusion_pytorch_model.fp16.safetensors, which is not read"),
    "a part gone": (lambda folder: shutil.rmtree(folder / "vae"), "lacks the folder vae (AutoencoderKL); get it again"),
    "no configuration": (no_json, "vae/config.json' cannot be read ("),
    "code of its own": (own_code, "brings code of its own for transformer (mine.Mine), which is never run here"),
    "a pipeline of its own": (own_pipeline_code, "brings code of its own for the pipeline (pipeline.Mine)"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(copied: Path, case: str) -> None:
    change, message = BROKEN[case]
    change(copied)
    assert message in refusal(copied)
