"""DINOv2 features against the network called by hand; what is loaded, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from torch import Tensor

from tempflow.perception import DenseFeatures, DinoEmbedding, DinoFeatures, Embedding, FeatureMaps

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def by_hand(folder: Path, media: Tensor) -> tuple[Tensor, Tensor]:
    """CLS [N, d] and all tokens that stand for a place, of pictures that need no resizing."""
    from transformers import AutoModel

    network = AutoModel.from_pretrained(folder).eval()
    registers = 3 if folder.name.endswith("registers") else 0
    pixels = ((media.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, 1)
    with torch.no_grad():
        hidden = network(pixels).last_hidden_state
    assert hidden.shape[1] == 1 + registers + media.shape[1] * media.shape[2] // 49
    return hidden[:, 0], hidden[:, 1 + registers :]


@pytest.mark.parametrize(("height", "width"), [(28, 28), (28, 42), (56, 28)])
def test_patches_lie_where_the_picture_has_them(dino_folder: Path, height: int, width: int) -> None:
    media = noise(3, height, width)
    features = DinoFeatures(str(dino_folder), patches=4)
    found = features(media)
    cls, patches = by_hand(dino_folder, media)
    assert found.shape == (3, height // 7, width // 7, 16) and found.dtype == torch.float32
    assert torch.allclose(found.flatten(1, 2), patches, atol=1e-4)
    assert torch.allclose(DinoEmbedding(str(dino_folder), patches=4, unit=False)(media), cls, atol=1e-4)
    pooled = DinoEmbedding(str(dino_folder), patches=4, unit=False, pool="patches")(media)
    assert torch.allclose(pooled, patches.mean(1), atol=1e-4)
    assert isinstance(features, DenseFeatures)


def test_nothing_is_cropped(dino_folder: Path) -> None:
    """The processor's own way, shorter side 32 and the middle 28, would not see the outermost pixels."""
    media = noise(1, 64, 64)
    other = media.clone()
    other[:, :2] = 255 - other[:, :2]
    features = DinoFeatures(str(dino_folder), patches=4)
    assert float((features(media) - features(other)).abs().max()) > 1e-2


def test_resizing_is_bicubic_as_pillow_does_it(dino_folder: Path) -> None:
    media = noise(1, 50, 61) // 2 + 64  # Pillow cuts off at 0 and 255 between its two passes; here nothing overshoots
    features = DinoFeatures(str(dino_folder), patches=4)
    down, across = features.backbone.grid(50, 61)
    assert (down, across) == (4, 5)
    small = Image.fromarray(media[0].numpy()).resize((35, 28), Image.Resampling.BICUBIC)
    resized = torch.from_numpy(np.asarray(small).copy())[None]
    pixels = features.backbone._pixels(media, (28, 35))
    levels = (pixels.movedim(1, -1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    assert float((levels - resized).abs().max()) < 1.01  # one level of 255, by rounding


def test_what_bicubic_overshoots_is_cut_off(dino_folder: Path) -> None:
    """Larger pictures of a hard edge: past white comes white, not black by the wrap of a byte."""
    media = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    media[:, :, 4:] = 255
    levels = DinoFeatures(str(dino_folder), patches=4).backbone._pixels(media, (28, 28))[0, 0, 14] * STD[0] + MEAN[0]
    assert torch.equal(levels.clamp(0, 1).round(), (torch.arange(28) >= 14).float())
    assert bool((levels.diff() > -1e-5).all())


def test_rows_at_once_do_not_matter(dino_folder: Path) -> None:
    media = noise(5, 32, 32)
    one, many = (DinoFeatures(str(dino_folder), patches=4, rows=n) for n in (1, 2))
    whole = one(media)
    assert torch.allclose(many(media), whole, atol=1e-4)
    for i in range(5):
        assert torch.equal(one(media[i : i + 1])[0], whole[i])
    assert one(media[:0]).shape == (0, 4, 4, 16)
    assert DinoEmbedding(str(dino_folder))(media[:0]).shape == (0, 16)


def test_maps_and_embeddings_of_it(dino_folder: Path) -> None:
    media = noise(3, 32, 32)
    maps = FeatureMaps(DinoFeatures(str(dino_folder), patches=4))(media, (8, 8))
    assert maps.flatten(1).amax(1).tolist() == [1] * 3 and maps.flatten(1).amin(1).tolist() == [0] * 3
    embedding = DinoEmbedding(str(dino_folder), patches=4)
    rows = embedding(media[[0, 1, 0, 2]])
    assert isinstance(embedding, Embedding) and rows.dtype == torch.float32 and not rows.requires_grad
    assert torch.equal(rows[0], rows[2]) and float((rows[0] - rows[1]).norm()) > 1e-4
    assert torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ loading
def test_weights_that_are_not_safetensors_are_refused(dino_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(dino_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    DinoFeatures(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        DinoFeatures(str(folder))


def test_code_of_a_folder_is_not_run(dino_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    shutil.copytree(dino_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nEvil = 1\n")
    DinoFeatures(str(folder))
    assert not (tmp_path / "ran").exists()


def test_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit'; nearest valid: dinov2 or dinov2_with_registers"):
        DinoFeatures(str(tmp_path))


def test_folders_that_are_none(dino_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json.*nearest model folder: .*" + dino_folder.name):
        (dino_folder.parent / "empty").mkdir(exist_ok=True)
        DinoFeatures(str(dino_folder.parent / "empty"))
    for path in (str(tmp_path / "none"), "nobody/nothing"):
        with pytest.raises(ValueError, match="is no folder, and as a hub id it cannot be had"):
            DinoEmbedding(path)


def test_values_out_of_range(dino_folder: Path) -> None:
    with pytest.raises(ValueError, match="patches: 0 must be at least 1; 16 is usual"):
        DinoFeatures(str(dino_folder), patches=0)
    with pytest.raises(ValueError, match="rows: 0 must be at least 1; 1 is usual"):
        DinoEmbedding(str(dino_folder), rows=0)
    with pytest.raises(ValueError, match="pool: 'max' is not one of cls, patches"):
        DinoEmbedding(str(dino_folder), pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"media is torch\.float32"):
        DinoFeatures(str(dino_folder))(torch.zeros(1, 8, 8, 3))


def test_without_transformers_the_command_is_named(dino_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'tempflow\[diffusers\]'"):
        DinoFeatures(str(dino_folder))


def test_importing_the_room_is_light() -> None:
    code = (
        "import sys, tempflow.perception\n"
        "heavy = {'transformers', 'diffusers', 'cv2', 'scipy', 'PIL'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
