"""`models.load`: what it takes, what it says of what it cannot take, and that it says nothing otherwise."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
from worlds import World

from tempflow import models
from tempflow.models import Model
from tempflow.models.pipeline_folder import licence_of
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3


def test_an_adapter_is_a_model(world: World) -> None:
    model: Model = world.adapter
    assert model.name == str(world.folder) and model.device == torch.device("cpu")
    assert model.network is world.adapter.pipe.transformer
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.network.parameters()) and not model.network.training


def test_shapes_by_name(shapes_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "place", lambda path: shapes_folder)
    assert models.load("shapes").name == "shapes"


def test_embedded_folders_are_inside_the_package() -> None:
    inside = Path(models.__file__).parents[1] / "shapes"
    assert models.shapes_folder() == models.place("shapes") == inside / "weights"
    assert models.tokens_folder() == models.place("shapes_tokens") == inside / "tokens"


def test_a_home_folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert isinstance(models.load(f"~/{tiny_folder.name}"), SD3)


@pytest.mark.parametrize(
    ("dtype", "nearest"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32"), ("float", "float32")]
)
def test_wrong_dtype(tiny_folder: Path, dtype: str, nearest: str) -> None:
    message = rf"model.dtype: '{dtype}' is not one of float32, bfloat16, float16; nearest is '{nearest}'$"
    with pytest.raises(ValueError, match=message):
        models.load(str(tiny_folder), dtype=dtype)


def test_missing_folder_names_the_nearest(tiny_folder: Path) -> None:
    missing = f"{tiny_folder.parent}/tinny"
    with pytest.raises(ValueError, match=rf"model.path: '{missing}' has no .*; nearest pipeline folder: .*/tiny$"):
        models.load(missing)


def test_missing_folder_without_neighbours(tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "here"  # tests beside this one leave pipelines beside its own folder
    alone.mkdir(parents=True)
    for path in (str(alone), str(tmp_path / "a" / "b" / "c"), "./nothing-here", "no such model"):
        with pytest.raises(ValueError, match=r"is no diffusers pipeline folder; 'shapes' comes with the package"):
            models.load(path)


@pytest.mark.parametrize("name", ["shapes", "shapes_tokens"])
def test_an_embedded_model_without_its_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "place", lambda path: tmp_path)
    message = rf"model.path: '{name}' .* lacks its weights: scripts/pretrain_{name}.py"
    with pytest.raises(ValueError, match=message):
        models.load(name)


def test_a_hub_id_that_cannot_be_had() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(
        ValueError, match=r"^model.path: 'nobody/nothing' is no folder, and as a hub id it cannot be had"
    ):
        models.load("nobody/nothing", revision="main")


def test_another_pipeline_class(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match=r"is a KandinskyPipeline; supported are .*StableDiffusion3Pipeline"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.path: '.*model_index.json' names no pipeline class"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("missing", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_missing_file_is_not_hidden(tiny_folder: Path, tmp_path: Path, missing: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=rf"^model.path: '.*{missing}' is missing; get it again$"):
        models.load(str(folder))


def test_pickled_weights_are_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "pickled"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"^model.path: .*\.safetensors' is missing; .*\.bin is a pickle"):
        models.load(str(folder))


# ------------------------------------------------------------------------------------------------------------- quiet
def test_loading_drawing_and_saving_print_nothing(shapes_folder: Path, tmp_path: Path) -> None:
    """In a fresh process, where the libraries' first import has its say."""
    code = """
import sys
from tempflow.models import load
from tempflow.request import asked
for dtype in ("float32", "bfloat16"):
    model = load(sys.argv[1], dtype=dtype)
    model.encode(asked(["a red circle"]), None)
    model.save(sys.argv[2] + "/full")
    model.add_lora(2, 4)
    model.save(sys.argv[2] + "/lora")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(shapes_folder), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_quiet_puts_everything_back_and_lets_warnings_through() -> None:
    logger = logging.getLogger("diffusers.somewhere")
    stream_of = logging.getLogger("diffusers").handlers[0]
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Handler()
    logging.getLogger("diffusers").addHandler(handler)
    before = [list(h.filters) for h in (stream_of, handler)]
    try:
        with pytest.raises(RuntimeError, match="real"), quiet():
            assert not diffusers_logging.is_progress_bar_enabled()
            assert not transformers_logging.is_progress_bar_enabled()
            logger.warning("There are modules in X that should be kept in float32: []. Casting …")
            logger.warning("There are modules in X that should be kept in float32: ['norm'].")
            logger.warning("Some weights were not used")
            raise RuntimeError("real")
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert seen == ["There are modules in X that should be kept in float32: ['norm'].", "Some weights were not used"]
    assert [list(h.filters) for h in (stream_of, handler)] == before
    assert diffusers_logging.is_progress_bar_enabled() and transformers_logging.is_progress_bar_enabled()


# ----------------------------------------------------------------------------------------------------------- licence
SD35 = "---\nlicense: other\nlicense_name: stabilityai-ai-community\ntags:\n- text-to-image\n---\n# Model\n"


@pytest.mark.parametrize(
    ("card", "record", "licence"),
    [
        (None, None, "unknown"),
        ("---\nlicense: apache-2.0\n---\ntext", None, "apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", {"licence": "cc0-1.0"}, "mit"),
        (SD35, None, "stabilityai-ai-community"),
        ("---\nlicense: other\n---\n", None, "other"),
        (None, {"licence": "Apache-2.0"}, "Apache-2.0"),
        ("# No front matter\nlicense: none of it\n", {"licence": "Apache-2.0"}, "Apache-2.0"),
        ("---\ntags: x\n---\nlicense: below the front matter\n", None, "unknown"),
        (None, {"author": "me"}, "unknown"),
        ("", None, "unknown"),
    ],
)
def test_licence(tmp_path: Path, card: str | None, record: dict[str, str] | None, licence: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    if record is not None:
        (tmp_path / "licence.json").write_text(json.dumps(record))
    assert licence_of(tmp_path) == licence


def test_the_adapter_knows_its_licence(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "licensed"))
    assert models.load(str(folder)).licence == "unknown"
    (folder / "README.md").write_text(SD35)
    assert models.load(str(folder)).licence == "stabilityai-ai-community"


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_f": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert models.resolved_dtype("auto", "cpu") == dtype
    assert (
        models.resolved_dtype("float32", "cpu") == "float32" and models.resolved_dtype("bfloat16", "cpu") == "bfloat16"
    )
    assert str(models.load(str(tiny_folder), dtype="auto").dtype) == f"torch.{dtype}"


def test_auto_is_float32_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert models.resolved_dtype("auto", "cpu") == models.resolved_dtype("auto", "mps") == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolved_dtype("auto", "cuda") == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert models.resolved_dtype("auto", "cuda:1") == "bfloat16"
