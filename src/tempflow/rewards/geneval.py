"""GenEval as a reward: a detector finds objects, CLIP names their colours, and `geneval_rules` judges.

The benchmark's detector is MMDetection's Mask2Former (Swin-S, COCO instances). Here it is transformers' Mask2Former,
the weights of another training run, and pictures prepared as its folder says: scores are near, not equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tempflow.core.scores import Scores
from tempflow.devices import DTYPES, resolved_device
from tempflow.media import Media
from tempflow.names import PATH, cut
from tempflow.rewards.clip import OPENAI_L, check_kind, cropped, load_clip
from tempflow.rewards.geneval_rules import (
    CLASSES,
    COLOURS,
    OTHER_NAMES,
    RENAMED,
    Detection,
    Found,
    Limits,
    Task,
    check_possible,
    coloured,
    counted,
    official,
    task_of,
)
from tempflow.rewards.protocol import check_media
from tempflow.rewards.scorer import Batch, Dtype, require
from tempflow.rewards.weights import folder_of
from tempflow.strict import Place, shown

LICENCE = "unknown (Mask2Former's weights), MIT (CLIP ViT-L/14)"
NEEDS, RANGE = "tempflow[scorers]", "0 or 1"

DETECTOR = "facebook/mask2former-swin-small-coco-instance"

CANDIDATES = 100
"""Pairs of query and class that the detector proposes for a picture, the likeliest."""

TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = 0x99
"""What each channel is outside of an object's mask."""

STRIP = 16
"""A crop that is longer than so many times its breadth is cut to its middle: the colour classifier sees the middle
square alone, and would enlarge all of it."""

Seen = tuple[Detection, Tensor]
"""A detection, and its mask: bool [H, W]."""

Rule = Callable[[Task, Found], float]


