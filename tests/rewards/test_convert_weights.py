"""scripts/convert_weights.py: published layouts to ours, whole or not at all. (What the converted networks make of
pictures is compared in test_scorers.py.)"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_scorers as tiny
import torch
from convert_weights import BLIP_L, CLIP_H, affine, blip_shapes, clip_shapes, convert, main
from torch import Tensor

from tempflow.rewards.weights import metadata_of, read_tensors

HEAD = tiny.head(768, hidden=(8, 4, 3, 2))


def test_an_affine_head_is_one_map() -> None:
    """To 1e-12, as its five layers one after the other."""
    x = torch.randn(5, 768, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = affine(HEAD)
    assert one["weight"].dtype == torch.float64
    assert torch.allclose(x @ one["weight"].T + one["bias"], tiny.layers(HEAD, x), rtol=1e-12, atol=1e-12)


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def saved(folder: Path, tensors: Any) -> str:
    torch.save(tensors, folder / "published.pth")
    return str(folder / "published.pth")


def test_a_file_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    file = saved(tmp_path, {f"module.{name}": tensor for name, tensor in HEAD.items()})
    for _ in range(2):  # a folder of ours is written anew
        assert main(["aesthetic", file, "--output", str(out)]) == 0
    assert "2 tensors in" in capsys.readouterr().out
    found = read_tensors(out)
    assert torch.equal(found["weight"], affine(HEAD)["weight"]) and found["bias"].shape == (1,)
    assert metadata_of(out) == {"format": "pt", "scorer": "aesthetic", "source": "published.pth"}
    assert not (out / "config.json").exists()


def test_listing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, {"state_dict": HEAD, "epoch": 3})
    assert main(["aesthetic", file, "--list"]) == 0
    told = capsys.readouterr().out
    assert "beside state_dict, not converted: epoch" in told and "weight  float64  [1, 768]" in told
    assert names(tmp_path) == ["published.pth"]


class Wicked:
    def __reduce__(self) -> Any:
        return os.mkdir, ("wicked",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (Wicked(), "cannot be read as weights"),
        ([torch.zeros(1)], "is no mapping of names to tensors"),
        ({"state_dict": {"layers.0.weight": 3}}, "is no mapping of names to tensors"),
        ({}, "is no mapping of names to tensors"),
        ({k: v for k, v in HEAD.items() if k != "layers.4.bias"}, "missing: layers.4.bias"),
        (HEAD | {"layers.9.bias": torch.zeros(1)}, "unknown: layers.9.bias"),
        (tiny.head(20), r"weight is [1, 20]; nearest valid: [1, 768]"),
        (HEAD | {"layers.4.weight": torch.zeros(3, 5)}, "layers.4.weight is [3, 5]; nearest valid: [·, 4]"),
        (HEAD | {"layers.7.bias": torch.tensor([float("nan")])}, "bias has numbers that are not finite"),
    ],
)
def test_what_is_not_the_published_file_is_refused(
    content: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path, content)
    assert main(["aesthetic", file, "--output", str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err
    assert names(tmp_path) == ["published.pth"]


def test_a_folder_of_others_is_not_written_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, HEAD)
    assert main(["aesthetic", file, "--output", str(tmp_path)]) == 1
    assert "output: " in capsys.readouterr().err and names(tmp_path) == ["published.pth"]
    assert main(["aesthetic", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 1
    assert "is not there" in capsys.readouterr().err


CLIP, BLIP = tiny.open_clip(), tiny.image_reward()


@pytest.mark.parametrize(
    ("kind", "tensors", "change", "told"),
    [
        ("hpsv2.1", CLIP, {"visual.ln_pre.bias": None}, "missing: vision_model.pre_layrnorm.bias"),
        ("hpsv2.1", CLIP, {"visual.head": torch.zeros(1)}, "'visual.head' is no tensor"),
        ("hpsv2.0", CLIP, {"transformer.resblocks.0.attn.bias_k": torch.zeros(1)}, r"attn\.bias_k' is no tensor"),
        ("hpsv2.1", CLIP, {"visual.transformer.resblocks.2.ln_1.bias": torch.zeros(32)}, "unknown: vision_model.enc"),
        ("hpsv2.1", CLIP, {"visual.proj": torch.zeros(20, 32)}, r"visual_projection.weight is \[32, 20\]; nearest"),
        (
            "hpsv2.1",
            CLIP,
            {"transformer.resblocks.1.attn.in_proj_bias": torch.zeros(71)},
            r"_proj.bias is \[23\]",
        ),
        ("image_reward", BLIP, {"blip.itm_head.weight": torch.zeros(2, 24)}, "'blip.itm_head.weight' is no tensor"),
        ("image_reward", BLIP, {"blip.text_encoder.embeddings.position_ids": torch.ones(1, 40)}, "unknown: text_enc"),
        ("image_reward", BLIP, {"blip.text_encoder.encoder.layer.1.output.dense.bias": None}, "missing: text_encoder"),
        ("image_reward", BLIP, {"mlp.layers.6.bias": None}, "missing: layers.6.bias"),
    ],
)
def test_networks_are_taken_whole(kind: str, tensors: dict[str, Tensor], change: Any, told: str) -> None:
    config = tiny.BLIP if kind == "image_reward" else tiny.CLIP
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=told):
        convert(kind, changed, config)


def test_what_the_score_does_not_use_is_named() -> None:
    made = convert("image_reward", BLIP, tiny.BLIP)
    assert sorted(made.unused) == sorted(n for n in BLIP if "_proj." in n or "position_ids" in n)
    assert convert("hpsv2.1", CLIP, tiny.CLIP).unused == []


def test_the_published_networks_have_the_published_sizes() -> None:
    """ViT-H/14 has 986 million parameters, ImageReward's BLIP-large 446 million with its head in five layers."""
    h, large = clip_shapes(CLIP_H), blip_shapes(BLIP_L)
    assert sum(shape.numel() for shape in h.values()) == 986_109_441
    assert h["vision_model.embeddings.position_embedding.weight"] == (257, 1280)
    assert h["text_model.embeddings.token_embedding.weight"] == (49408, 1024)
    assert large["text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert large["vision_model.embeddings.position_embedding"] == (1, 197, 1024)
    json.dumps([CLIP_H, BLIP_L])
