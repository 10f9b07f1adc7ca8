"""DINOv2 by transformers: features of a picture's patches, and of the whole picture.

Weights come from a folder or a hub id, as safetensors only; no code of a hub is run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempflow.perception.pictures import Pictures, check_pictures

FAMILIES = ("dinov2", "dinov2_with_registers")
"""Kinds of backbone (`model_type` of config.json) whose tokens are [CLS, registers, patches row by row]."""


class DinoBackbone:
    """A frozen DINOv2 in float32 and what it says of pictures.

    path      a folder with config.json, preprocessor_config.json and model.safetensors, or a hub id
    revision  commit, tag or branch of a hub id
    patches   patches along a picture's shorter side; 16 with patches of 14 is DINOv2's 224 pixels
    rows      pictures at once; 1, the default, keeps a row's last bits its own, more is quicker on an accelerator
    device    where the network runs; what it gives is on the CPU

    A picture is resized (bicubic, antialiased) to whole patches, near its own proportions, and never cropped: the
    processor that comes with DINOv2 cuts out the middle, and a map of the middle would lie beside the latent. Colours
    are normalised as the processor says.

    Raises ImportError with the command to run when transformers is missing; ValueError for `patches` or `rows` below 1,
    a folder without config.json, a hub id that cannot be had or another kind of network; OSError when a file is missing
    or broken, weights that are not safetensors included.
    """

    def __init__(
        self, path: str, revision: str | None = None, *, patches: int = 16, rows: int = 1, device: str = "cpu"
    ) -> None:
        for name, value, usual in (("patches", patches, 16), ("rows", rows, 1)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1; {usual} is usual")
        self.path, self.patches, self.rows = path, patches, rows
        self._network, self._processor, described = _load(path, revision)
        self._network.requires_grad_(False).eval().to(device)
        self._patch, self._registers = int(described["patch_size"]), int(described.get("num_register_tokens", 0))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across for pictures of height × width."""
        shorter = min(height, width)
        return round(self.patches * height / shorter), round(self.patches * width / shorter)

    def tokens(self, media: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
        """Per `rows` pictures: the CLS token float32 [n, d] and the patches' [n, gh, gw, d], both after the last norm.

        Raises ValueError for media that is not uint8 [N, H, W, 3] on the CPU.
        """
        check_pictures(media)
        down, across = self.grid(media.shape[1], media.shape[2])
        for part in media.split(self.rows) if len(media) else ():
            with torch.no_grad():
                found = self._network(pixel_values=self._pixels(part, (down * self._patch, across * self._patch)))
            hidden = found.last_hidden_state.float().cpu()
            patches = hidden[:, 1 + self._registers :]  # registers hold no place of the picture
            yield hidden[:, 0], patches.unflatten(1, (down, across))

    @property
    def width(self) -> int:
        """Numbers per token."""
        return int(self._network.config.hidden_size)

    def _pixels(self, media: Pictures, size: tuple[int, int]) -> Tensor:
        """uint8 [n, H, W, 3] to what the network takes, [n, 3, *size], on its device."""
        picture = media.permute(0, 3, 1, 2).float()
        picture = F.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)
        bytes_ = picture.round().clamp(0, 255).to(torch.uint8)  # bicubic overshoots
        done = self._processor(
            list(bytes_.numpy()),
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return done["pixel_values"].to(self._network.device)


class DinoFeatures:
    """Dense features for maps: a vector per patch; CLS and register tokens are dropped.

    ViPO's best backbone is DINOv2-large ("facebook/dinov2-large"). Arguments and errors are those of `DinoBackbone`.
    """

    def __init__(
        self, path: str, revision: str | None = None, *, patches: int = 16, rows: int = 1, device: str = "cpu"
    ) -> None:
        self.backbone = DinoBackbone(path, revision, patches=patches, rows=rows, device=device)

    def __call__(self, media: Pictures) -> Tensor:
        """float32 [N, gh, gw, d] on the CPU; (gh, gw) is `backbone.grid(H, W)`."""
        parts = [patches for _, patches in self.backbone.tokens(media)]
        empty = torch.empty(0, *self.backbone.grid(media.shape[1], media.shape[2]), self.backbone.width)
        return torch.cat(parts) if parts else empty


def _load(path: str, revision: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Network, processor and the configuration as a plain dictionary, which is looked at before weights travel."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
    except ImportError as error:
        if (error.name or "").split(".")[0] != "transformers":
            raise
        message = "DINO features need transformers: pip install 'tempflow[diffusers]'"
        raise ImportError(message, name="transformers") from error
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"path: {path!r} has no config.json, so it is no model folder{_near(folder)}")
    where = str(folder) if folder.is_dir() else path
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"path: {path!r} is no folder, and as a hub id it cannot be had ({error})") from error
    except ValueError as error:  # transformers advises an argument here that we do not have
        own = "trust_remote_code" in str(error)
        why = "it brings code of its own, which is never run here" if own else " ".join(str(error).split())[:300]
        raise ValueError(f"path: {path!r} cannot be loaded: {why}; nearest valid: {' or '.join(FAMILIES)}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"path: {path!r} is a {config.model_type!r}; nearest valid: {' or '.join(FAMILIES)}")
    from tempflow.models.quiet import quiet

    with quiet():
        processor = AutoImageProcessor.from_pretrained(where, revision=revision, trust_remote_code=False)
        network = AutoModel.from_pretrained(
            where, revision=revision, trust_remote_code=False, use_safetensors=True, torch_dtype=torch.float32
        )
    return network, processor, config.to_dict()


def _near(folder: Path) -> str:
    found = sorted(str(p.parent) for p in folder.parent.glob("*/config.json"))
    close = difflib.get_close_matches(str(folder), found, n=1, cutoff=0.0)
    return f"; nearest model folder: {close[0]}" if close else ""