class GenEval:
    """Whether a picture shows what its prompt's metadata ask for, right or wrong, as GenEval counts.

    The prompt's text plays no part. Its metadata are a line of GenEval's file: see `geneval_rules.task_of`.

    path                 a Mask2Former for the 80 COCO instances: a folder or hub id, as transformers saves it
    clip_path            the CLIP that names colours: the same
    revision, clip_revision  of a hub id
    device, dtype        where and in which type both networks compute
    batch                pictures, and crops, at once
    threshold, counting_threshold, most   which detections count (`geneval_rules.Limits`)

    Raises ImportError, naming the command to run, without transformers; ValueError as `Limits`, and for a device that
    is not here.
    """

    name: ClassVar[str] = "geneval"
    rule: ClassVar[Rule] = staticmethod(official)
    groupwise: ClassVar[bool] = False

    def __init__(
        self,
        *,
        path: Place = DETECTOR,
        revision: str | None = None,
        clip_path: Place = OPENAI_L,
        clip_revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "float32",
        batch: Batch = 8,
        threshold: Annotated[float, Field(ge=0, lt=1)] = 0.3,
        counting_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        most: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        require("scorers", "transformers", "accelerate")
        if batch < 1:
            raise ValueError(f"batch: {batch} is too small; nearest valid: 1")
        self.limits, self.batch = Limits(threshold, counting_threshold, most), batch
        at = resolved_device(device)
        self._detector_of, self._colours_of = (path, revision, at, dtype), (clip_path, clip_revision, at, dtype)
        self._loaded: tuple[Detector, Colours] | None = None
        self._loading = Lock()

    def prepare(self) -> None:
        """Loads both networks. Raises ValueError for a place where nothing is, other networks, other classes, weights
        that are not safetensors or do not fit."""
        self._networks()

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError, naming prompt and field, for one whose metadata are not GenEval's or can never be met."""
        for prompt, found in zip(prompts, metadata, strict=True):
            try:
                check_possible(task_of(found), self.limits.most)
            except ValueError as error:
                raise ValueError(f"prompts: {shown(prompt)}: {error}") from None

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; failed where a network gave NaN or infinity. Raises ValueError as `task_of`, and as `prepare`."""
        pictures = check_media(media, prompts, metadata).pictures()
        tasks = [task_of(found) for found in metadata]
        values: list[float | None] = []
        with torch.inference_mode(), torch.autocast(torch.device(self._detector_of[2]).type, enabled=False):
            for start in range(0, len(tasks), self.batch):
                values += self._judged(pictures[start : start + self.batch], tasks[start : start + self.batch])
        ok = torch.tensor([v is not None for v in values], dtype=torch.bool)[:, None]
        value = torch.tensor([v or 0.0 for v in values], dtype=torch.float32)[:, None]
        return Scores(value, ok, (self.name,))

    def _judged(self, pictures: Tensor, tasks: Sequence[Task]) -> list[float | None]:
        """None where it cannot be said."""
        detect, name_colours = self._networks()
        seen = detect(pictures, [self._wanted(task) for task in tasks])
        found = [
            counted(task, [d for d, _ in row], self.limits) if row is not None else {}
            for task, row in zip(tasks, seen, strict=True)
        ]
        masks = {id(one): mask for row in seen if row is not None for one, mask in row}
        asked = [(at, one) for at, task in enumerate(tasks) for one in coloured(task, found[at])]
        crops = [crop(pictures[at], masks[id(one)], one) for at, one in asked]
        named = name_colours(crops, [one.name for _, one in asked], self.batch)
        colours = {id(one): colour for (_, one), colour in zip(asked, named, strict=True)}
        blind = {at for (at, one) in asked if colours[id(one)] is None}

        def judged(at: int) -> float | None:
            if seen[at] is None or at in blind:
                return None
            known = {
                name: [replace(one, colour=colours.get(id(one))) for one in ones] for name, ones in found[at].items()
            }
            return type(self).rule(tasks[at], known)

        return [judged(at) for at in range(len(tasks))]

    def _wanted(self, task: Task) -> dict[str, float]:
        """The classes that the task speaks of, and what the confidence of one must be above."""
        return dict.fromkeys((item.name for item in (*task.include, *task.exclude)), self.limits.least(task))

    def _networks(self) -> tuple[Detector, Colours]:
        with self._loading:
            if self._loaded is None:
                self._loaded = (Detector(*self._detector_of), Colours(*self._colours_of))
            return self._loaded


geneval = GenEval


class Detector:
    """Mask2Former for COCO instances. Arguments and errors: `GenEval`."""

    def __init__(self, path: str, revision: str | None, device: str, dtype: str) -> None:
        from transformers import AutoImageProcessor

        folder = folder_of(path, revision)
        check_kind(path, folder, "mask2former")
        self._network = _network(folder).to(device, DTYPES[dtype])
        self._processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        self.classes = _classes(self._network.config.id2label, folder)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, wanted: Sequence[Mapping[str, float]]) -> list[list[Seen] | None]:
        """What is seen in pictures of one size, uint8 [N, H, W, 3]; None where the network gave NaN or infinity.

        wanted   of each picture: class → what the confidence must be above; others are left out

        An object's confidence is its class's probability times the mean of its mask's probabilities where the mask is,
        which is where they are above ½. Masks come at the picture's size; a box is the mask's extent, right and bottom
        the edges of its last pixels. Masks that cover no pixel are left out.
        """
        height, width = pictures.shape[1:3]
        try:
            prepared = self._processor(list(pictures.numpy()), input_data_format="channels_last", return_tensors="pt")
        except ValueError as error:  # resizing to its shorter and longer side leaves a thin picture no pixel
            raise ValueError(f"media is {height}×{width}, which the detector cannot take ({error})") from error
        out = self._network(pixel_values=prepared["pixel_values"].to(self._network.device, self._network.dtype))
        classes, masks = out.class_queries_logits.float(), out.masks_queries_logits.float()
        seen: list[list[Seen] | None] = []
        for row, least in enumerate(wanted):
            whole = bool(classes[row].isfinite().all()) and bool(masks[row].isfinite().all())
            seen.append(self._seen(classes[row], masks[row], least, (height, width)) if whole else None)
        return seen

    def _seen(self, classes: Tensor, masks: Tensor, wanted: Mapping[str, float], size: tuple[int, int]) -> list[Seen]:
        probability = classes.softmax(-1)[:, :-1]  # the last class is "no object"
        likeliest = probability.flatten().topk(min(CANDIDATES, probability.numel()))
        seen: list[Seen] = []
        for value, place in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            query, label = divmod(place, len(self.classes))
            name = self.classes[label]
            if name not in wanted or value <= wanted[name]:  # the confidence is at most the class's probability
                continue
            logits = F.interpolate(masks[query][None, None], size, mode="bilinear", align_corners=False)[0, 0]
            mask = logits > 0
            if not bool(mask.any()):
                continue
            rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            seen.append((Detection(name, value * float(logits[mask].sigmoid().mean()), box), mask.cpu()))
        return seen


class Colours:
    """CLIP that names the colour of what a crop shows, one of `COLOURS`. Arguments and errors: `GenEval`."""

    def __init__(self, path: str, revision: str | None, device: str, dtype: str) -> None:
        try:
            self.clip = load_clip(path, revision, (path, revision), device, dtype)
        except ValueError as error:
            raise ValueError(
                f"clip_{error}" if str(error).startswith(("path:", "revision:")) else str(error)
            ) from error
        self._texts: dict[str, Tensor] = {}

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str], batch: int = 8) -> list[str | None]:
        """The colour of each crop, uint8 [h, w, 3], which shows an object of that class; None where that is NaN."""
        found: list[str | None] = []
        for start in range(0, len(crops), batch):
            scores = self.similarities(crops[start : start + batch], names[start : start + batch])
            best = scores.argmax(1).tolist()
            found += [COLOURS[n] if ok else None for n, ok in zip(best, scores.isfinite().all(1).tolist(), strict=True)]
        return found

    @torch.inference_mode()
    def similarities(self, crops: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Cosines of each crop and each of `COLOURS`, float64 [N, 10]: of a colour stands the normalised mean of the
        templates' normalised features."""
        pixels = torch.cat([cropped(one[None], self.clip.side, half=round) for one in crops])
        texts = torch.stack([self._text(name) for name in names])
        return (self.clip.pictures(pixels)[:, None] * texts).sum(-1)

    def _text(self, name: str) -> Tensor:
        """float64 [10, d]: a unit vector for each colour."""
        if name not in self._texts:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            features = self.clip.prompts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._texts[name] = F.normalize(features.mean(1), dim=-1)
        return self._texts[name]


def crop(picture: Tensor, mask: Tensor, detection: Detection) -> Tensor:
    """The part of a picture, uint8 [H, W, 3], in the detection's box, what is outside of its mask painted #999."""
    left, top, right, bottom = (int(side) for side in detection.box)
    painted = torch.where(mask[..., None], picture, BACKGROUND)[top:bottom, left:right]
    for axis in (0, 1):
        length, most = painted.shape[axis], STRIP * painted.shape[1 - axis]
        if length > most:
            painted = painted.narrow(axis, (length - most) // 2, most)
    return painted


# ---------------------------------------------------------------------------------------------------------- loading
def _network(folder: Path) -> Any:
    """Mask2Former in float32, with weights that all fit.

    transformers loads it: it knows the names that weights had in its older versions. It does not ask the parts of parts
    which names they no longer read, or did not have then, though these say so.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    made: Any = Mask2FormerForUniversalSegmentation
    try:
        with _quiet():
            network, told = made.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"path: {str(folder)!r} cannot be loaded: {cut(str(error), PATH)}") from error
    for what, kind in (("lacks", "missing"), ("has unexpected", "unexpected")):
        excused = {
            p for part in network.modules() for p in getattr(part, f"_keys_to_ignore_on_load_{kind}", None) or ()
        }
        names = [name for name in told[f"{kind}_keys"] if not any(re.search(p, name) for p in excused)]
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"path: {str(folder)!r} does not fit {type(network).__name__}: it {what} {listed}")
    return network.requires_grad_(False).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar, and its report on names, which is checked here."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _classes(labels: Mapping[Any, str], folder: Path) -> tuple[str, ...]:
    """GenEval's name of each of the detector's classes, by number. Raises ValueError unless they are COCO's 80."""
    plain = [str(labels[number]).strip().lower() for number in sorted(labels)]
    coco = [OTHER_NAMES.get(name, name) for name in plain]
    found = tuple(RENAMED.get(name, name) for name in coco)
    lost, more = [n for n in CLASSES if n not in found], [n for n in found if n not in CLASSES]
    if lost or more or len(found) != len(CLASSES):
        told = f"lacks {lost[0]!r}" if lost else f"has {more[0]!r}" if more else f"are {len(found)}"
        raise ValueError(
            f"path: {str(folder)!r} is no detector of COCO's 80 classes: it {told}; nearest valid: {DETECTOR!r}"
        )
    return found
