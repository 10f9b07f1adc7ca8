"""Rewards that are a vision-language model with a small head: it reads a picture or a clip and a text that ends in
tokens of its own, and the head turns the hidden states at these tokens into numbers.

What is here suits networks of the Qwen2-VL kind: vision tokens of 2·2 patches of 14² pixels by two frames, a chat in
ChatML. The pixels are prepared here, because transformers does that with torchvision for clips, and by classes that
differ between its versions 4 and 5.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tempflow.devices import DTYPES
from tempflow.names import PATH, cut
from tempflow.rewards.scorer import Scorer
from tempflow.rewards.weights import TOKENIZER, folder_of, load_strict, load_tokenizer, unfilled

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's pixels, by which these networks' pixels are standardised too."""

CONTROL = re.compile(r"<\|[^<>|\s]*\|>")
"""What tokens that steer the network look like. In a prompt they would be read as such."""

PLACES = ("{prompt}", "{text_prompt}")
"""Where a template has the prompt."""

RENAMED = {
    "model.visual.": "visual.",
    "model.language_model.": "language_model.",
    "visual.": "visual.",
    "model.": "language_model.",
}
"""How names of tensors begin in checkpoints of transformers 5 and of older ones, and in the network without its
predictor of words. The first that fits counts."""

EMBEDDING = "language_model.embed_tokens.weight"
WORDS = "lm_head.weight"
"""The predictor of words, which no reward asks."""

HEAD = "rm_head."


# ---------------------------------------------------------------------------------------------------------- the text
@dataclass(frozen=True)
class Template:
    """A text around a prompt, with the tokens at which the head looks."""

    before: str
    after: str

    @staticmethod
    def of(text: str, tokens: Sequence[str], where: str) -> Template:
        """Raises ValueError, naming `where`, unless the text has one place for the prompt and each token once."""
        count = sum(text.count(place) for place in PLACES)
        if count != 1:
            raise ValueError(f"{where} has {count} places for the prompt; nearest valid: one {PLACES[0]}")
        seen = CONTROL.findall(text)
        if sorted(seen) != sorted(tokens):
            told = cut(", ".join(seen)) or "none"
            raise ValueError(f"{where} has the tokens {told}; nearest valid: {', '.join(tokens)}, each once")
        before, _, after = text.partition(next(place for place in PLACES if place in text))
        return Template(before, after)

    @staticmethod
    def read(path: str | None, ours: str, tokens: Sequence[str]) -> Template:
        """Of the file at `path`, UTF-8; our own for None. Raises ValueError."""
        if path is None:
            return Template.of(ours, tokens, "template")
        try:
            text = Path(path).expanduser().read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"template: {cut(path, PATH)!r} cannot be read ({error}); nearest valid: null") from error
        return Template.of(text, tokens, f"template: {cut(path, PATH)!r}")

    def filled(self, prompt: str) -> str:
        return f"{self.before}{prompt}{self.after}"


def check_plain(prompts: Sequence[str]) -> None:
    """Raises ValueError, naming it, for a prompt with what would be read as a token that steers the network."""
    for prompt in prompts:
        found = CONTROL.search(prompt)
        if found:
            raise ValueError(f"prompts: {cut(prompt)!r} has {cut(found[0])!r}, a control token; nearest valid: none")


def is_plain(prompt: str) -> bool:
    return CONTROL.search(prompt) is None


# -------------------------------------------------------------------------------------------------------- the pixels
def fitted(height: int, width: int, least: int, most: int, multiple: int = 28) -> tuple[int, int]:
    """Height and width to resize to: multiples of `multiple`, the shape nearly kept, and `least` to `most` pixels, as
    far as whole multiples allow. The rule that the networks were trained with."""
    sides = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    if sides[0] * sides[1] > most:
        by = math.sqrt(height * width / most)
        sides = [max(multiple, math.floor(side / by / multiple) * multiple) for side in (height, width)]
    elif sides[0] * sides[1] < least:
        by = math.sqrt(least / (height * width))
        sides = [math.ceil(side * by / multiple) * multiple for side in (height, width)]
    return sides[0], sides[1]


