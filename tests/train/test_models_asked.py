"""What a configuration asks of a model is checked, said and done before it is trained: licences, few steps, tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import tempflow
from tempflow.config import Config
from tempflow.models import shapes_folder
from tempflow.models.embeddings import MARK
from tempflow.recipes.shapes import shapes_flow, shapes_lora
from tempflow.train.build import check_model, check_optimizer, prepare_model
from tempflow.train.parallel import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded pipeline under another name and licence."""
    place = tmp_path / "model"
    shutil.copytree(shapes_folder(), place)
    return place


def licensed(folder: Path, licence: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: other\nlicense_name: {licence}\n---\n")


def configured(path: Path, base: Any = shapes_flow, **model: Any) -> Config:
    told = base().model_dump()
    told["algorithm"] |= {"group": 2, "steps": 2} if base is shapes_flow else {"steps": 2, "seeds": 1, "branches": 2}
    told["data"] |= {"prompts_per_iteration": 1}
    told["evaluation"] |= {"validation_prompts": 1, "test_prompts": 1, "steps": 1, "yardstick": ()}
    told["model"] |= {"path": str(path), "dtype": "float32", **model}
    return Config.model_validate(told | {"iterations": 1, "output": str(path.parent / "run"), "threads": 1})


NON_COMMERCIAL = ("flux-1-dev-non-commercial-license", "cc-by-nc-4.0", "NSCL v2-custom", "some-research-only-licence")


@pytest.mark.parametrize("licence", NON_COMMERCIAL)
def test_a_non_commercial_licence_is_accepted_by_its_name(folder: Path, licence: str) -> None:
    licensed(folder, licence)
    said: list[str] = []
    for given in ("", "yes"):
        with pytest.raises(
            ValueError, match=rf"model.accept_licence: '{given}', and .* is under '{licence}', which is"
        ):
            check_model(configured(folder, accept_licence=given), said.append)
    assert said == []
    check_model(configured(folder, accept_licence=licence), said.append)
    assert said[0].endswith(f"licence {licence}")


@pytest.mark.parametrize("licence", ["apache-2.0", "openrail++", "stabilityai-ai-community", "unknown", "encore"])
def test_other_licences_are_said_alone(folder: Path, licence: str) -> None:
    licensed(folder, licence)
    said: list[str] = []
    check_model(configured(folder), said.append)
    assert len(said) == 1 and said[0].startswith(f"model: {folder}, ") and said[0].endswith(f"licence {licence}")


@pytest.mark.parametrize("name", ["sdxl-turbo", "FLUX.1-schnell", "SDXL-Lightning", "Hyper-SD", "my-lcm", "x-dmd2"])
def test_a_name_that_says_few_steps_is_told(folder: Path, name: str) -> None:
    other = folder.rename(folder.with_name(name))
    said: list[str] = []
    check_model(configured(other), said.append)
    warned = [line for line in said if line.startswith("warn: model.path:")]
    assert len(warned) == (0 if name == "x-dmd2" else 1)


def test_the_embedded_model_says_nothing() -> None:
    said: list[str] = []
    check_model(shapes_flow(), said.append)
    assert said == []


def test_a_run_with_a_cache_and_without_encoders(tmp_path: Path, folder: Path) -> None:
    """It trains as the plain one does, to the last bit, and every prompt is on disk."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo squares\na blue cross\n")
    data = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "prompts.txt"))
    runs = {}
    for name, more in {"plain": {}, "lean": {"cache": str(tmp_path / "cache"), "drop_encoders": True}}.items():
        config = configured(folder, shapes_lora, **more)
        config = config.replace(output=str(tmp_path / name), data=config.data.model_copy(update=data))
        runs[name] = tempflow.train(config, quiet=True)
    a, b = ((tmp_path / name / "model" / "pytorch_lora_weights.safetensors").read_bytes() for name in runs)
    assert a == b
    assert runs["lean"].model.pipe.text_encoder is None and runs["plain"].model.pipe.text_encoder is not None  # type: ignore[attr-defined]
    assert (tmp_path / "cache" / MARK).is_file() and len(list((tmp_path / "cache").glob("??/*.safetensors"))) == 4


def test_dropping_needs_a_cache_and_a_lora(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"drop_encoders: true needs a folder in model.cache; nearest valid: false"):
        configured(folder, shapes_lora, drop_encoders=True)
    with pytest.raises(ValueError, match="drop_encoders: true, but full training saves the whole pipeline"):
        configured(folder, cache="c", drop_encoders=True)


def test_targets_and_tools_reach_the_model(folder: Path) -> None:
    config = configured(folder, shapes_lora, lora_targets=("attn.to_v",), checkpointing=True, offload=True)
    model: Any = prepare_model(config)
    trained = [n for n, p in model.network.named_parameters() if p.requires_grad]
    assert trained and all(".attn.to_v.lora_" in name for name in trained)
    assert model.network.is_gradient_checkpointing
    with pytest.raises(ValueError, match=r"lora targets: 'attn.nothing' is no linear layer; nearest is"):
        prepare_model(configured(folder, shapes_lora, lora_targets=("attn.nothing",)))


def test_a_family_that_takes_no_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another package need not have them."""

    class Plain:
        family = None

    monkeypatch.setattr("tempflow.models.adapter_of", lambda path, folder: Plain)
    monkeypatch.setattr("tempflow.models.local_folder", lambda path, revision=None: folder)
    with pytest.raises(ValueError, match=r"takes none of checkpointing, compile, .*; nearest valid: off"):
        tempflow.models.load(str(folder), tools=tempflow.models.Tools(offload=True))


def test_an_optimizer_in_8_bits_needs_its_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = configured(folder)
    config = base.replace(optimizer=base.optimizer.model_copy(update={"kind": "adamw_8bit"}))
    monkeypatch.setattr("tempflow.train.build.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"optimizer.kind: 'adamw_8bit' needs bitsandbytes: .*tempflow\[bits\]"):
        tempflow.train(config, quiet=True)
    sharded = config.replace(parallel=config.parallel.model_copy(update={"mode": "fsdp"}))
    with pytest.raises(ValueError, match=r"optimizer.kind: 'adamw_8bit' cannot be sharded; nearest valid: 'adamw'"):
        check_optimizer(sharded, World(0, 2))
