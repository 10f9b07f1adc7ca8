"""Starting from somebody's LoRA: it is the very LoRA that is trained, or it is merged; what comes out is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import SIZE, Fake
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow.config import Config
from tempflow.evaluate.source import find, load_source
from tempflow.export import export_run
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.lora import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE, lora_of
from tempflow.models.lora_files import load_lora
from tempflow.models.sd3 import SD3
from tempflow.recipes.shapes import shapes_flow
from tempflow.request import asked
from tempflow.train import build, checkpoint, trainer
from tempflow.train.state import read_start, read_starts, starting_state
from tempflow.train.weights import Trainable

WIDTH = load("shapes").network.config["caption_projection_dim"]
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_v", "transformer_blocks.1.ff.net.0.proj")


def factors(layer: str, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    out = 4 * WIDTH if "net.0" in layer else WIDTH
    return 0.2 * torch.randn(rank, WIDTH, generator=random), 0.2 * torch.randn(out, rank, generator=random)


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As flow_grpo writes one; scale 1.5."""
    folder = tmp_path_factory.mktemp("sft") / "checkpoint-9" / "lora"
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for n, layer in enumerate(LAYERS):
        a, b = factors(layer, 4, n)
        tensors |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
    save_file(tensors, folder / ADAPTER_FILE)
    (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6}))
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' form without a scale, ranks 2 and 3."""
    tensors: dict[str, Tensor] = {}
    for n, layer in enumerate(LAYERS[:2]):
        a, b = factors(layer, 2 + n, n)
        tensors |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
    path = tmp_path_factory.mktemp("file") / "style.safetensors"
    save_file(tensors, path)
    return path


def configured(output: Path, **model: Any) -> Config:
    """The smallest run there is."""
    told = shapes_flow().model_dump()
    told["algorithm"] |= {"group": 2, "steps": 2}
    told["data"] |= {"prompts_per_iteration": 1}
    told["evaluation"] |= {"validation_prompts": 1, "test_prompts": 1, "steps": 1, "yardstick": ()}
    told["model"] |= model
    return Config.model_validate(told | {"iterations": 1, "output": str(output), "threads": 1})


def begun(output: Path, start: Path, **model: Any) -> tuple[SD3, Trainable]:
    """The model and its weights as a run has them before its first iteration."""
    config = configured(output, start=str(start), **model)
    sd3 = trainer.prepare_model(config)
    trainable = Trainable(sd3.network)
    source = read_start(config.model.start, "model.start")
    trainable.load(starting_state(source, trainable, trainable.state(), source.lora_for(sd3)))
    return sd3, trainable


@torch.no_grad()
def predicted(model: SD3) -> Tensor:
    x = torch.randn(2, *model.noise_shape(Size(32, 32)), generator=torch.Generator().manual_seed(0))
    return model.predictor(model.encode(asked(["a red circle"]), SIZE), 1.0)(
        x, torch.tensor([0.3, 0.8]), torch.tensor([0, 0])
    )


def with_lora(path: Path) -> Tensor:
    model = load("shapes")
    before = predicted(model)
    load_lora(model, path)
    after = predicted(model)
    assert (after - before).abs().max() > 0.02 * before.abs().max()
    return after