def patches(
    frames: Tensor, height: int, width: int, patch: int = 14, merge: int = 2, temporal: int = 2
) -> tuple[Tensor, tuple[int, int, int]]:
    """A clip (a picture is one frame), uint8 RGB [F, H, W, 3], as the network's patches, float32 [T·Y·X, 3·temporal·
    patch²], and their grid (T, Y, X).

    Resized to height × width by PIL, bicubic; standardised by CLIP's mean and deviation. The last frame is repeated
    until there are whole groups of `temporal`. Patches that are merged to a token follow each other.
    """
    sized = [np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) for f in frames.numpy()]
    sized += sized[-1:] * (-len(sized) % temporal)
    pixels = (torch.from_numpy(np.stack(sized)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    grid = (len(sized) // temporal, height // patch, width // patch)
    cells = pixels.view(grid[0], temporal, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    return cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1), grid


# ------------------------------------------------------------------------------------------------------- the network
@dataclass(frozen=True)
class Source:
    """Where network and tokenizer come from, and how the network is held.

    base, revision  folder or hub id of the released model: its configuration and tokenizer, no weights
    device, dtype   of the network; the head is float32
    """

    base: str
    revision: str | None
    device: str
    dtype: str


class Rater:
    """A network, its tokenizer and a head. Use `Rater.of`.

    network    takes ids and patches, gives hidden states: transformers' model without its predictor of words
    head       hidden states float32 [..., D] → numbers [..., K]
    tokenizer  knows `tokens`
    ids        of the tokens at which the head looks
    """

    def __init__(self, network: Any, head: nn.Module, tokenizer: Any, ids: Sequence[int], device: str) -> None:
        self.network, self.head, self.tokenizer = network.to(device).eval(), head.to(device).eval(), tokenizer
        self.ids, self.device = list(ids), device
        self._typed = "mm_token_type_ids" in inspect.signature(network.forward).parameters  # transformers 5 asks for it
        self._lock = Lock()

    @staticmethod
    def of(source: Source, tensors: Mapping[str, Tensor], head: nn.Module, tokens: Sequence[str], what: str) -> Rater:
        """From the tensors of a checkpoint, by their names there.

        what  names the checkpoint in messages

        Raises ValueError for missing and unexpected tensors, a base without configuration or tokenizer, and a
        vocabulary that has no row for the tokens.
        """
        from transformers import AutoConfig, AutoModel

        try:
            config = AutoConfig.from_pretrained(folder_of(source.base, source.revision, TOKENIZER))
            tokenizer = load_tokenizer(source.base, source.revision)
        except (OSError, ValueError, KeyError) as error:
            where = cut(source.base, PATH)
            raise ValueError(f"base: {where!r} has no configuration or tokenizer ({cut(str(error), PATH)})") from error
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(list(tokens))
        own, heads = split(tensors)
        rows = len(own[EMBEDDING]) if EMBEDDING in own else 0
        if rows <= max(ids):
            raise ValueError(f"{what}: its vocabulary has {rows} rows, and {tokens[-1]!r} is token {max(ids)} of base")
        config.get_text_config().vocab_size = rows  # trained with the tokens added, and rows without use taken away
        network = unfilled(lambda: AutoModel.from_config(config, dtype=DTYPES[source.dtype]))
        load_strict(network, own, what)
        load_strict(head, heads, what)
        return Rater(network, head, tokenizer, ids, source.device)

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Tensor], texts: Sequence[str], sides: tuple[int, int], video: bool) -> Tensor:
        """What the head says at each token, float32 [N, tokens, K] on the CPU.

        clips  uint8 [F, H, W, 3] each, which are resized to `sides`
        texts  filled templates, one for each
        """
        vision = self.network.config.vision_config
        parts = [
            patches(c, *sides, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) for c in clips
        ]
        per = vision.spatial_merge_size**2
        rows = [self._ids(text, math.prod(grid) // per, video) for text, (_, grid) in zip(texts, parts, strict=True)]
        at = torch.tensor([[row.index(token) for token in self.ids] for row in rows], device=self.device)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        pixels = torch.cat([pixels for pixels, _ in parts]).to(self.device)
        grids = torch.tensor([grid for _, grid in parts], device=self.device)
        kind = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        given: dict[str, Any] = dict(zip(kind, (pixels, grids), strict=True))
        if self._typed:
            given["mm_token_type_ids"] = ((ids == self._media(video)) * mask * (2 if video else 1)).int()
        with self._lock:  # the network keeps positions of its last call
            states = self.network(input_ids=ids, attention_mask=mask, use_cache=False, **given).last_hidden_state
        picked = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        return self.head(picked.float()).float().cpu()

    def _ids(self, text: str, count: int, video: bool) -> list[int]:
        """Of one turn of a chat: the picture or clip as `count` vision tokens, then the text."""
        config, media = self.network.config, self._media(video)
        start, token, end = self.tokenizer.convert_ids_to_tokens(
            [config.vision_start_token_id, media, config.vision_end_token_id]
        )
        chat = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{start}{token}{end}{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        place = ids.index(media)
        return ids[:place] + [media] * count + ids[place + 1 :]

    def _media(self, video: bool) -> int:
        return self.network.config.video_token_id if video else self.network.config.image_token_id

    @property
    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors by the network's names, and by the head's. The predictor of words is left out."""
    own: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(HEAD):
            heads[name.removeprefix(HEAD)] = tensor
        elif name != WORDS:
            old = next((start for start in RENAMED if name.startswith(start)), "")
            own[RENAMED.get(old, "") + name.removeprefix(old)] = tensor
    return own, heads


class RatedPictures(Scorer[Rater]):
    """A `Scorer` by a `Rater`."""

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt with a control token, such as `<|im_end|>`."""
        check_plain(prompts)
