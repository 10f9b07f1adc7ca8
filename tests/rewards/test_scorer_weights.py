"""Where weights lie, and modules that take them whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tempflow.rewards.weights import FILES, folder_of, load_strict, metadata_of, read_tensors, unfilled


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 3)
        self.two = nn.Linear(3, 2, bias=False)
        self.same = self.one
        self.register_buffer("steps", torch.arange(3), persistent=False)


TENSORS = {"one.weight": torch.ones(3, 2), "one.bias": torch.zeros(3), "two.weight": torch.full((2, 3), 2.0)}


@pytest.mark.parametrize("empty", [False, True])
def test_a_module_takes_its_tensors(empty: bool) -> None:
    net = unfilled(Net) if empty else Net()
    assert net.two.weight.is_meta == empty and not net.steps.is_meta
    halves = {name: tensor.half() for name, tensor in TENSORS.items()}
    load_strict(net, halves, "path: 'x'")
    assert torch.equal(net.two.weight, TENSORS["two.weight"]) and net.two.weight.dtype == torch.float32
    assert torch.equal(net.same.weight, TENSORS["one.weight"])
    assert not any(p.is_meta for p in net.parameters())


def test_what_the_module_does_not_save_may_be_given_where_it_is_equal() -> None:
    load_strict(Net(), TENSORS | {"steps": torch.arange(3)}, "path: 'x'")
    with pytest.raises(ValueError, match=r"path: 'x': does not fit Net: it has unexpected steps$"):
        load_strict(Net(), TENSORS | {"steps": torch.arange(1, 4)}, "path: 'x'")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"two.weight": None}, "lacks two.weight"),
        ({"one.weight": None, "one.bias": None}, "lacks one.weight, one.bias, same.weight and 1 more"),
        ({"three.weight": torch.zeros(1)}, "has unexpected three.weight"),
        ({"two.weight": torch.zeros(3, 2)}, r"has other shapes: two.weight \[3, 2\] for \[2, 3\]"),
        ({"two.weight": None, "too.weight": torch.zeros(2, 3)}, "lacks two.weight; it has unexpected too.weight"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(changed: dict[str, Any], told: str) -> None:
    net = Net()
    before = net.one.weight.clone()
    given = {name: tensor for name, tensor in (TENSORS | changed).items() if tensor is not None}
    with pytest.raises(ValueError, match=told):
        load_strict(net, given, "path: 'x'")
    assert torch.equal(net.one.weight, before)


def test_tensors_of_a_file_of_a_folder_and_of_shards(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "only.safetensors", metadata={"scorer": "x"})
    for place in (tmp_path, tmp_path / "only.safetensors"):
        assert read_tensors(place).keys() == TENSORS.keys() and metadata_of(place) == {"scorer": "x"}
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, shards / f"model-{number}.safetensors")
    with pytest.raises(
        ValueError, match=r"model-0\.safetensors, model-1\.safetensors.*nearest valid: one of these files"
    ):
        read_tensors(shards)
    index = {"weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(TENSORS)}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(shards).keys() == TENSORS.keys()
    save_file({"one.bias": torch.zeros(3), "two.weight": torch.zeros(1)}, shards / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"model-2.safetensors' has one.bias, which another file"):
        read_tensors(shards)
    (shards / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors' is missing"):
        read_tensors(shards)


def test_pickles_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no safetensors \(get it again\)"):
        read_tensors(tmp_path)
    for name in ("pytorch_model.bin", "model.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"model.pth is a pickle.*scripts/convert_weights.py"):
        read_tensors(tmp_path)
    with pytest.raises(ValueError, match="is a pickle, which is never read here"):
        read_tensors(tmp_path / "model.pth")
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04")
    for read in (read_tensors, metadata_of):
        with pytest.raises(ValueError, match="is no safetensors, or damaged"):
            read(tmp_path)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PickScore").mkdir()
    assert folder_of(str(tmp_path / "PickScore")) == tmp_path / "PickScore"
    with pytest.raises(ValueError, match=r"no hub id; nearest valid: .*PickScore"):
        folder_of(str(tmp_path / "Pickscore"))
    with pytest.raises(ValueError, match="revision: 'main' of a place on the disk"):
        folder_of(str(tmp_path), "main")
    with pytest.raises(ValueError, match="path: 'nobody/has-this' is not there, and as a hub id it cannot be had"):
        folder_of("nobody/has-this")
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or tmp_path)
    assert folder_of("owner/name", "v1") == tmp_path
    assert asked == [("owner/name", {"revision": "v1", "allow_patterns": list(FILES)})]
    assert not any(p.endswith((".bin", ".pt", ".pth", ".py")) for p in FILES)