# --------------------------------------------------------------------------------------------------------------- exact
@pytest.mark.parametrize("scale", [(32, 64), (8, 12), (3, 1)], ids=str)
@pytest.mark.parametrize("which", ["peft_folder", "file"])
def test_a_lora_is_trained_on_as_it_is(
    request: pytest.FixtureRequest, tmp_path: Path, which: str, scale: tuple[int, int]
) -> None:
    path: Path = request.getfixturevalue(which)
    rank, alpha = scale
    model, trainable = begun(tmp_path, path, training="lora", lora_rank=rank, lora_alpha=alpha)
    wanted = with_lora(path)
    assert (predicted(model) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    own = lora_of(model.network)
    assert {f.scale for f in own.values()} == {alpha / rank}
    assert {name.split(".lora_")[0] for name in trainable.names} == set(own) and len(own) == (
        3 if which != "file" else 2
    )
    model.save(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / LORA_FILE)
    for n, layer in enumerate(own):
        a, b = factors(layer, own[layer].rank, LAYERS.index(layer))
        told = 1.5 if which == "peft_folder" else 1.0
        assert torch.equal(saved[f"transformer.{layer}.lora_A.weight"], a), n
        there = saved[f"transformer.{layer}.lora_B.weight"]
        if scale == (32, 64):  # a scale that is a power of two rounds nothing
            assert torch.equal(there, b * told)
        assert torch.allclose(there, b * told, rtol=3e-7, atol=0)


def test_a_file_of_ours_starts_and_is_saved_bit_by_bit(tmp_path: Path, file: Path) -> None:
    first, _ = begun(tmp_path, file, training="lora", lora_rank=32, lora_alpha=64)
    first.save(str(tmp_path / "first"))
    second, _ = begun(tmp_path, tmp_path / "first", training="lora", lora_rank=8, lora_alpha=32)
    second.save(str(tmp_path / "second"))
    one, two = (load_file(tmp_path / name / LORA_FILE) for name in ("first", "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_full_training_merges_it(tmp_path: Path, peft_folder: Path) -> None:
    model, trainable = begun(tmp_path, peft_folder, training="full")
    base = load("shapes").network.state_dict()
    for name, value in trainable.state().items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS and name.endswith(".weight"):
            a, b = factors(layer, 4, LAYERS.index(layer))
            wanted = base[name].double() + 1.5 * b.double() @ a.double()
            assert torch.allclose(value.double(), wanted, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, base[name])
    wanted = with_lora(peft_folder)
    assert (predicted(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# --------------------------------------------------------------------------------------------------------------- a run
def test_a_run_from_a_lora_and_back(tmp_path: Path, peft_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its test before training is the LoRA's own; its result, its export as a PEFT folder and a run from it agree."""
    model = {"training": "lora", "start": str(peft_folder), "lora_rank": 8, "lora_alpha": 16}
    run = trainer.train(configured(tmp_path / "run", **model))
    told = " ".join(capsys.readouterr().out.split())
    assert f"start: the LoRA of {peft_folder} (3 layers, rank 4) goes on being trained" in told.replace("\n", " ")
    result = predicted(load_source(find(str(tmp_path / "run"))))
    assert torch.equal(predicted(run.model), result)
    export_run(tmp_path / "run", tmp_path / "peft", form="peft")
    assert "a LoRA of rank 4, alpha 8, from lora" in (tmp_path / "peft" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(pipe.transformer, "peft")' in (tmp_path / "peft" / "README.md").read_text()
    assert torch.equal(predicted(load_source(find(str(tmp_path / "peft"), "shapes"))), result)
    for start, scale in ((tmp_path / "run", 32), (tmp_path / "peft", 32), (tmp_path / "run", 16)):
        again, _ = begun(tmp_path, start, training="lora", lora_rank=8, lora_alpha=scale)
        assert torch.equal(predicted(again), result)


def test_the_reference_may_be_a_lora(tmp_path: Path, file: Path, peft_folder: Path) -> None:
    model, trainable = begun(tmp_path, file, training="lora")
    base = trainable.state()
    same = build._reference(str(file), model, trainable, base)  # pyright: ignore[reportPrivateUsage]
    assert same is not None and all(torch.equal(same[name], base[name]) for name in base)
    with pytest.raises(
        ValueError, match=r"^model.reference: '.*lora' has a LoRA of rank 4 on .* and what is trained has"
    ):
        build._reference(str(peft_folder), model, trainable, base)  # pyright: ignore[reportPrivateUsage]


# ------------------------------------------------------------------------------------------------------------- refused
def refused(tmp_path: Path, start: str | Path, **model: Any) -> str:
    with pytest.raises(ValueError) as error:
        trainer.prepare_model(configured(tmp_path / "out", start=str(start), **model))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_what_is_no_start(tmp_path: Path, peft_folder: Path) -> None:
    near = refused(tmp_path, peft_folder.parent, training="lora")
    assert near.startswith("model.start: ") and near.endswith(f"nearest valid: {str(peft_folder)!r}")
    assert refused(tmp_path, tmp_path / "none").startswith(f"model.start: {str(tmp_path / 'none')!r} is no file; ")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").touch()
    assert f"is a whole pipeline; nearest valid: --model.path {tmp_path / 'pipe'}" in refused(
        tmp_path, tmp_path / "pipe"
    )
    (tmp_path / "x.bin").touch()
    assert "x.bin' is a pickle" in refused(tmp_path, tmp_path / "x.bin", training="lora")


def test_a_text_encoders_part_is_not_left_out_silently(tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = load("shapes").pipe.text_encoder.config.hidden_size
    a, b = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    tensors |= {f"transformer.{LAYERS[0]}.lora_A.weight": a, f"transformer.{LAYERS[0]}.lora_B.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    text = refused(tmp_path, tmp_path / "x.safetensors", training="lora")
    assert "has 1 layers of text_encoder too, which a run would not keep; nearest valid: " in text


def test_a_run_that_trained_everything_is_no_start_of_a_lora(tmp_path: Path) -> None:
    run = trainer.train(configured(tmp_path / "full"), quiet=True)
    text = refused(tmp_path, run.folder, training="lora")
    assert text.endswith(f"nearest valid: --model.path {run.folder / 'model'}")
    assert "trained the whole network, and this run trains a LoRA" in text


def test_a_mean_is_of_runs_that_trained_the_same_whole_network(
    tmp_path: Path, peft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer.train(configured(tmp_path / "one"), quiet=True).folder
    for name in ("two", "other"):
        shutil.copytree(one, tmp_path / name)
    best = checkpoint.best_weights(one)
    stored = {one: best, tmp_path / "two": {name: 3 * value for name, value in best.items()}}
    monkeypatch.setattr(checkpoint, "best_weights", lambda run: stored.get(run, {"other": torch.zeros(3)}))
    mean = read_starts([str(one), str(tmp_path / "two")], "model.start")
    assert mean.path == f"{one} and {tmp_path / 'two'}" and mean.weights is not None
    assert all(torch.allclose(mean.weights[name], 2 * value) for name, value in best.items())
    for wrong, why in (
        (peft_folder, "a mean is of whole networks, and '.*' is a LoRA"),
        (tmp_path / "other", "'.*other'"),
    ):
        with pytest.raises(ValueError, match=rf"^model.start: {why}.*; nearest valid: "):
            read_starts([str(one), str(wrong)], "model.start")


def test_a_model_of_another_kind_takes_no_file(peft_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.start: '.*' is a LoRA; this model takes none; nearest valid: ''"):
        read_start(str(peft_folder), "model.start").lora_for(Fake())
