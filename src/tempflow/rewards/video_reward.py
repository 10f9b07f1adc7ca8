"""VideoReward of VideoAlign (arXiv 2501.13918, KwaiVGI/VideoReward): Qwen2-VL 2B that rates a clip's visual quality,
motion quality and text alignment.

One turn of a chat: the clip's frames, then a text that holds a token for each of the three; a linear head without bias
turns the hidden state at each into a number, which is standardised by the mean and the deviation of the checkpoint's
model_config.json. The score is the sum of the three, or one of them.

The published checkpoint is a torch pickle of the network with its LoRA beside it; `scripts/convert_weights.py` makes a
safetensors file of it, and `path` is the folder with that file and model_config.json. The LoRA is merged on loading.

The weights were trained with one text around the prompt. That text is not ours to copy: without `template` a text of
our own asks the same, and the scores are **not comparable with published ones**. Whoever has the official text gives it
as a file, with `{prompt}` or `{text_prompt}` where the prompt goes and each of the three tokens once.

Reports of "visual quality above 4" are numbers that were not standardised (`standardise=False`). Trained on alone, it
is known to push clips to over-exposure and a cartoon's look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from tempflow.core.scores import Scores
from tempflow.devices import resolved_device
from tempflow.media import Kind, Media
from tempflow.names import PATH, cut
from tempflow.rewards.protocol import check_media
from tempflow.rewards.scorer import Batch, Dtype, require
from tempflow.rewards.vlm import Rater, Source, Template, check_plain, fitted, is_plain
from tempflow.rewards.weights import folder_of, read_tensors
from tempflow.strict import Place

LICENCE, NEEDS, RANGE = "MIT", "tempflow[scorers]", "about −3 to 3 each, standardised; overall is the sum of three"

Dimension = Literal["overall", "visual_quality", "motion_quality", "text_alignment"]
TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
KEYS = ("VQ", "MQ", "TA")
"""Of the three in model_config.json, in the order of `Dimension`."""

SETTINGS = "model_config.json"
LEAST = 128 * 28 * 28
"""Pixels that a frame has at least."""

FEWEST, GROUP = 4, 2
"""Frames that are taken by rate at least, and of which there is a multiple."""

TEMPLATE = """Rate this generated clip from 0 (worst) to 10 (best) in three ways, each by itself.
Visual quality, frame by frame: no errors in bodies and objects, sharpness, rich detail, light and colour, composition.
Rating of visual quality: <|VQ_reward|>
Motion quality: steady from frame to frame, natural and smooth, clear while it moves, and not standing still.
Rating of motion quality: <|MQ_reward|>
Text alignment: the things, actions, places, style and camera that the prompt names.
Prompt: {prompt}
Rating of text alignment: <|TA_reward|>
"""
"""Ours, version 1. As in the official text only the third rating comes after the prompt."""


def video_reward(
    *,
    path: Place = "KwaiVGI/VideoReward",
    base: Place = "Qwen/Qwen2-VL-2B-Instruct",
    dimension: Dimension = "overall",
    standardise: bool = True,
    fps: Annotated[float, Field(gt=0)] | None = None,
    num_frames: Annotated[int, Field(ge=2)] | None = None,
    max_pixels: Annotated[int, Field(ge=784)] | None = None,
    template: Place | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "bfloat16",
    batch: Batch = 1,
) -> VideoReward:
    """Visual quality, motion quality and text alignment of a clip by VideoReward, summed or one of them."""
    require("scorers", "transformers", "accelerate")
    if fps is not None and num_frames is not None:
        raise ValueError(f"fps: {fps:g} beside num_frames = {num_frames}; nearest valid: one of the two")
    text = Template.read(template, TEMPLATE, TOKENS)
    frames = Frames(fps, num_frames, max_pixels)
    source = Source(base, base_revision, resolved_device(device), dtype)
    return VideoReward(path, revision, source, text, dimension, standardise, frames, batch)


@dataclass(frozen=True)
class Frames:
    """Which frames of a clip are looked at, and how large. None: as model_config.json says.

    fps         so many of a second, at least 4
    num_frames  so many of the clip
    max_pixels  of a frame at most
    """

    fps: float | None = None
    num_frames: int | None = None
    max_pixels: int | None = None

    def of(self, total: int, rate: float | None) -> list[int]:
        """Places of the frames in a clip of `total`, evenly apart, the first and the last among them; an even number,
        where the clip has as many. Raises ValueError where a rate is asked for and the clip has none."""
        if self.num_frames is not None:
            count = round(self.num_frames / GROUP) * GROUP
        elif rate is None:
            raise ValueError(
                "media has no rate to take fps from; nearest valid: num_frames = 8 in the reward's options"
            )
        else:
            most = total // GROUP * GROUP
            count = round(min(max(total / rate * (self.fps or 2.0), FEWEST), most) / GROUP) * GROUP
        count = max(1, min(count, total))
        return [0] if count == 1 else [round(k * (total - 1) / (count - 1)) for k in range(count)]


@dataclass(frozen=True)
class Settings:
    """What model_config.json says.

    mean, deviation  of the three numbers, by which they are standardised
    alpha, by_root   the LoRA of rank r is scaled by alpha ÷ r, or by alpha ÷ √r
    """

    frames: Frames
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    alpha: float
    by_root: bool

    @staticmethod
    def read(file: Path) -> Settings:
        """Raises ValueError, naming the key, for a file that is missing or says something else."""
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"path: {cut(str(file), PATH)!r} cannot be read ({error}); get it again") from error
        data, lora = _section(told, "data_config", file), _section(told, "peft_lora_config", file)
        moments = _section(told, "inference_config", file)
        if data.get("sample_type", "uniform") != "uniform":
            kind = cut(repr(data["sample_type"]))
            raise ValueError(f"path: {cut(str(file), PATH)!r}: sample_type is {kind}; nearest valid: 'uniform'")
        mean, deviation = (tuple(_number(moments, f"{key}_{m}", file) for key in KEYS) for m in ("mean", "std"))
        if min(deviation) <= 0:
            raise ValueError(f"path: {cut(str(file), PATH)!r}: a deviation is {min(deviation)}; it must be above 0")
        count = None if data.get("num_frames") is None else int(_number(data, "num_frames", file))
        fps = None if count is not None else _number(data, "fps", file)
        frames = Frames(fps, count, int(_number(data, "max_frame_pixels", file)))
        alpha = _number(lora, "lora_alpha", file) if lora.get("lora_enable", True) else 0.0
        return Settings(frames, mean, deviation, alpha, bool(lora.get("use_rslora", False)))

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


class VideoReward:
    """See this file's docstring.

    path, revision  a safetensors file with model_config.json beside it, the folder of both, or a hub id
    batch           clips at a time
    """

    name, groupwise = "video_reward", False
    takes: Kind = "video"

    def __init__(
        self,
        path: str,
        revision: str | None,
        source: Source,
        template: Template,
        dimension: Dimension,
        standardise: bool,
        frames: Frames,
        batch: int,
    ) -> None:
        self.path, self.revision, self.source, self.template = path, revision, source, template
        self.dimension: Dimension = dimension
        self.standardise, self.frames, self.batch = standardise, frames, batch
        self._lock = Lock()
        self._loaded: tuple[Rater, Settings] | None = None

    def prepare(self) -> None:
        """Loads the weights. Raises ValueError for settings or tensors that are missing or unexpected."""
        with self._lock:
            if self._loaded is not None:
                return
            place = folder_of(self.path, self.revision)
            settings = Settings.read((place if place.is_dir() else place.parent) / SETTINGS)
            tensors = merged(read_tensors(place), settings)
            head = tensors.get("rm_head.weight")
            out, width = head.shape if head is not None and head.ndim == 2 else (1, 1)
            what = f"path: {cut(self.path, PATH)!r}"
            if out not in (1, len(TOKENS)):
                raise ValueError(f"{what}: rm_head.weight has {out} rows; nearest valid: 1 or {len(TOKENS)}")
            rater = Rater.of(self.source, tensors, nn.Linear(width, out, bias=False), TOKENS, what)
            self._loaded = (rater, settings)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt with a control token, such as `<|im_end|>`."""
        check_plain(prompts)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; a row whose prompt has a control token is failed. Raises ValueError for clips without a rate
        where frames are taken by rate."""
        media = check_media(media, prompts, metadata)
        self.prepare()
        assert self._loaded is not None
        rater, settings = self._loaded
        frames = self._frames(settings.frames)
        _, total, height, width, _ = media.frames.shape
        sides = fitted(height, width, LEAST, frames.max_pixels or LEAST)
        chosen = frames.of(total, media.fps)
        value = torch.full((len(media), 1), torch.nan)
        rows = [row for row, prompt in enumerate(prompts) if is_plain(prompt)]
        for start in range(0, len(rows), self.batch):
            some = rows[start : start + self.batch]
            clips, texts = [media.frames[row, chosen] for row in some], [self.template.filled(prompts[r]) for r in some]
            value[some, 0] = self._joined(rater(clips, texts, sides, video=True), settings)
        return Scores(value, value.isfinite(), (self.name,))

    def _frames(self, usual: Frames) -> Frames:
        """What was asked for, else what the checkpoint says."""
        pixels = self.frames.max_pixels or usual.max_pixels
        if self.frames.fps is None and self.frames.num_frames is None:
            return Frames(usual.fps, usual.num_frames, pixels)
        return Frames(self.frames.fps, self.frames.num_frames, pixels)

    def _joined(self, said: Tensor, settings: Settings) -> Tensor:
        """[N] of what the head said, [N, 3, 1], or [N, 3, 3] where it has a row for each token."""
        three = said[..., 0] if said.shape[-1] == 1 else said.diagonal(dim1=1, dim2=2)
        if self.standardise:
            three = (three - torch.tensor(settings.mean)) / torch.tensor(settings.deviation)
        if self.dimension == "overall":
            return three.sum(1)
        return three[:, get_args(Dimension).index(self.dimension) - 1]


# ---------------------------------------------------------------------------------------------------------- the LoRA
def merged(tensors: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """A checkpoint of peft's as one of the plain network: weight + scale · B A, and the names without peft's parts.

    Raises ValueError for a low-rank side without the other, or without the weight that it belongs to.
    """
    plain: dict[str, Tensor] = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.").replace(".default", "")
        layer, side, _ = next((short.partition(f".lora_{s}.") for s in "AB" if f".lora_{s}." in short), ("", "", ""))
        if side:
            sides.setdefault(layer, {})[side.strip(".")] = tensor
        elif ".original_module." not in short:  # what a module was before it was trained whole
            plain[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    for layer, pair in sides.items():
        weight = plain.get(f"{layer}.weight")
        if len(pair) < 2 or weight is None:
            lacks = f"{layer}.weight" if weight is None else f"the other side of {layer}.{next(iter(pair))}"
            raise ValueError(f"path: its LoRA lacks {cut(lacks, PATH)}; convert the checkpoint again")
        if any(part.ndim != 2 for part in (weight, *pair.values())):
            raise ValueError(
                f"path: its LoRA of {cut(layer, PATH)} is no pair of matrices; convert the checkpoint again"
            )
        down, up = pair["lora_A"].float(), pair["lora_B"].float()
        plain[f"{layer}.weight"] = (weight.float() + settings.scale(len(down)) * (up @ down)).to(weight.dtype)
    return plain


def _section(told: Any, key: str, file: Path) -> Mapping[str, Any]:
    part = told.get(key) if isinstance(told, Mapping) else None
    if not isinstance(part, Mapping):
        raise ValueError(f"path: {cut(str(file), PATH)!r} has no {key!r}; get it again")
    return part


def _number(part: Mapping[str, Any], key: str, file: Path) -> float:
    value = part.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"path: {cut(str(file), PATH)!r}: {key} is {cut(repr(value))}; nearest valid: a number")
    return float(value)
