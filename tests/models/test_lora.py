"""LoRA files: those that the adapter saves load again, others are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tempflow.evaluate.suite import draw
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.lora import LORA_FILE
from tempflow.models.lora_files import load_lora, lora_file
from tempflow.models.sd3 import SD3
from tempflow.request import asked

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def pictures(model: SD3) -> Tensor:
    return draw(
        model, asked(["a red circle", "two squares"]), steps=2, guidance=1.0, seed=0, size=Size(32, 32), rows=8
    ).pictures()


def trained(dtype: str, rank: int, alpha: int) -> SD3:
    model = load("shapes", dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_lora(rank, alpha)
        with torch.no_grad():
            for name, weight in model.network.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    trained("float32", 4, 8).save(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_lora_draws_the_same_pictures(tmp_path: Path, dtype: str) -> None:
    model = trained(dtype, 4, 8)
    model.save(str(tmp_path))
    again = load("shapes", dtype=dtype)
    base = pictures(again)
    load_lora(again, tmp_path)
    assert torch.equal(pictures(again), pictures(model)) and not torch.equal(pictures(again), base)
    assert not any(p.requires_grad for p in again.network.parameters()) and not again.network.training


def test_the_file_is_found(saved: Path, tmp_path: Path) -> None:
    assert lora_file(saved) == lora_file(saved / LORA_FILE) == saved / LORA_FILE
    with pytest.raises(ValueError, match=r"holds no .safetensors; "):
        lora_file(tmp_path)
    with pytest.raises(ValueError, match=r"missing' is no file; "):
        lora_file(tmp_path / "missing")
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert lora_file(tmp_path).name == "one.safetensors"
    save_file({"x": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"has one.safetensors, two.safetensors; name one of them"):
        lora_file(tmp_path)


def broken(weights: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    a = f"{LAYER}.lora_A.weight"
    if change == "alien":
        return {**weights, "lora_unet_x.alpha": torch.zeros(1)}
    if change == "layer":
        return {name.replace("transformer_blocks.0.", "transformer_blocks.99."): w for name, w in weights.items()}
    if change == "width":
        return {**weights, a: torch.zeros(4, 7)}
    return {}


@pytest.mark.parametrize(
    "change,message",
    [
        ("alien", "'lora_unet_x' has no lora_A"),
        ("layer", r"'transformer_blocks.99.attn.\w+' is no layer of shapes; nearest is 'transformer_blocks.\d+.attn"),
        ("width", r"to_q' has lora_A \(lora_down\) of \[4, 7\], but shapes needs \[rank, \d+\]: another base\?"),
        ("empty", "has no tensors"),
    ],
)
def test_another_file_is_refused_before_anything_changes(
    saved: Path, tmp_path: Path, change: str, message: str
) -> None:
    save_file(broken(load_file(saved / LORA_FILE), change), tmp_path / LORA_FILE)
    model = load("shapes")
    names = [n for n, _ in model.network.named_parameters()]
    with pytest.raises(ValueError, match=message):
        load_lora(model, tmp_path)
    assert [n for n, _ in model.network.named_parameters()] == names


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / LORA_FILE).write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="is not safetensors"):
        load_lora(load("shapes"), tmp_path)
