"""The miniature pipeline: built from a seed, saved, and drawing with diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tempflow import models
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.request import asked
from tempflow.shapes import build
from tempflow.shapes.prompts import specs

SIZE = Size(32, 32)

LIMIT = 16 * 2**20


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return build.pipeline(seed=0)


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped one; before it is there, the untrained one."""
    shipped = models.shapes_folder()
    if (shipped / "model_index.json").is_file():
        return shipped
    path = tmp_path_factory.mktemp("shapes") / "weights"
    with quiet():
        pipe.vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
        pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> StableDiffusion3Pipeline:
    """By plain `from_pretrained`, nothing of ours."""
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe: StableDiffusion3Pipeline) -> dict[str, torch.Tensor]:
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {f"{p}.{n}": t for p in parts for n, t in getattr(pipe, p).state_dict().items()}


def test_a_function_of_the_seed_alone(pipe: StableDiffusion3Pipeline) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, other = weights(build.pipeline(seed=0)), weights(build.pipeline(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    mine = weights(pipe)
    assert all(torch.equal(t, again[n]) for n, t in mine.items())
    assert not torch.equal(mine["transformer.proj_out.weight"], other["transformer.proj_out.weight"])


def test_plain_from_pretrained_is_all_float32(loaded: StableDiffusion3Pipeline) -> None:
    """transformers loads a text encoder in the dtype of its config, diffusers the rest in float32: they must fit."""
    dtypes = {name: tensor.dtype for name, tensor in weights(loaded).items() if tensor.is_floating_point()}
    assert {name: dtype for name, dtype in dtypes.items() if dtype != torch.float32} == {}


def test_every_slot_is_filled(loaded: StableDiffusion3Pipeline, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    for slot in (
        "transformer",
        "vae",
        "scheduler",
        *(f"{kind}{n}" for kind in ("tokenizer", "text_encoder") for n in ("", "_2", "_3")),
    ):
        assert getattr(loaded, slot) is not None and index[slot][1] is not None


def test_every_prompt_is_read_in_full(pipe: StableDiffusion3Pipeline) -> None:
    """Nothing is cut off, and no word is unknown, in any of the three tokenizers."""
    prompts = sorted({s.prompt for s in specs()})
    for tokenizer, ends in ((pipe.tokenizer, 2), (pipe.tokenizer_2, 2), (pipe.tokenizer_3, 1)):
        assert tokenizer.model_max_length == build.TOKENS
        rows = tokenizer(prompts).input_ids
        assert [len(r) for r in rows] == [len(p.split()) + ends for p in prompts]
        assert max(map(len, rows)) <= build.TOKENS
        assert not any(tokenizer.unk_token_id in r for r in rows)
        assert tokenizer.decode(rows[0], skip_special_tokens=True) == prompts[0]


def test_different_prompts_have_different_conditions(pipe: StableDiffusion3Pipeline) -> None:
    prompts = [*sorted({s.prompt for s in specs()})[::40], ""]
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=build.TOKENS)
    assert embeds.shape == (len(prompts), 2 * build.TOKENS, 128) and pooled.shape == (len(prompts), 128)
    distance = torch.cdist(embeds.flatten(1), embeds.flatten(1)) + 1e9 * torch.eye(len(prompts))
    assert distance.min() > 1e-3


def test_diffusers_alone_draws(loaded: StableDiffusion3Pipeline) -> None:
    options = {"height": 32, "width": 32, "max_sequence_length": build.TOKENS, "num_inference_steps": 2}

    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return loaded("a red circle", generator=generator, output_type="np", **options).images

    first = draw(0)
    assert first.shape == (1, 32, 32, 3) and np.isfinite(first).all()
    assert np.array_equal(first, draw(0)) and not np.array_equal(first, draw(1))


def test_the_default_size_is_the_worlds(loaded: StableDiffusion3Pipeline) -> None:
    assert loaded.default_sample_size * loaded.vae_scale_factor == 32
    seen: list[torch.Size] = []
    hook = loaded.transformer.pos_embed.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    loaded(
        "two squares", max_sequence_length=build.TOKENS, num_inference_steps=1, guidance_scale=1, output_type="latent"
    )
    hook.remove()
    assert seen == [(1, 16, 192)]  # 16 picture tokens


def test_the_adapter_reads_as_much_text_as_training_did(folder: Path, loaded: StableDiffusion3Pipeline) -> None:
    with torch.no_grad():
        embeds, *_ = loaded.encode_prompt(["a red circle"], None, None, max_sequence_length=build.TOKENS)
    mine = models.load(str(folder)).encode(asked(["a red circle"]), SIZE).tensors["embeds"]
    assert mine.shape == (1, 20, 128)
    assert torch.allclose(mine, embeds, atol=1e-5)


def test_size_on_disk(loaded: StableDiffusion3Pipeline, folder: Path) -> None:
    """The transformer in bfloat16 and the rest, which `from_pretrained` must not load so by itself, in float32."""
    size = sum(t.numel() * (2 if n.startswith("transformer.") else 4) for n, t in weights(loaded).items())
    assert size <= LIMIT
    if folder == models.shapes_folder():
        files = [f for f in folder.rglob("*") if f.is_file()]
        assert sum(f.stat().st_size for f in files) <= LIMIT
        assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".txt", ".jinja"}
